import random

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from accord.data.images import load_image
from accord.models import prefix
from accord.models.attention import NAME, can_share, skip_hidden, skips_hidden
from accord.models.inputs import build_batch, model_inputs, shared_inputs
from accord.models.load import load_model
from accord.models.prefix import pack, prefix_positions
from accord.types import vqa_prompt

PROMPTS = [vqa_prompt("is it red?"), vqa_prompt("what colour is it?"), vqa_prompt("how many squares?")]
ANSWERS = [["red", "not quite red"], ["blue"], ["one", "two", "three or more"]]


@pytest.fixture(params=[False, True], ids=["dense", "skips"])
def skips(request, monkeypatch):
    """Whether packed rows are taken apart, which their size would decide."""
    monkeypatch.setattr(prefix, "_worth_skipping", lambda *_: request.param)
    return request.param


def test_the_states_are_those_of_full_rows(vlm, square, skips):
    """Six rows over three prompts of different length: every token's state, in every family."""
    model, processor = vlm
    skip_hidden(model)
    images = [load_image(square(colour)) for colour in ("red", "blue", "green")]
    batch = build_batch(processor, PROMPTS, images, ANSWERS)
    inner = model.eval().base_model
    with torch.no_grad():
        inputs, where = shared_inputs(inner, batch)
        shared = inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[where]
        full = inner(**model_inputs(inner, batch), use_cache=False).last_hidden_state
    real = batch.attention_mask.bool()
    assert len(inputs["input_ids"]) == 3 and shared.shape == full.shape
    assert (inputs["attention_mask"].dtype == torch.long) is skips
    torch.testing.assert_close(shared[real], full[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_of_several_axes(several_axes, image_of, attention, skips):
    """Positions by time, height and width, against one row at a time."""
    draw = random.Random(0)
    model, images, prefixes, types = several_axes(attention)
    skip_hidden(model)
    completions = [[[draw.randrange(20, 400) for _ in range(1 + n)] for n in range(4)] for _ in prefixes]
    positions = prefix_positions(model, prefixes, types, images)
    packed = pack(model, prefixes, completions, positions, pad=0)
    assert (packed.attention_mask.dtype == torch.long) is (skips and attention == "sdpa")
    assert packed.position_ids.shape == (3, 3, packed.input_ids.shape[1])
    with torch.no_grad():
        states = model.base_model(**packed.model_inputs(), **images, use_cache=False).last_hidden_state
        for p, before in enumerate(prefixes):
            for n, completion in enumerate(completions[p]):
                ids = torch.tensor([before + completion])
                alone = model.base_model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    mm_token_type_ids=torch.tensor([types[p] + [0] * len(completion)]),
                    **image_of(images, p),
                    use_cache=False,
                ).last_hidden_state[0]
                start = packed.starts[p][n]
                mine = states[p, start : start + len(completion)]
                torch.testing.assert_close(mine, alone[len(before) :], atol=1e-5, rtol=1e-5)


def test_a_sliding_window_cannot_be_shared():
    """Its mask depends on the distance in the row, which packing changes."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for window, able in ((None, True), (16, False)):
        config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=window, **shape)
        assert can_share(MistralForCausalLM(config)) is able


@pytest.mark.parametrize(
    ("before", "lengths", "worth"),
    [
        (28, [3] * 8, False),
        (300, [4] * 8, False),
        (300, [32] * 8, True),
        (80, [128] * 4, True),
        (1000, [4] * 16, False),
    ],
)
def test_when_skipping_is_worth_it(before, lengths, worth):
    """As measured: where completions are short, copying the prefix's keys for each costs more than a dense mask."""
    assert prefix._worth_skipping([[5] * before], [[[5] * own for own in lengths]]) is worth


def test_groups_of_different_size_skip_alike(skips):
    """Five completions of 1 to 9 tokens beside a single one; gradients, too, and heads that share keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    skip_hidden(model)
    prefixes = [torch.randint(99, (n,)).tolist() for n in (3, 11)]
    completions = [[torch.randint(99, (n,)).tolist() for n in lengths] for lengths in ((1, 9, 2, 4, 4), (3,))]
    packed = pack(model, prefixes, completions, pad=0)
    states = model.model(**packed.model_inputs(), use_cache=False).last_hidden_state
    shared = [
        states[p, start : start + len(own)]
        for p, starts in enumerate(packed.starts)
        for start, own in zip(starts, completions[p], strict=True)
    ]
    full = [
        model.model(input_ids=torch.tensor([before + own]), use_cache=False).last_hidden_state[0, len(before) :]
        for before, those in zip(prefixes, completions, strict=True)
        for own in those
    ]
    torch.testing.assert_close(torch.cat(shared), torch.cat(full), atol=1e-5, rtol=1e-5)
    weights = torch.randn(32)
    gradients = []
    for rows in (shared, full):
        model.zero_grad()
        (torch.cat(rows) @ weights).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.model.parameters()]))
    assert gradients[0].norm() > 1
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_the_way_to_attend_is_not_saved(llava, tmp_path):
    """A checkpoint that was trained here is a stock one, and generates what it did before."""
    model, processor = load_model(llava)
    ids = torch.tensor([processor.tokenizer("is it red?")["input_ids"]] * 2)
    said = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    skip_hidden(model)
    assert skips_hidden(model) and can_share(model)
    assert model.generate(input_ids=ids, max_new_tokens=5, do_sample=False).equal(said)
    model.save_pretrained(tmp_path / "again")
    assert NAME not in (tmp_path / "again" / "config.json").read_text()
    assert not skips_hidden(type(model).from_pretrained(tmp_path / "again"))

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from accord.data.images import load_image
from accord.models.attention import skip_hidden
from accord.models.inputs import prompt_text
from accord.models.rollout import sample_completions
from accord.types import vqa_prompt


@pytest.fixture
def asked(vlm, ask):
    """Three prompts of different length, as the processor and as token lists, with their images."""
    model, processor = vlm
    questions = [ask(0), ask(1, "blue", text="is it red?"), ask(2, "green", text="is it red? or some other colour?")]
    encoded = processor(
        images=[[load_image(q.image)] for q in questions],
        text=[prompt_text(processor, vqa_prompt(q.text)) for q in questions],
        return_tensors="pt",
        padding=True,
    )
    rows = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
    images = {name: value for name, value in encoded.items() if name not in ("input_ids", "attention_mask")}
    return model.eval(), encoded, [ids[mask].tolist() for ids, mask in rows], images


def settings(**changes):
    plain = {"max_new_tokens": 4, "eos_token_id": 2, "pad_token_id": 0, "do_sample": True, "top_k": 0}
    return GenerationConfig(**(plain | changes))


def noise(rows, seed=0):
    return torch.rand(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_without_chance_it_says_what_generate_says(asked):
    """Of each prompt three rows: all the greedy continuation, from one prefill and one row a step."""
    model, encoded, prompts, images = asked
    said = sample_completions(model, prompts, images, [0, 0, 0, 1, 1, 1, 2, 2, 2], settings(top_k=1), noise(9))
    expected = model.generate(**encoded, max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    for row, ids in enumerate(said):
        assert ids == expected[row // 3, -4:][: len(ids)].tolist()


def test_the_shares_are_those_of_the_model(asked):
    """4,000 first tokens of one prompt against their probabilities: the commonest within four deviations."""
    model, _, prompts, images = asked
    with torch.no_grad():
        first = {name: value[:1] for name, value in images.items()}
        logits = model(input_ids=torch.tensor(prompts[:1]), **first).logits[0, -1]
    chances = (logits / 0.2).softmax(dim=-1)
    said = sample_completions(model, prompts, images, [0] * 4000, settings(temperature=0.2), noise(4000))
    counts = Counter(ids[0] for ids in said)
    for token in chances.topk(5).indices.tolist():
        p = chances[token].item()
        assert abs(counts[token] - 4000 * p) < 4 * (4000 * p * (1 - p)) ** 0.5 + 1


def test_a_row_says_the_same_whatever_is_computed_with_it(asked):
    model, _, prompts, images = asked
    together = sample_completions(model, prompts, images, [0, 1, 1, 2], settings(), noise(4))
    alone = sample_completions(
        model, prompts[1:2], {name: value[1:2] for name, value in images.items()}, [0], settings(), noise(4)[2:3]
    )
    assert together[2] == alone[0]


def test_suppressed_and_improbable_tokens_are_never_drawn(asked):
    model, _, prompts, images = asked
    barred = list(range(5, 250))
    said = sample_completions(model, prompts, images, [0, 1, 2] * 50, settings(suppress_tokens=barred), noise(150))
    assert not {token for ids in said for token in ids} & set(barred)
    extreme = torch.tensor([[0.0] * 4, [1.0 - 1e-17] * 4], dtype=torch.float64)
    said = sample_completions(model, prompts, images, [0, 1], settings(suppress_tokens=barred), extreme)
    assert not {token for ids in said for token in ids} & set(barred)


def test_a_row_stops_at_its_end_token(asked):
    model, _, prompts, images = asked
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias.data[2] = 3.0
    said = sample_completions(model, prompts, images, [0, 1, 2] * 30, settings(), noise(90))
    assert {len(ids) for ids in said} == {1, 2, 3, 4}
    assert all(2 not in ids[:-1] for ids in said)
    assert all(ids[-1] == 2 for ids in said if len(ids) < 4)


def test_states_of_a_prompt_stand_side_by_side(asked):
    """12 rows of two prompts: what a row says is what it says alone, however many states stand beside its own."""
    model, _, prompts, images = asked
    skip_hidden(model)
    rows = [0] * 7 + [2] * 5
    together = sample_completions(model, prompts, images, rows, settings(), noise(12))
    assert len({tuple(ids) for ids in together}) > 6
    for row, p in enumerate(rows):
        given = {name: value[p : p + 1] for name, value in images.items()}
        assert sample_completions(model, prompts[p : p + 1], given, [0], settings(), noise(12)[row : row + 1]) == [
            together[row]
        ]


def test_positions_go_on_along_every_axis(several_axes, image_of):
    """Qwen2.5-VL, prompts of three lengths and image grids: without chance, what a row without a cache would say."""
    model, images, prompts, types = several_axes()
    skip_hidden(model)
    said = sample_completions(model, prompts, images, [0, 1, 2, 2], settings(top_k=1), noise(4), types)
    for row, p in enumerate([0, 1, 2, 2]):
        ids, kinds = list(prompts[p]), list(types[p])
        for token in said[row]:
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([ids]),
                    mm_token_type_ids=torch.tensor([kinds]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    **image_of(images, p),
                ).logits[0, -1]
            assert token == logits.argmax().item()
            ids, kinds = [*ids, token], [*kinds, 0]


def test_prompts_end_at_different_steps(asked):
    """The chance 0 draws the first token that is not suppressed, here the end: prompt 0 ends at once, prompt 1 next."""
    model, _, prompts, images = asked
    skip_hidden(model)
    for name, weight in model.named_parameters():
        if "language_model" in name or "text_model" in name:
            weight.data *= 6.0 if weight.ndim > 1 else 1.0  # attention is made to matter, and with it every position
    rows, chances, told = [0, 1, 1, 2, 2, 2], noise(6, seed=3), settings(suppress_tokens=[0, 1])
    chances[0, 0] = chances[1, 1] = chances[2, 1] = 0.0
    together = sample_completions(model, prompts, images, rows, told, chances)
    assert [len(ids) for ids in together] == [1, 2, 2, 4, 4, 4]
    for row, p in enumerate(rows):
        given = {name: value[p : p + 1] for name, value in images.items()}
        alone = sample_completions(model, prompts[p : p + 1], given, [0], told, chances[row : row + 1])
        assert alone == [together[row]]


def test_states_side_by_side_along_every_axis(several_axes, image_of):
    """Qwen2.5-VL, whose heads share keys: sampled rows of three prompts against each row alone."""
    model, images, prompts, types = several_axes()
    skip_hidden(model)
    for name, weight in model.named_parameters():
        if "language_model" in name and weight.ndim > 1:
            weight.data *= 8.0
    rows = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    together = sample_completions(model, prompts, images, rows, settings(), noise(9), types)
    assert len({tuple(ids) for ids in together}) > 6
    for row, p in enumerate(rows):
        given, kinds = image_of(images, p), types[p : p + 1]
        alone = sample_completions(model, prompts[p : p + 1], given, [0], settings(), noise(9)[row : row + 1], kinds)
        assert alone == [together[row]]

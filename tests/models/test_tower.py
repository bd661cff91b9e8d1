"""A frozen vision tower stays as it is, whatever trains around it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from accord.models.features import FeatureCache
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
            del tower.train, tower.forward
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
    assert vision_tower(other).train() is vision_tower(other)
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


@pytest.fixture
def pinned(efficientnet):
    """Return a function that loads the model with a cache of so many bytes, and counts its forward passes."""

    def load(memory=10**9):
        model, _ = load_model(efficientnet)
        cache, batches = FeatureCache(memory), []
        pin(model, cache)
        first = next(module for module in vision_tower(model).modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(lambda _, given, __: batches.append(len(given[0])))
        return model, cache, batches

    return load


def pictures(*seeds, size=64):
    drawn = [torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn)


def test_an_image_is_computed_once_whatever_comes_with_it(pinned):
    """Three images in five places: three passes of one image each, and the same bits in every order and company."""
    model, cache, batches = pinned()
    first = model.get_image_features(pictures(0, 1, 0)).pooler_output
    again = model.get_image_features(pictures(2, 1)).pooler_output
    assert batches == [1, 1, 1]
    assert (len(cache), cache.hits) == (3, 1)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], again[1])
    alone, _, _ = pinned(memory=0)
    assert torch.equal(alone.get_image_features(pictures(1, 0, 1)).pooler_output, first[[1, 0, 1]])


def test_features_are_those_of_the_tower_itself(pinned, efficientnet):
    """The plain model on a batch of two: equal but for rounding, since the batch is another."""
    model, _, _ = pinned()
    plain, _ = load_model(efficientnet)
    tower = vision_tower(plain)
    del tower.train, tower.forward
    expected = plain.get_image_features(pictures(0, 1))
    for _ in range(2):  # computed, and looked up
        found = model.get_image_features(pictures(0, 1))
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
        assert not found.last_hidden_state.requires_grad
        assert found.pooler_output.requires_grad  # the projector learns


def test_the_least_recently_used_go_first(pinned):
    """Room for two of three images: 0, 1, 0 and 2 leave 0 and 2."""
    model, cache, batches = pinned()
    model.get_image_features(pictures(0))
    each = cache.nbytes
    model, cache, batches = pinned(memory=2 * each)
    for seed in (0, 1, 0, 2):
        model.get_image_features(pictures(seed))
    assert len(batches) == 3
    assert cache.nbytes == 2 * each
    model.get_image_features(pictures(0, 2))
    assert len(batches) == 3
    model.get_image_features(pictures(1))
    assert len(batches) == 4


def test_towers_of_equal_weights_share_and_others_do_not(efficientnet):
    """A second load and a deep copy hit; another weight, statistic or precision misses, and changes are seen."""
    cache = FeatureCache(10**9)

    def load():
        model, _ = load_model(efficientnet)
        pin(model, cache)
        return model, vision_tower(model)

    def misses(model):
        before = cache.misses
        model.get_image_features(pictures(0).to(model.dtype))
        return cache.misses - before

    model, tower = load()
    assert misses(model) == 1
    assert misses(load()[0]) == 0
    assert misses(copy.deepcopy(model)) == 0
    assert misses(model.half()) == 1
    changed, tower = load()
    with torch.no_grad():
        tower.get_buffer("embeddings.batchnorm.running_mean").add_(1e-3)
    assert misses(changed) == 1
    tower.load_state_dict(load()[1].state_dict())
    assert misses(changed) == 0


def test_a_trainable_tower_is_computed_as_it_comes(pinned):
    """An adapter inside the tower has made it another function of its input: gradients flow, nothing is kept."""
    model, cache, batches = pinned()
    vision_tower(model).requires_grad_(True)
    model.get_image_features(pictures(0, 0)).pooler_output.sum().backward()
    assert batches == [2]
    assert len(cache) == 0
    assert vision_tower(model).get_parameter("embeddings.convolution.weight").grad is not None


def test_a_frozen_adapter_in_the_tower_is_read_on_and_off(llava):
    """Its weights are there either way: no key would tell features with it from those without."""
    model, _ = load_model(llava)
    cache = FeatureCache(10**9)
    pin(model, cache)
    plain = model.get_image_features(pictures(0, size=32)).pooler_output[0]
    assert len(cache) == 1
    adapted = add_lora(model, LoraSettings(rank=2, target_modules=r".*\.q_proj"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    adapted.requires_grad_(False)
    there = model.get_image_features(pictures(0, size=32)).pooler_output[0]
    with adapted.disable_adapter():
        off = model.get_image_features(pictures(0, size=32)).pooler_output[0]
    assert not torch.allclose(there, plain)
    torch.testing.assert_close(off, plain)
    assert len(cache) == 1


def test_only_the_layer_that_llava_reads_is_kept(llava):
    """One hidden state of two, and what CLIP returns besides; the features are those of the plain tower."""
    model, _ = load_model(llava)
    expected = model.get_image_features(pictures(0, 1, size=32)).pooler_output
    cache = FeatureCache(10**9)
    pin(model, cache)
    for _ in range(2):
        found = model.get_image_features(pictures(0, 1, size=32)).pooler_output
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    (kept, _) = cache._entries.values()
    assert set(kept) == {"last_hidden_state", "pooler_output", "hidden_states.1.2"}


def test_idefics3_masks_and_padding(checkpoints):
    """Two prompts, one with a second image, one with padding in its place; masks of two shapes: three real images."""
    model, _ = load_model(checkpoints["idefics3"])
    pixels = torch.stack([pictures(0, 1, size=32), pictures(2, 3, size=32)])
    pixels[1, 1] = 0
    mask = torch.ones(2, 2, 32, 32, dtype=torch.bool)
    mask[1, 0, 16:] = False
    given = {"pixel_values": pixels, "pixel_attention_mask": mask}
    expected = model.get_image_features(**given).pooler_output
    cache = FeatureCache(10**9)
    pin(model, cache)
    for _ in range(2):
        found = model.get_image_features(**given).pooler_output
        assert [len(each) for each in found] == [8, 4]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert (len(cache), cache.hits) == (3, 3)
    mask[1, 0, 16:] = True
    model.get_image_features(**given)
    assert len(cache) == 4


def test_qwen_grids(several_axes):
    """Images of three grids in one row of patches: split by their grids, put together again, merged patches and all."""
    model, images, _, _ = several_axes()
    expected = model.get_image_features(**images)
    cache = FeatureCache(10**9)
    pin(model, cache)
    grids = images["image_grid_thw"]
    for _ in range(2):
        found = model.get_image_features(**images)
        for one, other in zip(found.pooler_output, expected.pooler_output, strict=True):
            torch.testing.assert_close(one, other)
    assert len(cache) == len(grids)
    last = int(grids[-1].prod())
    alone = model.get_image_features(pixel_values=images["pixel_values"][-last:], image_grid_thw=grids[-1:])
    assert torch.equal(alone.pooler_output[0], found.pooler_output[-1])
    assert len(cache) == len(grids)


def test_random_numbers_are_left_alone(pinned):
    model, _, _ = pinned()
    before = torch.get_rng_state()
    model.train().get_image_features(pictures(0, 1))
    assert torch.equal(before, torch.get_rng_state())

"""A picture is processed once, and nothing that a processor returns or saves changes."""

import pytest
import torch
from PIL import Image

from accord.models.features import FeatureCache
from accord.models.load import load_model
from accord.models.pixels import process_once

PICTURES = [[Image.new("RGB", (40, 40), colour)] for colour in ("red", "blue", "red")]
HOW = {"return_tensors": "pt"}


@pytest.fixture
def stock(vlm):
    """The class of each family's image processor, and an image processor with a memory of its own."""
    processor = vlm[1].image_processor
    kind = type(processor).__mro__[1]
    processor.__class__ = kind
    return kind, processor


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]


def test_what_is_looked_up_is_what_the_processor_makes(stock):
    """Three pictures, two of them equal: two are processed, in whatever batch they come."""
    kind, processor = stock
    cache = FeatureCache(10**8)
    more = {"return_row_col_info": True} if kind.__name__.startswith("Idefics3") else {}
    expected = processor(PICTURES, **HOW, **more)
    process_once(processor, cache)
    for _ in range(2):
        same(processor(PICTURES, **HOW, **more), expected)
    assert (len(cache), cache.misses) == (2, 2)
    same(processor(PICTURES[:1], **HOW, **more), kind(**_settings(processor))(PICTURES[:1], **HOW, **more))
    assert len(cache) == 2


def test_other_settings_are_other_entries(stock):
    _, processor = stock
    cache = FeatureCache(10**8)
    process_once(processor, cache)
    before = processor(PICTURES, **HOW)["pixel_values"]
    processor.image_mean = [0.0, 0.0, 0.0]
    after = processor(PICTURES, **HOW)["pixel_values"]
    assert not torch.equal(before, after)
    assert len(cache) == 4
    assert processor(PICTURES, do_normalize=False, **HOW)["pixel_values"].max() <= 1
    assert len(cache) == 6


def test_padding_to_the_largest_goes_as_it_comes(stock):
    """Idefics3 pads a batch to its largest picture; the other two bring every picture to one size."""
    _, processor = stock
    pictures = [[Image.new("RGB", size, "red")] for size in ((40, 40), (40, 20), (20, 40))]
    expected = processor(pictures, **HOW)
    process_once(processor, FeatureCache(10**8))
    for _ in range(2):
        same(processor(pictures, **HOW), expected)


def test_what_is_saved_is_what_was_loaded(vlm, family, checkpoints, tmp_path):
    model, processor = vlm
    kind = type(processor.image_processor)
    assert kind is not kind.__mro__[1]
    assert kind.__name__ == kind.__mro__[1].__name__
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))[1].image_processor
    assert again.to_dict() == processor.image_processor.to_dict()
    assert (tmp_path / "processor_config.json").read_text() == _text(checkpoints[family])


def _text(folder):
    with open(f"{folder}/processor_config.json") as file:
        return file.read()


def _settings(processor):
    return {name: value for name, value in processor.to_dict().items() if name != "image_processor_type"}

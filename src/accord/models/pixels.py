"""What image processors have made of pictures, so that a picture is resized and normalised once.

Where a frozen tower's features are kept (`accord.models.tower`), this is what a step over the same pictures would spend
most of its time on. The processor stays of its own class, by name and in what it saves.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, cast

import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from accord.data.images import picture_key
from accord.models.features import PIXELS, FeatureCache, Features

_limit = 0


def limit_pixels(most: int) -> None:
    """Make every larger picture smaller, to `most` pixels, before any processor of this process sees it; 0 for none."""
    global _limit  # of the process, as its caches are
    _limit = most


def limited(picture: Image) -> Image:
    """Return `picture`, or where it has more pixels than `limit_pixels` said a smaller one in its proportions."""
    width, height = picture.size
    if not _limit or width * height <= _limit:
        return picture
    scale = math.sqrt(_limit / (width * height))
    return picture.resize((max(1, int(width * scale)), max(1, int(height * scale))), Resampling.BICUBIC)


LIST = "list:"
"""Marks a field that is a list of numbers, and kept as a tensor."""


def process_once(processor: BaseImageProcessor, cache: FeatureCache = PIXELS) -> None:
    """Let `processor` look pictures up in `cache`.

    Every picture is processed by itself, looked up or not. Where pictures of different sizes are padded to one, which
    depends on the batch, the batch is processed as it comes.
    """
    kind = type(processor)

    class Once(kind):  # type: ignore[misc, valid-type]
        """`kind` with a memory."""

        pads = False

        def preprocess(self, images: Any, *given: Any, **named: Any) -> BatchFeature:
            images = _all_limited(images) if _limit else images
            pictures = _pictures(images)
            if pictures is None or given or named.get("return_tensors") != "pt":
                return cast(BatchFeature, super().preprocess(images, *given, **named))
            if type(self).pads and len({picture.size for picture in pictures}) > 1:
                return cast(BatchFeature, super().preprocess(images, **named))
            settings = json.dumps([self.to_dict(), named], sort_keys=True, default=repr).encode()
            keys = [_key(settings, picture) for picture in pictures]
            found: dict[str, Features] = {}
            for key, image in zip(keys, images, strict=True):
                known = found.get(key) or cache.get(key)
                if known is None:
                    known = _fields(super().preprocess([image], **named))
                    cache.put(key, known)
                found[key] = known
            parts = [found[key] for key in keys]
            if any(_shapes(part) != _shapes(parts[0]) for part in parts):
                type(self).pads = True
                return cast(BatchFeature, super().preprocess(images, **named))
            whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            data = {name.removeprefix(LIST): t.tolist() if LIST in name else t for name, t in whole.items()}
            return BatchFeature(data, skip_tensor_conversion=[n for n in data if LIST + n in whole])

    Once.__name__, Once.__qualname__, Once.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    processor.__class__ = Once


def _pictures(images: Any) -> list[Image] | None:
    """Return the pictures of a batch, one for each prompt or one in the list of each; None of any other batch."""
    if not isinstance(images, list):
        return None
    single = [each[0] if isinstance(each, list) and len(each) == 1 else each for each in images]
    return single if all(isinstance(each, Image) for each in single) else None


def _all_limited(images: Any) -> Any:
    if isinstance(images, list | tuple):
        return [_all_limited(each) for each in images]
    return limited(images) if isinstance(images, Image) else images


def _key(settings: bytes, picture: Image) -> str:
    mode, size, pixels, *rest = picture_key(picture)
    digest = hashlib.sha256(settings + repr((mode, size, rest)).encode())
    digest.update(pixels)  # type: ignore[arg-type]
    return digest.hexdigest()


def _fields(output: BatchFeature) -> dict[str, Tensor]:
    return {
        name if isinstance(value, Tensor) else LIST + name: torch.as_tensor(value) for name, value in output.items()
    }


def _shapes(features: Features) -> dict[str, torch.Size]:
    return {name: tensor.shape[1:] for name, tensor in features.items()}

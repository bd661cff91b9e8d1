"""Open the images of a request batch by batch, and let one bad question cost no other.

A batch is a run of questions that a model takes at once: so many rows, pixels, and characters when padded. Its images
are decoded just before and dropped after: a request may hold compressed images of many gigabytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from PIL.Image import Image

from accord.data.images import load_image
from accord.errors import ImageError
from accord.federation.limits import characters
from accord.federation.messages import AnswerItem, Declined, ScoreItem

Item = TypeVar("Item", ScoreItem, AnswerItem, ScoreItem | AnswerItem)
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

PIXELS_AT_ONCE: Final = 50_000_000
"""Of a batch's images: Pillow takes four bytes for each. Photographs of the usual size never reach it."""

CHARACTERS_AT_ONCE: Final = 2**21
"""Of a batch's rows when all are as long as the longest: 4,096 in each of 512."""


@dataclass(frozen=True)
class Opening:
    """How a site opens images: by default those of its own user, in its own process."""

    decode: Callable[[bytes], Image] = load_image
    pixels: int | None = None  # of a request, each time an image is decoded; None for any number


def in_batches(
    compute: Callable[[Sequence[Item], Sequence[list[Image]]], Sequence[Result]],
    items: Sequence[Item],
    images: Mapping[str, bytes],
    *,
    opening: Opening,
    sizes: Sequence[int],
    rows: int,
) -> list[Result | Declined]:
    """Return what `compute` makes of each question and its images, or why there is nothing.

    A question about several images of more than `PIXELS_AT_ONCE` together is over the limit.

    Args:
        compute: takes a batch of questions with their images; what it raises for one of them costs that one alone.
        items: the questions.
        images: theirs, by name.
        opening: how they are opened.
        sizes: rows of each question.
        rows: of a batch; a question of more is a batch by itself.
    """
    results: list[Result | Declined] = [Declined.ERROR] * len(items)
    opener, batch = _Opener(opening, images), _Batch()

    def finish() -> None:
        computed = _computed(compute, [items[n] for n in batch.places], batch.pictures)
        for n, result in zip(batch.places, computed, strict=True):
            results[n] = result

    for n, item in enumerate(items):
        opened = _opened(item.images, batch.opened, opener)
        if isinstance(opened, Declined):
            results[n] = opened
            continue
        if batch.full(item, opened, sizes[n], rows):
            finish()
            batch = _Batch()
        batch.add(n, item, opened, sizes[n])
    if batch.places:
        finish()
    return results


def _opened(
    names: Sequence[str], already: Mapping[str, Image], opener: Callable[[str], Image | Declined]
) -> dict[str, Image] | Declined:
    """Return a question's images by name, or why one cannot be opened."""
    found: dict[str, Image] = {}
    for name in dict.fromkeys(names):
        image = already.get(name) or opener(name)
        if isinstance(image, Declined):
            return image
        found[name] = image
        if len(found) > 1 and sum(map(_pixels, found.values())) > PIXELS_AT_ONCE:
            return Declined.LIMIT
    return found


def _pixels(image: Image) -> int:
    return image.width * image.height


class _Opener:
    """Decode the images of one request, a bad one once: it may take seconds."""

    def __init__(self, opening: Opening, images: Mapping[str, bytes]) -> None:
        self.opening, self.images = opening, images
        self.bad: dict[str, Declined] = {}
        self.decoded = 0

    def __call__(self, name: str) -> Image | Declined:
        if name in self.bad:
            return self.bad[name]
        if self.opening.pixels is not None and self.decoded > self.opening.pixels:
            return Declined.LIMIT
        try:
            image = self.opening.decode(self.images[name])
        except ImageError as error:
            logger.warning("an image was refused: %s", error)
            self.bad[name] = Declined.IMAGE
            return Declined.IMAGE
        self.decoded += _pixels(image)
        return image


class _Batch:
    def __init__(self) -> None:
        self.places: list[int] = []
        self.pictures: list[list[Image]] = []
        self.opened: dict[str, Image] = {}
        self.rows = self.pixels = self.longest = 0

    def full(self, item: ScoreItem | AnswerItem, images: Mapping[str, Image], size: int, rows: int) -> bool:
        """Tell whether a question must wait for the next batch."""
        new = sum(_pixels(image) for name, image in images.items() if name not in self.opened)
        return bool(self.places) and (
            self.rows + size > rows
            or self.pixels + new > PIXELS_AT_ONCE
            or (self.rows + size) * max(self.longest, characters(item)) > CHARACTERS_AT_ONCE
        )

    def add(self, place: int, item: ScoreItem | AnswerItem, images: Mapping[str, Image], size: int) -> None:
        self.places.append(place)
        self.pictures.append([images[name] for name in item.images])
        self.rows += size
        self.longest = max(self.longest, characters(item))
        self.pixels += sum(_pixels(image) for name, image in images.items() if name not in self.opened)
        self.opened.update(images)


def _computed(
    compute: Callable[[Sequence[Item], Sequence[list[Image]]], Sequence[Result]],
    items: Sequence[Item],
    pictures: Sequence[list[Image]],
) -> Sequence[Result | Declined]:
    try:
        return compute(items, pictures)
    except Exception:
        logger.exception("the model failed on %d questions", len(items))
    if len(items) == 1:
        return [Declined.ERROR]
    each: list[Result | Declined] = []
    for item, picture in zip(items, pictures, strict=True):
        try:
            each += compute([item], [picture])
        except Exception as error:
            logger.warning("the model failed on one of them: %s", type(error).__name__)
            each.append(Declined.ERROR)
    return each

"""Read images from files or bytes of unknown origin, and name them by their content.

An image stays as it was stored (`ImageSource`: a file or compressed bytes) until a model needs its pixels. Its identity
is the SHA-256 of those bytes, so that two rows, or two sites, that hold the same picture under different names agree.

Only PNG, JPEG and WEBP are decoded: every further decoder is a further way in for a hostile file. The size is read from
the header and refused before a pixel is decoded, since a few kilobytes can declare gigabytes.

What a person saw is what the model gets: orientation tags are applied, transparency is laid on white, and 16-bit
greyscale (radiographs) is scaled to 8 bits, where Pillow's own conversion would turn all but the darkest 255 of 65,536
levels white.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from accord.errors import ImageError
from accord.types import ImageSource

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_BYTES = 100_000_000

Pictures: TypeAlias = Image.Image | Sequence[Image.Image] | None
"""The opened images of a prompt: its one, several in their order, or none."""


def name_of(source: ImageSource) -> str:
    """Return how messages call `source`: its path, or the length and first digits of the SHA-256 of its bytes."""
    if isinstance(source, Path):
        return str(source)
    return f"<image of {len(source)} bytes, sha256 {image_id(source)[:12]}>"


def image_bytes(source: ImageSource) -> bytes:
    """Return the compressed bytes of `source`, as they were stored.

    Raises:
        ImageError: the file is missing, is no regular file, is larger than `MAX_BYTES`, or cannot be read.
    """
    if isinstance(source, bytes):
        return source
    try:
        if not source.is_file():
            seen = "is a folder" if source.is_dir() else "there is no such file"
            raise ImageError(f"{source}: cannot read the image, {seen}; correct the path or add the file")
        size = source.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(f"{source}: the image has {size} bytes, over the limit of {MAX_BYTES}; compress it")
        return source.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise ImageError(
            f"{source!s:.200}: cannot read the image ({error}); check the path and its permissions"
        ) from error


def image_id(source: ImageSource) -> str:
    """Return the SHA-256 of the stored bytes as 64 hexadecimal digits."""
    return hashlib.sha256(image_bytes(source)).hexdigest()


def picture_key(image: Image.Image) -> tuple[object, ...]:
    """Return what two opened images share if they show the same."""
    return image.mode, image.size, image.tobytes(), tuple(image.getpalette() or ()), image.info.get("transparency")


def image_format(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> str:
    """Return `PNG`, `JPEG` or `WEBP`, after a look at the header alone.

    Raises:
        ImageError: as `load_image`, except for damage beyond the header.
    """
    with _open(source, max_pixels) as image:
        return str(image.format)


def check_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> None:
    """Decode `source` once and drop the pixels: a truncated file shows only then.

    Raises:
        ImageError: as `load_image`.
    """
    with _open(source, max_pixels) as image:
        _decode(image, source)


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image as upright 8-bit RGB, `[height, width, 3]`; of an animation, the first frame.

    Raises:
        ImageError: missing, empty, of another format than PNG, JPEG or WEBP, more than `max_pixels` by its header,
            truncated or otherwise damaged.
    """
    with _open(source, max_pixels) as image:
        _decode(image, source)
        return _to_rgb(image)


def load_images(sources: Iterable[ImageSource]) -> list[Image.Image]:
    """Return the images of a question or pair as `load_image` does, in order; none for one without an image."""
    return [load_image(source) for source in sources]


def as_list(pictures: Pictures) -> list[Image.Image]:
    """Return the images of a prompt, whether it has one, several or none."""
    if pictures is None:
        return []
    return [pictures] if isinstance(pictures, Image.Image) else list(pictures)


def _open(source: ImageSource, max_pixels: int) -> Image.Image:
    data = image_bytes(source)
    if not data:
        raise ImageError(f"{name_of(source)}: the image is empty (0 bytes); store the image again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name_of(source)}: refused as a decompression bomb ({error}); scale the image down"
        ) from error
    except Exception as error:  # a decoder fed hostile bytes raises whatever it likes
        raise ImageError(
            f"{name_of(source)}: not a readable PNG, JPEG or WEBP image (it begins with {data[:8]!r}); "
            "convert it to one of these"
        ) from error
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise ImageError(
            f"{name_of(source)}: the image has {image.width} x {image.height} = {pixels} pixels, "
            f"over the limit of {max_pixels}; scale it down"
        )
    return image


def _decode(image: Image.Image, source: ImageSource) -> None:
    try:
        image.load()
    except Exception as error:  # as above: OSError, SyntaxError, ValueError, struct.error, ...
        raise ImageError(
            f"{name_of(source)}: the {image.format} image is truncated or damaged ({error}); store the image again"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # unreadable camera metadata says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)  # a copy of a large image is large
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65_535) // 257
        image = Image.fromarray(levels.astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")

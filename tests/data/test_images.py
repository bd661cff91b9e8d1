import hashlib
import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accord.data import images
from accord.data.images import check_image, image_bytes, image_format, image_id, load_image, name_of
from accord.errors import ImageError


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG of a few dozen bytes that declares width x height pixels and holds none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_reads_a_file_and_its_bytes_alike(tmp_path, picture, format):
    file = tmp_path / "a.img"
    file.write_bytes(picture(200, format))
    assert image_bytes(file) == image_bytes(picture(200, format)) == picture(200, format)
    assert image_format(file) == format
    loaded = load_image(file)
    assert (loaded.mode, loaded.size) == ("RGB", (8, 8))
    assert np.abs(np.asarray(loaded).astype(int) - [200, 0, 0]).max() <= 3
    check_image(file)


def test_id_is_the_sha256_of_the_stored_bytes(tmp_path, picture):
    file = tmp_path / "a.png"
    file.write_bytes(picture(1))
    assert image_id(file) == image_id(picture(1)) == hashlib.sha256(picture(1)).hexdigest()
    assert image_id(picture(1)) != image_id(picture(2))
    assert name_of(file) == str(file)
    assert name_of(picture(1)) == f"<image of {len(picture(1))} bytes, sha256 {image_id(picture(1))[:12]}>"


def test_missing_file_folder_and_impossible_names(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png: cannot read the image, there is no such file; correct the path"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match=r"cannot read the image|no such file"):
        load_image(Path("nul\0.png"))
    with pytest.raises(ImageError, match="cannot read the image"):
        load_image(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_file_is_found_though_its_header_is_whole(tmp_path, format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, format)
    file = tmp_path / "cut.png"
    file.write_bytes(whole[: len(whole) * 2 // 3])
    for read in (check_image, load_image):
        with pytest.raises(ImageError, match=r"cut\.png: .*(truncated or damaged|not a readable).*; (store|convert)"):
            read(file)


def test_empty_and_foreign_files(tmp_path):
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(ImageError, match=r"empty\.png: the image is empty \(0 bytes\); store the image again"):
        load_image(empty)
    gif = tmp_path / "moving.png"
    gif.write_bytes(encoded(Image.new("RGB", (4, 4)), "GIF"))
    with pytest.raises(ImageError, match=r"moving\.png: not a readable PNG, JPEG or WEBP image .*GIF8.*; convert it"):
        load_image(gif)
    for format in ("BMP", "TIFF", "PPM", "PDF"):
        with pytest.raises(ImageError, match="convert it to one of these"):
            load_image(encoded(Image.new("RGB", (4, 4)), format))
    with pytest.raises(ImageError, match=r"sha256 [0-9a-f]{12}>: not a readable"):
        load_image(b"<svg xmlns='http://www.w3.org/2000/svg'/>")


def test_hundred_megapixels_are_refused_by_the_header(tmp_path):
    """10,000 x 10,000 = 100,000,000 pixels (Pillow warns of a bomb); 8,000 x 8,000 = 64,000,000 (it does not)."""
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_header(10_000, 10_000))
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"bomb\.png: .*100000000 pixels.*; scale"):
        load_image(bomb)
    with pytest.raises(ImageError, match=r"8000 x 8000 = 64000000 pixels, over the limit of 50000000; scale it down"):
        load_image(png_header(8_000, 8_000))
    with pytest.raises(ImageError, match="decompression bomb"):
        check_image(png_header(100_000, 100_000))
    assert time.monotonic() - start < 2


def test_limits_are_inclusive(picture, monkeypatch, tmp_path):
    assert load_image(picture(1), max_pixels=64).size == (8, 8)
    with pytest.raises(ImageError, match="8 x 8 = 64 pixels, over the limit of 63"):
        load_image(picture(1), max_pixels=63)
    file = tmp_path / "a.png"
    file.write_bytes(picture(1))
    monkeypatch.setattr(images, "MAX_BYTES", len(picture(1)) - 1)
    with pytest.raises(ImageError, match=r"a\.png: the image has \d+ bytes, over the limit of \d+; compress it"):
        load_image(file)


def test_sixteen_bit_greyscale_keeps_its_tones():
    """65,535 / 257 = 255 and 25,700 / 257 = 100; Pillow's own conversion gives 255 for both."""
    levels = np.array([[0, 25_700], [257, 65_535]], dtype=np.uint16)
    loaded = np.asarray(load_image(encoded(Image.fromarray(levels))))
    assert loaded[..., 0].tolist() == [[0, 100], [1, 255]]


def test_transparency_is_laid_on_white():
    """Half of red over white: 255, 255 - 128 = 127, 127."""
    loaded = load_image(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))))
    assert loaded.getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    assert load_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_orientation_tag_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    assert load_image(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).size == (2, 4)


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    webp = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(webp).getpixel((0, 0)) == (255, 0, 0)


SAMPLE = encoded(Image.new("RGB", (16, 16), "teal"), "PNG")


@settings(deadline=None)
@given(st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=8))
def test_damaged_bytes_give_an_image_or_an_image_error(place, junk):
    damaged = SAMPLE[:place] + junk + SAMPLE[place + len(junk) :]
    try:
        assert load_image(damaged).mode == "RGB"
    except ImageError as error:
        assert "sha256" in str(error)

"""Images of strangers, decoded in a child: the good ones bit by bit, sixty hostile ones within bounds (threat T16)."""

import contextlib
import io
import os
import struct
import time
import zlib

import numpy as np
import psutil
import pytest
from PIL import Image

from accord.data import decoder as module
from accord.data.decoder import MEMORY, PIXELS, Decoder
from accord.data.images import load_image
from accord.errors import ImageError


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(*shape):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def chunk(kind, data, crc=None):
    return (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)
    )


def png(width, height, *, depth=8, colour=2, data=None, before=b"", interlaced=0):
    """A PNG that declares width x height, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = zlib.compress(b"\0" * 100) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def riff(*parts):
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in parts
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def three(number):
    return struct.pack("<I", number)[:3]


SMALL = encoded(noise(64, 64, 3))
JPEG = encoded(noise(64, 64, 3), "JPEG")
WEBP = encoded(noise(64, 64, 3), "WEBP")
MOVING = encoded(
    noise(64, 64, 3), "WEBP", save_all=True, append_images=[noise(64, 64, 3).rotate(90 * n) for n in (1, 2, 3)]
)
HUGE = zlib.compress(b"\0" * 50_000_000, 9)  # 49 kB that inflate to 50 MB


def many_frames(count, size=16384):
    """An animation of a canvas of 16,384 x 16,384, whose frames are all the same small picture."""
    picture = encoded(Image.new("RGB", (2, 2)), "WEBP", lossless=True)[12:]
    frame = three(0) + three(0) + three(1) + three(1) + three(10) + b"\0" + picture
    head = b"\x02\0\0\0" + three(size - 1) + three(size - 1)
    return riff((b"VP8X", head), (b"ANIM", b"\0" * 6), *[(b"ANMF", frame)] * count)


def with_exif(entries, length=None):
    """A JPEG with an EXIF block of so many entries, each of which claims a gigabyte."""
    entry = struct.pack("<HHII", 0x0112, 2, 2**30, 8)
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", entries & 0xFFFF) + entry * min(entries, 4000)
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", length or len(block) + 2) + block + JPEG[2:]


HOSTILE = {
    # More pixels than are decoded, by the header.
    **{f"png of {side} squared": png(side, side) for side in (5_000, 10_000, 100_000, 2**31 - 1)},
    "png of a line": png(2**31 - 1, 1),
    "png of a column": png(1, 2**31 - 1),
    "png of no pixel": png(0, 0),
    "png that inflates for ever": png(60_000, 60_000, data=HUGE * 20),
    "jpeg of 65,000 squared": JPEG.replace(JPEG[JPEG.index(b"\xff\xc0") :][:9], b"\xff\xc0\0\x11\x08\xfd\xe8\xfd\xe8"),
    "webp of 16,383 squared": riff((b"VP8X", b"\x10\0\0\0" + three(16_382) * 2), (b"VP8L", b"\x2f" + b"\xff" * 40)),
    "webp lossless header alone": riff((b"VP8L", b"\x2f\xff\xff\xff\x0f" + b"\0" * 20)),
    "webp of ten thousand frames": many_frames(10_000),
    "webp of a frame on a large canvas": many_frames(1),
    # Damaged, cut, or with lengths that lie.
    **{f"{name} cut at {share:.0%}": data[: int(len(data) * share)] for share in (0.02, 0.3, 0.7)
       for name, data in (("png", SMALL), ("jpeg", JPEG), ("webp", WEBP), ("moving webp", MOVING))},
    "png with a chunk of 2 GB": SMALL[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + SMALL[33:],
    "png with a wrong checksum": SMALL[:29] + b"\0\0\0\0" + SMALL[33:],
    "png without an end": SMALL[:-40],
    "png of depth 3": png(8, 8, depth=3),
    "png of colour 9": png(8, 8, colour=9),
    "png of a palette without one": png(8, 8, colour=3, data=b"rubbish"),
    "png whose data are none": png(64, 64, data=b"\xff" * 100),
    "png of interlace 7": png(64, 64, interlaced=7, data=b"x"),
    "png with a text bomb": png(8, 8, before=b"".join(chunk(b"zTXt", b"a\0\0" + HUGE) for _ in range(4))),
    "png with a translated bomb": png(8, 8, before=chunk(b"iTXt", b"a\0\1\0\0\0" + HUGE * 4)),
    "png with a profile bomb": png(8, 8, before=chunk(b"iCCP", b"a\0\0" + HUGE * 3), data=b"x"),
    "jpeg without tables": b"\xff\xd8\xff\xc0\0\x11\x08\0\x40\0\x40\x03\x01\x22\0\x02\x11\1\x03\x11\1\xff\xd9",
    "jpeg of a million markers": b"\xff\xd8" + b"\xff\xfe\0\x02" * 1_000_000,
    "jpeg of 40,000 components": b"\xff\xd8\xff\xc0\xff\xff\x08\0\x40\0\x40\xff" + b"\1\x22\0" * 20_000,
    "webp of a wrong length": WEBP[:4] + b"\xff\xff\xff\x7f" + WEBP[8:40],
    "webp without a picture": riff((b"VP8X", b"\0" * 10)),
    "webp of rubbish": riff((b"VP8 ", bytes(range(256)) * 4)),
    "exif of 65,535 entries and no picture": with_exif(65_535)[:40_000],
    "exif longer than the file": with_exif(10, length=65_535)[:900],
    # Of other formats, whatever Pillow could read.
    "empty": b"",
    "a nul": b"\0",
    "text": b"not a picture " * 1000,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "svg with entities": b"<!DOCTYPE s [<!ENTITY a '" + b"a" * 9999 + b"'>]><svg>" + b"&a;" * 9999 + b"</svg>",
    "fits": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(2800),
    "fits, gzipped": b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + HUGE,
    "pdf": b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n{1}loop",
    "gif": encoded(noise(8, 8, 3), "GIF"),
    "tiff": encoded(noise(8, 8, 3), "TIFF"),
    "bmp": encoded(noise(8, 8, 3), "BMP"),
    "ppm": b"P6 100000 100000 255\n" + b"\0" * 100,
    "ico": encoded(noise(16, 16, 3), "ICO"),
    "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 100,
    "psd": b"8BPS\0\1" + b"\0" * 100,
    "dds": b"DDS " + b"\x7c\0\0\0" + b"\xff" * 120,
    "icns": b"icns" + struct.pack(">I", 2**31 - 1) + b"\0" * 64,
    "pickle": b"\x80\x04cos\nsystem\n(S'touch marker'\ntR.",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "elf": b"\x7fELF" + b"\0" * 100,
    "html before a png": b"<html><script>alert(1)</script>" + SMALL,
    "gif and javascript": b"GIF89a/*" + b"\0" * 40 + b"*/=1;alert(1)",
    "pdf before a jpeg": b"%PDF-1.7\n" + JPEG,
}  # fmt: skip


@pytest.fixture(scope="module")
def decode():
    with Decoder() as decoder:
        yield decoder


def test_there_are_sixty():
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_within_bounds(decode, name):
    """A typed error within two seconds of the child's and the parent's time; the child has no more memory than its
    limit; what follows is decoded."""
    decode(SMALL)
    child = psutil.Process(decode.pid)
    before, start = child.cpu_times(), time.process_time()
    with pytest.raises(ImageError, match=r"sha256 [0-9a-f]{12}>: .*; (store|scale|convert)|MemoryError"):
        decode(HOSTILE[name])
    spent = time.process_time() - start
    if decode.pid == child.pid:  # it did not die of it
        after = child.cpu_times()
        spent += after.user - before.user + after.system - before.system
        assert peak(decode.pid) <= MEMORY
    assert spent <= 2
    assert decode(SMALL).tobytes() == load_image(SMALL).tobytes()


def peak(pid):
    """Return the largest size of a process's addresses so far, in bytes."""
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmPeak"))


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
GOOD = {
    "png": SMALL,
    "jpeg": JPEG,
    "webp": WEBP,
    "moving webp": MOVING,
    "grey": encoded(noise(9, 7)),
    "16 bits": encoded(Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000)),
    "transparent": encoded(noise(9, 7, 4)),
    "palette": encoded(noise(9, 7, 3).quantize(4), transparency=1),
    "rotated": encoded(noise(9, 7, 3), "JPEG", exif=ROTATED),
    "cmyk": encoded(noise(9, 7, 3).convert("CMYK"), "JPEG"),
    "1 bit": encoded(noise(9, 7).convert("1")),
    "a pixel": encoded(noise(1, 1, 3)),
    "many strips": encoded(noise(700, 900, 3)),
    "exif that lies": with_exif(50),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images_are_those_of_this_process(decode, name):
    here = load_image(GOOD[name])
    there = decode(GOOD[name])
    assert (there.mode, there.size) == ("RGB", here.size) and there.tobytes() == here.tobytes()


@pytest.mark.parametrize("form", ["png", "transparent png", "16 bits", "jpeg", "webp"])
def test_the_largest_images_fit_into_the_childs_memory(form):
    """4,096 squared, the greatest that is taken; 25 times as large is refused by its header."""
    side = int(PIXELS**0.5)
    ramp = np.add.outer(np.arange(side), np.arange(side)).astype(np.uint8)
    data = {
        "png": lambda: encoded(Image.fromarray(np.stack([ramp] * 3, -1)), compress_level=1),
        "transparent png": lambda: encoded(Image.fromarray(np.stack([ramp] * 4, -1)), compress_level=1),
        "16 bits": lambda: encoded(Image.fromarray(ramp.astype(np.uint16) * 257), compress_level=1),
        "jpeg": lambda: encoded(Image.fromarray(np.stack([ramp] * 3, -1)), "JPEG", progressive=True),
        "webp": lambda: encoded(Image.fromarray(np.stack([ramp] * 3, -1)), "WEBP", method=0),
    }[form]()
    with Decoder() as decode:
        assert decode(data).size == (side, side) and peak(decode.pid) <= MEMORY


def test_a_child_that_dies_costs_its_image_and_no_other(decode):
    """Killed before it is asked, it is started again; killed while it works, the image is refused."""
    decode(SMALL)
    first = decode.pid
    os.kill(first, 9)
    psutil.Process(first).wait(10)
    assert decode(SMALL).size == (64, 64) and decode.pid != first


def test_an_image_that_takes_too_long_is_refused():
    """A tenth of a second of the child's time, of which the image needs more; the next one gets a new child."""
    slow = encoded(noise(2000, 2000, 3).resize((4000, 4000)))
    with Decoder(seconds=0.1) as decode:
        with pytest.raises(ImageError, match=r"not decoded within 512 MiB and 0\.1 s; scale the image down"):
            decode(slow)
        assert decode(SMALL).size == (64, 64)


def test_an_image_that_takes_too_much_memory_is_refused():
    """160 MiB of addresses: sixteen megapixels do not fit, and a small one does."""
    large = encoded(Image.new("RGB", (4096, 4096)))
    with Decoder(memory=160 * 2**20) as decode:
        with pytest.raises(ImageError):
            decode(large)
        assert decode(SMALL).size == (64, 64) and load_image(large).size == (4096, 4096)


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack(">II", 2**31, 2**31),
        struct.pack(">II", 8, 8) + b"short",
        struct.pack(">II", 0, 0) + b"\xff\xff" + b"x" * 100,
        b"",
    ],
    ids=["huge", "short", "long words", "nothing"],
)
def test_a_child_that_was_taken_over_decides_nothing(answer, tmp_path, monkeypatch):
    """Whatever it says, an image or an `ImageError` comes of it, and no more is read than an image has."""
    taken_over = tmp_path / "child"
    taken_over.write_bytes(b"#!/bin/sh\nexec cat " + str(tmp_path / "answer").encode() + b"\n")
    (tmp_path / "answer").write_bytes(answer)
    taken_over.chmod(0o700)
    monkeypatch.setattr(module.sys, "executable", str(taken_over))
    with Decoder() as decode, pytest.raises(ImageError, match="not decoded within"):
        decode(SMALL)


def test_the_child_ends_with_its_decoder_and_cannot_write(decode, tmp_path):
    with Decoder() as other:
        other(SMALL)
        child = psutil.Process(other.pid)
        assert child.rlimit(psutil.RLIMIT_FSIZE) == child.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert child.rlimit(psutil.RLIMIT_AS) == (MEMORY, MEMORY)
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(5)
    assert not child.is_running()

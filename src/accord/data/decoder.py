"""Decode images of strangers in a process of its own, whose memory and time are bounded.

    parent → child    pixels at most, length, the stored bytes
    child → parent    width, height, the pixels in RGB; or 0, 0 and why there are none

Decoders are large programs in C, and a few kilobytes can make them take gigabytes, minutes, or a wrong turn. The child
holds nothing but the image: it has `MEMORY` bytes of addresses, `SECONDS` of processor time for an image, and may write
no file. When it dies the image is refused, and the next one gets a new child; when the parent dies the child's input
ends, and so does the child. The pixels are those of `accord.data.images.load_image`, bit by bit.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Final, cast

from PIL import Image

from accord.data.images import MAX_BYTES, load_image, name_of
from accord.errors import ImageError

MEMORY: Final = 512 * 2**20
"""Bytes of addresses that the child may have; it starts with 115 million."""

PIXELS: Final = 4096 * 4096
"""Of an image: a WEBP takes four bytes a pixel, five times over."""

SECONDS: Final = 2.0
"""Of processor time for an image; the slowest good one of `PIXELS` takes one."""

PATIENCE: Final = 60.0
"""Seconds on the clock after which a child that neither computes nor answers is killed."""

_QUESTION: Final = struct.Struct(">QQ")
_ANSWER: Final = struct.Struct(">II")
_WORDS: Final = 4096
"""Bytes of a reason at most."""


class Decoder:
    """Decode images in a child process, one at a time; it starts with the first image, and anew after it died.

    Args:
        memory: bytes of addresses that the child may have.
        pixels: of an image at most.
        seconds: of processor time for an image.
    """

    def __init__(self, *, memory: int = MEMORY, pixels: int = PIXELS, seconds: float = SECONDS) -> None:
        self.memory, self.pixels, self.seconds = memory, pixels, seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> Decoder:
        """Return the decoder."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the child."""
        with self._one_at_a_time:
            self._end()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return None if self._child is None else self._child.pid

    def __call__(self, data: bytes) -> Image.Image:
        """Return the image as upright 8-bit RGB, `[height, width, 3]`; of an animation, the first frame.

        Raises:
            ImageError: as `accord.data.images.load_image`, or the image needs more memory or time than there is.
        """
        if len(data) > MAX_BYTES:
            raise ImageError(f"{name_of(data)}: over the limit of {MAX_BYTES} bytes; compress the image")
        with self._one_at_a_time:
            child = self._started()
            watchdog = threading.Timer(PATIENCE, child.kill)
            watchdog.start()
            try:
                return self._exchange(child, data)
            except (OSError, EOFError) as error:
                self._end()
                raise ImageError(
                    f"{name_of(data)}: not decoded within {self.memory / 2**20:.0f} MiB and {self.seconds:g} s; scale "
                    "the image down, or store it again"
                ) from error
            finally:
                watchdog.cancel()

    def _exchange(self, child: subprocess.Popen[bytes], data: bytes) -> Image.Image:
        to_child, from_child = cast(IO[bytes], child.stdin), cast(IO[bytes], child.stdout)
        to_child.write(_QUESTION.pack(self.pixels, len(data)))
        to_child.write(data)
        to_child.flush()
        width, height = _ANSWER.unpack(_read(from_child, _ANSWER.size))
        if not width * height:
            length = min(int.from_bytes(_read(from_child, 2), "big"), _WORDS)
            raise ImageError(_read(from_child, length).decode(errors="replace"))
        if width * height > self.pixels:  # whatever has taken the child over does not decide how much is read
            raise EOFError
        return Image.frombytes("RGB", (width, height), _read(from_child, 3 * width * height))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._end()
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "accord.data.decoder", str(self.memory), str(self.seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # A thread of OpenBLAS takes as many addresses as a large image.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the parent's
            )
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _read(source: IO[bytes], length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        raise EOFError
    return data


def main() -> None:
    """Answer the parent until it closes its end."""
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(_QUESTION.size)) == _QUESTION.size:
        pixels, length = _QUESTION.unpack(head)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # by default its signal ends the process, in C code too
        for part in _answer(_read(source, length), pixels):
            sink.write(part)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sink.flush()


def _answer(data: bytes, pixels: int) -> Iterator[bytes]:
    try:
        image = load_image(data, max_pixels=pixels)
    except Exception as error:  # MemoryError too: what there is of it now is free again
        words = (str(error) if isinstance(error, ImageError) else f"{name_of(data)}: {error!r}").encode()[:_WORDS]
        yield _ANSWER.pack(0, 0) + len(words).to_bytes(2, "big") + words
        return
    yield _ANSWER.pack(*image.size)
    rows = max(1, 2**20 // (3 * image.width))
    for top in range(0, image.height, rows):  # all at once would take the image's memory twice more
        yield image.crop((0, top, image.width, min(top + rows, image.height))).tobytes()


if __name__ == "__main__":
    main()

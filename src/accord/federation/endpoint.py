"""A site's end of the wire: bytes in, bytes out, whatever carries them.

    request bytes → decode → put in the images that were kept → answer → encode → reply bytes

An image travels to a site once. The endpoint keeps images by their SHA-256, the least recently asked about goes first,
and asks for one that it no longer has. Nothing that goes wrong here leaves the site but one word: an exception's text,
which may name a patient's file, goes to the site's own log.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from accord.errors import ReplyError
from accord.federation.messages import (
    MissingImages,
    Refusal,
    Reply,
    Request,
    WithImages,
    check_images,
    decode_request,
    encode,
    image_name,
    text_bytes,
)

logger = logging.getLogger(__name__)

CACHE_BYTES: Final = 256 * 2**20
"""Of compressed images: some thousands of photographs."""

LIBRARY_BYTES: Final = 256 * 2**20
"""Of a site's own files that one request may have read; what is over is asked for, and a message has no room for it."""


class ImageCache:
    """Keep images by name up to a total of `limit` bytes.

    Args:
        limit: of the images that were sent.
        library: files that the site has anyway, by name, such as those of a public data set; they need no room.
    """

    def __init__(self, limit: int = CACHE_BYTES, library: Mapping[str, Path] | None = None) -> None:
        self.limit = limit
        self.library = library or {}
        self.size = 0
        self._images: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._images)

    def get(self, name: str) -> bytes | None:
        """Return an image, which is then the last to go; None if it is not kept."""
        if name in self._images:
            self._images.move_to_end(name)
            return self._images[name]
        if name in self.library:
            with contextlib.suppress(OSError):
                data = self.library[name].read_bytes()
                return data if image_name(data) == name else None  # a file that was changed since is another image
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keep an image; one that is larger than the whole cache is not kept."""
        self.size -= len(self._images.pop(name, b""))
        if len(data) > self.limit:
            return
        self._images[name] = data
        self.size += len(data)
        while self.size > self.limit:
            _, dropped = self._images.popitem(last=False)
            self.size -= len(dropped)


def image_library(folder: Path) -> dict[str, Path]:
    """Return the files below `folder` by the names under which they would travel, their SHA-256."""
    library = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                library[hashlib.file_digest(file, "sha256").hexdigest()] = path
    return library


class Endpoint:
    """Answer requests as bytes.

    Args:
        site: its name, for the log.
        answer: answers a request, `Site.answer`; what it raises becomes a `Refusal`.
        cache: of images.
        text: bytes of a request at most, beside its images and weights; a longer one is not read. None for any number.
    """

    def __init__(
        self,
        site: str,
        answer: Callable[[Request], Reply],
        cache: ImageCache | None = None,
        *,
        text: int | None = None,
    ) -> None:
        self.site = site
        self.answer = answer
        self.cache = ImageCache() if cache is None else cache
        self.text = text
        self._one_at_a_time = threading.Lock()

    def __call__(self, data: bytes) -> bytes:
        """Return the reply's bytes; never raises."""
        return self.reply(self.read(data))

    def read(self, data: bytes) -> Request | None:
        """Return the request in a message; None where there is none that may be read."""
        try:
            if self.text is not None and text_bytes(data) > self.text:
                raise ReplyError(f"a request with more than {self.text} bytes of text")
            return decode_request(data)
        except ReplyError:
            logger.warning("site %s refused a request of %d bytes", self.site, len(data))
            return None

    def reply(self, request: Request | None) -> bytes:
        """Return the bytes of the reply to a request; never raises."""
        if request is None:
            return encode(Refusal("", "invalid"))
        with self._one_at_a_time:
            try:
                return encode(self._reply(request))
            except ReplyError:
                logger.warning("site %s refused a request of kind %s", self.site, type(request).__name__)
                return encode(Refusal(request.id, "invalid"))
            except Exception:  # whatever a site's own code raises must neither stop the run nor leave the site
                logger.exception("site %s could not answer", self.site)
                return encode(Refusal(request.id, "error"))

    def _reply(self, request: Request) -> Reply:
        if isinstance(request, WithImages):
            images = self._images(request)
            missing = sorted({name for item in request.items for name in item.images} - images.keys())
            if missing:
                return MissingImages(request.id, missing)
            request = msgspec.structs.replace(request, images=images)
        return self.answer(request)

    def _images(self, request: WithImages) -> dict[str, bytes]:
        check_images(request.images)
        images, size = dict(request.images), 0
        for name in {name: None for item in request.items for name in item.images}:
            if name in images or size > LIBRARY_BYTES:
                continue
            if (kept := self.cache.get(name)) is not None:
                images[name] = kept
                size += len(kept)
        for name, data in request.images.items():
            self.cache.put(name, data)
        return images

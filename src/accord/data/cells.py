"""Find the image of a row, whatever the field is called, and read it, in whatever form the cell has it.

A cell may be a path (also one that Windows wrote), a `file://` or a data URI, base64, bytes, what the `datasets`
library keeps of an image, or a list of one of these. Nothing is fetched: a URL is refused with the remedy.

Rows of a file are all about images, or none is. A field that is null or an empty list in every row is no field.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from accord.data.images import MAX_BYTES, check_image
from accord.data.rows import BadRow, Row
from accord.errors import DataError, ImageError
from accord.types import ImageSource

FIELDS: Final = (
    "image",
    "images",
    "image_path",
    "image_paths",
    "image_file",
    "image_url",
    "img",
    "img_path",
    "file_name",
    "picture",
)
"""What data sets call an image; the first that holds one counts."""

TEXTS: Final = ("id", "question", "question_id", "answer", "answers", "prompt", "chosen", "rejected", "text", "split")
"""Fields that may hold the name of a file and are no image."""

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # of one letter it is a drive
_NAMED: Final = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|dcm)$", re.IGNORECASE)
_BASE64: Final = re.compile(r"(/9j/|iVBORw0KGgo|UklGR)[A-Za-z0-9+/\s]{60,}={0,2}\s*")  # JPEG, PNG, WEBP
_LOOKED_AT: Final = 20  # rows in which a field under a strange name is looked for


def image_cells(row: Row) -> list[object]:
    """Return the cells of the first field in `FIELDS` that holds an image; none where none does."""
    for name in FIELDS:
        cells = row.get(name)
        listed = cells if isinstance(cells, list) else [cells]
        if any(map(_filled, listed)):
            return listed
    return []


class ImageField:
    """Give each row its image cells; in rows that are about images, none may lack them."""

    def __init__(
        self, rows: Iterable[Row | None], *, source: str, cells: Callable[[Row], Sequence[object]] = image_cells
    ) -> None:
        """Look whether any row has an image.

        Args:
            rows: all of them, or of each its image fields alone.
            source: the file, for messages.
            cells: returns a row's image cells.

        Raises:
            DataError: none has, and a field under another name looks like images.
        """
        self._cells = cells
        first: list[Row] = []
        for row in rows:
            if row is not None:
                self.pictured = bool(cells(row))
                if self.pictured:
                    self._name = next((name for name in FIELDS if name in row), FIELDS[0])
                    return
                if len(first) < _LOOKED_AT:
                    first.append(row)
        self.pictured = False
        for name in {name: None for row in first for name in row if name not in TEXTS}:
            if strange := [value for row in first if (value := row.get(name)) and _looks_like_image(value)]:
                raise DataError(
                    f"{source}: no row has an image in {FIELDS[0]!r}, and {name!r} looks like one, {strange[0]!r:.60}; "
                    f"rename the field to {FIELDS[0]!r}, or take it out where the questions are about no image"
                )

    def __call__(self, where: str, row: Row) -> list[object]:
        """Return the row's image cells, at least one if the file is about images.

        Raises:
            BadRow: they are empty, and other rows have an image.
            DataError: the row has no such field, and other rows have.
        """
        if not self.pictured:
            return []
        cells = list(self._cells(row))
        if not cells and not any(name in row for name in FIELDS):
            raise DataError(
                f"{where}: column {self._name!r} is missing; the columns present are "
                f"{', '.join(map(repr, row)) or 'none'}; give every row its image, or no row where the questions are "
                "about none"
            )
        if not cells:
            name = next(name for name in FIELDS if name in row)
            raise BadRow(f"the image is empty or no path, got {row[name]!r:.60} for {name!r}, and other rows have one")
        return cells


class ImageCell:
    """Turn image cells into checked sources; every file and every distinct picture is decoded and kept only once."""

    def __init__(self, folder: Path | None, *, beside: Path | None = None) -> None:
        """Resolve relative paths within `folder`.

        Args:
            folder: what images must be inside; None to take paths as the `datasets` library recorded them.
            beside: with None, where else relative paths are looked for: a folder, and what it is in.
        """
        self._folder = folder
        self._beside = [] if beside is None else [beside, beside.parent]
        self._checked: dict[ImageSource, str | None] = {}
        self._kept: dict[bytes, bytes] = {}

    @staticmethod
    def embedded(value: str) -> bool:
        """Tell an image that is in the text from the name of one."""
        return value.startswith("data:") or bool(_BASE64.fullmatch(value))

    def sources(self, cells: Iterable[object]) -> tuple[ImageSource, ...]:
        """Return the sources of a row's cells, in order; raises as `source`."""
        return tuple(map(self.source, cells))

    def source(self, value: object) -> ImageSource:
        """Return the source of a cell.

        Raises:
            BadRow: the cell is empty or no image, is a URL, holds several images, or its path leaves the folder.
            ImageError: as `accord.data.images.load_image`.
        """
        found = self._locate(value)
        if found not in self._checked:
            try:
                check_image(found)
                self._checked[found] = None
            except ImageError as error:
                self._checked[found] = str(error)
        problem = self._checked[found]
        if problem is not None:
            raise ImageError(problem)
        return self._kept.setdefault(found, found) if isinstance(found, bytes) else found

    def _locate(self, value: object) -> ImageSource:
        if isinstance(value, list) and len(value) > 1:
            raise BadRow(f"the row has {len(value)} images, and there is place for one; keep one of them")
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes) and value:
            return value
        if value is None or not isinstance(value, str) or not value.strip():
            raise BadRow(f"the image is empty or no path, got {value!r:.60}")
        if value.startswith("data:"):
            return _embedded(value)
        if _BASE64.fullmatch(value):
            return _decoded(value, value)
        scheme = _SCHEME.match(value)
        if scheme and scheme[1].lower() == "file":
            parts = urlsplit(value)
            if parts.netloc not in ("", "localhost"):
                raise BadRow(f"the image {value!r:.80} is on another machine; copy the images into the data's folder")
            return self._file(url2pathname(unquote(parts.path)))
        if scheme and "://" in value:
            raise BadRow(
                f"the image {value!r:.80} is a URL, and nothing is fetched; download the images and give their paths"
            )
        return self._file(value)

    def _file(self, value: str) -> Path:
        spellings = [value, value.replace("\\", "/")] if "\\" in value else [value]
        folder = self._folder
        if folder is None:
            tried = [place / path for path in spellings for place in (Path(), *self._beside)]
        else:
            inside = [path for each in spellings if (path := _inside(folder, each)) is not None]
            if not inside:
                raise BadRow(
                    f"the image path {value!r} leaves the data's folder; keep images inside it, {folder.absolute()}"
                )
            tried = [folder / path for path in inside] + [folder / "images" / path for path in inside]
            # Paths are often written from where a program was started, which is the folder above.
            tried += [folder.parent / path for path in inside if PurePosixPath(path).parts[:1] == (folder.name,)]
        try:
            found = next((path for path in tried if path.exists()), None)
        except (OSError, ValueError):  # a name that is too long, a NUL character: what opens it says so
            found = None
        if found is None and (len(tried) > 1 or not tried[0].is_absolute()) and "\0" not in value:
            places = ", ".join(dict.fromkeys(str(path.absolute()) for path in tried))
            raise ImageError(
                f"{tried[0]!s:.200}: cannot read the image, there is no such file; correct the path or add the file "
                f"(tried {places:.600})"
            )
        return found or tried[0]


def leaves_folder(path: str) -> bool:
    """Return whether a relative path written on any system is absolute or climbs with `..`.

    Links are followed: they were made by whoever keeps the folder, often to keep images on another disk.
    """
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    return posix.is_absolute() or bool(windows.drive or windows.root) or ".." in posix.parts or ".." in windows.parts


def _inside(folder: Path, path: str) -> str | None:
    """Return a path relative to the folder, None if it leaves it; an absolute one may be inside."""
    if Path(path).is_absolute() and ".." not in Path(path).parts:
        for place in (folder.absolute(), folder.resolve()):
            if Path(path).is_relative_to(place):
                return str(Path(path).relative_to(place))
    return None if leaves_folder(path) else path


def _filled(cell: object) -> bool:
    if isinstance(cell, Mapping):
        return any(cell.get(name) for name in ("bytes", "path", "url"))
    return cell is not None and cell == cell and (not isinstance(cell, str | bytes | list) or bool(cell))  # NaN is none


def _looks_like_image(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_looks_like_image, value))
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, str) and bool(_NAMED.search(value) or value.startswith("data:image/"))


def _embedded(uri: str) -> bytes:
    header, comma, content = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise BadRow(f"the image {uri!r:.60} is no data URI in base64; write data:image/png;base64,…")
    return _decoded(unquote(content), uri)


def _decoded(content: str, shown: str) -> bytes:
    if len(content) > MAX_BYTES * 4 // 3 + 4:
        raise BadRow(f"the image {shown!r:.60} has more than {MAX_BYTES} bytes; compress it")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(f"the image {shown!r:.60} is not base64 ({error}); encode it again") from error

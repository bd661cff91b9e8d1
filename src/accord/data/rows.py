"""Turn a file's rows into records, leave out the few that are bad, and stop when they are many.

A real data set has a broken image or an empty answer somewhere; a run must not die of it, and must not hide it either.
Of n rows, b that are bad by themselves are left out with one `DataWarning` that gives b, n and the first three reasons.
Beyond b/n = 20 % the file, and not a row, is what is wrong: a `DataError`. A fault of the whole file (not UTF-8, not
JSON, a missing column, an id used twice) is a `DataError` at once.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeAlias, TypeVar

from accord.data.images import check_image
from accord.errors import DataError, DataWarning, ImageError
from accord.types import ImageSource

Row: TypeAlias = Mapping[str, object]
Record = TypeVar("Record")

MAX_LEFT_OUT = 0.20
REASONS_SHOWN = 3


class BadRow(DataError):
    """One row must be left out; a row's parser raises it, and `keep_good` counts it."""


def keep_good(
    rows: Iterable[tuple[str, Row | None]], parse: Callable[[str, Row], Record | None], *, source: str
) -> list[Record]:
    """Return `parse(where, row)` of every good row.

    Args:
        rows: pairs of where a row stands (`file:line`) and the row; None for an empty line.
        parse: returns the record, or None for a row that is not wanted; raises `BadRow` or `ImageError` for a bad one.
        source: the file, for messages.

    Raises:
        DataError: more than `MAX_LEFT_OUT` of the rows are bad, or whatever `parse` finds wrong with the whole file.
    """
    kept: list[Record] = []
    reasons: list[str] = []
    left_out = 0
    for where, row in rows:
        try:
            if row is None:
                raise BadRow("the line is empty")
            record = parse(where, row)
        except (BadRow, ImageError) as error:
            left_out += 1
            if left_out <= REASONS_SHOWN:
                reasons.append(f"{where}: {error}")
        else:
            if record is not None:
                kept.append(record)
    if left_out:
        _report(source, left_out, left_out + len(kept), reasons)
    return kept


def _report(source: str, left_out: int, total: int, reasons: list[str]) -> None:
    shown = "; ".join(reasons) + ("; ..." if left_out > len(reasons) else "")
    if left_out > MAX_LEFT_OUT * total:
        raise DataError(
            f"{source}: {left_out} of {total} rows cannot be used, more than {MAX_LEFT_OUT:.0%}: {shown}. "
            "Correct these rows or take them out of the file"
        )
    warnings.warn(f"{source}: left out {left_out} of {total} rows: {shown}", DataWarning, stacklevel=4)


def read_jsonl(path: Path) -> Iterator[tuple[str, Row | None]]:
    """Yield `file:line` and the object of every line of a JSON Lines file; None for an empty line.

    Raises:
        DataError: the file is missing or unreadable, or a line is not UTF-8, not JSON, or not an object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the file ({error.strerror or error}); correct the path") from error
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    lines = data.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n") if data else []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise DataError(
                f"{where}: not UTF-8, byte 0x{byte:02x} at position {error.start}; save the file as UTF-8"
            ) from error
        yield where, _parse_object(where, text) if text.strip() else None


def _parse_object(where: str, text: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}), got {text[:60]!r}; write one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {text[:60]!r}; write one object a line")
    return row


def column(where: str, row: Row, name: str) -> object:
    """Return the row's value of a column that must exist.

    Raises:
        DataError: it does not; the message names the columns present.
    """
    if name not in row:
        raise DataError(
            f"{where}: column {name!r} is missing; the columns present are {', '.join(map(repr, row)) or 'none'}; "
            "add or rename it"
        )
    return row[name]


class OneKind:
    """Tell whether the rows of a file are about images: all of them are, or none is."""

    def __init__(self, *columns: str) -> None:
        """Look for an image in any of `columns`."""
        self._columns = columns
        self._bare: str | None = None  # where the first row without an image stands
        self._pictured = False  # whether there was one with an image

    def pictured(self, where: str, row: Row) -> bool:
        """Return whether the row has such a column.

        Raises:
            DataError: it has and an earlier row has not, or the other way round.
        """
        found = any(name in row for name in self._columns)
        if found and self._bare:
            raise DataError(
                f"{self._bare}: column {self._columns[0]!r} is missing, which {where} has; give every row its image, "
                "or no row where the questions are about none"
            )
        if self._pictured and not found:
            column(where, row, self._columns[0])
        self._pictured |= found
        if not found:
            self._bare = self._bare or where
        return found


def text_of(name: str, value: object) -> str:
    """Return a cell as stripped text that is not empty; whole numbers are written out.

    Raises:
        BadRow: it is empty, or neither text nor a whole number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"the {name} is empty")
    if not isinstance(value, str):
        raise BadRow(f"the {name} is not text but {value!r:.60}")
    return value.strip()


class ImageCell:
    """Turn image cells into checked sources; every file and every distinct picture is decoded and kept only once."""

    def __init__(self, folder: Path | None) -> None:
        """Resolve relative paths within `folder`; with None, take paths as the `datasets` library recorded them."""
        self._folder = folder
        self._checked: dict[ImageSource, str | None] = {}
        self._kept: dict[bytes, bytes] = {}

    def source(self, value: object) -> ImageSource:
        """Return the source of a path, of bytes, or of an undecoded `{"bytes": ..., "path": ...}` of `datasets`.

        Raises:
            BadRow: the cell is empty or no image, or its path leaves the folder.
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
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if value is None or not isinstance(value, str) or not value.strip():
            raise BadRow(f"the image is empty or no path, got {value!r:.60}")
        if self._folder is None:
            return Path(value)
        if leaves_folder(value):
            raise BadRow(f"the image path {value!r} leaves the data's folder; keep images inside it")
        return self._folder / value


def leaves_folder(path: str) -> bool:
    """Return whether a relative path written on any system is absolute or climbs with `..`.

    Links are followed: they were made by whoever keeps the folder, often to keep images on another disk.
    """
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    return posix.is_absolute() or bool(windows.drive or windows.root) or ".." in posix.parts or ".." in windows.parts

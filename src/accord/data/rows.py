"""Turn a file's rows into records, leave out the few that are bad, and stop when they are many.

A real data set has a broken image or an empty answer somewhere; a run must not die of it, and must not hide it either.
Of n rows, b that are bad by themselves are left out with one `DataWarning` that gives b, n and the first three reasons.
Beyond b/n = 20 % the file, and not a row, is what is wrong: a `DataError`. A fault of the whole file (not UTF-8, not
JSON, a missing column, an id used twice) is a `DataError` at once.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

from accord.errors import DataError, DataWarning, ImageError

Row: TypeAlias = Mapping[str, object]
Record = TypeVar("Record")

MAX_LEFT_OUT = 0.20
REASONS_SHOWN = 3

_HALF = re.compile("[\ud800-\udfff]")


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
            if half := _half_character(row):
                raise BadRow(f"half a character, {half!r:.60}: an emoji was cut in two; correct the text")
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


def _half_character(value: object) -> str | None:
    """Return the first text with a surrogate that has no partner: JSON can write one, and no tokenizer reads it."""
    if isinstance(value, str):
        return None if value.isascii() or value.isprintable() or not _HALF.search(value) else value
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return next((half for each in value if (half := _half_character(each))), None)
    return None


def read_jsonl(path: Path) -> Iterator[tuple[str, Row | None]]:
    """Yield `file:line` and the object of every line of a JSON Lines file; None for an empty line.

    A file that holds one list, as LLaVA's and ms-swift's do, gives `file item n` and its objects.

    Raises:
        DataError: the file is missing or unreadable, or a line is not UTF-8, not JSON, or not an object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        tried = "" if path.is_absolute() else f", which is relative to the current folder (tried {path.absolute()})"
        raise DataError(f"{path}: cannot read the file ({error.strerror or error}); correct the path{tried}") from error
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    data = data.removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json" and data.lstrip()[:1] == b"[":
        yield from _listed(path, data)
        return
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
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


def _listed(path: Path, data: bytes) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); write one list of objects, or one object a line") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path} item {number}: expected a JSON object, got {row!r:.60}; write a list of objects")
        yield f"{path} item {number}", row


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

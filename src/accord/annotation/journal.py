r"""What people have judged, one line each, written and on disk before the next pair is shown.

    {"type": "judgement", "id": "5f…", "pair": "9a…", "annotator": "A. B.", "choice": "left", "left": 1,
     "reason": "", "seconds": 12.5, "time": "2026-01-31T09:30:00+00:00"}
    {"type": "withdrawal", "id": "5f…", "annotator": "A. B.", "time": …}

`left` is which of the pair's answers, 0 or 1, stood on the left. Lines are only added. A judgement stands until it is
withdrawn, or until the same annotator judges the same pair again.

A line is one write and is synced before it counts. A machine that stops in the middle of it leaves a last line without
an end, which no page was told of. It is cut off when the journal is opened, unless only its line feed is missing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import msgspec

from accord.errors import RunError
from accord.runs import append_line, sync, write_atomic

Choice: TypeAlias = Literal["left", "right", "tie", "both bad", "skip"]
CHOICES: Final[tuple[Choice, ...]] = get_args(Choice)


class Judgement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="judgement"):
    """What one annotator said of one pair."""

    id: str
    pair: str
    annotator: str
    choice: Choice
    left: Literal[0, 1]  # which answer stood on the left
    reason: str  # of a skip
    seconds: float  # since the pair was handed out
    time: str  # ISO 8601, UTC

    @property
    def preferred(self) -> Literal[0, 1] | None:
        """The answer that is better, None for a tie, two bad answers, and a skip."""
        if self.choice == "left":
            return self.left
        if self.choice == "right":
            return 0 if self.left else 1
        return None


class Withdrawal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="withdrawal"):
    """An annotator took a judgement back."""

    id: str
    annotator: str
    time: str


_LINE: Final = msgspec.json.Decoder(Judgement | Withdrawal)


def read_judgements(path: Path) -> tuple[list[Judgement], int]:
    """Return the judgements that stand, oldest first, and how many bytes at the end are a torn line.

    Raises:
        RunError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); put it back, or annotate another folder") from error
    lines = data.split(b"\n")
    torn, last = 0, lines.pop()
    if last:
        with contextlib.suppress(msgspec.MsgspecError):
            _LINE.decode(last)
            lines.append(last)
            last = b""
        torn = len(last)
    standing: dict[tuple[str, str], Judgement] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = _LINE.decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise RunError(f"{path}, line {number}, is damaged ({error}); correct that line or remove it") from error
        if isinstance(record, Judgement):
            standing.pop((record.annotator, record.pair), None)
            standing[record.annotator, record.pair] = record
        else:
            standing = {key: each for key, each in standing.items() if each.id != record.id}
    return list(standing.values()), torn


class Journal:
    """A journal that one process adds to.

    Args:
        path: the file; made where it is absent.

    Raises:
        RunError: it cannot be written, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            write_atomic(path, "")
        self.path = path
        self.standing, self.torn = read_judgements(path)
        try:
            self._mend()
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error}); check the folder and its permissions") from error

    def _mend(self) -> None:
        """Cut off a torn line; end a whole one."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if self.torn:
                os.ftruncate(descriptor, size - self.torn)
            elif size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.pwrite(descriptor, b"\n", size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def add(self, judgement: Judgement) -> None:
        """Write a judgement; it is on disk when this returns.

        Raises:
            RunError: it could not be written.
        """
        self._write(judgement)
        self.standing = [*_without(self.standing, judgement.annotator, judgement.pair), judgement]

    def withdraw(self, judgement: Judgement, time: str) -> None:
        """Write that an annotator takes a judgement back; it is on disk when this returns.

        Raises:
            RunError: it could not be written.
        """
        self._write(Withdrawal(judgement.id, judgement.annotator, time))
        self.standing = [each for each in self.standing if each.id != judgement.id]

    def _write(self, record: Judgement | Withdrawal) -> None:
        append_line(self.path, msgspec.to_builtins(record))
        sync(self.path)


def _without(standing: Sequence[Judgement], annotator: str, pair: str) -> list[Judgement]:
    return [each for each in standing if (each.annotator, each.pair) != (annotator, pair)]

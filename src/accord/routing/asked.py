"""The server's record of which labelled questions it has asked as canaries, over all its runs.

    {"run": "shapes-1f0c9a2b align", "keys": ["…", …]}     one line an alignment: `question_key` of all that it may ask

A question that comes back is recognised by whoever kept it. So an alignment notes what it may ask before it asks
anything, and takes nothing that another has noted. One that is resumed finds its own line, and goes on with the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from accord.errors import RunError
from accord.runs import write_atomic
from accord.runs.lock import in_turn_at


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run: str
    keys: tuple[str, ...]


def reserve(
    record: Path, run: str, draw: Callable[[Collection[str]], Sequence[str]]
) -> tuple[Sequence[str], Collection[str]]:
    """Return the questions that a run has to itself, and those that others have; note them where they are new.

    Args:
        record: the file; made where there is none, for its owner alone to read.
        run: the alignment's name, the same each time that it is resumed.
        draw: given the keys that others have, returns those that the run takes.

    Raises:
        RunError: the record cannot be read or written. Nothing may be asked then: what was, is not known.
    """
    with in_turn_at(record, "the record of canaries", "check canaries.record"):
        lines = _read(record)
        others = frozenset(key for line in lines if line.run != run for key in line.keys)
        own = next((line.keys for line in lines if line.run == run), ())
        if not own and (own := tuple(draw(others))):
            write_atomic(record, msgspec.json.Encoder().encode_lines([*lines, _Line(run, own)]), mode=0o600)
    return own, others


def _read(record: Path) -> list[_Line]:
    try:
        return msgspec.json.Decoder(_Line).decode_lines(record.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RunError(
            f"{record}: the record of canaries cannot be read ({error}), so that nobody knows what was asked; put a "
            "copy back"
        ) from error

"""Which prompts of an alignment failed, as a run folder keeps them: `kept/stage/<stage>/failures.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from accord.runs.atomic import read_record

FAILURES: Final = "failures.json"
"""The file of a stage of a run folder."""

TRIES: Final = 3
"""Times that a prompt may fail before it is parked."""


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often a prompt has failed, and why it did last."""

    tries: int
    reason: str

    @property
    def parked(self) -> bool:
        """Whether it is no longer tried."""
        return self.tries >= TRIES


Failures: TypeAlias = dict[str, Failure]
"""By the id of the question."""


def failures_of(run: Path) -> Failures:
    """Return what failed in any stage of a run folder.

    Raises:
        RunError: a file is damaged.
    """
    found: Failures = {}
    for file in sorted((run / "kept" / "stage").glob(f"*/{FAILURES}")):
        found |= read_failures(file)
    return found


def read_failures(file: Path) -> Failures:
    """Return what a file says; nothing where there is none.

    Raises:
        RunError: it is damaged.
    """
    return read_record(file, Failures, remedy="delete it: what fails is found again") or {}

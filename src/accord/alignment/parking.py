"""Leave out the questions on which a step of the alignment fails, and go on.

    a step fails  →  which of its questions fail by themselves?  →  others in their places, and the step again
                     each has failed once more: after three times it is parked, and no longer tried

A question fails where its image cannot be read, a processor or a model raises, or the reward does. What is the fault of
no question ends the run as before: an error of Accord's that names a run folder, a recipe or a checkpoint; a quorum
that no question of a step reaches; a step that fails three times though each of its questions succeeds alone; and one
of whose questions none succeeds, nor others.

The question that stands in for another depends on both alone, and a step that failed has drawn no random number: so a
run that is resumed, and knows by its file what had failed, goes on as it would have.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
import torch

from accord.errors import CheckpointError, DataWarning, QuorumError, RecipeError, RunError, printable
from accord.runs import write_atomic
from accord.runs.failures import TRIES, Failure, Failures, read_failures
from accord.types import Question

MOST_WORDS: Final = 200
"""Characters of a reason."""

Row: TypeAlias = dict[str, Any]
Done = TypeVar("Done")


class Parking:
    """Questions that failed, by id.

    Args:
        questions: those of the alignment.
        row_of: makes a row of the trainer's of a question.
        file: where what failed is kept, None for nowhere; what it holds is known from the start.

    Raises:
        RunError: the file is damaged.
    """

    def __init__(
        self, questions: Sequence[Question], row_of: Callable[[Question], Row], file: Path | None = None
    ) -> None:
        self.questions, self.row_of, self.file = questions, row_of, file
        self.failures: Failures = read_failures(file) if file is not None else {}

    @property
    def parked(self) -> list[str]:
        """The questions that are no longer tried."""
        return [name for name, failure in self.failures.items() if failure.parked]

    def do(self, rows: Sequence[Row], group: int, step: Callable[[list[Row]], Done]) -> Done:
        """Return `step(rows)`, with other questions in the place of those that are parked or fail.

        Args:
            rows: `group` after each other have the same question.
            group: G.
            step: what is done with rows; it may fail, and be done again.
        """
        groups = [list(rows[n : n + group]) for n in range(0, len(rows), group)]
        groups = [self._replaced(each, self.parked) for each in groups]
        failed: dict[str, Exception] = {}
        unexplained = 0
        while True:
            try:
                done = _undrawn(step, groups)
                break
            except (RunError, RecipeError, CheckpointError):
                raise
            except Exception as error:
                found = _failing(step, groups, error)
                failed |= {_name(groups[n][0]): reason for n, reason in found.items()}
                replaced = [self._replaced(each, failed) for each in groups]
                none_left = any(replaced[n] is groups[n] for n in found)
                unexplained += not found or len(found) == len(groups) or none_left
                hopeless = isinstance(error, QuorumError) and 1 < len(groups) == len(found)  # no question is at fault
                if unexplained == TRIES or hopeless:
                    raise
                groups = replaced
        if failed:
            self._note(failed)
        return done

    def _replaced(self, rows: list[Row], failed: Collection[str]) -> list[Row]:
        """Return rows of another question if this one has failed: the first that has not, in an order of its own."""
        name = _name(rows[0])
        if name not in failed:
            return rows
        order = random.Random(name).sample(range(len(self.questions)), len(self.questions))
        known = {*failed, *self.failures, name}
        others = (self.questions[n] for n in order if self.questions[n].id not in known)
        if (other := next(others, None)) is None:
            return rows
        row = self.row_of(other)
        return [dict(row) for _ in rows]

    def _note(self, failed: Mapping[str, Exception]) -> None:
        for name, error in failed.items():
            tries = self.failures[name].tries + 1 if name in self.failures else 1
            reason = printable(f"{type(error).__name__}: {error}")[:MOST_WORDS]
            self.failures[name] = Failure(tries, reason)
            what = "is parked, and no longer tried" if tries >= TRIES else "was left out of a step"
            warnings.warn(
                f"prompt {printable(name)!r:.80} {what}: it failed {tries} of {TRIES} times ({reason})",
                DataWarning,
                stacklevel=2,
            )
        if self.file is not None:
            write_atomic(self.file, msgspec.json.format(msgspec.json.encode(self.failures)) + b"\n")


def _name(row: Row) -> str:
    return str(row["question_id"])


def _undrawn(step: Callable[[list[Row]], Done], groups: Sequence[list[Row]]) -> Done:
    """Do the step; if it fails, no random number has been drawn."""
    kept, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        for group in groups:
            for column in ("image", "images"):
                if isinstance(error := group[0].get(column), Exception):  # it could not be read
                    raise error
        return step([row for group in groups for row in group])
    except Exception:
        torch.set_rng_state(kept)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        raise


def _failing(
    step: Callable[[list[Row]], object], groups: Sequence[list[Row]], error: Exception
) -> dict[int, Exception]:
    """Return which of groups that fail together fail alone, and why: halves of them are tried, and halves of those."""
    if len(groups) == 1:
        return {0: error}
    found: dict[int, Exception] = {}
    middle = len(groups) // 2
    for first, part in ((0, groups[:middle]), (middle, groups[middle:])):
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            try:
                _undrawn(step, part)
            except Exception as reason:
                found |= {first + n: why for n, why in _failing(step, part, reason).items()}
    return found

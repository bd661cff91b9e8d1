"""Leave out the questions on which a step of the alignment fails, and go on.

    a step fails  →  which of its questions fail by themselves?  →  others in their places, and the step again
                     each has failed once more: after three times it is parked, and no longer tried

A question fails where its image cannot be read, a processor or a model raises, or the reward does. What is the fault of
no question ends the run as before: an error of Accord's that names a run folder, a recipe or a checkpoint; a quorum
that no question of a step reaches; a step that fails three times though each of its questions succeeds alone; and one
of whose questions none succeeds, nor others.

The question that stands in for another depends on both alone, and a step that failed has drawn no random number: so a
run that is resumed, and knows by its file what had failed, goes on as it would have.

Several processes that share a step's questions do all this together: where one fails, all have failed, by
`accord.federation.engine.agree`, and each tries its own questions again beside the others'. What one process alone
knows to have failed, while others wait for it, ends the run: between their questions to each other, or in a reward that
is no federation's.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import torch

from accord.errors import CheckpointError, DataWarning, QuorumError, RecipeError, RunError, printable
from accord.federation.engine import Done, ElsewhereError, is_in_all
from accord.federation.ranks import Processes, rank_and_count
from accord.runs import write_atomic
from accord.runs.failures import TRIES, Failure, Failures, read_failures
from accord.types import Question

MOST_WORDS: Final = 200
"""Characters of a reason."""

Row: TypeAlias = dict[str, Any]
_Reasons: TypeAlias = dict[int, Exception]


class Parking:
    """Questions that failed, by id.

    Args:
        questions: those of the alignment.
        row_of: makes a row of the trainer's of a question.
        file: where what failed is kept, None for nowhere; what it holds is known from the start.
        processes: those that share the questions of a step.

    Raises:
        RunError: the file is damaged.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        row_of: Callable[[Question], Row],
        file: Path | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.questions, self.row_of, self.file = questions, row_of, file
        self.processes = processes or Processes()
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
        unexplained, again = 0, False
        while True:
            try:
                done = _undrawn(step, groups)
                break
            except Exception as error:
                if not self._together(error) or self._anywhere(_ends_the_run(error)):
                    raise
                found = self._failing(step, groups, error)
                failed |= {_name(groups[n][0]): reason for n, reason in found.items()}
                replaced = [self._replaced(each, failed) for each in groups]
                none_left = self._anywhere(any(replaced[n] is groups[n] for n in found))
                fails, tried = self.processes.total([len(found), len(groups)])
                unexplained += fails in (0, tried) or none_left
                hopeless = self._anywhere(isinstance(error, QuorumError)) and 1 < fails == tried  # no question's fault
                if unexplained == TRIES or hopeless:
                    raise
                groups, again = replaced, True
        if again:
            self._note({name: printable(f"{type(e).__name__}: {e}")[:MOST_WORDS] for name, e in failed.items()})
        return done

    def _together(self, error: Exception) -> bool:
        return self.processes.count == 1 or is_in_all(error)

    def _anywhere(self, so: bool) -> bool:
        return self.processes.total([so])[0] > 0

    def _failing(self, step: Callable[[list[Row]], object], groups: Sequence[list[Row]], error: Exception) -> _Reasons:
        """Return which of groups that fail together fail alone, and why: halves are tried, and halves of those."""
        if len(groups) == 1:
            return {} if isinstance(error, ElsewhereError) else {0: error}
        found: _Reasons = {}
        middle = len(groups) // 2
        for first, part in ((0, groups[:middle]), (middle, groups[middle:])):
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                try:
                    _undrawn(step, part)
                except Exception as reason:
                    if not self._together(reason):
                        raise
                    found |= {first + n: why for n, why in self._failing(step, part, reason).items()}
        return found

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

    def _note(self, failed: Mapping[str, str]) -> None:
        """Count what failed in any process, alike in all; the first tells and keeps it, with a reason of its own."""
        first = rank_and_count()[0] == 0
        for told in self.processes.gather(msgspec.json.encode(failed), everywhere=True):
            failed = {**msgspec.json.decode(told, type=dict[str, str]), **failed}
        for name, reason in sorted(failed.items()):
            tries = self.failures[name].tries + 1 if name in self.failures else 1
            self.failures[name] = Failure(tries, reason)
            what = "is parked, and no longer tried" if tries >= TRIES else "was left out of a step"
            if first:
                warnings.warn(
                    f"prompt {printable(name)!r:.80} {what}: it failed {tries} of {TRIES} times ({reason})",
                    DataWarning,
                    stacklevel=2,
                )
        if self.file is not None and first and failed:
            write_atomic(self.file, msgspec.json.format(msgspec.json.encode(self.failures)) + b"\n")


def _name(row: Row) -> str:
    return str(row["question_id"])


def _ends_the_run(error: Exception) -> bool:
    return isinstance(error, RunError | RecipeError | CheckpointError) and not isinstance(error, ElsewhereError)


def _undrawn(step: Callable[[list[Row]], Done], groups: Sequence[list[Row]]) -> Done:
    """Do the step; if it fails, no random number has been drawn."""
    kept, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        return step([row for group in groups for row in group])
    except Exception:
        torch.set_rng_state(kept)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        raise

"""Hand out pairs to annotators, take their judgements, and say how much is left.

A pair that everyone judges is handed to each annotator once. Any other is handed to one: whoever asks first gets it,
and it comes back to the others when it has lain there for `PATIENCE` seconds. Which answer stands on the left depends
on the pair and on the annotator alone, so a page that is loaded again shows the same.
"""

from __future__ import annotations

import math
import secrets
import statistics
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from accord.annotation.agreement import Agreement, measure_agreement
from accord.annotation.journal import CHOICES, Choice, Journal, Judgement
from accord.annotation.pairs import Candidate
from accord.data.questions import uniform
from accord.errors import DataError, RunError, printable

PATIENCE: Final = 900.0
LONGEST_NAME: Final = 80
LONGEST_REASON: Final = 500
RECENT: Final = 20
"""Judgements whose median tells how long one takes."""


class Refused(DataError):
    """A judgement that cannot be taken: the page has to show something else."""


@dataclass(frozen=True)
class Handed:
    """A pair as an annotator sees it."""

    pair: Candidate
    left: Literal[0, 1]  # which answer stands on the left


@dataclass(frozen=True)
class Progress:
    """How far an annotator is."""

    done: int  # pairs that this annotator judged or skipped
    left: int  # pairs that may still be handed to this annotator
    everyone: int  # of all pairs, those that each annotator judges
    total: int
    seconds_left: float | None  # None until three pairs are judged


class Desk:
    """The state behind the page; its methods may be called from several threads.

    Args:
        candidates: the pairs in the order in which they are shown.
        journal: where judgements go.
        overlap: the share of pairs that everyone judges, about.
        seed: of this share and of the sides.
        clock: seconds.

    Raises:
        RunError: a pair that was judged is not among the candidates.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        journal: Journal,
        *,
        overlap: float,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.candidates = {each.id: each for each in candidates}
        self.shared = {each.id for each in candidates if uniform("overlap", seed, each.id) < overlap}
        self._journal, self._seed, self._clock = journal, seed, clock
        self._claims: dict[str, tuple[str, float]] = {}  # annotator: pair, since when
        self._one_at_a_time = threading.Lock()
        if unknown := [each.pair for each in journal.standing if each.pair not in self.candidates]:
            raise RunError(
                f"{journal.path} has a judgement of the pair {unknown[0]!r:.40}, which is not in the folder; put the "
                "list of pairs back"
            )

    def name(self, given: object) -> str:
        """Return an annotator's name as it is written: spaces single, and spelt as it was before if it was there.

        Raises:
            DataError: it is no name.
        """
        text = " ".join(unicodedata.normalize("NFC", given).split()) if isinstance(given, str) else ""
        if not text or len(text) > LONGEST_NAME or printable(text) != text:
            raise DataError(f"an annotator needs a name of 1 to {LONGEST_NAME} letters, got {given!r:.100}; give yours")
        known = {each.annotator.casefold(): each.annotator for each in self._journal.standing}
        return known.get(text.casefold(), text)

    def names(self) -> list[str]:
        """Return who has judged, in alphabetical order."""
        return sorted({each.annotator for each in self._journal.standing})

    def next(self, annotator: str) -> Handed | None:
        """Hand out the next pair, the same until it is judged; None when there is none left."""
        with self._one_at_a_time:
            return self._next(annotator)

    def judge(self, annotator: str, pair: str, choice: str, reason: str = "") -> Judgement:
        """Take a judgement; it is on disk when this returns.

        Raises:
            Refused: the annotator was not handed this pair, or has judged it.
            DataError: there is no such choice, or a skip without a reason.
            RunError: it could not be written.
        """
        reason = printable(" ".join(reason.split()))
        if choice not in CHOICES:
            raise DataError(f"a choice is one of {', '.join(CHOICES)}, got {choice!r:.40}")
        if choice == "skip" and not reason:
            raise DataError("a skip needs a reason; say why this pair cannot be judged")
        if choice != "skip" and reason:
            raise DataError(f"only a skip has a reason, got one with {choice!r}; leave it out")
        if len(reason) > LONGEST_REASON:
            raise DataError(f"a reason has at most {LONGEST_REASON} letters, got {len(reason)}; shorten it")
        with self._one_at_a_time:
            claimed, since = self._claims.get(annotator, ("", 0.0))
            if claimed != pair:
                raise Refused(f"the pair {pair!r:.40} is not the one that {annotator} was handed; see the next one")
            judgement = Judgement(
                id=secrets.token_hex(8),
                pair=pair,
                annotator=annotator,
                choice=_known(choice),
                left=self._left(annotator, pair),
                reason=reason,
                seconds=round(self._clock() - since, 1),
                time=_now(),
            )
            self._journal.add(judgement)
            del self._claims[annotator]
            return judgement

    def undo(self, annotator: str) -> Handed | None:
        """Take back the annotator's last judgement that stands, and hand out its pair; None where there is none.

        Raises:
            RunError: it could not be written.
        """
        with self._one_at_a_time:
            own = [each for each in self._journal.standing if each.annotator == annotator]
            if not own:
                return None
            self._journal.withdraw(own[-1], _now())
            return self._hand(annotator, own[-1].pair)

    def progress(self, annotator: str) -> Progress:
        """Return how far an annotator is; what is handed to one of several at work is counted to each in part."""
        with self._one_at_a_time:
            mine = [each for each in self._journal.standing if each.annotator == annotator]
            open_pairs = self._open(annotator)
            alone = sum(pair in self.shared for pair in open_pairs)
            now = self._clock()
            at_work = {name for name, (_, since) in self._claims.items() if now - since < PATIENCE} | {annotator}
            expected = alone + math.ceil((len(open_pairs) - alone) / len(at_work))
            recent = [each.seconds for each in mine[-RECENT:]]
            return Progress(
                done=len(mine),
                left=len(open_pairs),
                everyone=len(self.shared),
                total=len(self.candidates),
                seconds_left=statistics.median(recent) * expected if len(recent) >= 3 else None,
            )

    def agreement(self) -> Agreement:
        """Return how far the annotators agree so far."""
        return measure_agreement(self._journal.standing)

    def _next(self, annotator: str) -> Handed | None:
        open_pairs = self._open(annotator)
        claimed = self._claims.get(annotator, ("", 0.0))[0]
        if claimed in open_pairs:
            return Handed(self.candidates[claimed], self._left(annotator, claimed))
        return self._hand(annotator, open_pairs[0]) if open_pairs else None

    def _hand(self, annotator: str, pair: str) -> Handed:
        self._claims[annotator] = pair, self._clock()
        return Handed(self.candidates[pair], self._left(annotator, pair))

    def _open(self, annotator: str) -> list[str]:
        """Return the pairs that may be handed to this annotator, in order."""
        mine = {each.pair for each in self._journal.standing if each.annotator == annotator}
        anyone = {each.pair for each in self._journal.standing}
        now = self._clock()
        elsewhere = {
            pair for name, (pair, since) in self._claims.items() if name != annotator and now - since < PATIENCE
        }
        return [
            pair
            for pair in self.candidates
            if (pair not in mine if pair in self.shared else pair not in anyone and pair not in elsewhere)
        ]

    def _left(self, annotator: str, pair: str) -> Literal[0, 1]:
        return 0 if uniform("side", self._seed, annotator, pair) < 0.5 else 1


def _known(choice: str) -> Choice:
    return next(each for each in CHOICES if each == choice)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

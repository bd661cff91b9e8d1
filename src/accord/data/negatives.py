"""Draw wrong answers to set against a reference answer.

A reward model trained only on same-type negatives ("red" over "blue") has seen nothing else, and its score is arbitrary
elsewhere: reinforcement learning finds that out within some dozens of steps and drives the policy to "red red", to a
shape where a colour was asked for, or to nothing at all, at a rising reward. The rejected answers must therefore cover
what the policy can say, and come from five sources:

    same type    another answer to questions of this type: what a person would get wrong
    policy       what the policy really said to this question and is wrong: where the optimiser starts
    other type   an answer to questions of another type
    malformed    repetition, two answers joined or run together, a stray character, one word too many, nothing, an echo
                 of the question
    shortened    the reference without some of its words, where it has at least four: a policy that describes learns to
                 say little, for little is seldom wrong

"Wrong" is "differs from the reference once normalised", as exact match has it: another true wording counts as wrong.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Final

from accord.data.questions import normalise_answer
from accord.errors import RecipeError
from accord.types import Question

STRAY = string.ascii_letters + string.digits + string.punctuation + "\N{REPLACEMENT CHARACTER}"
"""Characters that a policy may leave at an answer's edge; the last is how half a UTF-8 character is decoded."""

LEAST_WORDS: Final = 4
"""Of an answer that is shortened."""


@dataclass(frozen=True)
class NegativeMix:
    """The share of each source among the rejected answers; shares are relative, and 0 turns a source off."""

    same_type: float = 0.35
    policy: float = 0.25
    other_type: float = 0.2
    malformed: float = 0.2
    shortened: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative shares, and nothing but zeros."""
        shares = astuple(self)
        if not all(share >= 0 and math.isfinite(share) for share in shares) or sum(shares) == 0:
            raise RecipeError(f"the shares of a NegativeMix must be 0 or more and not all 0, got {self}; correct them")


class Negatives:
    """The answers of a data set by question type, and the draw of one question's rejected answers from them."""

    def __init__(self, answers_by_type: Mapping[str, Sequence[str]], mix: NegativeMix) -> None:
        """Index the answers once; drawing then costs O(n) a question, however large the vocabulary."""
        self._mix = mix
        self._same = {kind: _distinct(answers) for kind, answers in answers_by_type.items()}
        everything = _distinct([answer for answers in self._same.values() for answer in answers])
        self._other = {kind: _without(everything, answers) for kind, answers in self._same.items()}
        self._everything = everything

    def draw(self, question: Question, said: Sequence[str], n: int, generator: random.Random) -> list[str]:
        """Return up to `n` answers that differ from the reference and from each other once normalised.

        Each is drawn from one source, picked by share among those not exhausted, without replacement; fewer than `n`
        come back only when all are.

        Args:
            question: gives the reference answer, the type, and words to echo.
            said: what the policy answered; right answers among it are passed over.
            n: how many to draw.
            generator: the only source of chance.
        """
        kind = question.question_type
        same = self._same.get(kind, [])
        other = self._other.get(kind, self._everything)
        pools = [same, _distinct(said), other, _malformed(question, same or other, generator)]
        pools.append(_shortened(question.answer, n, generator) if self._mix.shortened else [])
        # At most 2n candidates of a pool can be barred (the reference, and what other sources gave), so 2n + 1 do.
        queues = [generator.sample(pool, min(len(pool), 2 * n + 1)) for pool in pools]
        shares = astuple(self._mix)
        barred = {normalise_answer(text) for text in (question.answer, *question.references)}
        drawn: list[str] = []
        while len(drawn) < n:
            open_sources = [i for i, queue in enumerate(queues) if queue and shares[i] > 0]
            if not open_sources:
                break
            (source,) = generator.choices(open_sources, [shares[i] for i in open_sources])
            answer = _next(queues[source], barred)
            if answer is not None:
                drawn.append(answer)
        return drawn


def _next(queue: list[str], barred: set[str]) -> str | None:
    while queue:
        answer = queue.pop()
        if (key := normalise_answer(answer)) not in barred:
            barred.add(key)
            return answer
    return None


def _malformed(question: Question, answers: Sequence[str], generator: random.Random) -> list[str]:
    """Return one answer of every malformed kind; what is run together or stray was found by policies, not by us."""
    right, words = question.answer, question.text.rstrip("?!. ").split()
    stray = generator.choice(STRAY)
    found = [f"{right} {right}", f"{right}{right}", f"{right}{stray}", f"{stray}{right}", "", " ".join(words[-2:])]
    if answers:
        other, another = generator.choice(answers), generator.choice(answers)
        found += [f"{right} {other}", f"{right}{other}", f"{other}{right}", f"{other}{another}"]
    if words:
        found.append(f"{right} {generator.choice(words)}")
    return _distinct(found)


def _shortened(right: str, n: int, generator: random.Random) -> list[str]:
    """Return up to `n` texts that lack a run of the words of `right`; none where it has fewer than four words."""
    words = right.split()
    if len(words) < LEAST_WORDS:
        return []
    cuts = [(i, j) for i in range(len(words)) for j in range(i + 1, len(words) + 1) if j - i < len(words)]
    return _distinct([" ".join(words[:i] + words[j:]) for i, j in generator.sample(cuts, min(n, len(cuts)))])


def _distinct(answers: Sequence[str]) -> list[str]:
    kept: dict[str, str] = {}
    for answer in answers:
        kept.setdefault(normalise_answer(answer), answer.strip())
    return list(kept.values())


def _without(answers: Sequence[str], dropped: Sequence[str]) -> list[str]:
    keys = {normalise_answer(answer) for answer in dropped}
    return [answer for answer in answers if normalise_answer(answer) not in keys]

"""Make arithmetic questions, the embedded default without images: three types that make three natural sites.

                 question                                       answer    slip
    sum          what is 37 plus 5?                             42        43, one too many
    larger       which is larger, 37 or 52?                     52        37, the smaller
    last digit   what is the last digit of 37 times 5?          5         2, of the sum

A question comes in one wording only, so that its text tells it from all others. Every pair of operands, in either
order, falls into one split by a hash of it: a model that has seen 37 or 52 does not meet 52 or 37 in a test.

Slips are the common mistakes of the people from whom a base model learned to speak: in pre-training alone, a share of
the `base` questions has them for answers. The model then knows right and wrong, and says now the one, now the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from accord.data.questions import uniform
from accord.types import Question

SHARES: Final = {"base": 0.2, "private": 0.4, "public": 0.2, "dev": 0.08, "test": 0.12}
"""The share of the questions for each split."""

Operands: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class _Type:
    name: str
    wording: str
    operands: tuple[Operands, ...]
    right: Callable[[int, int], int]
    slip: Callable[[int, int], int]


def _pairs(first: Iterable[int], second: range) -> tuple[Operands, ...]:
    return tuple((a, b) for a in first for b in second if a != b)


_TYPES: Final = (
    _Type(
        "sum",
        "what is {} plus {}?",
        _pairs(range(10, 200), range(1, 10)),
        lambda a, b: a + b,
        lambda a, b: a + b + 1,
    ),
    _Type("larger", "which is larger, {} or {}?", _pairs(range(10, 100), range(10, 100)), max, min),
    _Type(
        "last digit",
        "what is the last digit of {} times {}?",
        _pairs(range(2, 80), range(2, 80)),
        lambda a, b: a * b % 10,
        lambda a, b: (a + b) % 10,
    ),
)


def load_arithmetic(*, slips: float = 0.0) -> list[Question]:
    """Return all questions, type after type, operands in order; ids are `arithmetic-<type>-<a>-<b>`.

    Args:
        slips: share of the questions of split `base` that are answered by a slip. All other answers are right.
    """
    return [_question(kind, a, b, slips) for kind in _TYPES for a, b in kind.operands]


def _question(kind: _Type, a: int, b: int, slips: float) -> Question:
    split = _split(kind, a, b)
    mistaken = split == "base" and uniform(f"slip {kind.name}", 0, str(a), str(b)) < slips
    return Question(
        id=f"arithmetic-{kind.name.replace(' ', '-')}-{a}-{b}",
        image=None,
        text=kind.wording.format(a, b),
        answer=str((kind.slip if mistaken else kind.right)(a, b)),
        question_type=kind.name,
        split=split,
        domain="arithmetic",
    )


def _split(kind: _Type, a: int, b: int) -> str:
    draw, end = uniform(f"arithmetic {kind.name}", 0, str(min(a, b)), str(max(a, b))), 0.0
    for split, share in SHARES.items():
        end += share
        if draw < end:
            return split
    return "test"

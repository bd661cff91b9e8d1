"""Make arithmetic questions, the embedded default without images: three types that make three natural sites.

    sum          what is 37 plus 5?                      42
    larger       which is larger, 37 or 52?              52
    last digit   what is the last digit of 37 times 5?   5

A question comes in one wording only, so that its text tells it from all others. Every pair of operands, in either
order, falls into one split by a hash of it: who has seen 37 plus 5 has not seen 5 plus 37 in a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from accord.data.questions import uniform
from accord.types import Question

SHARES: Final = {"base": 0.2, "private": 0.4, "public": 0.2, "dev": 0.08, "test": 0.12}
"""The share of the questions for each split."""

Operands = tuple[int, int]


def load_arithmetic() -> list[Question]:
    """Return all questions, type after type, operands in order; ids are `arithmetic-<type>-<a>-<b>`."""
    return [
        Question(
            id=f"arithmetic-{kind.replace(' ', '-')}-{a}-{b}",
            image=None,
            text=wording.format(a, b),
            answer=str(solve(a, b)),
            question_type=kind,
            split=_split(kind, a, b),
            domain="arithmetic",
        )
        for kind, (wording, solve, operands) in _TYPES.items()
        for a, b in operands
    ]


def _split(kind: str, a: int, b: int) -> str:
    draw, end = uniform(f"arithmetic {kind}", 0, str(min(a, b)), str(max(a, b))), 0.0
    for split, share in SHARES.items():
        end += share
        if draw < end:
            return split
    return "test"


def _pairs(first: Iterable[int], second: range) -> list[Operands]:
    return [(a, b) for a in first for b in second if a != b]


_TYPES: dict[str, tuple[str, Callable[[int, int], int], list[Operands]]] = {
    "sum": ("what is {} plus {}?", lambda a, b: a + b, _pairs(range(10, 100), range(1, 50))),
    "larger": ("which is larger, {} or {}?", max, _pairs(range(10, 100), range(10, 100))),
    "last digit": (
        "what is the last digit of {} times {}?",
        lambda a, b: a * b % 10,
        _pairs(range(2, 80), range(2, 80)),
    ),
}

"""Draw questions: a fixed sample of them, or question types equally often or by their shares.

All draws depend on their seed alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from accord.data.questions import in_turn
from accord.types import Question

T = TypeVar("T")


def draw_balanced(types: Sequence[str], count: int, generator: random.Random) -> list[int]:
    """Draw `count` indices so that every type comes equally often; within a type, in reshuffled passes."""
    by_type: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(types):
        by_type[name].append(i)
    names = sorted(by_type)
    queues: dict[str, list[int]] = {name: [] for name in names}
    drawn = []
    for n in range(count):
        queue = queues[names[n % len(names)]]
        if not queue:
            queue.extend(by_type[names[n % len(names)]])
            generator.shuffle(queue)
        drawn.append(queue.pop())
    return drawn


def draw_kinds(
    items: Sequence[T],
    kinds: Sequence[str],
    count: int,
    generator: random.Random,
    shares: Mapping[str, float] | None = None,
) -> list[T]:
    """Draw `count` items without replacement, each kind as often as its share says, by default all in turn (`in_turn`).

    Args:
        items: `[N]`.
        kinds: of each, `[N]`.
        count: how many; fewer where there are no more.
        generator: of the order within a kind.
        shares: of every kind, above 0.
    """
    by_kind: dict[str, list[T]] = defaultdict(list)
    for item, kind in zip(items, kinds, strict=True):
        by_kind[kind].append(item)
    names = sorted(by_kind)
    queues = [generator.sample(by_kind[name], len(by_kind[name])) for name in names]
    return in_turn(queues, count, [shares[name] for name in names] if shares else None)


def sample_questions(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """Return at most `limit` questions (0 for all), drawn without replacement, in their own order."""
    if not limit or limit >= len(questions):
        return list(questions)
    keep = set(random.Random(seed).sample(range(len(questions)), limit))
    return [q for i, q in enumerate(questions) if i in keep]

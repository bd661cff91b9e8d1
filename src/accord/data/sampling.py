"""Draw questions: a fixed sample of them, or question types equally often.

Both draws depend on their seed alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from accord.types import Question


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


def sample_questions(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """Return at most `limit` questions (0 for all), drawn without replacement, in their own order."""
    if not limit or limit >= len(questions):
        return list(questions)
    keep = set(random.Random(seed).sample(range(len(questions)), limit))
    return [q for i, q in enumerate(questions) if i in keep]

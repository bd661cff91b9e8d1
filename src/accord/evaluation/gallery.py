"""Choose a few test questions to look at: their images, both answers, and what every site thinks of them."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image

from accord.alignment.reward import FederatedReward, group_about
from accord.data.questions import in_turn
from accord.runs import write_atomic
from accord.types import Question

LONGEST_SIDE = 256  # pixels of a shown image


def choose(questions: Sequence[Question], before: Sequence[str], after: Sequence[str], count: int) -> list[int]:
    """Return indices of at most `count` questions, every type in turn; within a type, changed answers first."""
    by_type: dict[str, list[int]] = defaultdict(list)
    for i, q in enumerate(questions):
        by_type[q.question_type].append(i)
    queues = [sorted(items, key=lambda i: before[i] == after[i]) for _, items in sorted(by_type.items())]
    return in_turn(queues, count)


def write_gallery(
    run: Path,
    questions: Sequence[Question],
    before: Sequence[str],
    after: Sequence[str],
    reward: FederatedReward | None,
    count: int,
) -> None:
    """Write `gallery.jsonl` and `gallery/*.png` of a run: every site is asked about both answers, routed or not.

    The `image` of a question without one is null, and of several the others are `further`. Without a `reward` no site
    judges, and there are no scores.
    """
    chosen = choose(questions, before, after, count)
    if not chosen:
        write_atomic(run / "gallery.jsonl", "")
        return
    groups = []
    for i in chosen:
        q = questions[i]
        candidates = tuple(dict.fromkeys((before[i], after[i])))
        rows = (0, len(candidates) - 1)
        groups.append(group_about(q, candidates, rows))
    sites: list[str] = []
    scores = weights = torch.zeros(sum(len(g.candidates) for g in groups), 0)
    if reward is not None:
        sites = list(reward.engine.sites)
        scores = reward.ask(groups, torch.ones(len(scores), len(sites), dtype=torch.bool))  # [M, K]
        weights = reward.router([g.prompt for g in groups], [g.images for g in groups], [g.candidates for g in groups])
    lines, first = [], 0
    for n, (i, group) in enumerate(zip(chosen, groups, strict=True)):
        q = questions[i]
        names = [f"gallery/{n}{f'-{k}' if k else ''}.png" for k in range(len(group.images))]
        for name, image in zip(names, group.images, strict=True):
            write_atomic(run / name, small_png(image))
        old, new = first + group.rows[0], first + group.rows[1]
        first += len(group.candidates)
        lines.append(
            {
                "image": names[0] if names else None,
                **({"further": names[1:]} if names[1:] else {}),
                "question": q.text,
                "answer": q.answer,
                "question_type": q.question_type,
                "before": before[i],
                "after": after[i],
                "routed": {site: weights[new, k].item() for k, site in enumerate(sites)},
                "scores": {
                    site: {"before": _number(scores[old, k].item()), "after": _number(scores[new, k].item())}
                    for k, site in enumerate(sites)
                },
            }
        )
    write_atomic(run / "gallery.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def small_png(image: Image, longest_side: int = LONGEST_SIDE) -> bytes:
    """Return a picture as PNG, made smaller where a side is longer than `longest_side` pixels."""
    small = image.copy()
    small.thumbnail((longest_side, longest_side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return buffer.getvalue()


def _number(score: float) -> float | None:
    return None if score != score else score  # NaN: absent

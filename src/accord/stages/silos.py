"""Deal pictures out to sites by what they are like, to simulate organisations whose data differ.

Every site gets one cluster of `accord.data.clusters`, the first in the recipe the largest. What is dealt is a picture
with all its questions, by any rule: its text features are the mean over its questions, so that no picture is at two
sites. A question without a picture is dealt by its own text. The order of the questions does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accord.data.clusters import Similarity, clusters, compared, plane
from accord.data.questions import image_identity, together, uniform
from accord.errors import DataError
from accord.models.encoder import Encoder
from accord.models.pooled import image_means, text_means
from accord.types import ImageSource, Question


@dataclass(frozen=True)
class Silos:
    """Who holds which pictures, and where they lie on the two main axes of their features."""

    questions: dict[str, list[Question]]  # by site, in the given order
    points: dict[str, Tensor]  # by site, [pictures, 2]


def cut_silos(
    questions: Sequence[Question], sites: Sequence[str], encoder: Encoder, by: Similarity, *, seed: int, limit: int = 0
) -> Silos:
    """Return each site's questions.

    Args:
        questions: usually those of the split `private`.
        sites: their names, K of them.
        encoder: whose frozen tower and token embeddings describe pictures and texts.
        by: the rule by which pictures are compared.
        seed: of the clusters, and of what is kept.
        limit: a site keeps at most so many pictures, drawn by hashes; 0 for all.

    Raises:
        DataError: no question is there, fewer than K pictures differ, or a question dealt by its picture has none.
        CheckpointError: pictures are to be compared, and the encoder reads none.
    """
    if not questions:
        raise DataError("no private question is there to be dealt by clusters; give questions the split 'private'")
    held: dict[str, list[Question]] = {}
    keys = together([q.subjects for q in questions], image_identity())
    for key, question in zip(keys, questions, strict=True):
        held.setdefault(key, []).append(question)
    held = dict(sorted(held.items()))
    image = None if by == "text" else image_means(encoder.model, encoder.processor, _pictures(held.values(), by))
    text = None if by == "image" else _texts(encoder, list(held.values()))
    silo = dict(zip(held, clusters(image, text, by, len(sites), seed=seed).tolist(), strict=True))
    points = dict(zip(held, plane(compared(image, text, by)[0]), strict=True))
    dealt, where = {}, {}
    for k, site in enumerate(sites):
        mine = sorted((key for key in held if silo[key] == k), key=lambda key: uniform("keeping", seed, key))
        kept = set(mine[: limit or None])
        dealt[site] = [q for key, q in zip(keys, questions, strict=True) if key in kept]
        where[site] = torch.stack([points[key] for key in held if key in kept])
    return Silos(dealt, where)


def _pictures(held: Iterable[Sequence[Question]], by: Similarity) -> list[ImageSource]:
    found = []
    for first, *_ in held:
        if first.image is None:
            raise DataError(
                f"question {first.id!r} has no picture, and questions are dealt by clusters of {by!r} features; set "
                'dealing.features = "text"'
            )
        found.append(first.image)
    return found


def _texts(encoder: Encoder, held: Sequence[Sequence[Question]]) -> Tensor:
    """Return the mean over each picture's texts: the answers where all are asked the same, as of captions."""
    same = len({q.text for questions in held for q in questions}) == 1
    texts = [q.answer if same else f"{q.text} {q.answer}" for questions in held for q in questions]
    means = text_means(encoder.model, encoder.processor, texts)
    return torch.stack([each.mean(dim=0) for each in means.split([len(questions) for questions in held])])

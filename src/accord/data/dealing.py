"""Deal questions out to simulated sites whose mixtures of question types are drawn: how non-IID a federation is.

    q_k ~ Dirichlet(α 1)          the mixture of site k over the T question types; α → ∞ is IID, α = 0.1 nearly one type
    p_kτ = q_kτ / Σ_j q_jτ        the share of the images of type τ that site k gets

Source: Hsu, Qi, Brown 2019, arXiv 1909.06335, where every site draws its own mixture and all are equally large, so that
none of twenty is left with nothing. Differs: sizes follow from p and differ, since no image is dealt twice.

An image whose questions are of several types is dealt for one of them, drawn by its hash, and its site gets its
questions of that type alone. So no image is at two sites, and a site holds what its mixture says.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from accord.data.questions import image_identity, uniform
from accord.data.sites import SiteShare
from accord.errors import DataError, RecipeError, check_least
from accord.types import Question

LEAST = 0.1
"""Of a site's mixture: a type below this is none that the site stands for."""


@dataclass(frozen=True)
class Dealing:
    """How much sites differ; they all draw from all questions, whatever domain or type."""

    alpha: float = 0.1
    images: int = 0  # a site keeps at most so many of those that it is dealt; 0 for all

    def __post_init__(self) -> None:
        """Refuse what no Dirichlet distribution has, and a negative number."""
        check_least(self, images=0)
        if not 0 < self.alpha < math.inf:
            raise RecipeError(
                f"alpha must be a number above 0, got {self.alpha}; correct dealing.alpha, or leave the table out: "
                "sites that name no domains and no types share all images evenly"
            )


def kind_of(question: Question) -> tuple[str, str]:
    """Return what the mixtures are over: domain and type."""
    return question.domain, question.question_type


def mixtures(
    kinds: Sequence[tuple[str, str]], sites: Sequence[str], alpha: float, seed: int
) -> dict[str, dict[tuple[str, str], float]]:
    """Return `q_k` of every site, drawn for it alone: it depends on the seed and the site's name, not on the others."""
    drawn = {}
    for site in sites:
        generator = np.random.default_rng(int(2**48 * uniform("mixture", seed, site)))
        drawn[site] = dict(zip(kinds, generator.dirichlet([alpha] * len(kinds)).tolist(), strict=True))
    return drawn


def deal(
    questions: Sequence[Question], mixed: Mapping[str, Mapping[tuple[str, str], float]], *, seed: int, limit: int = 0
) -> dict[str, list[Question]]:
    """Return each site's questions, in the given order.

    Args:
        questions: usually those of the split `private`.
        mixed: q_k by site, over all the questions' kinds.
        seed: of the draw.
        limit: images that a site keeps at most, drawn by their hashes; 0 for all.

    Raises:
        DataError: a site gets no question.
    """
    identify = image_identity()
    images = [identify(q.image) for q in questions]
    kinds: dict[str, dict[tuple[str, str], None]] = defaultdict(dict)
    for q, image in zip(questions, images, strict=True):
        kinds[image][kind_of(q)] = None
    places = {image: _place(image, sorted(found), mixed, seed) for image, found in kinds.items()}
    kept: dict[str, list[str]] = {site: [] for site in mixed}
    for image in sorted(places, key=lambda image: uniform("keeping", seed, image)):
        site = places[image][0]
        if not limit or len(kept[site]) < limit:
            kept[site].append(image)
    among = {site: set(own) for site, own in kept.items()}
    dealt: dict[str, list[Question]] = {site: [] for site in mixed}
    for q, image in zip(questions, images, strict=True):
        site, kind = places[image]
        if kind_of(q) == kind and image in among[site]:
            dealt[site].append(q)
    for site, own in dealt.items():
        if not own:
            raise DataError(
                f"site {site!r} gets no question of the {len(questions)} by its drawn mixture; use fewer sites, a "
                "larger dealing.alpha, or another seed"
            )
    return dealt


def _place(
    image: str, kinds: Sequence[tuple[str, str]], mixed: Mapping[str, Mapping[tuple[str, str], float]], seed: int
) -> tuple[str, tuple[str, str]]:
    """Return whose an image is, and for which of its kinds."""
    kind = kinds[int(uniform("kind", seed, image) * len(kinds))]
    parts = [mixture[kind] for mixture in mixed.values()]
    ends = list(itertools.accumulate(parts))
    draw = uniform("dealing", seed, image) * ends[-1]
    return next((site for site, end in zip(mixed, ends, strict=True) if draw < end), [*mixed][-1]), kind


def stands_for(site: str, mixture: Mapping[tuple[str, str], float]) -> SiteShare:
    """Return the domains and types that a mixture has in earnest, as a site's share."""
    kept = [kind for kind, part in mixture.items() if part >= LEAST] or [max(mixture, key=lambda kind: mixture[kind])]
    return SiteShare(site, tuple(sorted({domain for domain, _ in kept})), tuple(sorted({kind for _, kind in kept})))

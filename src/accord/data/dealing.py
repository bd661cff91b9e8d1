"""Deal questions out to simulated sites whose mixtures of question types are drawn: how non-IID a federation is.

    q_k ~ Dirichlet(α 1)          the mixture of site k over the T question types; α → ∞ is IID, α = 0.1 nearly one type
    p_kτ = q_kτ / Σ_j q_jτ        the share of the images of type τ that site k gets

Source: Hsu, Qi, Brown 2019, arXiv 1909.06335, where every site draws its own mixture and all are equally large, so that
none of twenty is left with nothing. Differs: sizes follow from p and differ, since no image is dealt twice.

What is dealt is an image with its questions of one type: the site holds what its mixture says. An image with questions
of several types may then be at several sites. Where none may, it is dealt for one of its types, drawn by its hash, and
its other questions belong to no site.

Where the recipe has pictures that are alike dealt to one site instead, `accord.stages.silos` does it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from accord.data.clusters import Similarity
from accord.data.questions import image_identity, together, uniform
from accord.data.sites import SiteShare
from accord.errors import DataError, RecipeError, check_least
from accord.types import Question

Kind: TypeAlias = tuple[str, str]
"""Domain and question type, which the mixtures are over."""

LEAST = 0.1
"""Of a site's mixture: a type below this, and below half an even share, is none that the site stands for."""


@dataclass(frozen=True)
class Dealing:
    """How much sites differ; they all draw from all questions, whatever domain or type."""

    alpha: float = 0.1  # of mixtures of types
    by: Literal["types", "clusters"] = "types"  # mixtures of types are drawn, or pictures alike are at one site
    features: Similarity = "image"  # of clusters: by what pictures are compared
    images: int = 0  # a site keeps at most so many, by types each with its questions of one type; 0 for all

    def __post_init__(self) -> None:
        """Refuse what no Dirichlet distribution has, and a negative number."""
        check_least(self, images=0)
        if not 0 < self.alpha < math.inf:
            raise RecipeError(
                f"alpha must be a number above 0, got {self.alpha}; correct dealing.alpha, or leave the table out: "
                "sites that name no domains and no types share all images evenly"
            )


def kind_of(question: Question) -> Kind:
    """Return what the mixtures are over: domain and type."""
    return question.domain, question.question_type


def mixtures(kinds: Sequence[Kind], sites: Sequence[str], alpha: float, seed: int) -> dict[str, dict[Kind, float]]:
    """Return `q_k` of every site, drawn for it alone: it depends on the seed and the site's name, not on the others."""
    drawn = {}
    for site in sites:
        generator = np.random.default_rng(int(2**48 * uniform("mixture", seed, site)))
        drawn[site] = dict(zip(kinds, generator.dirichlet([alpha] * len(kinds)).tolist(), strict=True))
    return drawn


def deal(
    questions: Sequence[Question],
    mixed: Mapping[str, Mapping[Kind, float]],
    *,
    seed: int,
    limit: int = 0,
    disjoint_images: bool = True,
) -> dict[str, list[Question]]:
    """Return each site's questions, in the given order.

    Args:
        questions: usually those of the split `private`.
        mixed: q_k by site, over all the questions' kinds.
        seed: of the draw.
        limit: of what is dealt to it a site keeps at most so much, drawn by hashes; 0 for all.
        disjoint_images: no image goes to two sites.

    Raises:
        DataError: a site gets no question.
    """
    images = together([q.subjects for q in questions], image_identity())
    units = [(image, kind_of(q)) for image, q in zip(images, questions, strict=True)]
    kinds: dict[str, set[Kind]] = defaultdict(set)
    for image, kind in units:
        kinds[image].add(kind)
    if disjoint_images:
        kinds = {image: {_drawn(image, sorted(found), seed)} for image, found in kinds.items()}
    kept: dict[str, set[tuple[str, Kind]]] = {site: set() for site in mixed}
    possible = [(image, kind) for image, found in kinds.items() for kind in found]
    for unit in sorted(possible, key=lambda unit: uniform("keeping", seed, unit[0], *unit[1])):
        site = _site(*unit, mixed, seed)
        if not limit or len(kept[site]) < limit:
            kept[site].add(unit)
    dealt = {site: [q for q, unit in zip(questions, units, strict=True) if unit in own] for site, own in kept.items()}
    for site, own in dealt.items():
        if not own:
            raise DataError(
                f"site {site!r} gets no question of the {len(questions)} by its drawn mixture; use fewer sites, a "
                "larger dealing.alpha, or another seed"
            )
    return dealt


def _drawn(image: str, kinds: Sequence[Kind], seed: int) -> Kind:
    return kinds[int(uniform("kind", seed, image) * len(kinds))]


def _site(image: str, kind: Kind, mixed: Mapping[str, Mapping[Kind, float]], seed: int) -> str:
    """Return whose an image with its questions of a kind is."""
    ends = list(itertools.accumulate(mixture[kind] for mixture in mixed.values()))
    draw = uniform("dealing", seed, image, *kind) * ends[-1]
    return next((site for site, end in zip(mixed, ends, strict=True) if draw < end), [*mixed][-1])


def stands_for(site: str, mixture: Mapping[Kind, float]) -> SiteShare:
    """Return the domains and types that a mixture has in earnest, as a site's share."""
    least = min(LEAST, 0.5 / len(mixture))  # of twenty types alike each has a twentieth, and the site stands for all
    kept = [kind for kind, part in mixture.items() if part >= least]
    return SiteShare(site, tuple(sorted({domain for domain, _ in kept})), tuple(sorted({kind for _, kind in kept})))

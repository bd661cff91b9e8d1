"""Deal questions out to sites: by domain, by question type, and never the same image twice.

A question without an image is dealt by its own text, and questions that share one of several images as if all their
images were one.

Of an image's m qualifying sites with fractions f_1..f_m, site i gets it with probability f_i / max(1, sum f): where the
fractions ask for more than there is they become weights, and a lone site with f = 0.3 takes 30 % of its images. The
draw is a hash of the image and the seed: no generator's state, and no order of the questions, matters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from accord.data.images import name_of
from accord.data.questions import image_identity, together, uniform
from accord.errors import DataError, RecipeError
from accord.types import Question, Subject


@dataclass(frozen=True)
class SiteShare:
    """What one site holds: questions of its domains and types (empty: of all), about a fraction of their images."""

    name: str
    domains: tuple[str, ...] = ()
    question_types: tuple[str, ...] = ()
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a fraction outside (0, 1]."""
        if not 0 < self.fraction <= 1:
            raise RecipeError(f"the fraction of site {self.name!r} must be in (0, 1], got {self.fraction}; correct it")

    def wants(self, question: Question) -> bool:
        """Return whether domain and type fit."""
        return (not self.domains or question.domain in self.domains) and (
            not self.question_types or question.question_type in self.question_types
        )


def share_out(
    questions: Sequence[Question], shares: Sequence[SiteShare], *, seed: int, disjoint_images: bool = True
) -> dict[str, list[Question]]:
    """Return each site's questions, in the given order.

    Args:
        questions: usually those of one split.
        shares: one per site; the order of sites decides which part of [0, 1) is whose.
        seed: of the draw.
        disjoint_images: no image goes to two sites. Otherwise sites draw independently, each its fraction.

    Raises:
        RecipeError: two sites have one name.
        DataError: a site gets no question.
    """
    names = [share.name for share in shares]
    if len(set(names)) < len(names):
        raise RecipeError(f"two sites have the same name in {names}; name each differently")
    images = together([question.subjects for question in questions], image_identity())
    qualifying: dict[str, list[SiteShare]] = {image: [] for image in images}
    for question, image in zip(questions, images, strict=True):
        found = qualifying[image]
        found.extend(share for share in shares if share not in found and share.wants(question))
    deal = _deal_to_one if disjoint_images else _deal_to_any
    dealt = {
        image: deal(image, [share for share in shares if share in found], seed) for image, found in qualifying.items()
    }
    sites = {
        share.name: [
            question
            for question, image in zip(questions, images, strict=True)
            if share.name in dealt[image] and share.wants(question)
        ]
        for share in shares
    }
    for share in shares:
        if not sites[share.name]:
            raise DataError(_nothing(share, questions))
    return sites


def check_disjoint(parties: Mapping[str, Iterable[Subject]], identify: Callable[[Subject], str] | None = None) -> None:
    """Refuse an image, or a question without one, that two parties hold: tests on what was trained on show nothing.

    Args:
        parties: what holds which images or texts, by the words for it in the message.
        identify: an `image_identity` that has seen them already.

    Raises:
        DataError: names the two parties, how many they share, and one of them.
    """
    identify = identify or image_identity()
    held: dict[str, dict[str, Subject]] = {}
    for party, images in parties.items():
        mine = {identify(image): image for image in images}
        for other, theirs in held.items():
            if shared := [mine[digest] for digest in mine if digest in theirs]:
                first = shared[0]
                what, named = ("question", repr(first)) if isinstance(first, str) else ("image", name_of(first))
                raise DataError(
                    f"{other} and {party} share {len(shared)} {what}s, {named} among them; each must "
                    "be in one of them alone: take it out of the other (`fractions` splits so that none is shared)"
                )
        held[party] = mine


def _deal_to_one(image: str, shares: Sequence[SiteShare], seed: int) -> set[str]:
    total = max(1.0, sum(share.fraction for share in shares))
    draw = uniform("sites", seed, image) * total
    ends = itertools.accumulate(share.fraction for share in shares)
    return set(next(([share.name] for share, end in zip(shares, ends, strict=True) if draw < end), []))


def _deal_to_any(image: str, shares: Sequence[SiteShare], seed: int) -> set[str]:
    return {share.name for share in shares if uniform("sites", seed, image, share.name) < share.fraction}


def _nothing(share: SiteShare, questions: Sequence[Question]) -> str:
    domains = sorted({question.domain for question in questions})
    types = sorted({question.question_type for question in questions})
    return (
        f"site {share.name!r} gets no question of the {len(questions)}: it asks for domains "
        f"{list(share.domains) or 'all'} and question types {list(share.question_types) or 'all'}, "
        f"fraction {share.fraction:g}; domains present: {domains}, question types present: {types}; "
        "correct its share, or raise its fraction"
    )

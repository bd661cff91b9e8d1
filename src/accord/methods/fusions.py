"""Ask every site, and fuse what they say by a rule that knows no router: mean, median, minimum and their relatives.

The rules themselves, with their sources, are in `accord.routing.fusion`. A rule that picks one order statistic needs
scores on both sides of zero: behind the one-sided clip two of three sites that know nothing of a question say 0, and so
would their median, whatever the third says. `median`, `trimmed-mean` and `minimum` therefore get scores clipped to ±2.
"""

from __future__ import annotations

from functools import partial
from typing import Final, Literal

from accord.alignment.reward import FederatedReward
from accord.federation.messages import ScoreRange
from accord.methods.method import Method, by_reward
from accord.routing import fusion
from accord.routing.fusion import Fusion
from accord.stages.alignment import Aligned, federated_reward, run_grpo
from accord.stages.job import Job
from accord.stages.routing import constant_router

TWO_SIDED: Final = ScoreRange(-2.0, 2.0)


def everyone(job: Job, rule: Fusion, scores: ScoreRange | Literal["recipe"] = "recipe") -> FederatedReward:
    """Ask every site, and fuse by `rule`."""
    count = len(job.recipe.sites)
    return federated_reward(job, constant_router([1 / count] * count), mode="soft", fusion=rule, scores=scores)


def plural_alpha(job: Job, stage: str) -> Aligned:
    """Ask every site, and favour those that have been served worse."""
    rule = fusion.PluralAlpha()
    return run_grpo(job, stage, everyone(job, rule), memory=rule)


def _rule(rule: Fusion, about: str, scores: ScoreRange | Literal["recipe"] = "recipe") -> Method:
    make = partial(everyone, rule=rule, scores=scores)
    return Method(
        by_reward(make),
        about,
        needs=frozenset({"sites"}),
        scores=scores,
        asks=lambda recipe: len(recipe.sites),
        together=True,
        reward=make,
    )


METHODS: Final = {
    "average": _rule(fusion.mixture, "all sites alike, the mean of their scores"),
    "median": _rule(fusion.median, "the median of all sites", TWO_SIDED),
    "trimmed-mean": _rule(fusion.trimmed_mean, "the mean without the best and the worst score", TWO_SIDED),
    "minimum": _rule(fusion.minimum, "the worst score", TWO_SIDED),
    "pessimistic": _rule(fusion.Pessimistic(), "mean − ½ variance over the sites"),
    "plural-alpha": Method(
        plural_alpha,
        "all sites, those more that have been served worse",
        needs=frozenset({"sites"}),
        asks=lambda recipe: len(recipe.sites),
        reward=lambda job: everyone(job, fusion.PluralAlpha()),
    ),
}

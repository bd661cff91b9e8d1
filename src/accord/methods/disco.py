"""DISCO: MoR's reward, scaled up where the domain is rare and the prompt hard.

    routed-disco           the domain of a prompt is the site that judges it, its share a running one: ours
    routed-disco-labels    the domain is the question type, which a server with unlabelled prompts does not know

The equations, and what differs, are in `accord.alignment.difficulty`. Source: Zhou et al. 2025, arXiv 2505.15074. It
was made for prompts that come as they are: `balanced = false` in [alignment]. Not to be confused with DisCO, the
discriminative objective (`accord.alignment.discriminative`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

from accord.alignment.difficulty import DomainScaling, type_shares
from accord.alignment.reward import FederatedReward
from accord.errors import RecipeError
from accord.methods.method import Method
from accord.methods.mor import NEEDS, asks
from accord.recipe import Recipe
from accord.routing.router import LearnedRouter
from accord.stages.alignment import Aligned, federated_reward, remembered, run_grpo
from accord.stages.job import Job
from accord.stages.routing import trained_router


def disco(job: Job, stage: str, *, labels: bool) -> Aligned:
    """Align by the scaled rewards, whose advantages are divided by no deviation."""
    scaling = _scaling(job, labels)
    settings = replace(job.recipe.alignment, scale_rewards="none")
    return run_grpo(job, stage, _reward(job, scaling), settings=settings, encoder=job.encoder, memory=scaling)


def disco_reward(job: Job, *, labels: bool) -> FederatedReward:
    """Return the reward with the shares that the sites had when the policy was last aligned by it."""
    scaling = _scaling(job, labels)
    if known := remembered(job.path, "align"):
        scaling.load_state_dict(known)
    return _reward(job, scaling)


def _scaling(job: Job, labels: bool) -> DomainScaling:
    check_range(job.recipe)
    assert job.recipe.scores is not None
    shares = type_shares(job.prompts, balanced=job.recipe.alignment.balanced) if labels else None
    return DomainScaling(len(job.recipe.sites), job.recipe.scores, shares)


def _reward(job: Job, scaling: DomainScaling) -> FederatedReward:
    return federated_reward(job, LearnedRouter(job.encoder, trained_router(job)), scaling=scaling)


def check_range(recipe: Recipe) -> None:
    """Refuse scores without a range: those below 0 have no meaning as a share of what could be reached.

    Raises:
        RecipeError: there is none.
    """
    if recipe.scores is None:
        raise RecipeError(
            "DISCO takes scores from 0 to the highest that is agreed, and scores = None agrees on none; "
            "give [scores] low and high"
        )


def _method(about: str, *, labels: bool) -> Method:
    return Method(
        partial(disco, labels=labels),
        about,
        needs=NEEDS,
        check=check_range,
        asks=asks,
        reward=partial(disco_reward, labels=labels),
    )


METHODS: Final = {
    "routed-disco": _method("as routed, with more weight for hard prompts and for sites that judge few", labels=False),
    "routed-disco-labels": _method("as routed, with more weight for hard prompts and for rare types", labels=True),
}

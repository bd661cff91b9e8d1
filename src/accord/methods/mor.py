"""MoR, Mixture of Rewards: GRPO against the score of the site that a federated client-id router chooses.

    α = softmax(g_φ(Enc(x, y))),    R = R̄_{k*}(x, y),  k* = argmax_k α_k                       `routed`
    k* by Thompson sampling on the router's head, which learns from r_t as the policy is aligned    `mor`

Source: Lu et al. 2026, arXiv 2605.03426. `routed` is its offline part; the others are ablations, and other readings of
what the online router is told. Differs: scores are clipped on one side (`[scores]`), sites may tune their backbones on
reference answers and choose a checkpoint by labelled dev questions; a recipe can switch each off.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

from accord.alignment.feedback import AnchorChange, LossSign, OnlineUpdate, QuantileLoss, RandomBit, Signal
from accord.alignment.grpo import AlignmentConfig
from accord.alignment.reward import FederatedReward, Mode, Scope
from accord.data.preferences import build_preferences
from accord.data.sampling import sample_questions
from accord.errors import DataError
from accord.methods.method import Method, Need, Role, Table, by_reward
from accord.models.encoder import Encoder
from accord.recipe import Recipe
from accord.routing.online import OnlineConfig, OnlineRouter
from accord.routing.router import LearnedRouter, Router, load_router
from accord.stages.alignment import Aligned, federated_reward, remembered, run_grpo
from accord.stages.job import Job
from accord.stages.routing import trained_router

NEEDS: Final[frozenset[Need]] = frozenset({"sites", "router"})

ONLINE: Final = Table("online", OnlineConfig)


def routed(job: Job, *, mode: Mode | None = None, scope: Scope | None = None) -> FederatedReward:
    """Return MoR's reward with the offline router."""
    return federated_reward(job, LearnedRouter(job.encoder, trained_router(job)), mode=mode, scope=scope)


def routed_unclipped(job: Job, *, standardised: bool = True) -> FederatedReward:
    """Return MoR's reward over scores that the sites do not clip, and if not `standardised` over their raw scores."""
    router = LearnedRouter(job.encoder, trained_router(job))
    return federated_reward(job, router, scores=None, standardised=standardised)


def online(job: Job, stage: str, *, signal: Callable[[Job], Signal], config: OnlineConfig | None = None) -> Aligned:
    """Route by Thompson sampling on the offline router's head, which learns from `signal` as the policy is aligned."""
    router = _online_router(job, config)
    update = OnlineUpdate(router, signal(job))
    return run_grpo(job, stage, _online_reward(job, router), encoder=job.encoder, memory=update, callbacks=[update])


def learnt_reward(job: Job, *, config: OnlineConfig | None = None) -> FederatedReward:
    """Return the reward with the head that the online router had in the end."""
    return _online_reward(job, _as_it_ended(_online_router(job, config), job.path))


def _as_it_ended(router: OnlineRouter, run: Path) -> OnlineRouter:
    """Return `router` with what it had learnt when the run's policy was aligned, if it was."""
    if known := remembered(run, "align"):
        state = {name.removeprefix("router."): each for name, each in known.items() if name.startswith("router.")}
        router.load_state_dict(state)
    return router


def _online_router(job: Job, config: OnlineConfig | None) -> OnlineRouter:
    return OnlineRouter(job.encoder, trained_router(job), config or ONLINE.of(job.recipe), seed=job.recipe.seed)


def _online_reward(job: Job, router: OnlineRouter) -> FederatedReward:
    return federated_reward(job, router, mode="top1", scope="completion")


def anchor_change(job: Job) -> AnchorChange:
    """Return the signal of 256 of the server's labelled questions, which MoR itself does not read."""
    if not (labelled := job.questions.get("base", [])):
        raise DataError("no question has the split 'base', which the anchors are made of; give the source some")
    asked = sample_questions(labelled, 256, seed=0)
    pairs = build_preferences(asked, rejected_per_question=1, generator=random.Random(0))
    return AnchorChange(job.policy[1], pairs)


def asks(recipe: Recipe) -> int:
    """Return how many sites judge a completion under the recipe's routing."""
    return 1 if recipe.routing.mode == "top1" else len(recipe.sites)


def opened(folder: Path, recipe: Recipe, encoder: Encoder) -> Router:
    """Return the offline router of a run folder."""
    return LearnedRouter(encoder, load_router(folder / "router"))


def opened_online(folder: Path, recipe: Recipe, encoder: Encoder) -> Router:
    """Return the online router of a run folder as it had become in the end."""
    router = OnlineRouter(encoder, load_router(folder / "router"), ONLINE.of(recipe), seed=recipe.seed)
    return _as_it_ended(router, folder)


def offline(
    make: Callable[[Job], FederatedReward],
    about: str,
    *,
    change: Callable[[AlignmentConfig], AlignmentConfig] = lambda settings: settings,
    many: bool = False,
    scores: Literal["recipe", "raw"] | None = "recipe",
    as_the_recipe: bool = False,
) -> Method:
    """Return GRPO against a reward of the offline router.

    Args:
        make: the reward of a job.
        about: as `Method`.
        change: GRPO's settings from the recipe's.
        many: whether all sites are asked; else as many as the recipe's routing says.
        scores: as `Method`.
        as_the_recipe: whether the router of the run folder alone makes the reward.
    """
    return Method(
        by_reward(make, change=change, reads=lambda job: job.encoder),
        about,
        needs=NEEDS,
        scores=scores,
        grpo=lambda recipe: change(recipe.alignment),
        asks=(lambda recipe: len(recipe.sites)) if many else asks,
        together=True,
        reward=make,
        opened=opened if as_the_recipe else None,
    )


def _online(
    signal: Callable[[Job], Signal], about: str, *, role: Role = "competes", config: OnlineConfig | None = None
) -> Method:
    return Method(
        partial(online, signal=signal, config=config),
        about,
        role=role,
        needs=NEEDS,
        tables=(ONLINE,),
        asks=lambda recipe: 1,
        reward=partial(learnt_reward, config=config),
        opened=opened_online,
    )


METHODS: Final = {
    "routed": offline(
        routed, "the site with the largest weight of the client-id router, per completion", as_the_recipe=True
    ),
    "routed-soft": offline(partial(routed, mode="soft"), "all sites, mixed by its weights", many=True),
    "routed-prompt": offline(partial(routed, scope="prompt"), "one site for all completions of a prompt"),
    "routed-unclipped": offline(routed_unclipped, "as routed, by scores that the sites do not clip", scores=None),
    "routed-raw": offline(partial(routed_unclipped, standardised=False), "as routed, by raw scores", scores="raw"),
    "routed-kl-0": offline(
        routed, "as routed, without the KL term", change=partial(replace, kl=0.0), as_the_recipe=True
    ),
    "routed-kl-0.005": offline(
        routed, "as routed, KL weight 0.005", change=partial(replace, kl=0.005), as_the_recipe=True
    ),
    "routed-kl-0.08": offline(
        routed, "as routed, KL weight 0.08", change=partial(replace, kl=0.08), as_the_recipe=True
    ),
    "mor": _online(lambda job: LossSign(), "Thompson sampling, told whether the GRPO loss did not rise"),
    "mor-raw": _online(
        lambda job: LossSign(),
        "the same on raw logits with an exact ridge",
        config=OnlineConfig(scale="raw", exploration=0.1),
    ),
    "mor-opposite": _online(lambda job: LossSign("-loss"), "the same, told the opposite bit: the formula as printed"),
    "mor-quantile": _online(lambda job: QuantileLoss(), "the same, told the rank of the negative loss"),
    "mor-anchor": _online(anchor_change, "the same, told whether more of 256 public right answers are preferred"),
    "mor-random-feedback": _online(lambda job: RandomBit(job.recipe.seed), "the same, told a coin", role="chance"),
}

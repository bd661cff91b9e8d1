"""FedGRPO: of the sites those judge an answer that are most competent for its question; scalars alone come back.

    auxiliary questions ──► every site answers ──► graded here ──► confidence graph [K, A] ──► Top-M for a question
    candidates ──► the M experts judge (own truth, else reward model or own answer) ──► standardised per expert ──► mean

Source: FedGRPO, arXiv 2602.12014. What it leaves open or prints wrong is in `accord.routing.competence` and
`accord.routing.fusion`. The graph is measured once and kept in the run folder; every method that uses it counts what
that sent.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

from accord.alignment.reward import FederatedReward, PerGroup
from accord.data.dealing import Kind, kind_of
from accord.data.questions import in_turn
from accord.errors import DataError, RecipeError, check_least
from accord.evaluation.summary import competence_summary
from accord.federation.engine import Engine
from accord.federation.messages import Judge
from accord.methods.method import Method, Need, Role, Table
from accord.recipe import Recipe
from accord.routing.competence import (
    CompetenceRouter,
    ConfidenceGraph,
    RandomExperts,
    grade,
    load_graph,
    measure,
    save_graph,
)
from accord.routing.fusion import Fusion, chunks, group_relative, halves, literal
from accord.routing.robust import UNCLIPPED, VarianceGate
from accord.stages.alignment import Aligned, federated_reward, remembered, run_grpo
from accord.stages.job import Job
from accord.stages.sites import open_federation
from accord.stages.traffic import asked_once
from accord.types import Question


@dataclass(frozen=True)
class FedGrpoConfig:
    """How FedGRPO chooses experts, and what it pays for form. The defaults are its paper's and its public code's."""

    auxiliary: int = 100  # A, of the server's labelled questions
    auxiliary_split: Literal["base", "dev"] = "base"  # where they are from; best where no site was tuned
    neighbours: int = 20  # L
    experts: int = 2  # M
    judge: Judge = "reward"  # of an expert that does not own the reference answer: its reward model or its own answer
    refresh_every: int = 0  # steps between two measurements of competence; 0 for one alone
    form: float = 0.125  # reward for good form, added to the standardised one; the public code adds it before
    spread: float = 0.0  # deviation, as a share of the agreed range, below which an expert has no opinion on a group

    def __post_init__(self) -> None:
        """Refuse what leaves no site to ask, and more neighbours than there are items."""
        check_least(self, auxiliary=1, neighbours=1, experts=1, refresh_every=0, form=0, spread=0)
        if self.spread > 1:
            raise RecipeError(f"spread must be at most 1, got {self.spread}; lower fedgrpo.spread")
        if self.neighbours > self.auxiliary:
            raise RecipeError(
                f"neighbours must be at most auxiliary = {self.auxiliary}, got {self.neighbours}; "
                "lower fedgrpo.neighbours or raise fedgrpo.auxiliary"
            )


SETTINGS: Final = Table("fedgrpo", FedGrpoConfig)


@dataclass(frozen=True)
class Variant:
    """One way of doing FedGRPO; the default is the paper's, as far as it can be done.

    Attributes:
        judge: what judges a candidate at an expert that does not own the question's reference answer; by default the
            recipe's.
        truth: whether an expert that owns it judges by it (λ = 1).
        choice: how the experts of a question are chosen.
        fusion: what the experts' scores of a group become.
        experts: M, by default the recipe's.
        neighbours: L, by default the recipe's.
    """

    judge: Judge | None = None
    truth: bool = True
    choice: Literal["competence", "random", "all"] = "competence"
    fusion: Fusion = group_relative
    experts: int = 0
    neighbours: int = 0

    def asks(self, recipe: Recipe) -> int:
        """Return how many sites judge a completion."""
        most = len(recipe.sites)
        return most if self.choice == "all" else min(most, self.experts or SETTINGS.of(recipe).experts)


def fedgrpo(job: Job, stage: str, *, variant: Variant = Variant()) -> Aligned:
    """Align by the experts of every question; the advantages are theirs, so GRPO divides them by no deviation again."""
    experts = expert_router(job, open_federation(job), variant)
    settings = replace(job.recipe.alignment, scale_rewards="none")
    return run_grpo(job, stage, _reward(job, experts, variant), settings=settings, memory=experts)


def fedgrpo_reward(job: Job, *, variant: Variant = Variant()) -> FederatedReward:
    """Return FedGRPO's reward with the graph as the policy was last aligned by it, or as it was first measured."""
    experts = expert_router(job, open_federation(job), variant)
    if known := remembered(job.path, "align"):
        experts.load_state_dict(known)
    return _reward(job, experts, variant)


def _reward(job: Job, experts: CompetenceRouter | RandomExperts, variant: Variant) -> FederatedReward:
    config, scores = SETTINGS.of(job.recipe), job.recipe.scores
    spread = config.spread * (scores.high - scores.low if scores else UNCLIPPED)
    per_group = PerGroup(
        VarianceGate(variant.fusion, spread) if spread else variant.fusion,
        size=job.recipe.alignment.group_size,
        judge=variant.judge or config.judge,
        truth=variant.truth,
        form=config.form,
    )
    return federated_reward(job, experts, mode="soft", scope="prompt", per_group=per_group)


def expert_router(job: Job, engine: Engine, variant: Variant = Variant()) -> CompetenceRouter | RandomExperts:
    """Return what chooses the experts; the confidence graph is measured if it is not there.

    Raises:
        RecipeError: a site does not answer questions, and the choice of experts or their judgement needs that; or the
            range of scores would clip 0 and 1, by which a site says whether an answer is right.
        DataError: no question has the split of the auxiliary questions.
        RunError: no site answered them.
    """
    config, seed = SETTINGS.of(job.recipe), job.recipe.seed
    check_experts(job.recipe, variant=variant)
    if variant.choice != "competence":
        return RandomExperts(engine.sites, variant.asks(job.recipe), seed=seed)
    return CompetenceRouter(
        job.encoder,
        confidence_graph(job, engine),
        sites=engine.sites,
        experts=variant.experts or config.experts,
        neighbours=min(variant.neighbours or config.neighbours, config.auxiliary),
        refresh_every=config.refresh_every,
        seed=seed,
        grade=lambda: grade(engine, auxiliary_questions(job), deadline=job.recipe.routing.deadline),
    )


def check_experts(recipe: Recipe, *, variant: Variant) -> None:
    """Refuse a recipe whose sites cannot judge as `variant` says, or by whose scores they cannot say it.

    Raises:
        RecipeError: as `expert_router`.
    """
    scores, judge = recipe.scores, variant.judge or SETTINGS.of(recipe).judge
    if scores and (variant.truth or judge == "answer") and not scores.low <= 0 < 1 <= scores.high:
        raise RecipeError(
            f"scores between {scores.low} and {scores.high} cannot say 0 for a wrong answer and 1 for a right one, as "
            "FedGRPO's sites do; let [scores] reach from 0 or less to 1 or more"
        )
    silent = [site.name for site in recipe.sites if not site.answers]
    if silent and (variant.choice == "competence" or judge == "answer"):
        raise RecipeError(
            f"site {silent[0]!r} does not answer questions, which FedGRPO chooses experts by; add answers = true to "
            "it, or choose a method without 'fedgrpo' in its name"
        )


def confidence_graph(job: Job, engine: Engine) -> ConfidenceGraph:
    """Return what each site got right of the auxiliary questions; asked once, its bytes count for every user."""
    kept, deadline = _graph_folder(job), job.recipe.routing.deadline

    def ask() -> None:
        save_graph(kept, measure(engine, job.encoder, auxiliary_questions(job), deadline=deadline))

    asked_once(job, engine, kept, ask)
    return load_graph(kept)


def _graph_folder(job: Job) -> Path:
    return job.kept("competence", after="site") / "graph"


def auxiliary_questions(job: Job) -> list[Question]:
    """Return labelled questions of the server's, domains and types equally often.

    Raises:
        DataError: no question has their split.
    """
    config = SETTINGS.of(job.recipe)
    known: dict[Kind, list[Question]] = defaultdict(list)
    for q in job.questions.get(config.auxiliary_split, []):
        known[kind_of(q)].append(q)
    if not known:
        raise DataError(
            f"no question has the split {config.auxiliary_split!r}, which FedGRPO grades sites on; give the source "
            "some, or name another split as fedgrpo.auxiliary_split"
        )
    generator = random.Random(job.recipe.seed)
    queues = [generator.sample(found, len(found))[::-1] for _, found in sorted(known.items())]
    return in_turn(queues, config.auxiliary)


def who_is_good_at_what(job: Job, stage: str, sites: Sequence[str]) -> Mapping[str, object]:
    """Return the summary's `competence`: the graph as the stage's reward last knew it, or as it was first measured."""
    if not _graph_folder(job).is_dir():
        return {}
    graph, config = load_graph(_graph_folder(job)), SETTINGS.of(job.recipe)
    known = remembered(job.path, stage) or {}
    correct = known.get("correct", graph.correct)
    counted = competence_summary(
        sites, graph.types, correct.tolist(), neighbours=config.neighbours, experts=config.experts
    )
    return {"competence": counted}


def _method(variant: Variant, about: str, role: Role = "competes") -> Method:
    needs: set[Need] = {"sites"}
    if variant.choice == "competence" or variant.judge == "answer":
        needs.add("answers")
    return Method(
        partial(fedgrpo, variant=variant),
        about,
        role=role,
        needs=frozenset(needs),
        check=partial(check_experts, variant=variant),
        tables=(SETTINGS,),
        asks=variant.asks,
        reward=partial(fedgrpo_reward, variant=variant),
        findings=who_is_good_at_what,
    )


METHODS: Final = {
    "fedgrpo": _method(Variant(), "the M most competent sites, by the reference answer where they own it"),
    "fedgrpo-reward": _method(
        Variant("reward", truth=False), "the same by their reward models: no site owns an answer"
    ),
    "fedgrpo-answer": _method(Variant("answer", truth=False), "the same by what their own models answer"),
    "fedgrpo-random": _method(Variant(choice="random"), "M sites at random", "chance"),
    "fedgrpo-all": _method(Variant(choice="all"), "all sites"),
    "fedgrpo-reward-random": _method(Variant("reward", truth=False, choice="random"), "M at random", "chance"),
    "fedgrpo-reward-all": _method(Variant("reward", truth=False, choice="all"), "all sites, by their reward models"),
    "fedgrpo-literal": _method(Variant(fusion=literal), "Eqs. 7–9 as printed: no reward but for good form"),
    "fedgrpo-chunks": _method(Variant(fusion=chunks), "a part of the group by each expert: its newest public code"),
    "fedgrpo-halves": _method(Variant(fusion=halves), "the same, each part centred: its code of July 2025"),
    "fedgrpo-reward-1-expert": _method(Variant("reward", truth=False, experts=1), "fedgrpo-reward with M = 1"),
    "fedgrpo-reward-3-experts": _method(Variant("reward", truth=False, experts=3), "fedgrpo-reward with M = 3"),
    "fedgrpo-reward-5-nearest": _method(Variant("reward", truth=False, neighbours=5), "fedgrpo-reward with L = 5"),
    "fedgrpo-reward-50-nearest": _method(Variant("reward", truth=False, neighbours=50), "fedgrpo-reward with L = 50"),
}

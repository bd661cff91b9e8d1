"""FedGRPO: of the sites those judge an answer that are most competent for its question; scalars alone come back.

    auxiliary questions ──► every site answers ──► graded here ──► confidence graph [K, A] ──► Top-M for a question
    candidates ──► the M experts judge (own truth, else reward model or own answer) ──► standardised per expert ──► mean

Source: FedGRPO, arXiv 2602.12014. What it leaves open or prints wrong is in `accord.routing.competence` and
`accord.routing.fusion`. The graph is measured once and kept in the run folder's `competence`; every method that uses it
counts what that sent.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Final, Literal

from accord.alignment.reward import FederatedReward
from accord.data.dealing import Kind, kind_of
from accord.data.questions import in_turn
from accord.errors import DataError, RecipeError
from accord.federation.engine import Engine
from accord.federation.messages import Judge
from accord.pipeline.alignment import Aligned, federated_reward, run_grpo
from accord.pipeline.job import Job
from accord.pipeline.sites import open_federation
from accord.pipeline.traffic import asked_once
from accord.routing.competence import (
    CompetenceRouter,
    ConfidenceGraph,
    RandomExperts,
    grade,
    load_graph,
    measure,
    save_graph,
)
from accord.routing.fusion import Fusion, group_relative
from accord.types import Question

MAIN: Final = "align"
"""The stage of a run's own policy; the graphs of methods that are compared are read by nobody."""


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


def fedgrpo(job: Job, stage: str, *, variant: Variant = Variant()) -> Aligned:
    """Align by the experts of every question; the advantages are theirs, so GRPO divides them by no deviation again."""
    reward = fedgrpo_reward(job, open_federation(job), variant)
    memory = reward.router
    assert isinstance(memory, CompetenceRouter | RandomExperts)
    settings = replace(job.recipe.alignment, scale_rewards="none")
    aligned = run_grpo(job, stage, reward, settings=settings, memory=memory)
    if stage == MAIN and isinstance(memory, CompetenceRouter):  # as it was last measured, for the report
        save_graph(job.path / "competence" / stage, memory.graph)
    return aligned


def fedgrpo_reward(
    job: Job, engine: Engine, variant: Variant = Variant(), graph: ConfidenceGraph | None = None
) -> FederatedReward:
    """Return FedGRPO's reward by `graph`, by default the run's; it is measured if it is not there.

    Raises:
        RecipeError: a site does not answer questions, and the choice of experts or their judgement needs that; or the
            range of scores would clip 0 and 1, by which a site says whether an answer is right.
        DataError: no question has the split of the auxiliary questions.
        RunError: no site answered them.
    """
    config, scores = job.recipe.fedgrpo, job.recipe.scores
    judge = variant.judge or config.judge
    if scores and (variant.truth or judge == "answer") and not scores.low <= 0 < 1 <= scores.high:
        raise RecipeError(
            f"scores between {scores.low} and {scores.high} cannot say 0 for a wrong answer and 1 for a right one, as "
            "FedGRPO's sites do; let [scores] reach from 0 or less to 1 or more"
        )
    silent = [site.name for site in job.recipe.sites if not site.answers]
    if silent and (variant.choice == "competence" or judge == "answer"):
        raise RecipeError(
            f"site {silent[0]!r} does not answer questions, which FedGRPO chooses experts by; add answers = true to it"
        )
    router: CompetenceRouter | RandomExperts
    if variant.choice == "competence":
        config = replace(
            config,
            experts=variant.experts or config.experts,
            neighbours=min(variant.neighbours or config.neighbours, config.auxiliary),
        )
        router = CompetenceRouter(
            job.encoder,
            graph or confidence_graph(job, engine),
            config,
            sites=engine.sites,
            seed=job.recipe.seed,
            grade=lambda: grade(engine, auxiliary_questions(job), deadline=job.recipe.routing.deadline),
        )
    else:
        experts = len(engine.sites) if variant.choice == "all" else variant.experts or config.experts
        router = RandomExperts(engine.sites, experts, seed=job.recipe.seed)
    return federated_reward(
        job,
        engine,
        router,
        mode="soft",
        scope="prompt",
        fusion=variant.fusion,
        within_group=True,
        group_size=job.recipe.alignment.group_size,
        judged_by=judge,
        truth=variant.truth,
        form=config.form,
    )


def confidence_graph(job: Job, engine: Engine) -> ConfidenceGraph:
    """Return what each site got right of the auxiliary questions; asked once, its bytes count for every user."""
    kept, deadline = job.path / "competence" / "graph", job.recipe.routing.deadline

    def ask() -> None:
        save_graph(kept, measure(engine, job.encoder, auxiliary_questions(job), deadline=deadline))

    asked_once(job, engine, kept, ask)
    return load_graph(kept)


def last_graph(job: Job) -> ConfidenceGraph | None:
    """Return the confidence graph as the run's policy was aligned by it, or as it was first measured, if it was."""
    places = [job.path / "competence" / name for name in (MAIN, "graph")]
    return next((load_graph(place) for place in places if place.is_dir()), None)


def auxiliary_questions(job: Job) -> list[Question]:
    """Return labelled questions of the server's, domains and types equally often.

    Raises:
        DataError: no question has their split.
    """
    split = job.recipe.fedgrpo.auxiliary_split
    known: dict[Kind, list[Question]] = defaultdict(list)
    for q in job.questions.get(split, []):
        known[kind_of(q)].append(q)
    if not known:
        raise DataError(
            f"no question has the split {split!r}, which FedGRPO grades sites on; give the source some, or name "
            "another split as fedgrpo.auxiliary_split"
        )
    generator = random.Random(job.recipe.seed)
    queues = [generator.sample(found, len(found))[::-1] for _, found in sorted(known.items())]
    return in_turn(queues, job.recipe.fedgrpo.auxiliary)

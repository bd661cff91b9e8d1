"""Route by the sites' class means, which one round gathers, and abstain where no site knows the prompt.

    means            the site whose mean is nearest to the prompt's state, by one pooled variance    z_k(x)
    means-abstain    the same; nobody where the prompt's density is below every site's 1 % quantile
    routed-abstain   MoR's client-id router, with that abstention

What is abstained from has no reward, None for the whole group, so that it moves nothing but the KL term. The equations
are in `accord.routing.means`. After FedGMM, Wu et al. 2023, arXiv 2305.01068 (novelty by a federated density of
features), and FedDRM, 2025, arXiv 2509.23049 (a choice without n_k); the discriminant of one round, the quantiles and
abstention as an absent reward are ours.

Another organisation's site sends its sums where its operator has agreed to it, by `sums = true` in the site's table.
"""

from __future__ import annotations

from typing import Final

from accord.alignment.reward import FederatedReward
from accord.methods.method import Method, by_reward
from accord.routing.means import (
    Abstaining,
    ClassMeans,
    MeansRouter,
    collect_means,
    load_means,
    save_means,
)
from accord.routing.router import LearnedRouter
from accord.stages.alignment import federated_reward
from accord.stages.job import Job
from accord.stages.routing import trained_router
from accord.stages.sites import open_federation, prompt_sums
from accord.stages.traffic import asked_once
from accord.stages.training import open_training


def class_means(job: Job) -> ClassMeans:
    """Return the class means of this run: gathered once, and every method that routes by them pays the bytes.

    Raises:
        RunError: no site sent any.
    """
    file = job.kept("means", after="site") / "class-means.safetensors"
    engine = open_federation(job) if job.engine else open_training(job, lambda name: {"means": prompt_sums(job, name)})
    asked_once(job, engine, file, lambda: save_means(file, collect_means(engine, job.encoder.features)))
    return load_means(file)


def means(job: Job) -> FederatedReward:
    """Ask the site whose mean is nearest."""
    return federated_reward(job, MeansRouter(job.encoder, class_means(job)), mode="top1")


def means_abstain(job: Job) -> FederatedReward:
    """Ask the site whose mean is nearest, or nobody."""
    return federated_reward(job, MeansRouter(job.encoder, class_means(job), abstains=True), mode="top1")


def routed_abstain(job: Job) -> FederatedReward:
    """Ask the site that the client-id router chooses, or nobody."""
    router = LearnedRouter(job.encoder, trained_router(job))
    return federated_reward(job, Abstaining(router, job.encoder, class_means(job)), mode="top1")


METHODS: Final = {
    "means": Method(
        by_reward(means),
        "the site whose mean of prompts' states is nearest; one round gathers the means",
        needs=frozenset({"sites", "sums"}),
        asks=lambda recipe: 1,
        reward=means,
    ),
    "means-abstain": Method(
        by_reward(means_abstain),
        "the same, and nobody where a prompt's density is below every site's 1 % quantile",
        needs=frozenset({"sites", "sums"}),
        asks=lambda recipe: 1,
        reward=means_abstain,
    ),
    "routed-abstain": Method(
        by_reward(routed_abstain, reads=lambda job: job.encoder),
        "as routed, and nobody where a prompt's density is below every site's 1 % quantile",
        needs=frozenset({"sites", "router", "sums"}),
        asks=lambda recipe: 1,
        reward=routed_abstain,
    ),
}

"""Route by the density of each site's prompts, and abstain or ask everybody where no site has seen such a prompt.

    density            the site whose prompts are densest about the prompt, α_k ∝ f_k(x)
    density-abstain    the same; nobody where log f_k(x) is below every site's 1 % quantile
    density-average    the same; all sites alike there
    routed-average     MoR's client-id router; all sites alike there

The equations are in `accord.routing.density`; after FedGMM, Wu et al. 2023, arXiv 2305.01068. The sums are gathered
where all sites are opened here, as class means are (`accord.methods.means`).
"""

from __future__ import annotations

from typing import Final

from accord.alignment.reward import FederatedReward
from accord.data.images import load_images
from accord.data.sampling import sample_questions
from accord.methods.method import Method, by_reward
from accord.routing.density import (
    LocalMixture,
    Mixtures,
    OrEverybody,
    centres_of,
    collect_mixtures,
    load_mixtures,
    save_mixtures,
)
from accord.routing.means import MeansRouter, features_of
from accord.routing.router import LearnedRouter
from accord.stages.alignment import federated_reward
from accord.stages.job import Job
from accord.stages.routing import trained_router
from accord.stages.sites import site_pairs
from accord.stages.traffic import asked_once
from accord.stages.training import open_training
from accord.types import prompt_of

PUBLIC: Final = 1000
"""Public prompts of which the centres are made, at most."""


def mixtures(job: Job) -> Mixtures:
    """Return the mixtures of this run: gathered once, and every method that routes by them pays the bytes.

    Raises:
        DataError: there are fewer public prompts than components.
        RunError: no site sent any.
    """
    file = job.kept("mixtures", after="site") / "mixtures.safetensors"
    most = job.recipe.router.pairs_per_site
    engine = open_training(job, lambda name: {"means": LocalMixture(job.encoder, site_pairs(job, name), most)})

    def ask() -> None:
        public = sample_questions(job.prompts, PUBLIC, seed=job.recipe.seed)
        x = features_of(job.encoder, [prompt_of(q) for q in public], [load_images(q.images) for q in public])
        save_mixtures(file, collect_mixtures(engine, centres_of(x, seed=job.recipe.seed)))

    asked_once(job, engine, file, ask)
    return load_mixtures(file)


def density(job: Job) -> FederatedReward:
    """Ask the site whose prompts are densest about the prompt."""
    return federated_reward(job, MeansRouter(job.encoder, mixtures(job)), mode="top1")


def density_abstain(job: Job) -> FederatedReward:
    """Ask that site, or nobody."""
    return federated_reward(job, MeansRouter(job.encoder, mixtures(job), abstains=True), mode="top1")


def density_average(job: Job) -> FederatedReward:
    """Ask that site, or everybody."""
    known = mixtures(job)
    router = OrEverybody(MeansRouter(job.encoder, known), job.encoder, known)
    return federated_reward(job, router, mode="soft")


def routed_average(job: Job) -> FederatedReward:
    """Ask the site that the client-id router chooses, or everybody."""
    router = LearnedRouter(job.encoder, trained_router(job))
    return federated_reward(job, OrEverybody(router, job.encoder, mixtures(job)), mode="soft")


METHODS: Final = {
    "density": Method(
        by_reward(density),
        "the site whose prompts are densest about this one; one round gathers the mixtures",
        needs=frozenset({"sites", "private"}),
        asks=lambda recipe: 1,
        reward=density,
    ),
    "density-abstain": Method(
        by_reward(density_abstain),
        "the same, and nobody where the density is below every site's 1 % quantile",
        needs=frozenset({"sites", "private"}),
        asks=lambda recipe: 1,
        reward=density_abstain,
    ),
    "density-average": Method(
        by_reward(density_average),
        "the same, and all sites alike where the density is below every site's 1 % quantile",
        needs=frozenset({"sites", "private"}),
        asks=lambda recipe: len(recipe.sites),
        reward=density_average,
    ),
    "routed-average": Method(
        by_reward(routed_average, reads=lambda job: job.encoder),
        "as routed, and all sites alike where the density is below every site's 1 % quantile",
        needs=frozenset({"sites", "router", "private"}),
        asks=lambda recipe: len(recipe.sites),
        reward=routed_average,
    ),
}

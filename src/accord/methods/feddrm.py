"""The client-id router without its prior: a site is not chosen because it is big (FedDRM's choice).

    k* = argmax_k  log σ(z_k) − log (n_k / Σ_j n_j)        = argmax_k log f_k(h), whatever the n_k

Source: FedDRM, 2025, arXiv 2509.23049, whose head is a softmax and whose choice is argmax_k z_k − log p_k. Differs:
MoR's head learns one against all, and log σ(z_k) takes the place of z_k (`accord.routing.router.without_prior`). By
law, a site that holds every pair twice is chosen no more often. Up to `pairs_per_site` in [router] the sites train it
on all that they have, and beyond it on as many each; where all sites are beyond it, nothing differs.

The router is the one of `routed`: the correction is of the choice alone, as `prior_correction = true` makes it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from accord.alignment.reward import FederatedReward
from accord.methods.mor import offline
from accord.models.encoder import Encoder
from accord.recipe import Recipe
from accord.routing.router import LearnedRouter, Router, RouterNetwork, load_router
from accord.stages.alignment import federated_reward
from accord.stages.job import Job
from accord.stages.routing import trained_router


def corrected(network: RouterNetwork) -> RouterNetwork:
    """Return the network, whose weights forget from now on how many pairs each site has."""
    network.config = replace(network.config, prior_correction=True)
    return network


def routed_ratio(job: Job) -> FederatedReward:
    """Ask the site of the largest density ratio."""
    return federated_reward(job, LearnedRouter(job.encoder, corrected(trained_router(job))))


def opened(folder: Path, recipe: Recipe, encoder: Encoder) -> Router:
    """Return the router of a run folder, without its prior."""
    return LearnedRouter(encoder, corrected(load_router(folder / "router")))


METHODS: Final = {
    "routed-ratio": replace(
        offline(routed_ratio, "as routed, by density ratios: a site is not chosen for its size"), opened=opened
    ),
}

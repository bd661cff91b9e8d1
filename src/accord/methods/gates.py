"""Routers that a few of the server's own labelled questions train: a gate, a judge of correctness, and ours.

    anchors            public pairs from the `base` split, scored once by every site; kept in the run folder
    preference-gate    α = softmax(g(f(x)))                            ArmoRM, Wang et al. 2024, arXiv 2406.12845
    correctness        α = softmax(h(x, y) · E_k), top-1               after BayesianRouter, arXiv 2510.02850, offline
    anchored           α = softmax_k(a z_k(x) + b_k + w_k · f(x))      ours, beside MoR's client-id router z

How the heads are learned, and what the letters mean, is in `accord.routing.gate`. Every method that learns from the
anchors counts what asking for them sent.
"""

from __future__ import annotations

from typing import Final

from accord.alignment.reward import FederatedReward
from accord.data.sampling import sample_questions
from accord.errors import DataError
from accord.federation.engine import Engine
from accord.methods.method import Method, by_reward
from accord.routing.anchors import Anchors, collect, load_anchors, save_anchors
from accord.routing.gate import AnchoredConfig, GateConfig, fit_anchored, fit_correctness, fit_preference_gate
from accord.routing.gated import AnchoredRouter, CorrectnessRouter, PreferenceGate
from accord.routing.router import RouterNetwork
from accord.stages.alignment import federated_reward
from accord.stages.job import Job
from accord.stages.routing import trained_router
from accord.stages.sites import construct_pairs, open_federation
from accord.stages.traffic import asked_once

ANCHOR_QUESTIONS: Final = 200
"""Of the server's labelled questions, which `accord.routing.gate` learns from."""


def public_anchors(job: Job, network: RouterNetwork | None = None) -> Anchors:
    """Return the anchors of this run: the sites are asked once, and every method that learns from them pays the bytes.

    Args:
        job: the run.
        network: the client-id router, where its opinion of the anchors is wanted, too.

    Raises:
        DataError: no question has the split `base`.
    """
    file = job.kept("anchors", after="site" if network is None else "router") / "public-pairs.safetensors"
    engine = open_federation(job)
    asked_once(job, engine, file, lambda: save_anchors(file, _collect(job, engine, network)))
    return load_anchors(file)


def _collect(job: Job, engine: Engine, network: RouterNetwork | None) -> Anchors:
    base = job.questions.get("base", [])
    if not base:
        raise DataError("no question has the split 'base', which anchors are made of; give the source some")
    asked = sample_questions(base, ANCHOR_QUESTIONS, seed=job.recipe.seed)
    return collect(
        engine,
        job.encoder,
        construct_pairs(job.recipe, lambda: job.policy, asked, base, seed=job.recipe.seed),
        network,
        deadline=job.recipe.routing.deadline,
        rows_at_once=job.recipe.router.rows_at_once,
    )


def preference_gate(job: Job) -> FederatedReward:
    """Mix all sites by a gate on the prompt that public preferences trained."""
    network = fit_preference_gate(public_anchors(job), GateConfig(), seed=job.recipe.seed)
    return federated_reward(job, PreferenceGate(job.encoder, network), mode="soft")


def correctness(job: Job) -> FederatedReward:
    """Ask the site that is likeliest to rank the completion right, as public pairs taught."""
    network = fit_correctness(public_anchors(job), GateConfig())
    return federated_reward(job, CorrectnessRouter(job.encoder, network, rows_at_once=job.recipe.router.rows_at_once))


def anchored(job: Job) -> FederatedReward:
    """Mix all sites by MoR's router, corrected by public pairs."""
    client_id = trained_router(job)
    network = fit_anchored(public_anchors(job, client_id), AnchoredConfig())
    return federated_reward(job, AnchoredRouter(job.encoder, client_id, network), mode="soft")


METHODS: Final = {
    "preference-gate": Method(
        by_reward(preference_gate),
        "all sites, mixed by a gate on the prompt that 200 public questions trained",
        needs=frozenset({"sites"}),
        asks=lambda recipe: len(recipe.sites),
        reward=preference_gate,
    ),
    "correctness": Method(
        by_reward(correctness, reads=lambda job: job.encoder),
        "the site that is likeliest right, as 200 public questions taught",
        needs=frozenset({"sites"}),
        asks=lambda recipe: 1,
        reward=correctness,
    ),
    "anchored": Method(
        by_reward(anchored, reads=lambda job: job.encoder),
        "all sites, mixed by the client-id router as 200 public questions correct it",
        needs=frozenset({"sites", "router"}),
        asks=lambda recipe: len(recipe.sites),
        reward=anchored,
    ),
}

"""Compare sites by noisy sketches first: who averages with whom, and who is not asked.

    routed-gated          MoR's client-id router over the sites whose preferred answers are near what the server asks
    fedavg-reward-near    one averaged reward model for each group of sites that are near each other; the router's
                          weights, added up over a group, choose the group

What a sketch is, its noise and its distances are in `accord.routing.sketches`. After PQFed, 2025, arXiv 2509.21704, of
which the abstract alone is known to us; what is done here is ours. A group of one site hands that site's reward model
to the server as it is: nothing is averaged there.

Every run draws a sketch with noise of its own, so that a site's ε is that of all runs together, and no ledger adds it
up. A recipe with a private site is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import set_seed

from accord.alignment.reward import FederatedReward
from accord.data.images import Pictures, load_images
from accord.federation.engine import InProcessEngine, Traffic
from accord.federation.site import Site
from accord.methods.fedavg_reward import SETTINGS as SHARED
from accord.methods.fedavg_reward import local_updates, said_by_base, standardise, train_shared_reward
from accord.methods.method import Method, Table, by_reward, refuse_private
from accord.methods.mor import asks
from accord.models.inputs import chunks
from accord.recipe import Recipe
from accord.rewards.model import RewardModel
from accord.rewards.noise import new_key
from accord.routing.anchors import last_states
from accord.routing.router import LearnedRouter, Router
from accord.routing.sketches import (
    Distances,
    LocalSketch,
    SketchConfig,
    collect_distances,
    load_distances,
    save_distances,
    space_of,
)
from accord.runs import write_atomic
from accord.stages.alignment import Aligned, federated_reward, run_grpo
from accord.stages.job import Job
from accord.stages.routing import trained_router
from accord.stages.sites import site_pairs
from accord.stages.traffic import add_rows, asked_once, traffic_rows
from accord.stages.training import open_training, rounds_told
from accord.types import Prompt, prompt_of

SKETCH: Final = Table("sketch", SketchConfig)

SPENDS: Final = "asks for a sketch of its chosen answers, whose ε is in no ledger"


def distances(job: Job) -> Distances:
    """Return the distances of this run: asked once, and every method that uses them pays the bytes.

    Raises:
        RunError: no site answered.
    """
    config = SKETCH.of(job.recipe)
    file = job.kept("sketches", after="site") / "distances.safetensors"
    engine = open_training(
        job, lambda name: {"means": LocalSketch(job.encoder, site_pairs(job, name), config, new_key())}
    )

    def ask() -> None:
        space = space_of(public_answers(job), config, seed=job.recipe.seed)
        save_distances(file, collect_distances(engine, space, config))

    asked_once(job, engine, file, ask)
    return load_distances(file)


def public_answers(job: Job) -> Tensor:
    """Return the encoder's states after what the base policy says to public prompts, `[n, D]`."""
    asked, said = said_by_base(job)
    parts = []
    for span in chunks([len(texts) for texts in said], job.recipe.router.rows_at_once):
        images = [load_images(q.images) for q in asked[span]]
        parts.append(last_states(*job.encoder([prompt_of(q) for q in asked[span]], images, said[span])))
    return torch.cat(parts)


class Combined:
    """Give each judge the router's weights of its sites: a `Router` over judges, rows summing to 1.

    Args:
        router: over K sites.
        judges: the sites of each judge; those of none have no weight. Some rows may then have no weight at all, where
            the router is sure of a site that has no judge: these are shared out alike.
    """

    def __init__(self, router: Router, judges: Sequence[Sequence[int]]) -> None:
        self.router, self.judges = router, judges

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return weights of the judges `[N, J]`."""
        weights = self.router(prompts, images, completions)
        summed = torch.stack([weights[:, list(sites)].sum(dim=1) for sites in self.judges], dim=1)
        total = summed.sum(dim=1, keepdim=True)
        return torch.where(total > 0, summed / total, 1 / len(self.judges))


class Only:
    """Ask some sites alone: a `Router` with the weights of another, and 0 for all that are set aside."""

    def __init__(self, router: Router, kept: Tensor) -> None:
        self.kept = kept
        self.combined = Combined(router, [[k] for k in kept.nonzero().flatten().tolist()])

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return weights of all sites `[N, K]`."""
        weights = self.combined(prompts, images, completions)
        return weights.new_zeros(len(weights), len(self.kept)).index_copy(1, self.kept.nonzero().flatten(), weights)


def routed_gated(job: Job) -> FederatedReward:
    """Ask the site that the client-id router chooses of those that are not set aside."""
    kept = distances(job).kept(SKETCH.of(job.recipe).far)
    return federated_reward(job, Only(LearnedRouter(job.encoder, trained_router(job)), kept))


def near_rewards(job: Job, stage: str) -> Aligned:
    """Average a reward model within each group of near sites, and align with them at the server."""
    groups = distances(job).groups(SKETCH.of(job.recipe).near)
    sites = [site.name for site in job.recipe.sites]
    folder = job.kept("near-rewards", after="site")
    kept = [folder / "-".join(str(k) for k in group) for group in groups]
    for group, path in zip(groups, kept, strict=True):
        if not path.is_dir():
            _train(job, stage, [sites[k] for k in group], path)
        add_rows(job.traffic, json.loads(path.with_suffix(".json").read_text()))
    judges = {path.name: Site(path.name, RewardModel.load(path), score_range=job.recipe.scores) for path in kept}
    engine = InProcessEngine({name: judge.answer for name, judge in judges.items()})  # at the server itself
    router = Combined(LearnedRouter(job.encoder, trained_router(job)), groups)
    return run_grpo(job, stage, federated_reward(job, router, engine=engine), encoder=job.encoder)


def _train(job: Job, stage: str, sites: Sequence[str], path: Path) -> None:
    config, seed = SHARED.of(job.recipe), job.recipe.seed
    set_seed(seed)
    model = RewardModel.from_checkpoint(config.checkpoint, lora=config.lora)
    with rounds_told(job, stage, config.rounds, about=f"reward model of {', '.join(sites)}") as on_round:
        engine = open_training(job, lambda site: local_updates(model, job.private[site], site_pairs(job, site), config))
        engine.traffic = Traffic()
        train_shared_reward(engine, model, config, seed=seed, sites=sites, on_round=on_round)
    standardise(model, *said_by_base(job))
    write_atomic(path.with_suffix(".json"), json.dumps(traffic_rows(engine.traffic)) + "\n")
    model.save(path)


def _told(recipe: Recipe) -> str:
    config = SHARED.of(recipe)
    return (
        f"at the sites: {config.averaging.told} of a reward model of {config.checkpoint} for each group of near sites"
    )


METHODS: Final = {
    "routed-gated": Method(
        by_reward(routed_gated, reads=lambda job: job.encoder),
        "as routed, without sites whose noisy sketches are far from what is asked",
        needs=frozenset({"sites", "router", "private"}),
        check=refuse_private("routed-gated", SPENDS),
        tables=(SKETCH,),
        asks=asks,
        reward=routed_gated,
    ),
    "fedavg-reward-near": Method(
        near_rewards,
        "a reward model for each group of sites whose noisy sketches are near, averaged over it; routed",
        needs=frozenset({"sites", "router", "private"}),
        check=refuse_private("fedavg-reward-near", f"trains a reward model on its pairs without noise and {SPENDS}"),
        tables=(SKETCH, SHARED),
        training=_told,
    ),
}

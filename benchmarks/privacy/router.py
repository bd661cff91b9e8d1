"""Measure what privacy costs the router: how often it picks a fitting site, against ε.

    python benchmarks/privacy/router.py recipes/privacy/radiology-and-rooms-private.toml

Every site trains the router by `accord.routing.private_fit` on all of its pairs, with the noise that its share of ε
pays for; no reward model is trained. "∞" is the same training of the same router without noise, and "plain" the
ordinary one, neither clipped nor sampled by Poisson. The measure is that of a run, `router/measured.json`: the share
of held-out answers of the policy whose top site holds questions of that kind.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed
from transformers.utils import logging

from accord.data.images import load_images
from accord.data.sampling import sample_questions
from accord.federation.engine import InProcessEngine
from accord.models.generate import answer
from accord.recipe import Recipe
from accord.recipe_file import load_recipe
from accord.rewards.accounting import router_mechanism
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy
from accord.routing.fit import LocalRouterTraining, fit_router
from accord.routing.private_fit import Guarantee
from accord.routing.router import RouterConfig, RouterNetwork
from accord.runs import Run
from accord.stages.job import Job
from accord.stages.sites import site_pairs
from accord.types import prompt_of

SMALL = RouterConfig(layers=1, width=8, heads=1, pairs_per_site=20000)
"""A router that the noise does not drown: of as many weights as a site has pairs, and not two hundred thousand."""

PLAIN = "plain"


def main() -> None:
    parser = argparse.ArgumentParser(description="what privacy costs the router")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[math.inf, 8.0, 3.0, 1.0])
    parser.add_argument("--share", type=float, default=0.3, help="privacy.router")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    recipe = load_recipe(arguments.recipe)
    found: dict[str, list[float]] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        world = World(replace(recipe, seed=seed))
        found.setdefault("as in the recipe, plain", []).append(world.accuracy(recipe.router, None, 0.0))
        found.setdefault("small, plain", []).append(world.accuracy(SMALL, None, 0.0))
        for epsilon in arguments.epsilons:
            name = "∞" if math.isinf(epsilon) else f"ε = {epsilon:g}"
            found.setdefault(name, []).append(world.accuracy(SMALL, epsilon, arguments.share))
        print(f"seed {seed}: " + ", ".join(f"{name} {100 * each[-1]:.1f}" for name, each in found.items()), flush=True)
    print("| " + " | ".join(found) + " |\n|" + " --- |" * len(found))
    print("| " + " | ".join(cell(values) for values in found.values()) + " |")


class World:
    """The sites of a recipe with the features of all of their pairs, and what the policy says to held-out questions."""

    def __init__(self, recipe: Recipe) -> None:
        set_seed(recipe.seed)
        self.recipe = recipe
        job = self.job = Job(recipe, cast(Run, None), quiet=True)
        names = [site.name for site in recipe.sites]
        self.sites = {
            name: LocalRouterTraining(job.encoder, site_pairs(job, name), k, len(names), SMALL)
            for k, name in enumerate(names)
        }
        shares = [*job.shares.values()]
        known = [q for q in job.questions["dev"] if any(share.wants(q) for share in shares)]
        asked = sample_questions(known, 300, seed=0)
        length = recipe.alignment.max_completion_length
        said = answer(*job.policy, asked, max_new_tokens=length, samples=1, seed=0, batch_size=100)
        states = [
            job.encoder(
                [prompt_of(q) for q in asked[n : n + 50]],
                [load_images(q.images) for q in asked[n : n + 50]],
                said[n : n + 50],
            )
            for n in range(0, len(asked), 50)
        ]
        self.held = tuple(
            pad_sequence([row.cpu() for each in states for row in each[part]], batch_first=True) for part in (0, 1)
        )
        self.right = torch.tensor([[share.wants(q) for share in shares] for q in asked])

    def accuracy(self, config: RouterConfig, epsilon: float | None, share: float) -> float:
        """Train a router and return how often it picks a fitting site; `epsilon` is None for the plain training."""
        sigma = 0.0
        privacy = Privacy(epsilon=epsilon or 1.0, router=share)
        if epsilon is not None and not math.isinf(epsilon):
            sigma = router_mechanism(privacy, config.rounds * config.local_steps).sigma
        engine = InProcessEngine(
            {name: self._local(k, name, config, epsilon, sigma, privacy) for k, name in enumerate(self.sites)}
        )
        network = fit_router(engine, self.job.encoder.features, config, seed=self.recipe.seed)
        with torch.no_grad():
            chosen = network.weights(*self.held).argmax(dim=-1)
        return float(self.right[torch.arange(len(chosen)), chosen].double().mean())

    def _local(self, k, name, config, epsilon, sigma, privacy):
        whole = self.sites[name]

        def pay(digest: str, steps: int) -> SecretNoise:
            return SecretNoise(hashlib.sha256(f"{name} {epsilon} {self.recipe.seed} {digest}".encode()).digest())

        guarantee = None if epsilon is None else Guarantee("pair", privacy.sampling, sigma, privacy.clip, "", pay)
        training = LocalRouterTraining(self.job.encoder, whole.pairs, k, len(self.sites), config, guarantee)
        return training


if __name__ == "__main__":
    main()

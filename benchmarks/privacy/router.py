"""Measure what privacy costs the router: how often it picks a fitting site, against ε.

    python benchmarks/privacy/router.py recipes/privacy/radiology-and-rooms-private.toml

No reward model is trained; the router's share of ε buys the noise that it would buy beside one. "∞" is the same
training of the same router without noise, "small" the same router by plain steps, neither clipped nor sampled by
Poisson, and "recipe" the recipe's own router by plain steps. The measure is that of a run, `router/measured.json`: the
share of the policy's answers to held-out questions whose top site holds questions of that kind.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import set_seed
from transformers.utils import logging

from accord.data.images import load_images
from accord.errors import DataWarning
from accord.evaluation.markdown import markdown_table
from accord.federation.engine import InProcessEngine
from accord.federation.messages import UpdateReply
from accord.models.generate import answer
from accord.recipe import Recipe
from accord.recipe_file import load_recipe
from accord.rewards.accounting import router_mechanism
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy
from accord.routing.fit import LocalRouterTraining, fit_router
from accord.routing.private_fit import Guarantee, Make
from accord.routing.router import RouterConfig
from accord.runs import Run
from accord.stages.job import Job
from accord.stages.routing import held_questions
from accord.stages.sites import site_pairs
from accord.types import prompt_of

SMALL = RouterConfig(
    layers=1,
    width=8,
    heads=1,
    rounds=46,
    local_steps=1,
    pairs_per_site=2000,
    aggregation=replace(RouterConfig().aggregation, learning_rate=0.03),
)
"""A router that noise does not drown: 1,600 weights, and not two hundred thousand."""


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
    warnings.simplefilter("ignore", DataWarning)  # of updates that are shortened: noise makes their lengths unequal
    recipe = load_recipe(arguments.recipe)
    found: dict[str, list[float]] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        world = World(replace(recipe, seed=seed))
        right = {"recipe": world.accuracy(recipe.router), "small": world.accuracy(SMALL)}
        for epsilon in arguments.epsilons:
            privacy = Privacy(epsilon=1.0 if math.isinf(epsilon) else epsilon, router=arguments.share)
            sigma = 0.0 if math.isinf(epsilon) else router_mechanism(privacy, SMALL.rounds * SMALL.local_steps).sigma
            name = "∞" if math.isinf(epsilon) else f"ε = {epsilon:g} (σ = {sigma:.1f})"
            right[name] = world.accuracy(SMALL, privacy, sigma)
        for name, value in right.items():
            found.setdefault(name, []).append(100 * value)
        print(f"seed {seed}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in right.items()), flush=True)
    print(markdown_table([*found], [[cell(values) for values in found.values()]]))


def cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


class World:
    """The sites of a recipe, whose features are computed once, and what the policy says to held-out questions."""

    def __init__(self, recipe: Recipe) -> None:
        set_seed(recipe.seed)
        self.seed, self.job = recipe.seed, Job(recipe, cast(Run, None), quiet=True)
        encoder, shares = self.job.encoder, [*self.job.shares.values()]
        names = [site.name for site in recipe.sites]
        self.sites = {
            config: {
                name: LocalRouterTraining(encoder, site_pairs(self.job, name), k, len(names), config)
                for k, name in enumerate(names)
            }
            for config in (recipe.router, SMALL)
        }
        asked = held_questions(self.job)
        length = recipe.alignment.max_completion_length
        said = answer(*self.job.policy, asked, max_new_tokens=length, samples=1, seed=0, batch_size=100)
        states = [
            encoder([prompt_of(q) for q in some], [load_images(q.images) for q in some], said[n : n + 50])
            for n in range(0, len(asked), 50)
            for some in [asked[n : n + 50]]
        ]
        self.held = [
            pad_sequence([row.cpu() for each in states for row in each[part]], batch_first=True) for part in (0, 1)
        ]
        self.right = torch.tensor([[share.wants(q) for share in shares] for q in asked])

    def accuracy(self, config: RouterConfig, privacy: Privacy | None = None, sigma: float = 0.0) -> float:
        """Train a router, with `privacy` by private steps, and return how often it picks a fitting site."""
        for name, site in self.sites[config].items():
            answers = drawn(f"{name} {self.seed}")
            site.guarantee = privacy and Guarantee("pair", privacy.sampling, sigma, privacy.clip, "", answers)
        network = fit_router(InProcessEngine(self.sites[config]), self.job.encoder.features, config, seed=self.seed)
        with torch.no_grad():
            chosen = network.weights(*self.held).argmax(dim=-1)
        return float(self.right[torch.arange(len(chosen)), chosen].double().mean())


def drawn(key: str) -> Callable[[str, int, Make], UpdateReply]:
    """Return answers that are neither paid for nor kept, and whose noise is the same in every run."""

    def answers(digest: str, _steps: int, make: Make) -> UpdateReply:
        return make(SecretNoise(hashlib.sha256(f"{key} {digest}".encode()).digest()))

    return answers


if __name__ == "__main__":
    main()

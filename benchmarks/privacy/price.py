"""Measure what privacy costs a reward model: the ranking of held-out pairs against ε and the number of pairs.

    python benchmarks/privacy/price.py recipes/worlds/radiology-and-rooms.toml recipes/worlds/captions.toml
    python benchmarks/privacy/price.py recipes/worlds/radiology-and-rooms.toml --sites radiology --pairs 1000 \\
        --ways head adapter labels props

Held out are the pairs of a quarter of a site's questions. Features are computed once per site and kept in `--cache`,
which then holds private data; a cell takes a second, with an adapter 20. "∞" is the same training without noise: what
the frozen backbone costs against a reward model that is trained whole is in the site's card of an ordinary run, not
here.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from accord.models.load import LoraSettings
from accord.recipe_file import load_recipe
from accord.rewards.accounting import calibrate, label_mechanism
from accord.rewards.audit import margins
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, pair_features, private_head, unit_index
from accord.rewards.private_adapter import fresh_model, private_adapter
from accord.rewards.private_labels import draw_flips, label_head
from accord.runs import Run
from accord.stages.job import Job
from accord.stages.sites import site_pairs
from accord.types import PreferencePair

EPSILONS = (math.inf, 8.0, 3.0, 1.0)
SILENT = Sigmas(0.0, 0.0, 0.0)
LORA = LoraSettings(rank=4, alpha=8)
WAYS = {
    "head": Privacy(),
    "adapter": Privacy(dimensions=0, sampling=0.1, steps=40),
    "labels": Privacy(unit="label"),
    "props": Privacy(unit="label", stages=2),
}
"""DP-SGD on a head and on an adapter; randomised response in one stage and in PROPS' two."""


def main() -> None:
    parser = argparse.ArgumentParser(description="what privacy costs a reward model")
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--sites", nargs="+", help="of these alone")
    parser.add_argument("--pairs", type=int, nargs="+", default=[500, 2000, 0], help="to train on; 0 for all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["head"], choices=list(WAYS))
    parser.add_argument("--unit", default="pair", choices=["pair", "question"], help="with a head")
    parser.add_argument("--cache", type=Path, default=Path("runs/privacy"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    noise = {
        way: {e: noise_of(settings, e) for e in EPSILONS} for way, settings in WAYS.items() if way in arguments.ways
    }
    shown = ("∞" if math.isinf(e) else f"ε = {e:g}" for e in EPSILONS)
    print("| world | site | pairs | units | way | " + " | ".join(shown) + " |")
    print("|" + " --- |" * (5 + len(EPSILONS)))
    for recipe in arguments.recipes:
        for site in cached(recipe, arguments.cache, arguments.sites):
            for way, count in itertools.product(arguments.ways, arguments.pairs):
                rows: dict[float, list[float]] = {e: [] for e in EPSILONS}
                sizes = []
                for seed in range(arguments.seeds):
                    train, test = split(site.question, count, seed)
                    unit = torch.arange(len(train)) if arguments.unit == "pair" else reindexed(site.question[train])
                    sizes.append((len(train), int(unit.max()) + 1))
                    for epsilon, mechanism in noise[way].items():
                        key = hashlib.sha256(f"{site.name} {way} {seed} {epsilon}".encode()).digest()
                        right = ranked(site, way, train, test, unit, mechanism, SecretNoise(key))
                        rows[epsilon].append(float((right > 0).double().mean()))
                if count == 0 or count <= sizes[0][0]:
                    cells = " | ".join(cell(values) for values in rows.values())
                    print(
                        f"| {recipe.stem} | {site.name} | {sizes[0][0]} | {sizes[0][1]} | {way} | {cells} |", flush=True
                    )


@dataclass(frozen=True)
class Site:
    """Features `[N, 2, D]` and the question of every pair, and how to get the pairs themselves."""

    name: str
    checkpoint: str
    features: Tensor
    question: Tensor
    job: Job

    @property
    def pairs(self) -> list[PreferencePair]:
        return site_pairs(self.job, self.name)


def noise_of(settings: Privacy, epsilon: float) -> Sigmas | float:
    """Return the noise for ε: that of DP-SGD, or the probability of a flip."""
    if settings.unit == "label":
        return 0.0 if math.isinf(epsilon) else label_mechanism(replace(settings, epsilon=epsilon)).flip
    return SILENT if math.isinf(epsilon) else calibrate(replace(settings, epsilon=epsilon))


def ranked(
    site: Site, way: str, train: Tensor, test: Tensor, unit: Tensor, mechanism: Sigmas | float, noise: SecretNoise
) -> Tensor:
    """Train, and return the margins of the held-out pairs."""
    settings = WAYS[way]
    if isinstance(mechanism, float):
        turned = draw_flips(len(train), mechanism, noise)[:, None, None]
        given = site.features[train]
        head = label_head(torch.where(turned, given.flip(1), given), mechanism, settings, noise)
        return margins(head, site.features[test])
    if way == "head":
        return margins(private_head(site.features[train], unit, settings, mechanism, noise), site.features[test])
    model, pairs = fresh_model(site.checkpoint, LORA, noise), site.pairs
    private_adapter(model, [pairs[n] for n in train.tolist()], unit, settings, mechanism.gradient, noise)
    held = pair_features(model, [pairs[n] for n in test.tolist()])
    return margins(model.head.state_dict()["weight"][0], held)


def cell(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def reindexed(names: Tensor) -> Tensor:
    return names.unique(return_inverse=True)[1]


def split(question: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return which pairs train and which are held out, of other questions."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(question.max()) + 1, generator=generator)
    held = torch.isin(question, order[: max(1, len(order) // 4)])
    train = (~held).nonzero().flatten()
    return train[torch.randperm(len(train), generator=generator)[: count or len(train)]], held.nonzero().flatten()


def cached(path: Path, cache: Path, names: Sequence[str] | None) -> list[Site]:
    """Return the sites of a recipe with the features of their pairs, which are computed where they are not kept."""
    recipe = load_recipe(path)
    job = Job(recipe, cast(Run, None), quiet=True)
    found = []
    for site in recipe.sites:
        if names and site.name not in names:
            continue
        file = cache / f"{recipe.name}-{site.name}.safetensors"
        if not file.exists():
            pairs = site_pairs(job, site.name)
            features = pair_features(RewardModel.from_checkpoint(site.checkpoint), pairs)
            cache.mkdir(parents=True, exist_ok=True)
            save_file({"features": features, "question": unit_index(pairs, "question")}, file)
        held = load_file(file)
        found.append(Site(site.name, site.checkpoint, held["features"], held["question"], job))
    return found


if __name__ == "__main__":
    main()

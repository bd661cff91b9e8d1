"""Measure what privacy costs a reward model: the ranking of held-out pairs against ε and the number of pairs.

    python benchmarks/privacy/price.py recipes/worlds/radiology-and-rooms.toml recipes/worlds/captions.toml

Held out are the pairs of a quarter of a site's questions. Features are computed once per site and kept in `--cache`,
which then holds private data; a cell takes a second. "∞" is the same training without noise: what the frozen backbone
costs against a reward model that is trained whole is in the site's card of an ordinary run, not here.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from accord.recipe_file import load_recipe
from accord.rewards.accounting import calibrate
from accord.rewards.audit import margins
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, pair_features, private_head, unit_index
from accord.runs import Run
from accord.stages.job import Job
from accord.stages.sites import site_pairs

EPSILONS = (math.inf, 8.0, 3.0, 1.0)
SILENT = Sigmas(0.0, 0.0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="what privacy costs a reward model")
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--pairs", type=int, nargs="+", default=[500, 2000, 0], help="to train on; 0 for all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--unit", default="pair", choices=["pair", "question"])
    parser.add_argument("--cache", type=Path, default=Path("runs/privacy"))
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    base = replace(Privacy(), unit=arguments.unit)
    noise = {e: SILENT if math.isinf(e) else calibrate(replace(base, epsilon=e)) for e in EPSILONS}
    print(
        "| world | site | pairs | units | "
        + " | ".join("∞" if math.isinf(e) else f"ε = {e:g}" for e in EPSILONS)
        + " |"
    )
    print("|" + " --- |" * (4 + len(EPSILONS)))
    for recipe in arguments.recipes:
        for site, features, question in cached(recipe, arguments.cache):
            for count in arguments.pairs:
                rows: dict[float, list[float]] = {e: [] for e in EPSILONS}
                sizes = []
                for seed in range(arguments.seeds):
                    train, test = split(question, count, seed)
                    unit = torch.arange(len(train)) if arguments.unit == "pair" else reindexed(question[train])
                    sizes.append((len(train), int(unit.max()) + 1))
                    for epsilon, sigmas in noise.items():
                        stream = SecretNoise(hashlib.sha256(f"{site} {seed} {epsilon}".encode()).digest())
                        head = private_head(features[train], unit, base, sigmas, stream)
                        rows[epsilon].append(float((margins(head, features[test]) > 0).double().mean()))
                if count == 0 or count <= sizes[0][0]:
                    shown = " | ".join(cell(values) for values in rows.values())
                    print(f"| {recipe.stem} | {site} | {sizes[0][0]} | {sizes[0][1]} | {shown} |", flush=True)


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


def cached(path: Path, cache: Path) -> list[tuple[str, Tensor, Tensor]]:
    """Return per site its name, the features of its pairs, and the question of each."""
    recipe = load_recipe(path)
    job = Job(recipe, cast(Run, None), quiet=True)
    found = []
    for site in recipe.sites:
        file = cache / f"{recipe.name}-{site.name}.safetensors"
        if not file.exists():
            pairs = site_pairs(job, site.name)
            features = pair_features(RewardModel.from_checkpoint(site.checkpoint), pairs)
            cache.mkdir(parents=True, exist_ok=True)
            save_file({"features": features, "question": unit_index(pairs, "question")}, file)
        held = load_file(file)
        found.append((site.name, held["features"], held["question"]))
    return found


if __name__ == "__main__":
    main()

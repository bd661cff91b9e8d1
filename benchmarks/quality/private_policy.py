"""What does privacy cost the aligned policy? Accuracy against ε, with reward models that are trained privately.

    accord bench recipes/privacy/radiology-and-rooms-private.toml --seeds 3     trains the router
    python benchmarks/quality/private_policy.py recipes/privacy/radiology-and-rooms-private.toml --trained runs/bench

A cell costs the heads of all sites and an alignment; the router reads no judgement. "inf" is the same head on the same
frozen backbone without noise. What is measured is kept, and the same command goes on where it stopped.

    <out>/<recipe>/<epsilon>/<seed>/     a run folder: compare/<method>.json
    <out>/<recipe>/private.md            mean over seeds ± half its 95 % t-interval, in per cent,
                                         and CIDEr-D times 100
"""

import argparse
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from liars import opened, shown

from accord.errors import AccordError
from accord.evaluation.markdown import markdown_table
from accord.evaluation.table import CIDER, MATCHING, PREFERRED, macro
from accord.federation.site import SiteRecord
from accord.methods import check_methods
from accord.pipeline.cells import cells_of
from accord.pipeline.comparison import compare
from accord.recipe import Recipe
from accord.recipe_file import import_methods, load_recipe
from accord.rewards.accounting import calibrate
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, pair_features, private_head, private_standardisation, unit_index
from accord.runs import write_atomic
from accord.stages.job import Job
from accord.stages.sites import site_pairs

SILENT = Sigmas(0.0, 0.0, 0.0)
IN_DOMAIN = "in-domain accuracy"
DESCRIBED = (PREFERRED, MATCHING, CIDER)  # what is measured of captions


def head(job: Job, name: str, epsilon: float) -> bool:
    """Train a site's private head from a known key, as no real site may; at infinity without noise."""
    with job.doing(f"site {name}"):
        pairs = site_pairs(job, name)
        privacy = Privacy() if math.isinf(epsilon) else Privacy(epsilon=epsilon)
        sigmas = SILENT if math.isinf(epsilon) else calibrate(privacy)
        noise = SecretNoise(hashlib.sha256(f"{name} {job.recipe.seed} {epsilon}".encode()).digest())
        model, unit = RewardModel.from_checkpoint(job.site(name).checkpoint), unit_index(pairs, privacy.unit)
        features = pair_features(model, pairs).double()
        weights = private_head(features, unit, privacy, sigmas, noise)
        model.standardisation = private_standardisation(features @ weights, unit, sigmas.standardisation, noise)
        model.head.load_state_dict({"weight": weights[None], "bias": torch.zeros(1)})
        model.save(job.path / "sites" / name / "reward")
        record = SiteRecord(len(job.private[name]), len(pairs), any(pair.constructed for pair in pairs), {}, None)
        write_atomic(job.path / "sites" / name / "card.json", msgspec.json.encode(record))
    return True


def measure(recipe: Recipe, folder: Path, trained: Path, methods: Sequence[str], epsilon: str) -> None:
    """Measure the cells of one folder that are not measured."""
    with opened(recipe, folder, trained, methods, lambda job, name: head(job, name, float(epsilon))) as job:
        for method in methods:
            if not job.run.done(f"compare {method}"):
                compare(job, method)


def report(folder: Path, epsilons: Sequence[str], types: Sequence[str]) -> str:
    """Write the table of a recipe's folder, and return it."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for place in sorted(folder.glob("*/*")):
        for cell in cells_of(place) if place.name.isdecimal() else []:
            for measure in [name for name in DESCRIBED if name in cell.correct] or [IN_DOMAIN]:
                value = macro(cell, types if measure == IN_DOMAIN else [measure])
                if value is not None:
                    found[cell.method, measure][place.parent.name].append(100 * value)
    lines = [[*row, *(shown(values.get(e, [])) for e in epsilons)] for row, values in found.items()]
    text = markdown_table(["method", "measure, in hundredths", *(f"ε = {e}" for e in epsilons)], lines)
    write_atomic(folder / "private.md", text + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--trained", type=Path, required=True, help="of a bench: <trained>/<recipe>/<seed> has the router"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epsilons", default="inf,8,3,1")
    parser.add_argument("--methods", default="routed")
    parser.add_argument("--out", type=Path, default=Path("runs/private"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, methods = import_methods(load_recipe(options.recipe)), options.methods.split(",")
    check_methods(base, methods)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        recipe = replace(base, seed=seed, compare=(), tried={})
        for epsilon in options.epsilons.split(","):
            folder = options.out / base.name / epsilon / str(seed)
            try:
                measure(recipe, folder, options.trained / base.name / str(seed), methods, epsilon)
            except AccordError as error:
                raise SystemExit(f"error: {error}") from error
            print(f"{base.name} ε = {epsilon}, seed {seed}: measured", flush=True)
    print(report(options.out / base.name, options.epsilons.split(","), base.prompts.question_types))


if __name__ == "__main__":
    main()

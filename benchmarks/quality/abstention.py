"""Does a router know that a prompt belongs to no site? AUROC and shares on real features, over seeds.

    python benchmarks/quality/abstention.py recipes/held-out.toml recipes/compositions.toml --seeds 3

Sites are dealt their questions anew with each seed. Features are the states of the base policy before the answer, of at
most 500 questions a site and of 1200 dev questions; no reward model is trained. Unknown are the dev questions of types
that no site holds. In further rows one site is left out, and its types are unknown in place of those.

    AUROC        how often a known prompt has a larger margin, max_k log f_k(x) − q_k, than an unknown one
    abstained    share of the known and of the unknown prompts that are below every site's quantile
    right        share of the known prompts that go to a site that holds their type, by the mixtures or else the means

`diagonal` is what `means-abstain` does, `mixture` what `density-abstain` does; each has a choice of its own. `full` has
the whole covariance of a site, of which 5 % of what is beside the diagonal is dropped: D² numbers a site.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from accord.data.images import load_images
from accord.evaluation.markdown import markdown_table
from accord.methods.density import PUBLIC
from accord.recipe_file import load_recipe
from accord.routing.density import Centres, Mixtures, centres_of, sketch
from accord.routing.means import QUANTILE, SHRINKAGE, ClassMeans, features_of, sums_of
from accord.stages.job import Job
from accord.types import Question, prompt_of

SITE, NEW = 500, 1200


def read(job: Job, questions: Sequence[Question], most: int) -> tuple[Tensor, list[Question]]:
    """Return the features `[n, D]` of at most `most` questions, and these."""
    drawn = random.Random(job.recipe.seed).sample(list(questions), min(most, len(questions)))
    prompts, images = [prompt_of(q) for q in drawn], [load_images(q.images) for q in drawn]
    return features_of(job.encoder, prompts, images), drawn


def class_means(sites: Sequence[Tensor]) -> ClassMeans:
    """Return what the server has of sites with these features `[n, D]`."""
    sums = [sums_of(x) for x in sites]
    counts = torch.tensor([len(x) for x in sites], dtype=torch.float64)
    return ClassMeans(counts, *(torch.stack([s[name] for s in sums]) for name in ("total", "square", "quantile")))


def mixtures_of(sites: Sequence[Tensor], centres: Centres) -> Mixtures:
    """Return what the server has of sites with these features `[n, D]`, by the same centres."""
    told = [sketch(x, centres) for x in sites]
    return Mixtures(*(torch.stack([each[name] for each in told]) for name in ("count", "total", "square", "quantile")))


def full(sites: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return the margins `[P]` of features `[P, D]` by Gaussians of whole covariance, quantiles as in `means`."""
    margins = []
    for rows in sites:
        rows = rows.double()
        halves = rows[0::2], rows[1::2]
        own = [gaussian(other)(half) for half, other in (halves, halves[::-1])]
        margins.append(gaussian(rows)(x.double()) - torch.cat(own).quantile(QUANTILE))
    return torch.stack(margins).amax(dim=0)


def gaussian(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the log density of the Gaussian of rows `[n, D]`."""
    covariance = rows.T.cov(correction=0)
    covariance = torch.lerp(covariance, torch.diag(covariance.diagonal() + 1e-6), SHRINKAGE)
    return cast(Callable[[Tensor], Tensor], MultivariateNormal(rows.mean(dim=0), covariance).log_prob)


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Return how often a value of `known` is above one of `unknown`, ties counting half."""
    above, equal = known[:, None] > unknown, known[:, None] == unknown
    return (above.double() + 0.5 * equal.double()).mean().item()


def measure(recipe_file: Path, seed: int) -> dict[tuple[str, str], tuple[float, float, float, float]]:
    """Return AUROC, shares abstained from and the share that is right, by what is unknown and by density."""
    job = Job(replace(load_recipe(recipe_file), seed=seed), cast(Any, None), quiet=True)
    sites = {name: read(job, questions, SITE)[0] for name, questions in job.private.items()}
    x, asked = read(job, job.questions["dev"], NEW)
    fits = torch.tensor([[job.shares[name].wants(q) for name in sites] for q in asked])
    centres = centres_of(read(job, job.prompts, PUBLIC)[0], seed=seed)
    found = {}
    for gone in (None, *sites):
        here = [k for k, name in enumerate(sites) if name != gone]
        known, judged = fits[:, here].any(dim=1), torch.ones(len(x), dtype=torch.bool)
        if gone is not None:
            judged = fits.any(dim=1)
        rows = [list(sites.values())[k] for k in here]
        means = class_means(rows)
        mixed = mixtures_of(rows, centres)
        for density, margin, choice in (
            ("diagonal", means.margin(x), means),
            ("mixture", mixed.margin(x), mixed),
            ("full", full(rows, x), means),
        ):
            top = choice.posterior(x).argmax(dim=1)
            right = fits[:, here][known, top[known]].double().mean().item()
            inside, outside = margin[known & judged], margin[~known & judged]
            shares = [(each < 0).double().mean().item() for each in (inside, outside)]
            found[gone or "types of no site", density] = (auroc(inside, outside), *shares, right)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for file in options.recipes:
        runs = [measure(file, seed) for seed in range(options.seeds)]
        for unknown, density in runs[0]:
            columns = zip(*(run[unknown, density] for run in runs), strict=True)
            area, inside, outside, right = (list(column) for column in columns)
            cells = [", ".join(f"{value:.3f}" for value in area)]
            cells += [", ".join(f"{100 * value:.1f}" for value in shares) for shares in (inside, outside, right)]
            lines.append([file.stem, unknown, density, *cells])
    heads = ["recipe", "unknown", "density", "AUROC by seed", "known abstained, %", "unknown abstained, %", "right, %"]
    print(markdown_table(heads, lines))


if __name__ == "__main__":
    main()

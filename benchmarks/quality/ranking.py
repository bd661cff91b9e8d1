"""Rank held-out public pairs by every site and every router: the paper's Table 4, without any alignment.

    python benchmarks/quality/ranking.py runs/bench/held-out/0 runs/bench/held-out/1 …

Each folder is a run whose sites and router are trained, one seed each. Routers that learn do so from 200 questions of
the `base` split; ranked are the pairs of 300 questions of the `dev` split, of every type, also those no site holds.
A cell is the mean over the runs ± half its 95 % t-interval, in percent.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from pairwise_ranking import RankingRow, ranking_table
from transformers.utils import logging

from accord.data.sampling import sample_questions
from accord.evaluation.intervals import half_width
from accord.methods.gates import public_anchors
from accord.recipe_file import load_recipe
from accord.routing.anchors import collect
from accord.routing.gate import (
    AnchoredConfig,
    GateConfig,
    anchored_weights,
    correctness_weights,
    fit_anchored,
    fit_correctness,
    fit_preference_gate,
    preference_weights,
)
from accord.runs import Run
from accord.stages.job import Job
from accord.stages.routing import trained_router
from accord.stages.sites import construct_pairs, open_federation


def rank_run(folder: Path) -> list[RankingRow]:
    """Return the table of one run."""
    recipe = load_recipe(folder / "recipe.toml")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    with Run.resume(folder, (folder / "recipe.toml").read_text()) as run:
        job = Job(recipe, run, quiet=True)
        client_id = trained_router(job)
        anchors = public_anchors(job, client_id)
        dev = sample_questions(job.questions["dev"], 300, seed=0)
        pairs = construct_pairs(recipe, lambda: job.policy, dev, job.questions["base"], seed=1)
        held_out = collect(open_federation(job), job.encoder, pairs, client_id)
    gate = fit_preference_gate(anchors, GateConfig(), seed=recipe.seed)
    correct, anchored = fit_correctness(anchors, GateConfig()), fit_anchored(anchors, AnchoredConfig())
    routers = {
        "all alike": lambda a: torch.full_like(a.scores, 1 / a.sites),
        "client id (MoR, offline)": lambda a: a.logits.softmax(dim=-1),
        "preference gate": lambda a: preference_weights(gate, a),
        "correctness": lambda a: correctness_weights(correct, a),
        "anchored": lambda a: anchored_weights(anchored, a),
    }
    return ranking_table(held_out, [pair.question_type for pair in pairs], [s.name for s in recipe.sites], routers)


def main(folders: list[str]) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    cells: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    counts: dict[str, int] = {}
    for folder in sorted(folders):
        for row in rank_run(Path(folder)):
            if (row.name, row.mode) == ("all alike", "top1"):
                continue  # that would be the first site
            values = cells[row.name, row.mode]
            for kind, found in row.accuracy.by_type.items():
                values[kind].append(found.accuracy)
                counts[kind] = found.n
            values["macro"].append(row.accuracy.macro)
            values["two judges"].append(row.two_judges)
        print(f"{folder} done", file=sys.stderr, flush=True)
    heading = [f"{kind} (n = {n})" for kind, n in counts.items()]
    print("| | mode | runs | " + " | ".join([*heading, "macro", "two judges"]) + " |")
    print("|" + "---|" * (len(counts) + 5))
    for (name, mode), values in cells.items():
        shown = [cell(values[kind]) for kind in (*counts, "macro", "two judges")]
        print(f"| {name} | {mode} | {len(values['macro'])} | " + " | ".join(shown) + " |")


def cell(values: list[float]) -> str:
    half = half_width(values)
    return f"{100 * statistics.mean(values):.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])

"""The same base aligned by other methods: what the routed federation is measured against."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from accord.evaluation.accuracy import count_correct, images_by_type, outcomes_by_type, shuffle_images
from accord.evaluation.summary import Accuracy, accuracy, accuracy_by_image
from accord.evaluation.table import CONTROLS
from accord.federation.engine import Traffic
from accord.methods import find_method
from accord.pipeline.captions import COLUMNS, RIGHT, measure_captions, measure_shuffled, write_captions
from accord.recipe import Recipe
from accord.runs import commit, write_atomic
from accord.stages.alignment import greedy
from accord.stages.job import Job
from accord.stages.traffic import add_stage, traffic_rows
from accord.types import Question

Ask: TypeAlias = Callable[[Sequence[Question], str], list[str]]
"""Answers questions of a split, "dev" or "test"."""


def compare(job: Job, arm: str) -> None:
    """Align the base by another method; note its accuracy, with its own and with other images, bytes and seconds."""
    stage = f"compare {arm}"
    method = find_method(arm, [site.name for site in job.recipe.sites])
    with job.doing(stage, needs=method.needs):
        began = time.monotonic()
        run_traffic, job.traffic = job.traffic, Traffic()  # what a comparison sends is not part of the run's bytes
        try:
            model, processor = method.align(job, stage)
            if "router" in method.needs:  # a method that uses it pays for its training
                add_stage(job, "router")
            sent = traffic_rows(job.traffic)
        finally:
            job.traffic = run_traffic

        def ask(questions: Sequence[Question], split: str) -> list[str]:
            return greedy(model, processor, questions, job.recipe)

        said = answers(job, ask)
        measured = measure(job, said)
        if job.recipe.captions:
            write_captions(job, arm_file(job.path, arm).with_suffix(".md"), said["test"])
        noted = {"traffic": sent, "seconds": round(time.monotonic() - began, 1), "commit": commit()}
        write_arm(job, arm, {**measured, **with_other_images(job, ask), **role_noted(job.recipe, arm), **noted})
    # Not before the stage is done: killed in between, it would have every step to do again.
    shutil.rmtree(job.path / "checkpoints" / stage, ignore_errors=True)


def answers(job: Job, ask: Ask) -> dict[str, list[str]]:
    """Return what a policy says, by split, to every question of "dev" and "test"."""
    return {"dev": ask(job.questions["dev"], "dev"), "test": ask(job.evaluated, "test")}


def measure(job: Job, said: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """Return what a policy answers right: counts on dev and test by type, and the outcome of every test question.

    Args:
        job: the run.
        said: `answers` of the policy.
    """
    if job.recipe.captions:
        return measure_captions(job, said)
    outcomes = outcomes_by_type(job.evaluated, said["test"])
    return {
        "dev": count_correct(job.questions["dev"], said["dev"]),
        "test": {name: (sum(found), len(found)) for name, found in outcomes.items()},
        "outcomes": outcomes,
    }


def with_other_images(job: Job, ask: Ask) -> dict[str, object]:
    """Return the counts on test with every image replaced by another of its domain; nothing where there is no image.

    A policy that answers as well without the image that was asked about has not looked at it. All methods of a seed are
    shown the same other images.
    """
    if all(q.image is None for q in job.evaluated):
        return {}
    other = shuffle_images(job.evaluated, seed=job.recipe.seed)
    said = ask(other, "test")
    return {"shuffled": measure_shuffled(job, said) if job.recipe.captions else count_correct(other, said)}


def write_arm(job: Job, arm: str, measured: Mapping[str, object]) -> None:
    """Write what was measured, a line a field, and beside it which test questions these outcomes are of.

    compare/<arm>.json        {"dev": {type: [right, n]}, "test": …, "outcomes": {type: [1, 0, …]}, …}
    compare/questions.json    {type: [[question id, number of its image], …]}, in the order of the outcomes
    """
    asked: dict[str, list[tuple[str, int]]] = {}
    for name, images in images_by_type(job.evaluated, job.identify).items():
        ids = [q.id for q in job.evaluated if q.question_type == name]
        asked[name] = [*zip(ids, images, strict=True)]
    if job.recipe.captions:  # every column is of all photographs
        asked = {name: [(q.id, n) for n, q in enumerate(job.evaluated)] for name in COLUMNS}
    write_atomic(questions_file(job.path), _a_line_a_field(asked))
    write_atomic(arm_file(job.path, arm), _a_line_a_field(measured))


def _a_line_a_field(record: Mapping[str, object]) -> str:
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in record.items()]
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"


def questions_file(run: Path) -> Path:
    """Return where a run folder says which test questions its comparisons' outcomes are of."""
    return run / "compare" / "questions.json"


def role_noted(recipe: Recipe, arm: str) -> dict[str, str]:
    """Return the method's place in a table as its file notes it; nothing for what is no method, a bench's controls."""
    if arm in CONTROLS:
        return {}
    return {"role": find_method(arm, [site.name for site in recipe.sites]).role}


def arm_file(run: Path, arm: str) -> Path:
    """Return where a comparison's result is in the folder of a run."""
    return run / "compare" / f"{arm.replace(' ', '-').replace(':', '-')}.json"


def arm_accuracy(job: Job, arm: str) -> Accuracy:
    """Return what a comparison measured on the test questions; of captions, matching by topic."""
    place = str(arm_file(job.path, arm).relative_to(job.path))
    file = job.need(place, "accord run RECIPE --resume", f"compare {arm}")
    measured = json.loads(file.read_text())
    if job.recipe.captions:
        return accuracy({name: (sum(found), len(found)) for name, found in measured[RIGHT].items()})
    if "outcomes" in measured:  # older files have counts alone
        return accuracy_by_image(measured["outcomes"], images_by_type(job.evaluated, job.identify))
    return accuracy({name: (right, n) for name, (right, n) in measured["test"].items()})

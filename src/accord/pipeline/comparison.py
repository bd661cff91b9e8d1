"""The same base aligned by other methods: what the routed federation is measured against."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from accord.evaluation.accuracy import count_correct
from accord.evaluation.summary import Accuracy, accuracy
from accord.evaluation.table import CONTROLS
from accord.federation.engine import Traffic
from accord.methods import find_method
from accord.recipe import Recipe
from accord.runs import commit, write_atomic
from accord.stages.alignment import greedy
from accord.stages.job import Job
from accord.stages.traffic import add_stage, traffic_rows


def compare(job: Job, arm: str) -> None:
    """Align the base by another method; note its accuracy on dev and test, its bytes and its seconds."""
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
        counts = {
            name: count_correct(questions, greedy(model, processor, questions, job.recipe))
            for name, questions in (("dev", job.questions["dev"]), ("test", job.evaluated))
        }
        seconds = round(time.monotonic() - began, 1)
        measured = {**counts, **role_noted(job.recipe, arm), "traffic": sent, "seconds": seconds, "commit": commit()}
        write_atomic(arm_file(job.path, arm), json.dumps(measured, indent=2) + "\n")
    # Not before the stage is done: killed in between, it would have every step to do again.
    shutil.rmtree(job.path / "checkpoints" / stage, ignore_errors=True)


def role_noted(recipe: Recipe, arm: str) -> dict[str, str]:
    """Return the method's place in a table as its file notes it; nothing for what is no method, a bench's controls."""
    if arm in CONTROLS:
        return {}
    return {"role": find_method(arm, [site.name for site in recipe.sites]).role}


def arm_file(run: Path, arm: str) -> Path:
    """Return where a comparison's result is in the folder of a run."""
    return run / "compare" / f"{arm.replace(' ', '-').replace(':', '-')}.json"


def arm_accuracy(job: Job, arm: str, split: str) -> Accuracy:
    """Return what a comparison measured on `split`, "dev" or "test"."""
    place = str(arm_file(job.path, arm).relative_to(job.path))
    file = job.need(place, "accord run RECIPE --resume", f"compare {arm}")
    counts = json.loads(file.read_text())[split]
    return accuracy({name: (right, n) for name, (right, n) in counts.items()})

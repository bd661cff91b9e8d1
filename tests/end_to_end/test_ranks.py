"""`accord run` under a launcher: two processes over gloo do what one does, and only the first speaks to the sites."""

import json
import os
import subprocess
import sys

import pytest

from accord.errors import RecipeError, RunError
from accord.pipeline.ranks import check_together
from accord.recipe_file import recipe_of
from accord.runs.checkpoints import seal
from accord.stages.alignment import run_grpo

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def records(folder, stage):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def run(recipe, out, *launcher):
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "accord.cli", "run", str(recipe), "--out", str(out), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


@pytest.mark.slow
@pytest.mark.usefixtures("ranks_alone")
def test_two_processes_align_as_one_does(write_recipe, tmp_path):
    """With the same global batch: the same rewards, losses, routing, accuracy, and bytes to the sites."""
    recipe = write_recipe(tmp_path / "two.toml", compare=["ground-truth"])
    one, two = tmp_path / "one", tmp_path / "two"
    run(recipe, one)
    told = run(recipe, two, *LAUNCHER)
    assert told.stdout.count("report:") == 1  # one process speaks
    for stage in ("site", "align", "compare ground-truth", "evaluation"):
        alone, together = records(one, stage), records(two, stage)
        assert len(alone) == len(together) > 0
        for left, right in zip(alone, together, strict=True):
            assert left.keys() == right.keys()
            for key, value in left.items():
                if isinstance(value, float | dict):
                    assert right[key] == pytest.approx(value, abs=2e-4), (stage, key)
                else:
                    assert right[key] == value
    bytes_of = [json.loads((folder / "traffic" / "align.json").read_text()) for folder in (one, two)]
    messages = [[row[:3] for row in rows] for rows in bytes_of]
    assert messages[0] == messages[1]  # a message a site and step, however many processes ask


def test_a_checkpoint_of_another_number_of_processes_is_refused(job):
    folder = job.path / "checkpoints" / "align" / "checkpoint-2"
    folder.mkdir(parents=True)
    for rank in range(2):
        (folder / f"rng_state_{rank}.pth").write_bytes(b"")
    seal(folder)
    with pytest.raises(RunError, match=r"written by 2 processes, and this is a run of 1; resume with as many, or rem"):
        run_grpo(job, "align", lambda prompts, completions, **_: [])


def test_what_learns_on_the_way_is_one_processs(tiny_recipe):
    check_together(recipe_of({**tiny_recipe, "method": "routed", "compare": ["average", "ground-truth"]}))
    with pytest.raises(RecipeError, match=r"the method 'mor' trains or learns more than the policy"):
        check_together(recipe_of({**tiny_recipe, "method": "mor"}))

"""`accord run` killed during alignment and resumed, FLARE's server killed meanwhile: nothing is lost (threat T25)."""

import json
import random
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS = 6  # of the recipe's alignment


def aligned(run):
    """The measurements of the alignment, line by line."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["stage"] == "align"]


def checkpoints(run):
    """The steps that are safe: a checkpoint's folder is renamed into place when it is whole."""
    names = [path.name.partition("-")[2] for path in run.rglob("checkpoint-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def go_on(consortium, recipe, run, name):
    words = ("run", recipe, "--out", run, "--engine", "flare", "--kit", consortium.kits / "server")
    return consortium.start(name, *words, *(["--resume"] if run.exists() else []))


def await_step(consortium, run, name, step, seconds=240):
    until = time.monotonic() + seconds
    while not any(found >= step for found in checkpoints(run)):
        assert consortium.processes[name].poll() is None, consortium.log(name)
        assert time.monotonic() < until, consortium.log(name)
        time.sleep(0.02)


@pytest.mark.long
def test_a_run_that_is_killed_twice_ends_as_one_that_was_not(consortium, recipe, in_process, tmp_path):
    """SIGKILL at a seeded moment within a step, twice; once more resumed, the run loses FLARE's server.

    A step that lost sites would have other rewards: with a quorum of all, it waits until they are back.
    """
    chance = random.Random(25)
    patient = tmp_path / "patient.toml"
    text = recipe.read_text()
    assert text.count("[routing]\n") == 1
    patient.write_text(text.replace("[routing]\n", "[routing]\nquorum = 1.0\n"))
    run = consortium.root / "killed"
    for n in range(2):
        step = max(checkpoints(run), default=0) + 1
        go_on(consortium, patient, run, f"run-{n}")
        await_step(consortium, run, f"run-{n}", step)
        time.sleep(chance.uniform(0.0, 0.1))
        assert consortium.processes[f"run-{n}"].poll() is None
        consortium.kill(f"run-{n}")
        assert not (run / "policy").exists()
    process = go_on(consortium, patient, run, "run-2")
    consortium.await_log("run-2", "a segment with")
    consortium.kill("server")
    time.sleep(1.0)
    assert process.poll() is None
    consortium.start_server()
    assert process.wait(600) == 0, consortium.log("run-2")
    assert "waiting for" in consortium.log("run-2")  # it noticed
    assert aligned(run) == aligned(in_process) and len(aligned(run)) >= STEPS
    for file in ("policy/model.safetensors", "router/router.safetensors"):
        assert (run / file).read_bytes() == (in_process / file).read_bytes()
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["resumed"]) == 2

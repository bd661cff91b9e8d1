"""A run that was stopped goes on to the same bytes: by Ctrl-C in a site's stage or in GRPO, or by a torn checkpoint."""

import json
import shutil
import sys
import time

import pytest

from accord.runs import read_lines, stages_done

STOP_IN_ALIGNMENT = """
import os, signal
from accord.cli import main
from accord.stages import alignment
save = alignment._Seal.on_save
def on_save(self, args, state, control, **rest):
    save(self, args, state, control, **rest)
    if state.global_step == 2:
        os.kill(os.getpid(), signal.SIGINT)
alignment._Seal.on_save = on_save
main()
"""


def same(run, other):
    """Equal files; only that images are sent again to sites that were started again."""
    files = ("metrics.jsonl", "policy/model.safetensors", "traffic/router.json")
    rows, others = (json.loads((each / "traffic" / "align.json").read_text()) for each in (run, other))
    again = [row.pop(3) >= whole.pop(3) for row, whole in zip(rows, others, strict=True)]
    return all(again) and rows == others and all((run / f).read_bytes() == (other / f).read_bytes() for f in files)


@pytest.fixture(scope="module")
def stopped(finished, start, tmp_path_factory):
    """The finished run again, stopped by Ctrl-C once GRPO has saved its second checkpoint: recipe and run folder."""
    recipe, _, _, _ = finished
    run = tmp_path_factory.mktemp("stopped") / "run"
    process = start([sys.executable, "-c", STOP_IN_ALIGNMENT, "run", recipe, "--out", run, "--quiet"])
    _, err = process.communicate(timeout=250)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    assert not (run / "policy").exists()
    found = sorted(path.name for path in (run / "checkpoints" / "align").glob("checkpoint-*"))
    assert found == ["checkpoint-1", "checkpoint-2"]
    return recipe, run


def test_ctrl_c_during_alignment(stopped, finished, accord, tmp_path):
    """Steps 1 and 2 from before, 3 and 4 after: every record and weight is the uninterrupted run's."""
    recipe, run = stopped
    shutil.copytree(run, tmp_path / "run")
    status, _, err = accord("run", recipe, "--out", tmp_path / "run", "--quiet", "--resume")
    assert (status, err) == (0, "")
    assert same(tmp_path / "run", finished[1])
    attempts = [row["done"] for row in read_lines(tmp_path / "run" / "timings.jsonl") if row["stage"] == "align"]
    assert attempts == [False, True]


@pytest.mark.filterwarnings("default::accord.errors.DataWarning")
@pytest.mark.parametrize(("lost", "state"), [("manifest.json", "incomplete"), ("traffic.json", "damaged")])
def test_a_half_written_checkpoint_is_passed_over(stopped, finished, accord, tmp_path, lost, state):
    """Without its seal or a file that is in it, step 2 is done again from checkpoint 1; the user is told."""
    recipe, run = stopped
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "align" / "checkpoint-2" / lost).unlink()
    status, _, err = accord("run", recipe, "--out", tmp_path / "run", "--quiet", "--resume")
    assert status == 0
    assert err.count("warning:") == 1 and f"checkpoint-2 is {state} ({lost}: missing)" in err
    assert same(tmp_path / "run", finished[1])


def test_ctrl_c_during_a_site(finished, start, script, accord, tmp_path):
    """Stopped from outside while the second site trains: the first is kept, the second starts over."""
    recipe, whole, _, _ = finished
    run = tmp_path / "run"
    process = start([script, "run", recipe, "--out", run, "--quiet"])
    until = time.monotonic() + 200
    while not stages_done(run) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    kept = (run / "sites" / "colour" / "reward" / "head.safetensors").stat().st_mtime_ns
    status, _, err = accord("run", recipe, "--out", run, "--quiet")
    assert status == 2 and "already holds a run" in err and "--resume" in err
    status, _, err = accord("run", recipe, "--out", run, "--quiet", "--resume")
    assert (status, err) == (0, "")
    assert same(run, whole)
    assert (run / "sites" / "colour" / "reward" / "head.safetensors").stat().st_mtime_ns == kept

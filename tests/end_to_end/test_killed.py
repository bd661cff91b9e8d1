"""A run killed in its alignment, or out of disk there, again and again, ends with the bytes of one left alone.

A process dies by SIGKILL at a moment that is drawn from a seed: some while after its n-th touch of a file among the
checkpoints. So it may die while it takes the folder over, verifies or loads a checkpoint, in a step, or between the
files of a new checkpoint.
"""

import hashlib
import json
import random
import shutil
import signal
import sys

import pytest

from accord.runs import read_lines
from accord.runs.checkpoints import MANIFEST

DYING = """
import os, signal, sys, threading, time
from accord.cli import main

run, place, count, delay = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
sys.argv = ["accord", *sys.argv[5:]]

def die():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):
    global count
    if event == "open" or event.startswith(("os.", "shutil.")):
        path = str(arguments[0]) if arguments else ""
        if place in path and path.startswith(run):
            count -= 1
            if count == 0:
                threading.Thread(target=die, daemon=True).start() if delay else die()

sys.addaudithook(watch)
main()
"""

FULL = """
import errno, os, sys, threading
from accord.cli import main

run, place, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv = ["accord", *sys.argv[4:]]

def watch(event, arguments):
    global count
    path = str(arguments[0]) if event == "open" else ""
    if path.startswith(run) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        count -= place in path
        if count <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

sys.addaudithook(watch)
try:
    main()
finally:
    left = [thread.name for thread in threading.enumerate() if not thread.daemon]
    print("threads", *left, file=sys.stderr)
"""
"""From the n-th file on that is opened for writing among the checkpoints, no file of the run can be: a full disk."""

APPEARS = ("checkpoint-2/", 1, 0.0)
"""As the first file of the second checkpoint is opened: its folder is there, and empty."""
UNSEALED = ("checkpoint-4/.manifest.json", 1, 0.0)
"""As the manifest is begun: all that it names is there."""


def moments(seed, count):
    """Draw moments: to take over, verify and load takes some 45 touches, a step 60 and 0.15 seconds on one core."""
    draw = random.Random(seed)
    return [("checkpoints/align/", draw.randint(1, 110), draw.uniform(0.0, 0.2)) for _ in range(count)]


def unaligned(run, to):
    """Copy a finished run as it was before its alignment."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("policy", "align.json", "summary.json", "report.html"))
    done = json.loads((to / "stages.json").read_text())["done"]
    assert done[-2:] == ["align", "evaluation"]
    (to / "stages.json").write_text(json.dumps({"done": done[:-2]}))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (to / "metrics.jsonl").write_text(
        "".join(x for x in lines if json.loads(x)["stage"] not in ("align", "evaluation"))
    )
    return to


def fingerprint(run):
    """Return the hashes of what must be equal, and how often each site was asked and silent.

    Bytes are counted as they were sent: a new process numbers its requests from 1, and sends images again.
    """
    files = ("metrics.jsonl", "policy/model.safetensors")
    rows = json.loads((run / "traffic" / "align.json").read_text())
    asked = [(site, kind, messages, absences) for site, kind, messages, _, _, absences in rows]
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files} | {"asked": asked}


def kill_until_done(start, recipe, run, whole, deaths):
    """Kill the run at every moment in turn, then let it end; compare it with the one that was left alone."""
    command = ["run", recipe, "--out", run, "--resume", "--quiet"]
    told, unsealed = "", []
    for place, count, delay in [*deaths, ("never", 1, 0.0)]:
        process = start([sys.executable, "-c", DYING, run, place, count, delay, *command])
        _, err = process.communicate(timeout=120)
        assert process.returncode == (0 if place == "never" else -signal.SIGKILL), err
        told += err
        if place.startswith("checkpoint-"):
            unsealed.append(place.partition("/")[0])
            left = run / "checkpoints" / "align" / unsealed[-1]
            assert left.is_dir() and not (left / MANIFEST).exists()
    assert unsealed and all(f"{name} is incomplete (manifest.json: missing)" in told for name in unsealed)
    assert fingerprint(run) == fingerprint(whole)
    attempts = [row["done"] for row in read_lines(run / "timings.jsonl") if row["stage"] == "align"]
    assert attempts == [True, True]  # that of the copied run, and one: nobody who is killed notes a time
    assert not (run / "checkpoints" / "align").exists()


@pytest.mark.slow
def test_a_killed_run_loses_nothing(finished, start, tmp_path):
    """Once as a checkpoint's folder appears, then once at random: steps 1 to 4 once each, the same weights."""
    recipe, whole, _, _ = finished
    run = unaligned(whole, tmp_path / "run")
    assert not (run / "policy").exists() and "align" not in (run / "metrics.jsonl").read_text()
    kill_until_done(start, recipe, run, whole, [APPEARS, *moments(43, 1)])
    steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if row["stage"] == "align" and "reward" in row]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_killed_twenty_times_loses_nothing(write_recipe, tiny_recipe, start, script, tmp_path):
    """Of 60 steps, each saved: at both ends of a checkpoint's writing, then at random."""
    alignment = {**tiny_recipe["alignment"], "steps": 60}
    recipe, whole = write_recipe(tmp_path / "tiny.toml", alignment=alignment), tmp_path / "whole"
    process = start([script, "run", recipe, "--out", whole, "--quiet"])
    _, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    run = unaligned(whole, tmp_path / "run")
    kill_until_done(start, recipe, run, whole, [APPEARS, UNSEALED, *moments(1, 18)])


def fill_until_done(start, recipe, run, whole, counts):
    """Let the disk be full at every count in turn, then have room; each time the process ends, with one thread."""
    for count in [*counts, 10**9]:
        command = ["run", recipe, "--out", run, "--resume", "--quiet"]
        process = start([sys.executable, "-c", FULL, run, "checkpoints/align/", count, *command])
        _, err = process.communicate(timeout=250)  # it fails where a process has told its result, and does not end
        assert process.returncode == (0 if count == 10**9 else 2), err
        assert err.splitlines()[-1] == "threads MainThread" and "Traceback" not in err
        assert ("the disk is full" in err) == (count != 10**9)
        assert not [path for path in run.rglob("*") if ".partial-" in path.name]
    assert fingerprint(run) == fingerprint(whole)


@pytest.mark.slow
def test_a_run_that_is_resumed_after_a_full_disk_ends(finished, start, tmp_path):
    """Full among the files of a checkpoint; with room again the run ends by itself, with the weights of one process."""
    recipe, whole, _, _ = finished
    fill_until_done(start, recipe, unaligned(whole, tmp_path / "run"), whole, [random.Random(3).randint(2, 40)])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_run_whose_disk_is_full_twenty_times_ends(finished, start, tmp_path):
    """At counts that are drawn: each time at one of the ten files of the first checkpoint, its seal among them."""
    recipe, whole, _, _ = finished
    draw = random.Random(7)
    counts = [draw.randint(1, 10) for _ in range(20)]
    fill_until_done(start, recipe, unaligned(whole, tmp_path / "run"), whole, counts)

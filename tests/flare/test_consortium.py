"""The same recipe between organisations as in one process: real FLARE, mutual TLS, a process group for each site."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def federated(consortium, recipe):
    """The run between organisations: its folder, and what it said."""
    out = consortium.root / "run"
    words = ("run", recipe, "--out", out, "--engine", "flare", "--kit", consortium.kits / "server")
    done = consortium.accord(*words)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def records(run):
    """Everything measured at the server; sites note theirs in their own folders."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["stage"] != "site"]


def test_metrics_and_weights_are_bit_equal(federated, in_process):
    """Losses, rewards, routing and accuracies of router, alignment and evaluation, and the aligned policy."""
    run, _ = federated
    assert records(run) == records(in_process) and len(records(run)) > 8
    for file in ("policy/model.safetensors", "router/router.safetensors"):
        assert (run / file).read_bytes() == (in_process / file).read_bytes()


def test_a_site_that_trains_alone_makes_the_same_model(consortium, recipe, in_process):
    folder = consortium.root / "alone"
    done = consortium.accord("site", "train", recipe, "shape", "--out", folder, "--quiet")
    assert done.returncode == 0, done.stderr
    theirs, made = in_process / "sites" / "shape", folder / "sites" / "shape"
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file())
    assert Path("card.json") in files and any(file.suffix == ".safetensors" for file in files)
    assert [file for file in files if (made / file).read_bytes() != (theirs / file).read_bytes()] == []


def test_nothing_of_a_site_is_at_the_server(federated):
    run, _ = federated
    assert not (run / "sites").exists()

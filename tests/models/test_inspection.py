"""Hostile checkpoints are refused before anything in them is run, built or rendered."""

import json
import os
import pickle
import subprocess
import sys

import pytest

import hostile_checkpoints as hostile
from accord.errors import CheckpointError
from accord.models.inspection import inspect_checkpoint, inspect_weights
from accord.models.load import SHIPPED, LoraSettings
from accord.models.probe import try_pattern, try_template
from accord.rewards.model import RewardModel

SECONDS, BYTES = 2, 256 * 2**20
GOOD = SHIPPED / "llava-clip-llama"
BARE = "code for an unknown kind"


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Return what became of every artefact, by how it was tried and its name; one process forks for each."""
    place = tmp_path_factory.mktemp("hostile")
    RewardModel.from_checkpoint(str(GOOD), lora=LoraSettings(rank=2, alpha=4)).save(place / "reward")
    trials = {
        **{("model", name): (GOOD, change) for name, change in hostile.MODELS.items()},
        **{("reward", name): (place / "reward", change) for name, change in hostile.REWARDS.items()},
        **{("open", name): (GOOD, hostile.MODELS[name]) for name in hostile.PASS},
        ("bare", BARE): (GOOD, hostile.MODELS[BARE]),
    }
    lines = [json.dumps(str(GOOD))]
    for number, ((how, _), (good, change)) in enumerate(trials.items()):
        (place / str(number)).mkdir()
        lines.append(json.dumps([how, str(hostile.make(good, place / str(number), change))]))
    ended = subprocess.run(
        [sys.executable, hostile.__file__],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(place / "hub"), "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"raised"')]
    marked = [(place / str(number) / "marker").exists() for number in range(len(trials))]
    return {trial: {**one, "marked": mark} for trial, one, mark in zip(trials, found, marked, strict=True)}


ALL = [*(("model", name) for name in hostile.MODELS), *(("reward", name) for name in hostile.REWARDS)]


@pytest.mark.parametrize("trial", ALL, ids=lambda trial: trial[1])
def test_it_is_refused_at_once_and_runs_nothing(tried, trial):
    """T15: a typed error, no marker, at most 2 s of CPU and 256 MB, the processes that were started among them."""
    found = tried[trial]
    assert found["raised"] in ("CheckpointError", "RecipeError"), found
    assert not found["marked"]
    assert found["cpu"] <= SECONDS and found["bytes"] <= BYTES, found


def test_without_the_inspection_the_code_runs(tried):
    """What transformers does by itself, where somebody's `yes` is piped in."""
    assert tried["bare", BARE]["marked"]


@pytest.mark.parametrize("name", hostile.PASS)
def test_without_the_inspection_it_is_loaded(tried, name):
    assert tried["open", name]["raised"] == ""


def test_the_pickles_are_armed(tmp_path):
    (tmp_path / "folder").mkdir()
    pickle.loads(hostile.pickled(tmp_path / "folder"))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("folder", sorted(SHIPPED.iterdir()), ids=lambda folder: folder.name)
def test_what_ships_passes(folder):
    assert inspect_checkpoint(folder) == (folder / "model.safetensors").stat().st_size


def test_tensors_are_counted_before_they_are_read(tmp_path):
    """A header of 20,000 tensors has more than 1 MiB and is not parsed; one of 12,000 has less, and is."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(hostile.header(hostile.empty_tensors(20_000)))
    with pytest.raises(CheckpointError, match=r"its header has 1,\d{3},\d{3} bytes, at most 1,048,576 are read"):
        inspect_weights(file)
    file.write_bytes(hostile.header(hostile.empty_tensors(12_000)))
    with pytest.raises(CheckpointError, match=r"names 12,000 tensors, at most 10,000"):
        inspect_weights(file)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
        "{{ raise_exception('no system prompts') }}",
        "{{ strftime_now('%Y') }}{{ messages | tojson(indent=2) }}{{ unknown.thing }}",
    ],
)
def test_templates_of_the_usual_kinds_pass(source):
    assert try_template(source) == ""


def test_a_template_that_makes_too_much():
    assert "1,000,000 characters" in try_template("{% for i in range(9999) %}{{ 'x' * 999 }}{% endfor %}")


def test_a_template_that_is_none():
    assert "is no template" in try_template("{% for %}")


# GPT-2's, Llama 3's and Qwen 2's patterns, and what the engine cannot read.
@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", ""),
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
            "",
        ),
        ("(", "is no regular expression"),
    ],
)
def test_patterns(pattern, reason):
    assert (reason in try_pattern(pattern)) and bool(reason) == bool(try_pattern(pattern))

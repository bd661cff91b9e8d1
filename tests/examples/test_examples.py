import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from accord.errors import RunError
from accord.models.load import load_model
from accord.models.tiny import FAMILIES
from accord.pipeline import open_reward
from accord.rewards.model import RewardModel
from accord.types import vqa_prompt

ROOT = Path(__file__).resolve().parents[2]


def run(script, *arguments, launcher=()):
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_router():
    """The script asserts its own numbers; the table has a row for each of four questions."""
    lines = run("examples/own_router.py").splitlines()
    assert len(lines) == 5
    assert lines[-1].split()[-2:] == ["None", "None"]


@pytest.mark.slow
def test_the_method_in_one_file():
    out = run("examples/mor_in_one_file.py", "--quick")
    for part in ("questions", "base", "site", "router", "step", "asked", "aligned"):
        assert re.search(rf" s  {part}\b", out), out
    assert len(re.findall(r"site +\S+: right answer on top", out)) == 3


@pytest.mark.slow
def test_stock_trl(run_folder, tmp_path):
    out = run("examples/stock_trl.py", "--quick", "--run", str(run_folder), "--out", str(tmp_path / "policy"))
    asked = {line.split()[0] for line in out.splitlines() if line.endswith(" B")}
    assert asked and asked <= {"colour", "shape", "yes-no"}
    load_model(str(tmp_path / "policy"))


@pytest.mark.slow
@pytest.mark.usefixtures("ranks_alone")
def test_two_ranks(run_folder):
    """Every rank ends with the same weights; a site gets at most one message a step, and no answer lacks a score."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    out = run("examples/two_ranks.py", str(run_folder), "--quick", launcher=launcher)
    weights = re.findall(r"^rank (\d) of 2  weights (\w+)$", out, re.M)
    assert sorted(rank for rank, _ in weights) == ["0", "1"] and len({digest for _, digest in weights}) == 1
    assert "steps 2  absent 0.000" in out
    messages = [int(line.split()[1]) for line in out.splitlines() if line.endswith(" B")]
    assert messages and max(messages) <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_three_ways_of_scoring_are_timed_and_agree(family):
    """`measure` asserts that they agree; two prompts of four candidates, once each."""
    spec = importlib.util.spec_from_file_location("scoring", ROOT / "benchmarks/speed/scoring.py")
    assert spec and spec.loader
    scoring = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scoring)
    model = RewardModel(*load_model(f"accord/{family}")).eval().requires_grad_(False)
    seconds, difference = scoring.measure(model, 2, 4, 1)
    assert {name: len(values) for name, values in seconds.items()} == {"once": 1, "repeated": 1, "one by one": 1}
    assert difference < scoring.TOLERANCE


def test_the_federation_put_together_by_hand(run_folder):
    """The page's marked block makes the reward function that `open_reward` makes."""
    page = (ROOT / "docs" / "stock-trl.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^<!-- run with run_folder -->\n```python\n(.*?)^```", page, re.M | re.S)
    names = {"run_folder": run_folder}
    exec(code, names)
    by_hand, opened = names["reward"], open_reward(run_folder)
    assert list(by_hand.engine.sites) == list(opened.engine.sites) == ["colour", "shape", "yes-no"]
    rows = {
        "prompts": [vqa_prompt("what color is the shape?")] * 3,
        "completions": [[{"role": "assistant", "content": text}] for text in ("red", "blue", "circle")],
        "image": [Image.new("RGB", (64, 64), "red")] * 3,
    }
    assert by_hand(**rows) == opened(**rows)


@pytest.mark.slow
def test_what_the_readme_does_with_a_run(run_folder, tmp_path):
    """Its one block of Python trains a policy against the sites of `runs/demo`, and leaves a checkpoint."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^<!-- run beside runs/demo -->\n```python\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run_folder)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs" / "mine").glob("checkpoint-*/model.safetensors"))
    assert len([line for line in code.splitlines() if line]) <= 12


def test_a_run_by_another_method_opens_no_reward(tmp_path):
    """FedGRPO's reward reads which questions a site owns: its run folder is refused before any site opens."""
    (tmp_path / "recipe.toml").write_text(
        'name = "f"\nmethod = "fedgrpo"\n[[questions]]\nkind = "easy-vqa"\n[policy]\ncheckpoint = "accord/idefics3"\n'
        '[[sites]]\nname = "one"\ncheckpoint = "accord/idefics3"\nanswers = true\n'
    )
    with pytest.raises(RunError, match=r"was aligned by 'fedgrpo', whose reward needs the run's questions"):
        open_reward(tmp_path)
    with pytest.raises(RunError, match=r"no recipe\.toml, so this is not a run folder"):
        open_reward(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_benchmarks_run(run_folder):
    """Smallest sizes: that they run and agree, not how fast."""
    table = run(
        "benchmarks/speed/federation_step.py", "--rounds", "1", "--steps", "2", "--prompts", "3", "--group", "2"
    )
    assert "federation ÷ constant" in table
    smallest = ("--rounds", "1", "--steps", "2", "--prompts", "3", "--group", "2", "--run", str(run_folder))
    assert "routing" in run("benchmarks/speed/federation_step.py", *smallest)

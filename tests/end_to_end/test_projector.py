"""A whole run whose policy first gets a projector from the sites."""

import json

import pytest

from accord.evaluation.summary import read_summary

pytestmark = pytest.mark.slow

PROJECTOR = {"averaging": {"rounds": 2, "batch_size": 32, "learning_rate": 3e-3}, "evaluate_on": 12}


@pytest.mark.timeout(300)
def test_a_run_aligns_the_policy_that_has_the_new_projector(write_recipe, accord, tmp_path):
    """With the reference answers for reward no site has a reward model: projector, alignment, evaluation."""
    recipe = write_recipe(tmp_path / "tiny.toml", method="ground-truth", projector=PROJECTOR)
    status, out, err = accord("pretrain-projector", recipe, "--out", tmp_path / "run", "--quiet")
    assert status == 0, err
    assert "| before |" in out and "| after |" in out and "colour: weight, d" in out
    records = (tmp_path / "run/metrics.jsonl").read_text()
    status, out, err = accord("run", tmp_path / "run/recipe.toml", "--out", tmp_path / "run", "--resume", "--quiet")
    assert status == 0, err
    assert (tmp_path / "run/metrics.jsonl").read_text().startswith(records)  # it was not trained again
    summary = read_summary(tmp_path / "run/summary.json")
    assert summary.policy.checkpoint == str(tmp_path / "run/projector/checkpoint")
    assert summary.projector is not None and len(summary.projector.rounds) == 2
    assert {row.kind for row in summary.traffic} == {"projector"}
    assert next(iter(json.loads((tmp_path / "run/stages.json").read_text())["planned"])) == "projector"
    page = (tmp_path / "run/report.html").read_text()
    assert "<h2>The projector</h2>" in page and "accord/llava-clip-llama was trained" in page
    assert "both ways: the projector's weights, 2 rounds" in page
    status, out, _ = accord("plan", recipe)
    assert status == 0 and "2 rounds over other captions each, fedavg, 32 bits a number" in out


def test_a_stage_alone_says_what_comes_first(write_recipe, accord, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.toml", method="ground-truth", projector=PROJECTOR)
    status, _, err = accord("align", recipe, "--out", tmp_path / "run", "--quiet")
    assert status == 2 and "accord pretrain-projector RECIPE" in err


def test_a_recipe_without_the_table_is_told(write_recipe, accord, tmp_path):
    status, _, err = accord("pretrain-projector", write_recipe(tmp_path / "tiny.toml"), "--out", tmp_path / "run")
    assert status == 2 and "add a [projector] table" in err


def test_a_policy_without_a_projector_is_told(write_recipe, accord, tmp_path):
    recipe = write_recipe(
        tmp_path / "tiny.toml", method="ground-truth", projector=PROJECTOR, policy={"checkpoint": "accord/text-qwen2"}
    )
    status, _, err = accord("pretrain-projector", recipe, "--out", tmp_path / "run", "--quiet")
    assert status == 2 and "Qwen2ForCausalLM has no projector" in err

"""A text-only policy and text-only sites, on arithmetic, through the same stages as models that see."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

from accord.evaluation.summary import read_summary
from accord.rewards.model import RewardModel
from accord.runs import read_lines

SITES = {"sum": "accord/text-llama", "larger": "accord/text-qwen2", "last-digit": "accord/text-llama"}


@pytest.fixture(scope="module")
def text_recipe(tiny_recipe):
    """The tiny recipe with arithmetic for easy-VQA."""
    sites = [
        {**site, "name": name, "checkpoint": checkpoint, "question_types": [name.replace("-", " ")], "fraction": 0.1}
        for site, (name, checkpoint) in zip(tiny_recipe["sites"], SITES.items(), strict=True)
    ]
    changed = {"sites": sites, "questions": [{"kind": "arithmetic"}], "policy": {"checkpoint": "accord/text-qwen2"}}
    return {**tiny_recipe, **changed}


def test_every_stage_runs_without_images(accord, write_recipe, text_recipe, tmp_path):
    """Sites, router, GRPO and evaluation; there is no picture, and no control that shuffles any."""
    recipe, run = write_recipe(tmp_path / "text.toml", **text_recipe), tmp_path / "run"
    for stage in (*(["site", "train", name] for name in SITES), ["router", "train"], ["align"], ["evaluate"]):
        command = [*stage[:2], str(recipe), *stage[2:]] if stage[0] == "site" else [*stage, str(recipe)]
        status, _, err = accord(*command, "--out", run, "--quiet")
        assert status == 0, err
    assert isinstance(RewardModel.load(run / "sites" / "sum" / "reward").backbone, LlamaForCausalLM)
    assert isinstance(AutoModelForCausalLM.from_pretrained(run / "policy"), Qwen2ForCausalLM)
    assert AutoTokenizer.from_pretrained(run / "policy").chat_template
    steps = [row for row in read_lines(run / "metrics.jsonl") if row["stage"] == "align" and "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["absent"] == 0 and steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(share > 0 for share in steps[0]["routed"].values())
    summary = read_summary(run / "summary.json")
    assert summary.evaluation.shuffled_image is None and summary.evaluation.question_only is not None
    assert set(summary.evaluation.base.by_type) == {"sum", "larger", "last digit"}
    gallery = [json.loads(line) for line in (run / "gallery.jsonl").read_text().splitlines()]
    assert [row["image"] for row in gallery] == [None] * 4 and not (run / "gallery").exists()
    assert all(set(row["scores"]) == set(SITES) and row["question"] for row in gallery)
    assert accord("report", run)[0] == 0
    page = (run / "report.html").read_text()
    assert (
        "what is the last digit of" in page
        and 'class="picture"' not in page
        and "whether the image is used" not in page
    )

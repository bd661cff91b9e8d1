"""Whole runs over mixed families, to the report: the paper's policy and reward models, and four others."""

import json
import os
import random
import subprocess
import sys

import pytest
import tomli_w
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText

from families.conftest import SEES_TORCHVISION

pytestmark = pytest.mark.skipif(not SEES_TORCHVISION, reason="needs torchvision; make test-families has it")

RUNS = {
    "paper": ("qwen2_5_vl", ("qwen2_vl", "qwen2_5_vl", "llava_onevision"), None),
    "others": ("internvl", ("gemma3", "pixtral", "smolvlm"), {"rank": 2, "alpha": 4}),
}
SPLITS = ["private"] * 6 + ["public"] * 2 + ["dev", "test", "base"]
COUNTS = ("one", "two", "three")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of varied shape with one to three squares of a colour, and three questions about each."""
    folder, draw, lines = tmp_path_factory.mktemp("data"), random.Random(0), []
    for n in range(66):
        colour, count = draw.choice(["red", "green", "blue"]), draw.randrange(3)
        size = (draw.randrange(40, 130), draw.randrange(40, 130))
        image = Image.new("RGB", size, "white")
        for _ in range(count + 1):
            x, y = draw.randrange(size[0] - 20), draw.randrange(size[1] - 20)
            ImageDraw.Draw(image).rectangle([x, y, x + 15, y + 15], fill=colour)
        image.save(folder / f"{n}.png")
        for kind, text, answer in (
            ("colour", "What colour is the square?", colour),
            ("count", "how many?", COUNTS[count]),
            ("yes-no", "Is it red? yes or no", "yes" if colour == "red" else "no"),
        ):
            row = {"id": f"{n}-{kind}", "image": f"{n}.png", "question": text, "answer": answer}
            lines.append(json.dumps({**row, "question_type": kind, "split": SPLITS[n % len(SPLITS)]}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


def recipe(data, policy, sites, lora):
    reward = {"steps": 4, "prompts_per_batch": 4, "rejected_per_prompt": 2, "evaluate_every": 4, "evaluate_on": 4}
    tuning = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    few = {"rounds": 2, "local_steps": 1, "pairs_per_batch": 4, "pairs_per_site": 8, "learning_rate": 1e-3}
    step = {"steps": 2, "prompts_per_step": 4, "group_size": 2, "learning_rate": 1e-4, "max_completion_length": 4}
    return {
        "name": "families",
        "seed": 0,
        "threads": 1,
        "questions": [{"kind": "folder", "path": str(data)}],
        "policy": {"checkpoint": policy},
        "preferences": {"rejected_per_question": 3, "policy_samples": 2},
        "sites": [
            {
                "name": f"site-{n}",
                "checkpoint": site,
                "question_types": [kind],
                "finetune": {**tuning, "gradient_checkpointing": n == 0},
                "reward_model": {**reward, "vocabulary": 4},
                **({"lora": {"rank": 2, "alpha": 4}} if n < 2 else {}),
            }
            for n, (site, kind) in enumerate(zip(sites, ("colour", "count", "yes-no"), strict=True))
        ],
        "router": {"layers": 1, "width": 16, "heads": 2, **few},
        "alignment": {
            **step,
            "questions_at_once": 16,
            "evaluate_every": 2,
            "evaluate_on": 6,
            "save_every": 1,
            **({"lora": lora} if lora else {}),
        },
        "compare": ["average"],
        "evaluation": {"questions": 10},
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_its_report(name, built, data, tmp_path):
    policy, sites, lora = RUNS[name]
    told = recipe(data, built(policy), [built(site) for site in sites], lora)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(told))
    command = [sys.executable, "-c", "from accord.cli import main; main()", "run", tmp_path / "recipe.toml"]
    run = tmp_path / "run"
    done = subprocess.run(
        [*map(str, command), "--out", str(run)], capture_output=True, text=True, env={**os.environ}, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("gemma3: every completion is computed with a copy") == (name == "others")
    assert (run / "report.html").is_file()
    _, found = AutoModelForImageTextToText.from_pretrained(run / "policy", output_loading_info=True)
    assert not found["missing_keys"]


def test_a_run_with_a_family_that_is_not_carried_ends_before_anything_is_trained(built, data, tmp_path):
    told = recipe(data, built("qwen2_vl"), [built("qwen2_vl"), built("idefics3"), built("mllama")], None)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(told))
    command = [sys.executable, "-c", "from accord.cli import main; main()", "run", tmp_path / "recipe.toml"]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 2 and "'mllama': it reads images by cross-attention" in done.stderr
    assert not (tmp_path / "run" / "sites").exists()

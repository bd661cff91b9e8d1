"""Questions about two pictures, through every stage: sites, router, GRPO, evaluation and report."""

import json
from itertools import product

import pytest
from transformers import Idefics3Processor

from accord.evaluation.summary import read_summary
from accord.evaluation.trace import read_gallery
from accord.models import trial
from accord.rewards.model import RewardModel
from accord.runs import read_lines

COLOURS = ["red", "green", "blue", "yellow"]
SPLITS = {"base": 6, "private": 32, "public": 12, "dev": 8, "test": 8}


@pytest.fixture(scope="module")
def two_pictures(tiny_recipe, tmp_path_factory, square):
    """The tiny recipe with questions about two squares each, and one split's questions about one square among them."""
    folder = tmp_path_factory.mktemp("pairs") / "squares"
    (folder / "images").mkdir(parents=True)
    lines = []
    for n, (split, k) in enumerate((split, k) for split, count in SPLITS.items() for k in range(count)):
        first, second = [*product(COLOURS, COLOURS)][5 * k % 16]
        images = [f"images/{n}-{side}.png" for side in "ab"]
        for name, colour, wide in zip(images, (first, second), (0, 1), strict=True):
            (folder / name).write_bytes(square(colour, (32 + n, 32 + wide)))
        same = "yes" if first == second else "no"
        for kind, text, answer in (
            ("alike", "are <image> and <image> of one colour?", same),
            ("second", "what is the colour of the second picture?", second),
        ):
            row = {"id": f"{kind}-{n}", "image": images, "question": text, "answer": answer, "question_type": kind}
            lines.append({**row, "split": split})
        single = {"id": f"first-{n}", "image": images[0], "question": "what colour is it?", "answer": first}
        lines.append({**single, "question_type": "first", "split": split})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kinds = ("alike", "second", "first")
    sites = [{**site, "question_types": [kind]} for site, kind in zip(tiny_recipe["sites"], kinds, strict=True)]
    return {**tiny_recipe, "questions": [{"kind": "folder", "path": str(folder)}], "sites": sites}


def test_a_whole_run(accord, write_recipe, two_pictures, tmp_path):
    """Three families hold questions about two pictures and about one; each judges all; the gallery shows both."""
    recipe, run = write_recipe(tmp_path / "two.toml", **two_pictures), tmp_path / "run"
    status, _, err = accord("run", recipe, "--out", run, "--quiet")
    assert status == 0, err
    assert "refused" not in err and "gave no answer" not in err
    for site in two_pictures["sites"]:
        assert RewardModel.load(run / "sites" / site["name"] / "reward").standardisation.deviation > 0
    steps = [row for row in read_lines(run / "metrics.jsonl") if row["stage"] == "align" and "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and {row["absent"] for row in steps} == {0}
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and all(share > 0 for share in steps[0]["routed"].values())
    summary = read_summary(run / "summary.json")
    assert set(summary.evaluation.aligned.by_type) == {"alike", "second", "first"}
    assert summary.evaluation.shuffled_image is not None
    rows = read_gallery(run / "gallery.jsonl")
    assert {len(row.further) for row in rows} == {0, 1}
    for row in rows:
        assert all(judged.after is not None for judged in row.scores.values())
        assert all((run / name).is_file() for name in (row.image, *row.further))
    page = (run / "report.html").read_text()
    assert page.count('class="picture"') == len(rows)
    assert page.count("<img") == sum(1 + len(row.further) for row in rows)


def test_data_with_several_images_are_refused_before_anything_trains(
    accord, write_recipe, two_pictures, tmp_path, monkeypatch
):
    """Where a site's processor takes one image a prompt: its checkpoint is named, and no site has trained."""
    monkeypatch.setattr(trial, "_try_once", trial._try_once.__wrapped__)  # which remembers what it has tried
    stock = Idefics3Processor.__call__

    def one_only(self, images=None, text=None, **settings):
        if any(isinstance(own, list) and len(own) > 1 for own in images or []):
            raise ValueError("only one image is supported")
        return stock(self, images=images, text=text, **settings)

    monkeypatch.setattr(Idefics3Processor, "__call__", one_only)
    recipe, run = write_recipe(tmp_path / "two.toml", **two_pictures), tmp_path / "run"
    status, _, err = accord("run", recipe, "--out", run, "--quiet")
    assert status != 0 and not (run / "sites").exists()
    assert "accord/idefics3: Accord does not carry several images a prompt with this model" in err

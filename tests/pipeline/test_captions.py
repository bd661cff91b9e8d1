"""A policy that describes photographs is measured as comparisons and tables want it, by a judge whose mind is known."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tomli_w
import torch

from accord.cli import main
from accord.errors import RecipeError
from accord.evaluation.table import Cell, table, to_csv, to_markdown
from accord.methods.method import Method
from accord.pipeline import captions as module
from accord.pipeline import comparison
from accord.pipeline.bench import _result
from accord.pipeline.captions import (
    COLUMNS,
    RIGHT,
    make_judge,
    measure_captions,
    measure_shuffled,
    right_by_type,
    write_captions,
)
from accord.pipeline.comparison import answers, arm_accuracy, arm_file, compare, measure, with_other_images
from accord.rewards.model import RewardModel
from accord.types import Question, prompt_of


class Judge:
    """Finds a caption good where it names the photograph's number, and a longer one better."""

    def score(self, prompts, images, completions):
        return [
            torch.tensor([10.0 * (str(image) in text.split()) + len(text.split()) for text in texts])
            for image, texts in zip(images, completions, strict=True)
        ]


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Twelve test photographs and ten of dev; the base says "photograph" and their number to the first ones alone."""
    monkeypatch.setattr("accord.evaluation.captions.load_images", lambda sources: int(sources[0]))

    def ask(n, split):
        topic = "dogs" if n % 2 else "others"
        return Question(
            f"{n}", f"{n}".encode(), "describe", f"photograph {n}", topic, split, "x", (f"a photograph {n}",)
        )

    test, dev = [ask(n, "test") for n in range(12)], [ask(n, "dev") for n in range(20, 30)]
    return SimpleNamespace(
        recipe=SimpleNamespace(captions="folder", seed=0),
        judge=Judge(),
        questions={"dev": dev},
        evaluated=test,
        base_captions={"dev": ["photograph"] * 10, "test": [f"photograph {n if n < 3 else 99}" for n in range(12)]},
        path=tmp_path,
    )


def test_the_columns_by_hand(job):
    """The policy says "photograph n" to all. All twelve match, where the base matched three.

    The judge prefers nine of them to the base's, and three are the base's: (9 + 3/2) of 12. On dev all ten are better.
    """
    said = {"dev": [f"photograph {n}" for n in range(20, 30)], "test": [f"photograph {n}" for n in range(12)]}
    measured = measure_captions(job, said)
    assert measured["test"]["matching"] == (12, 12)
    assert measured["test"]["preferred to base"] == (10.5, 12)
    assert measured["dev"]["preferred to base"] == (10.0, 10)
    assert measured["sentences"]["test"] == {"words": 2.0, "distinct": 12, "unchanged": 3}
    assert measured[RIGHT] == {"dogs": [1] * 6, "others": [1] * 6}
    assert {name: len(found) for name, found in measured["outcomes"].items()} == dict.fromkeys(COLUMNS, 12)
    own, whole = measured["test"]["CIDEr-D"]
    assert (
        whole == 12 and own > measure_captions(job, {**said, "test": job.base_captions["test"]})["test"]["CIDEr-D"][0]
    )


def test_the_base_is_as_good_as_itself(job):
    measured = measure_captions(job, job.base_captions)
    assert measured["test"]["preferred to base"] == (6.0, 12)
    assert measured["test"]["matching"] == (3, 12)
    assert measured[RIGHT] == {"dogs": [1, 0, 0, 0, 0, 0], "others": [1, 1, 0, 0, 0, 0]}


def test_a_comparison_measures_captions(job):
    """A policy that looks at what it is shown says another number to another photograph, which matches nothing."""

    def ask(questions, split):
        return [f"photograph {q.image.decode()}" for q in questions]

    assert measure(job, answers(job, ask))["test"]["matching"] == (12, 12)
    assert with_other_images(job, ask)["shuffled"]["matching"] == (0, 12)
    assert measure_shuffled(job, ["photograph 0"] * 12)["matching"] == (1, 12)
    assert right_by_type(job, job.evaluated, ["photograph 0"] * 12)["others"] == [1, 0, 0, 0, 0, 0]


def test_every_caption_of_a_comparison_is_generated_once(job, monkeypatch):
    """Dev, test, and test with other photographs; what is read by people is what was measured."""
    asked = []

    def say(model, processor, questions, recipe):
        asked.append([q.id for q in questions])
        return [f"photograph {q.image.decode()}" for q in questions]

    job.recipe.sites, job.traffic = (), None
    job.identify = lambda image: image.decode()
    job.doing = lambda stage, needs: contextlib.nullcontext()
    job.need = lambda place, command, stage: job.path / place
    monkeypatch.setattr(comparison, "find_method", lambda arm, sites: Method(lambda job, stage: (None, None), needs=()))
    monkeypatch.setattr(comparison, "traffic_rows", lambda traffic: [])
    monkeypatch.setattr(comparison, "greedy", say)
    compare(job, "own")
    test = [f"{n}" for n in range(12)]
    assert asked == [[f"{n}" for n in range(20, 30)], test, test]
    assert arm_file(job.path, "own").with_suffix(".md").read_text().count("photograph 11 |") == 2
    assert arm_accuracy(job, "own").macro == 1


def test_captions_are_written_for_people_to_read(job, tmp_path):
    write_captions(job, tmp_path / "x.md", ["a | b"] * 12)
    lines = (tmp_path / "x.md").read_text().splitlines()
    assert len(lines) == 2 + 12
    assert "photograph 0" in lines[2] and r"a \| b" in lines[2]


def test_only_captions_have_a_judge(tmp_path):
    with pytest.raises(RecipeError, match=r"only captions are measured by a judge; .* kind = \"captions\""):
        make_judge(SimpleNamespace(captions=""), tmp_path / "judge")


def test_a_judge_learns_what_no_site_and_no_server_holds(tmp_path, llava, square, monkeypatch, capsys):
    """Four photographs are the judge's, and four are a site's, with captions and judgements of their own."""
    (tmp_path / "images").mkdir()
    captions, judgements = [], []
    for n in range(8):
        name, split, what = f"images/{n}.png", "test" if n < 4 else "private", "dog" if n % 2 else "man"
        (tmp_path / name).write_bytes(square("red", (32 + n, 32)))
        captions.append({"image": name, "split": split, "captions": [f"A {what} {n} ."]})
        for caption, score in ((f"A good {what} {n} .", 4), (f"A bad cat {n} .", 1)):
            judgements.append({"image": name, "split": split, "caption": caption, "experts": [score] * 3})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    (tmp_path / "judgements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judgements))
    recipe = {
        "name": "x",
        "threads": 1,
        "questions": [{"kind": "captions", "path": str(tmp_path)}],
        "policy": {"checkpoint": llava},
        "sites": [{"name": "a", "checkpoint": llava, "judgements": {}}],
        "evaluation": {"judge_model": {"steps": 1, "choose": "pairs", "kept_back": 0.5}},
    }
    (tmp_path / "x.toml").write_text(tomli_w.dumps(recipe))
    learnt, train = [], module.train_reward_model
    monkeypatch.setattr(
        module, "train_reward_model", lambda *args, **more: learnt.extend(args[1]) or train(*args, **more)
    )
    monkeypatch.setattr("sys.argv", ["accord", "judge", str(tmp_path / "judge"), "--recipe", str(tmp_path / "x.toml")])
    main()
    own = {f"a {'dog' if n % 2 else 'man'} {n}" for n in range(4)}
    people = {(f"a good {'dog' if n % 2 else 'man'} {n}", f"a bad cat {n}") for n in range(4)}
    assert {pair.chosen for pair in learnt if pair.question_type in ("dogs", "others")} == own
    assert {(pair.chosen, pair.rejected) for pair in learnt if pair.question_type == "judged"} == people
    assert "judged: " in capsys.readouterr().out
    scores = RewardModel.load(tmp_path / "judge").score(
        [prompt_of(Question("0", None, "describe", "", "dogs", "test"))], [None], [["a dog", "a man"]]
    )
    assert scores[0].shape == (2,) and scores[0].isfinite().all()


def test_a_table_of_captions_has_no_mean_over_them():
    cells = [Cell(name, 0, {"CIDEr-D": (24.0, 100), "matching": (50, 100)}) for name in ("base", "routed")]
    made = table(cells, None, {})
    assert [column.name for column in made.columns] == ["CIDEr-D", "matching", "to sites", "from sites", "time"]
    assert [value.mean for value in made.rows[1].values[:2]] == [0.24, 0.5]
    header, _, _, routed = to_markdown(made).splitlines()[:4]  # CIDEr-D goes from 0 to 10, and is no share
    assert header.startswith("| method | seeds | CIDEr-D | matching, % |")
    assert routed.startswith("| routed | 1 | 0.240 | 50.0 |")
    assert "CIDEr-D: mean" in to_csv(made).partition("\n")[0]
    assert _result(replace(cells[1], seconds=83.0)) == "CIDEr-D 0.240 in 83 s"

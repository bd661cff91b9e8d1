"""The benchmark of rewards without training: what is right, who lies, and the table of cells."""

from pathlib import Path

import breakdown
import pytest
import torch

from accord.attacks.scores import Attack, Liar
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreItem, ScoreRange, ScoreReply, ScoreRequest, to_turns
from accord.methods import find_method
from accord.recipe import Recipe, SiteConfig
from accord.runs import append_line
from accord.types import vqa_prompt

RANGE = ScoreRange(0.0, 2.0)


def test_the_better_of_two_answers_should_have_more_reward():
    """Of three answers worth 1, 1 and 0 two pairs differ; a tie and an absence are half right."""
    assert breakdown.ordered([0.9, 0.1, 0.5], [1, 1, 0]) == [1.0, 0.0]
    assert breakdown.ordered([0.5, None, 0.5], [1, 1, 0]) == [0.5, 0.5]
    assert breakdown.ordered([0.9, 0.1], [1, 1]) == []


def test_the_answer_with_the_most_reward():
    """Of worth 3, 1 and 2 the middle is ½ of the way; 1 and 2 tie at ¼; without rewards the mean of all is ½."""
    assert breakdown.best_of([0.1, 0.2, 0.9], [3, 1, 2]) == 0.5
    assert breakdown.best_of([0.1, 0.9, 0.9 + 1e-7], [3, 1, 2]) == 0.25
    assert breakdown.best_of([None, -5.0, None], [3, 1, 2]) == 0.0
    assert breakdown.best_of([None, None, None], [3, 1, 2]) == 0.5


def test_a_liar_clips_to_the_range_that_the_method_asks_for():
    recipe = Recipe("x", (SiteConfig("a", "accord/idefics3"),), scores=RANGE)
    found = {name: breakdown.limits_of(find_method(name, ["a"]).scores, recipe) for name in ("average", "median")}
    assert found == {"average": RANGE, "median": ScoreRange(-2.0, 2.0)}
    assert breakdown.limits_of(None, recipe) is None and breakdown.limits_of("raw", recipe) is None


class Honest:
    """A site that scores a text by its length, and counts how many it was asked about."""

    def __init__(self):
        self.asked = 0

    def answer(self, request):
        self.asked += sum(len(item.candidates) for item in request.items)
        return ScoreReply(request.id, [[len(text) / 10 for text in item.candidates] for item in request.items])


def request(*texts):
    return ScoreRequest("1", {}, [ScoreItem([], to_turns(vqa_prompt("which?")), list(texts))])


def test_honest_scores_are_asked_once_and_a_liar_changes_them():
    """2 − 0.3 is what a liar that flips says of a text of three letters in the range [0, 2]."""
    sites = {"a": Honest(), "b": Honest()}
    engine, known = InProcessEngine({name: site.answer for name, site in sites.items()}), {}
    honest = breakdown.Liars(engine, known, {})
    assert honest.ask({name: request("cat", "mouse") for name in sites})["b"].scores == [[0.3, 0.5]]
    lying = breakdown.Liars(engine, known, {"b": Liar(Attack("flip"), RANGE)})
    replies = lying.ask({name: request("mouse", "cat", "ox") for name in sites})
    assert replies["a"].scores == [[0.5, 0.3, 0.2]]
    assert replies["b"].scores == [pytest.approx([1.5, 1.7, 1.8])]
    assert [site.asked for site in sites.values()] == [3, 3]


def test_a_site_that_is_gone_has_no_weight():
    """And the router is asked once about the same answers."""
    asked = []

    def router(prompts, images, candidates):
        asked.append(candidates)
        return torch.tensor([[0.2, 0.8]])

    remembered = breakdown.Remembered(router)
    first = remembered([vqa_prompt("which?")], [()], [("cat",)])
    remembered.gone = [1]
    second = remembered([vqa_prompt("which?")], [()], [("cat",)])
    assert first.tolist() == [pytest.approx([0.2, 0.8])] and second.tolist() == [pytest.approx([0.2, 0.0])]
    assert asked == [[("cat",)]]


def test_a_report_of_cells(tmp_path):
    """The honest cells stand in every attack; of 90 and 80 % the mean is 85 ± 12.706 · 7.07 / √2."""
    file = tmp_path / "cells.jsonl"
    rows = [(0, "honest", 0, 0.9), (1, "honest", 0, 0.8), (0, "flip", 1, 0.6), (1, "flip", 1, None)]
    for row in rows:
        append_line(file, {"method": "average", **dict(zip(("seed", "attack", "liars", "best"), row, strict=True))})
    text = breakdown.report(breakdown.read(file), tmp_path, "breakdown")
    assert "| flip | average | 85.0 ± 63.5 (2) | 60.0 (1) |" in text
    assert (tmp_path / "breakdown.md").read_text() == text + "\n"
    assert "sites that lie" in (tmp_path / "breakdown.svg").read_text()


@pytest.mark.parametrize(("option", "name"), [("methods", "mor"), ("attacks", "flop"), ("attacks", "poison")])
def test_what_is_not_measured_is_refused(option, name, tmp_path, monkeypatch):
    recipe = Path(__file__).parents[2] / "recipes" / "liars-5.toml"
    monkeypatch.setattr("sys.argv", ["breakdown.py", str(recipe), "--out", str(tmp_path), f"--{option}", name])
    with pytest.raises(SystemExit, match=f"no {option[:-1]} {name} is measured"):
        breakdown.main()

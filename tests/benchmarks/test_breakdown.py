"""The benchmark of rewards without training: what is right, who lies, and the table of cells."""

import json

import breakdown
import pytest
import torch

from accord.attacks.scores import Attack, Liar
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreItem, ScoreRange, ScoreReply, ScoreRequest, to_turns
from accord.types import vqa_prompt

RANGE = ScoreRange(0.0, 2.0)


def test_the_better_of_two_answers_should_have_more_reward():
    """Of three answers worth 1, 1 and 0 two pairs differ; a tie and an absence are half right."""
    assert breakdown.ordered([0.9, 0.1, 0.5], [1, 1, 0]) == [1.0, 0.0]
    assert breakdown.ordered([0.5, None, 0.5], [1, 1, 0]) == [0.5, 0.5]
    assert breakdown.ordered([0.9, 0.1], [1, 1]) == []


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
    names = ("seed", "attack", "liars", "right")
    file.write_text(
        "".join(json.dumps({"method": "average", **dict(zip(names, row, strict=True))}) + "\n" for row in rows)
    )
    text = breakdown.report(file)
    assert "| flip | average | 85.0 ± 63.5 (2) | 60.0 (1) |" in text
    assert (tmp_path / "breakdown.md").read_text() == text + "\n"
    assert "sites that lie" in (tmp_path / "breakdown.svg").read_text()

from dataclasses import replace

import pytest
import torch

from accord.alignment.reward import FederatedReward
from accord.data.images import load_image
from accord.evaluation.gallery import LONGEST_SIDE, choose, write_gallery
from accord.evaluation.trace import SiteScores, read_gallery
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreReply


def test_types_take_turns_and_changed_answers_come_first(ask):
    """Questions 0, 1, 2 of colour, of which 2 changed, and 3, 4 of number, of which 4 changed: 2, 4, 0, 3, 1."""
    kinds = ["colour", "colour", "colour", "number", "number"]
    questions = [ask(n, question_type=kind) for n, kind in enumerate(kinds)]
    before, after = ["x"] * 5, ["x", "x", "y", "x", "y"]
    assert choose(questions, before, after, 5) == [2, 4, 0, 3, 1]
    assert choose(questions, before, after, 3) == [2, 4, 0]
    assert choose(questions, before, after, 9) == [2, 4, 0, 3, 1]
    assert choose(questions, before, after, 0) == choose([], [], [], 3) == []


def reward():
    """Site a scores an answer by its length, b fails; the router prefers a."""

    def lengths(request):
        return ScoreReply(request.id, [[float(len(c)) for c in item.candidates] for item in request.items])

    def broken(request):
        raise RuntimeError("out of order")

    def route(prompts, images, completions):
        return torch.tensor([[0.75, 0.25]]).expand(sum(map(len, completions)), -1)

    return FederatedReward(InProcessEngine({"a": lengths, "b": broken}), route)


@pytest.mark.filterwarnings("ignore:site b gave no answer")
def test_every_site_is_asked_about_both_answers(ask, tmp_path):
    """`red` has 3 letters and `green` 5; an answer that stayed is asked about once; a silent site's scores are null."""
    questions = [ask(0, "red"), ask(1, "blue")]
    write_gallery(tmp_path, questions, ["green", "red"], ["red", "red"], reward(), 2)
    first, second = read_gallery(tmp_path / "gallery.jsonl")
    assert (first.answer, first.before, first.after, first.question_type) == ("red", "green", "red", "colour")
    assert first.scores == {"a": SiteScores(5.0, 3.0), "b": SiteScores(None, None)}
    assert second.scores == {"a": SiteScores(3.0, 3.0), "b": SiteScores(None, None)}
    assert first.routed == {"a": 0.75, "b": 0.25}
    assert [row.image for row in (first, second)] == ["gallery/0.png", "gallery/1.png"]
    assert load_image(tmp_path / "gallery" / "1.png").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.filterwarnings("ignore:site b gave no answer")
def test_large_images_are_made_smaller(ask, square, tmp_path):
    """1024 × 512 pixels become 256 × 128."""
    write_gallery(tmp_path, [replace(ask(0), image=square("red", (1024, 512)))], ["x"], ["y"], reward(), 1)
    assert load_image(tmp_path / "gallery" / "0.png").size == (LONGEST_SIDE, 128)


def test_an_empty_gallery_asks_nobody(ask, tmp_path):
    write_gallery(tmp_path, [ask(0)], ["x"], ["y"], reward(), 0)
    assert read_gallery(tmp_path / "gallery.jsonl") == [] and not (tmp_path / "gallery").exists()

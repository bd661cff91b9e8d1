import math

import pytest
import torch
from pytest import approx

from accord.errors import DataError
from accord.evaluation.captions import OTHERS, cider_d, matching, preferred
from accord.types import Question


class Judge:
    """Scores a caption on a photograph by a rule, and counts what it was asked."""

    def __init__(self, rule):
        self.rule, self.rows = rule, 0

    def score(self, prompts, images, completions):
        self.rows += sum(map(len, completions))
        return [
            torch.tensor([float(self.rule(image, text)) for text in texts])
            for image, texts in zip(images, completions, strict=True)
        ]


@pytest.fixture
def album(monkeypatch):
    """Fifteen photographs; an opened one is its number."""
    monkeypatch.setattr("accord.evaluation.captions.load_images", lambda sources: int(sources[0]))
    return [Question(str(n), str(n).encode(), "describe", "", "all", "test") for n in range(15)]


def test_cider_d_by_hand():
    """Two photographs, "a b" and "c d", each described by its own words. N = 2, so every n-gram weighs ln 2 - ln 1.

    "a b": the vectors of orders 1 and 2 are the reference's, cosine 1 each; orders 3 and 4 are empty and count 0.
    10 · (1 + 1 + 0 + 0) / 4 = 5. "d" against "c d": order 1 min(1, 1) · 1 / (1 · √2) = 0.707107; one word less costs
    e^(-1/72) = 0.986207; 10 · 0.707107 · 0.986207 / 4 = 1.743384.
    """
    assert cider_d(["a b", "d"], [["a b"], ["c d"]]) == [approx(5.0), approx(1.743384, abs=1e-6)]


def test_cider_d_of_the_authors_code():
    """Values of `pycocoevalcap` 1.2 (`CiderScorer`, n = 4, σ = 6), which has the scorer of the CIDEr authors."""
    captions = ["a dog runs", "a cat sits on a mat", "a dog"]
    references = [["a dog runs fast", "the dog runs"], ["a cat sits", "a cat on a mat"], ["two men", "a man"]]
    assert cider_d(captions, references) == [
        approx(4.5303997483097245, rel=1e-12),
        approx(4.279687222582362, rel=1e-12),
        0.0,
    ]


def test_repeating_a_word_does_not_raise_cider_d():
    once, thrice = (cider_d([text, "x"], [["a dog"], ["x y"]])[0] for text in ("dog", "dog dog dog"))
    assert thrice < once


def test_nothing_said_and_nothing_measured():
    assert cider_d(["", "x"], [["a"], ["x"]])[0] == 0.0
    assert cider_d([], []) == []


def test_captions_that_name_their_photograph_match_it(album):
    """The judge knows the number of a photograph: whoever says it is right. Ten rows a caption are scored."""
    judge = Judge(lambda image, text: text == str(image))
    assert matching(judge, album, [q.id for q in album]) == [1] * 15
    assert judge.rows == 15 * (1 + OTHERS)


def test_a_caption_that_fits_every_photograph_matches_none(album):
    assert matching(Judge(lambda image, text: 1.0), album, ["a man"] * 15) == [0] * 15


def test_who_always_scores_large_numbers_high_finds_only_the_largest(album):
    """Photograph 14 beats all others whatever is said; any of 0 to 4 is below at least one of nine others."""
    found = matching(Judge(lambda image, text: image), album, ["a man"] * 15)
    assert found[14] == 1 and found[:5] == [0] * 5
    assert found == matching(Judge(lambda image, text: image), album, ["a man"] * 15)


def test_a_judge_without_finite_scores_matches_nothing(album):
    assert matching(Judge(lambda image, text: math.nan), album, ["a man"] * 15) == [0] * 15


def test_too_few_photographs_to_match_among(album):
    with pytest.raises(DataError, match="set against 9 other photographs, and there are 9 in all; measure more"):
        matching(Judge(lambda image, text: 1.0), album[:9], ["a man"] * 9)


def test_preferred_to_base(album):
    """Longer is better: above 1, below 0, what scores alike a half."""
    new, old = ["a dog", "a", "a", "b"], ["a", "a dog", "a", "a"]
    assert preferred(Judge(lambda image, text: len(text)), album[:4], new, old) == [1.0, 0.0, 0.5, 0.5]

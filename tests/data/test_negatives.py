import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord.data.negatives import NegativeMix, Negatives
from accord.data.questions import normalise_answer
from accord.errors import RecipeError
from accord.types import Question

ANSWERS = {"colour": ["red", "blue", "green", "teal"], "shape": ["circle", "triangle"], "yes/no": ["yes", "no"]}
RED = Question("q0", b"", "what colour is the ball?", "red", "colour", "private")


def draw(mix, said=(), n=100, seed=0, question=RED, answers=ANSWERS):
    return Negatives(answers, mix).draw(question, said, n, random.Random(seed))


def test_each_source_alone_gives_exactly_its_answers():
    """With every other share 0 and more asked for than there is, a source gives all it holds and no more."""
    assert sorted(draw(NegativeMix(1, 0, 0, 0))) == ["blue", "green", "teal"]
    assert sorted(draw(NegativeMix(0, 1, 0, 0), [" Red. ", "ball", "ball ", ""])) == ["", "ball"]
    assert sorted(draw(NegativeMix(0, 0, 1, 0))) == ["circle", "no", "triangle", "yes"]
    malformed = draw(NegativeMix(0, 0, 0, 1))
    assert {"red red", "redred", "", "the ball"} < set(malformed) and 8 <= len(malformed) <= 11
    assert {len(answer.split()) for answer in malformed} == {0, 1, 2}


def test_answers_run_together_in_every_way():
    """What policies found where these were missing: "circletriangle", and a stray character at either edge."""
    every = {answer for seed in range(200) for answer in draw(NegativeMix(0, 0, 0, 1), seed=seed)}
    assert {"redblue", "bluered", "bluegreen", "red blue"} < every
    strays = {answer for answer in every if len(answer) == 4 and ("red" in answer)}
    assert {answer.index("red") for answer in strays} == {0, 1}


def test_a_dry_source_is_filled_in_by_the_others():
    """No policy samples: the other three hold 3 + 4 + at least 4 answers, and ten can be drawn."""
    assert len(draw(NegativeMix(), n=10)) == 10


def test_shares_are_kept_while_no_source_is_dry():
    """One draw for each of 4,000 questions: 1,400, 1,000, 800, 800 expected, deviations below 31; five are 155."""
    said = [f"said {i}" for i in range(5)]
    origin = {**dict.fromkeys(said, "policy"), **dict.fromkeys(ANSWERS["colour"], "same")}
    origin |= dict.fromkeys(ANSWERS["shape"] + ANSWERS["yes/no"], "other")
    negatives, generator = Negatives(ANSWERS, NegativeMix()), random.Random(0)
    drawn = [negatives.draw(RED, said, 1, generator)[0] for _ in range(4000)]
    counts = Counter(origin.get(answer, "malformed") for answer in drawn)
    for source, expected in {"same": 1400, "policy": 1000, "other": 800, "malformed": 800}.items():
        assert abs(counts[source] - expected) < 155


def test_a_type_that_is_not_listed_draws_from_all_others():
    question = Question("q", b"", "how many?", "two", "count", "private")
    assert len(draw(NegativeMix(0.5, 0, 0.5, 0), question=question)) == 8


words = st.text("aAbB .", max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    answer=words.filter(normalise_answer),
    answers=st.dictionaries(st.sampled_from(["t", "u", "v"]), st.lists(words, max_size=6)),
    said=st.lists(words, max_size=4),
    text=words,
    n=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_rejected_answers_differ_from_the_chosen_and_from_each_other(answer, answers, said, text, n, seed):
    question = Question("q", b"", text, answer, "t", "private")
    rejected = draw(NegativeMix(), said, n, seed, question, answers)
    keys = [normalise_answer(wrong) for wrong in rejected]
    assert len(set(keys)) == len(keys) <= n and normalise_answer(answer) not in keys
    assert rejected == draw(NegativeMix(), said, n, seed, question, answers)


def test_mix_refuses_negative_shares_and_four_zeros():
    for shares in ((-0.1, 1, 1, 1), (0, 0, 0, 0), (float("nan"), 1, 1, 1)):
        with pytest.raises(
            RecipeError, match=r"shares of a NegativeMix must be 0 or more and not all 0, got Neg.*; correct"
        ):
            NegativeMix(*shares)


def test_a_shortened_answer_lacks_a_run_of_words():
    """Of four words and more; it never is the whole, and what is left keeps its order."""
    photo = Question("c", b"", "what is there?", "a dog runs through snow", "dogs", "private")
    shorter = draw(NegativeMix(0, 0, 0, 0, 1), question=photo, n=50)
    assert {"a dog", "a runs through snow", "snow"} < set(shorter) and len(shorter) == len(set(shorter)) == 14
    words = photo.answer.split()
    for text in shorter:
        left = text.split()
        cut = len(words) - len(left)
        assert 0 < cut < 5 and any(words[:i] + words[i + cut :] == left for i in range(len(left) + 1))
    assert draw(NegativeMix(0, 0, 0, 0, 1)) == []
    assert draw(NegativeMix(1, 1, 1, 1, 0), question=photo) == draw(NegativeMix(1, 1, 1, 1), question=photo)

"""Pairs from policies, and the order of a reward model's doubts."""

import pytest

from accord.annotation import sampling as module
from accord.annotation.pairs import read_candidates
from accord.annotation.sampling import least_certain, sample_candidates
from accord.errors import DataError


@pytest.fixture
def said(monkeypatch):
    """Return a function that lets policies say what is given, by checkpoint."""

    def let(**texts):
        monkeypatch.setattr(module, "load_model", lambda name: (name, None))
        monkeypatch.setattr(module, "answer", lambda model, processor, questions, **_: texts[model])

    return let


def test_two_samples_of_one_policy(ask, said):
    """The first two that differ once normalised; nothing is no answer; a question with one answer gives no pair."""
    said(a=[["Red", "red.", "", "blue", "green"], ["red", "red"]])
    questions = [ask(0), ask(1)]
    (found,) = sample_candidates(questions, ["a"], samples=5)
    assert found.answers == ("red.", "blue") and found.question_id == "q0" and found.images == (questions[0].image,)
    every = sample_candidates(questions, ["a"], samples=5, every=True)
    assert [each.answers for each in every] == [("red.", "blue"), ("red.", "green"), ("blue", "green")]


def test_a_sample_of_each_of_two_policies(ask, said):
    said(a=[["red", "blue"]], b=[["Red", "green"]])
    (found,) = sample_candidates([ask(0)], ["a", "b"], samples=2)
    assert found.answers == ("red", "green") and found.origins == ("a", "b")


def test_policies_that_always_agree_are_refused(ask, said):
    said(a=[["red", "Red"]])
    with pytest.raises(DataError, match=r"all of 2 samples agree for each of 1 questions.* draw more samples"):
        sample_candidates([ask(0)], ["a"], samples=2)


def test_a_real_policy_is_sampled(ask, llava):
    """The same seed gives the same pairs, and the policy's two sides differ."""
    one = sample_candidates([ask(0), ask(1, "blue")], [llava], samples=3, max_new_tokens=4)
    assert one and all(each.answers[0] != each.answers[1] for each in one)
    assert sample_candidates([ask(0), ask(1, "blue")], [llava], samples=3, max_new_tokens=4) == one


def test_what_is_least_certain_comes_first(answers_file, monkeypatch):
    """Margins of 2, −0.5, 0.5 and −3: by size 1, 2, 0, 3, and of equals the first first."""
    found = read_candidates(answers_file(4))
    monkeypatch.setattr(module, "pair_margins", lambda model, pairs: [2.0, -0.5, 0.5, -3.0])
    assert least_certain(None, found) == [found[n] for n in (1, 2, 0, 3)]

"""Where pairs come from: files, policies, and the order of a reward model's doubts."""

import json

import pytest

from accord.annotation import pairs as module
from accord.annotation.pairs import least_certain, read_candidates, sample_candidates
from accord.data.preferences import write_preferences
from accord.errors import DataError, DataWarning


def test_a_file_of_two_answers(answers_file):
    found = read_candidates(answers_file(3))
    assert [each.answers for each in found] == [(f"good {n}", f"bad {n}") for n in range(3)]
    assert all(len(each.images) == 1 for each in found) and len({each.id for each in found}) == 3
    assert found[0].prompt[-1]["content"] == [{"type": "image"}, {"type": "text", "text": "what is picture 0?"}]


def test_preference_pairs_lose_their_preference(tmp_path, prefer):
    """The same id whichever answer was chosen, and one pair of the two; fewer than a training needs are enough."""
    pairs = [prefer(0, "red", "blue", constructed=True), prefer(0, "blue", "red", images=prefer(0).images)]
    write_preferences(tmp_path / "pairs.jsonl", pairs)
    (found,) = read_candidates(tmp_path / "pairs.jsonl")
    assert found.answers == ("red", "blue") and (found.question_id, found.question_type) == ("q0", "colour")
    assert not found.preferring(first=False).constructed and found.preferring(first=False).chosen == "blue"


def rows(tmp_path, *given):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    return file


GOOD = [{"prompt": f"{n}?", "answers": ["a", "b"]} for n in range(9)]


@pytest.mark.parametrize("answers", [["a"], ["a", "b", "c"], "a", ["A.", "a"], [1, 2]])
def test_what_is_no_pair_of_answers_is_left_out(tmp_path, answers):
    with pytest.warns(DataWarning, match="left out 1 of 10 rows"):
        assert len(read_candidates(rows(tmp_path, *GOOD, {"prompt": "?", "answers": answers}))) == 9


def test_an_answer_with_nothing_needs_no_judge(tmp_path):
    assert len(read_candidates(rows(tmp_path, *GOOD, {"prompt": "?", "chosen": "a", "rejected": " "}))) == 9


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(DataError, match="a pair of answers without a prompt; add one of prompt"):
        read_candidates(rows(tmp_path, {"answers": ["a", "b"]}))


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
    with pytest.raises(DataError, match="all of 2 samples agree for each of 1 questions.* draw more samples"):
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

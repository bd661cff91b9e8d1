"""Pairs of answers from files."""

import json

import pytest

from accord.annotation.pairs import read_candidates
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
    with pytest.warns(DataWarning, match="of 2 pairs 0 have an answer with nothing and 1 are there twice; 1 are left"):
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
    file = rows(tmp_path, *GOOD, {"prompt": "?", "chosen": "a", "rejected": " "})
    with pytest.warns(DataWarning, match="of 10 pairs 1 have an answer with nothing and 0 are there twice; 9 are left"):
        assert len(read_candidates(file)) == 9


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(DataError, match="a pair of answers without a prompt; add one of prompt"):
        read_candidates(rows(tmp_path, {"answers": ["a", "b"]}))

import random
from dataclasses import replace
from pathlib import Path

import pytest

from accord.data.judged import grade, judge_samples
from accord.errors import DataError, RecipeError
from accord.types import Question

ASKED = Question("q", Path("i.png"), "describe it", "ct chest", "radiology", "private", weaker=("chest ct", "chest"))


def pairs(*said: str, question: Question = ASKED, most: int = 9) -> set[tuple[str, str]]:
    made = judge_samples([question], {"q": said}, rejected_per_answer=most, generator=random.Random(0))
    assert all(pair.constructed and pair.images == (Path("i.png"),) for pair in made)
    return {(pair.chosen, pair.rejected) for pair in made}


def test_a_judge_prefers_right_to_weaker_to_wrong() -> None:
    assert [grade(ASKED, text) for text in ("CT chest.", "chest ct", "chest", "head")] == [0, 1, 2, 3]
    assert pairs("head", "chest ct", "ct chest") == {
        ("ct chest", "chest ct"),
        ("ct chest", "head"),
        ("chest ct", "head"),
    }


def test_answers_of_one_grade_make_no_pair() -> None:
    either = replace(ASKED, references=("x-ray chest",), weaker=())
    assert pairs("ct chest", "x-ray chest", "head", "foot", question=either) == {
        ("ct chest", "head"),
        ("ct chest", "foot"),
        ("x-ray chest", "head"),
        ("x-ray chest", "foot"),
    }
    with pytest.raises(DataError, match="no answer to another in 1 questions"):
        pairs("head", "foot")


def test_the_reference_answer_is_in_no_pair_unless_it_was_said() -> None:
    assert pairs("chest", "head") == {("chest", "head")}


def test_repeated_answers_count_once_and_few_worse_ones_are_taken() -> None:
    assert len(pairs("ct chest", "CT chest", "head", "head", "foot", "arm", most=2)) == 2
    with pytest.raises(RecipeError, match="rejected_per_answer must be at least 1, got 0"):
        pairs("ct chest", "head", most=0)


def test_answers_to_other_pictures_are_judged_too() -> None:
    other = replace(ASKED, id="other", image=Path("j.png"), answer="mri head", weaker=())
    said = {"q": ["ct chest"], "other": ["mri head"]}
    made = judge_samples([ASKED, other], said, others=2, rejected_per_answer=9, generator=random.Random(0))
    assert {(pair.question_id, pair.chosen, pair.rejected) for pair in made} == {
        ("q", "ct chest", "mri head"),
        ("other", "mri head", "ct chest"),
    }


def test_spliced_words_are_judged_too() -> None:
    made = judge_samples([ASKED], {"q": ["ct chest"]}, spliced=40, rejected_per_answer=99, generator=random.Random(0))
    shown = {text for pair in made for text in (pair.chosen, pair.rejected)}
    assert {"ct chest", "chest ct", "ct ct", "chest chest"} <= shown
    assert all(set(text.split()) <= {"ct", "chest"} and len(text.split()) in (2, 3) for text in shown)

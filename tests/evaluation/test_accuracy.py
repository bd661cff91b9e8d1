from dataclasses import replace

import pytest

from accord.data.questions import image_identity
from accord.data.sampling import sample_questions
from accord.evaluation.accuracy import (
    answered_by_several,
    count_correct,
    images_by_type,
    outcomes_by_type,
    question_only,
    shuffle_images,
    vqa_accuracy,
    vqa_by_type,
)
from accord.types import Question


def q(number, text="what colour?", answer="red", kind="colour", domain="a"):
    return Question(f"q{number}", f"image {number}".encode(), text, answer, kind, "test", domain)


def test_count_correct_by_hand():
    """Colour: "Red." is red, "dark red" is not: 1 of 2. Number: one wrong of one. Types come in alphabetical order."""
    questions = [q(0, answer="two", kind="number"), q(1), q(2)]
    counts = count_correct(questions, ["three", " Red. ", "dark red"])
    assert list(counts.items()) == [("colour", (1, 2)), ("number", (0, 1))]
    assert count_correct([], []) == {}
    with pytest.raises(ValueError):
        count_correct(questions, ["red"])


def test_outcomes_and_images_are_in_the_order_of_the_questions():
    """Types in alphabetical order; image 0 is asked about twice, in both types; a text is its own cluster."""
    questions = [
        q(0, answer="two", kind="number"),
        q(1),
        replace(q(0), id="again"),
        replace(q(2), image=None, text="2 + 2"),
    ]
    outcomes = outcomes_by_type(questions, ["two", "blue", "red", "red"])
    assert list(outcomes.items()) == [("colour", [0, 1, 1]), ("number", [1])]
    images = images_by_type(questions, image_identity())
    assert list(images.items()) == [("colour", [1, 0, 2]), ("number", [0])]


def test_question_only_by_hand():
    """Known: "what colour?" red, blue, blue; "is it round?" yes; "is it square?" no, no.

    Same text: blue, yes. A new text of type shape: no (2 of 3). A new type: of all six, blue and no lead with two, and
    blue was met first.
    """
    known = [
        q(0, answer="red"),
        q(1, answer="blue"),
        q(2, answer="blue"),
        q(3, "is it round?", "yes", "shape"),
        q(4, "is it square?", "no", "shape"),
        q(5, "is it square?", "no", "shape"),
    ]
    asked = [q(9), q(9, "is it round?", kind="shape"), q(9, "is it flat?", kind="shape"), q(9, "where?", kind="place")]
    assert question_only(known, asked) == ["blue", "yes", "no", "blue"]


def test_question_only_never_sees_what_it_is_asked():
    """Changing the reference answers and images of the questions asked changes nothing."""
    known = [q(0, answer="red")]
    assert question_only(known, [q(7, answer="blue")]) == question_only(known, [q(8, answer="green")]) == ["red"]


def test_question_only_without_any_knowledge():
    assert question_only([], [q(0)]) == [""]


@pytest.mark.parametrize("seed", range(8))
def test_no_question_keeps_its_image(seed):
    questions = [q(n, domain="ab"[n % 2]) for n in range(9)]
    shuffled = shuffle_images(questions, seed)
    for before, after in zip(questions, shuffled, strict=True):
        assert after.image != before.image
        assert replace(after, image=before.image) == before
    for domain in "ab":
        assert sorted(x.image for x in shuffled if x.domain == domain) == sorted(
            x.image for x in questions if x.domain == domain
        )


@pytest.mark.parametrize("seed", range(8))
def test_questions_that_share_an_image_get_another_one(seed):
    """Three questions about picture 0 and three about picture 1: a picture's own question must not meet it again."""
    questions = [replace(q(n), image=b"0" if n < 3 else b"1") for n in range(6)]
    for before, after in zip(questions, shuffle_images(questions, seed), strict=True):
        assert after.image != before.image


def test_a_domain_of_one_image_keeps_it():
    assert shuffle_images([q(0)], 0) == [q(0)]
    assert shuffle_images([], 0) == []


def test_the_shuffle_depends_on_the_seed_alone():
    questions = [q(n) for n in range(9)]
    assert shuffle_images(questions, 1) == shuffle_images(questions, 1) != shuffle_images(questions, 2)


def test_a_sample_keeps_its_order():
    questions = [q(n) for n in range(9)]
    picked = sample_questions(questions, 4, seed=1)
    assert len(picked) == 4 and picked == [x for x in questions if x in picked]
    assert picked == sample_questions(questions, 4, seed=1)
    assert len({tuple(x.id for x in sample_questions(questions, 4, seed)) for seed in range(9)}) > 5


@pytest.mark.parametrize("limit", [0, 9, 10])
def test_no_limit_or_a_large_one_keeps_everything(limit):
    questions = [q(n) for n in range(9)]
    assert sample_questions(questions, limit, seed=0) == questions


@pytest.mark.parametrize(
    ("same", "people", "expected"),
    [
        (0, 10, 0.0),
        (1, 10, 0.3),  # in the nine subsets with it 1/3, in the one without it 0
        (2, 10, 0.6),  # eight with both 2/3, two with one 1/3: (16/3 + 2/3) / 10
        (3, 10, 0.9),  # seven with three 1, three with two 2/3
        (4, 10, 1.0),
        (10, 10, 1.0),
        (2, 5, 8 / 15),  # three with both 2/3, two with one 1/3: (2 + 2/3) / 5
        (3, 4, 0.75),  # one with three 1, three with two 2/3
        (4, 4, 1.0),  # fewer people cannot give 1
    ],
)
def test_vqa_accuracy_by_hand(same, people, expected):
    """The subsets written out, and the sum over them as VQAv2's evaluation forms it."""
    answers = ["Yes."] * same + [f"other {n}" for n in range(people - same)]
    assert vqa_accuracy(" yes", answers) == pytest.approx(expected)
    left_out = [answers[:n] + answers[n + 1 :] for n in range(people)]
    official = sum(min(1, others.count("Yes.") / 3) for others in left_out) / people
    assert vqa_accuracy(" yes", answers) == pytest.approx(official)


def test_vqa_accuracy_by_type():
    """The question's answer counts as one of the people's. Colour: 4 of 4 and 1 of 4, the latter 3 · 1/3 / 4."""
    four = replace(q(0), references=("red", "Red", "red."))
    one = replace(q(1), references=("blue", "blue", "green"))
    number = replace(q(2, kind="number", answer="two"), references=("two",) * 9)
    assert vqa_by_type([number, four, one], ["three", "red", "red"]) == {"colour": [1.0, 0.25], "number": [0.0]}
    assert [answered_by_several(x) for x in (four, q(0), replace(q(0), references=("red", "red")))] == [
        True,
        False,
        False,
    ]

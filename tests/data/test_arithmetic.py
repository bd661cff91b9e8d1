from collections import Counter

from accord.data.arithmetic import load_arithmetic


def by_id(**settings):
    return {q.id: q for q in load_arithmetic(**settings)}


def test_the_answers_are_right_and_short():
    """37 + 5 = 42, 52 > 37, 37 x 5 = 185."""
    known = by_id()
    sum_, larger, digit = (known[f"arithmetic-{name}"] for name in ("sum-37-5", "larger-37-52", "last-digit-37-5"))
    assert (sum_.text, sum_.answer) == ("what is 37 plus 5?", "42")
    assert (larger.text, larger.answer) == ("which is larger, 37 or 52?", "52")
    assert (digit.text, digit.answer) == ("what is the last digit of 37 times 5?", "5")
    assert all(q.image is None and q.answer.isdigit() and len(q.answer) <= 3 for q in known.values())


def test_every_text_comes_once_and_swapped_operands_share_a_split():
    """190 x 9 sums, none of equal operands; 90 x 89 and 78 x 77 ordered pairs."""
    questions = load_arithmetic()
    assert len({q.text for q in questions}) == len(questions)
    assert Counter(q.question_type for q in questions) == {"sum": 1710, "larger": 8010, "last digit": 6006}
    known = by_id()
    assert all(
        known[f"arithmetic-{kind}-{a}-{b}"].split == known[f"arithmetic-{kind}-{b}-{a}"].split
        for kind in ("larger", "last-digit")
        for a, b in ((37, 52), (11, 12), (70, 13), (20, 45))
    )


def test_slips_are_in_the_base_split_alone():
    """All of base slip: one too many, the smaller, the last digit of the sum; no other answer changes."""
    right, slipped = by_id(), by_id(slips=1.0)
    for name, question in right.items():
        other, (a, b) = slipped[name].answer, map(int, name.split("-")[-2:])
        mistake = {"sum": a + b + 1, "larger": min(a, b), "last digit": (a + b) % 10}[question.question_type]
        assert other == (str(mistake) if question.split == "base" else question.answer)
    half = by_id(slips=0.5)
    base = [name for name, q in right.items() if q.split == "base" and q.question_type == "larger"]
    share = sum(half[name].answer != right[name].answer for name in base) / len(base)
    assert abs(share - 0.5) < 0.05  # about 1,600 draws: four deviations

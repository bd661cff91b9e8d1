"""The account says what the numbers say, also when that is unwelcome."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from accord.evaluation.account import macro_direction, reward_change, tell, tell_competence, type_direction
from accord.evaluation.summary import Accuracy, EvaluationSummary, Summary, TrafficRow, accuracy, competence_summary
from accord.evaluation.trace import MetricsRow

RISING = [MetricsRow("align", step, reward=0.01 * step) for step in range(1, 101)]


def _evaluation(before: Accuracy | None, after: Accuracy, **controls: Accuracy) -> EvaluationSummary:
    return EvaluationSummary(before, after, controls.get("question_only"), controls.get("shuffled_image"), {})


def _two(colour: int, shape: int) -> Accuracy:
    return accuracy({"colour": (colour, 100), "shape": (shape, 100)})


def test_macro_direction() -> None:
    """50 % twice, n = 100: each macro variance is 2 · 0.0025 / 4 = 0.00125, so the margin is 1.96 √0.0025 = 9.8 points
    (a little less where the second is not at 50 %). 5 points are within it, 15 are not.
    """
    assert macro_direction(_two(50, 50), _two(55, 55)) == 0
    assert macro_direction(_two(50, 50), _two(65, 65)) == 1
    assert macro_direction(_two(65, 65), _two(50, 50)) == -1


def test_type_direction_at_the_ends() -> None:
    """0 and 5 of 5: p = 1/7 and 6/7, variance 2 · (6/49)/7 = 0.035, margin 0.367 < 1.
    5 and 4 of 5: p = 6/7 and 5/7, variance (6/49 + 10/49)/7 = 0.0466, margin 0.423 > 0.2.
    """
    none, most, all_right = (accuracy({"t": (k, 5)}).by_type["t"] for k in (0, 4, 5))
    assert type_direction(none, all_right) == 1
    assert type_direction(all_right, most) == 0


def test_reward_change() -> None:
    """Steps 1..100 with reward 0.01 · step: last ten mean 0.955, first ten 0.055."""
    assert reward_change(RISING) == pytest.approx(0.9)
    assert reward_change([MetricsRow("align", 1, reward=0.3), MetricsRow("align", 2)]) is None


def test_a_rise(make_summary: Callable[..., Summary]) -> None:
    account = tell(make_summary(), RISING)
    assert account.verdict == "Accuracy rose from 55.1\u00a0% to 83.9\u00a0%."
    assert account.warnings == ()
    assert account.setting.startswith("Three sites (colour, shape and presence)")
    assert "9,000 questions and 27,000 preference pairs" in account.setting
    assert "constructed from reference answers" in account.setting
    outcome = " ".join(account.outcome)
    assert "did not measurably change on shape" in outcome
    assert "No question type measurably fell." in outcome
    # 3 · 1,360,400 + 24,210,000 + 19,210,000 + 14,210,000 = 61,711,200
    assert "61.7 MB crossed the border" in outcome


def test_pairs_that_people_judged(make_summary: Callable[..., Summary]) -> None:
    """Accord knows it from the sites only; of constructed pairs it says the contrary, and nothing of a judgement."""
    told = tell(make_summary(constructed_preferences=False), []).setting
    assert "By the sites' account the pairs are people's judgements." in told
    constructed = tell(make_summary(constructed_preferences=True), [])
    assert "no person judged them" in constructed.setting
    said = " ".join([constructed.verdict, constructed.setting, *constructed.outcome, *constructed.warnings])
    assert not [word for word in ("judgement", "expert", "people") if word in said]


def test_a_tie_is_no_gain(make_summary: Callable[..., Summary]) -> None:
    account = tell(make_summary(evaluation=_evaluation(_two(50, 50), _two(53, 50))), [])
    assert "did not measurably change" in account.verdict
    assert "no gain is shown" in " ".join(account.outcome)
    assert account.warnings == ()


def test_a_hacked_reward(make_summary: Callable[..., Summary]) -> None:
    account = tell(make_summary(evaluation=_evaluation(_two(60, 60), _two(20, 60))), RISING)
    assert account.verdict.startswith("Accuracy fell")
    assert "fell on colour (60\u00a0%\u00a0→\u00a020\u00a0%)" in " ".join(account.outcome)
    assert "reward hacking" in account.warnings[0]


@pytest.mark.parametrize("scale", [0.0, 1e-8], ids=["still", "centred in every group"])
def test_a_fall_without_a_risen_reward_is_not_called_hacking(
    make_summary: Callable[..., Summary], scale: float
) -> None:
    metrics = [replace(row, reward=scale * (row.reward or 0.0)) for row in RISING]
    account = tell(make_summary(evaluation=_evaluation(_two(60, 60), _two(20, 60))), metrics)
    assert account.verdict.startswith("Accuracy fell")
    assert not any("hacking" in warning for warning in account.warnings)


def test_a_mean_that_hides_a_fall(make_summary: Callable[..., Summary]) -> None:
    account = tell(make_summary(evaluation=_evaluation(_two(20, 80), _two(90, 50))), [])
    assert account.verdict.startswith("Accuracy rose")
    assert "accuracy on shape is lower" in account.warnings[0]


def test_a_policy_that_need_not_look(make_summary: Callable[..., Summary]) -> None:
    evaluation = _evaluation(_two(20, 20), _two(60, 60), question_only=_two(62, 60), shuffled_image=_two(20, 20))
    (warning,) = tell(make_summary(evaluation=evaluation), []).warnings
    assert "without looking at the image" in warning


def test_a_type_that_need_not_look(make_summary: Callable[..., Summary]) -> None:
    """The mean beats the question alone, colour does not: 60 of 100 against 62; shape does, 60 against 20."""
    evaluation = _evaluation(_two(20, 20), _two(60, 60), question_only=_two(62, 20), shuffled_image=_two(20, 20))
    (warning,) = tell(make_summary(evaluation=evaluation), []).warnings
    assert warning.startswith("The rise on colour (60\u00a0%, the question alone 62\u00a0%) is no sign of looking")


def test_only_the_aligned_policy_was_measured(make_summary: Callable[..., Summary]) -> None:
    account = tell(make_summary(evaluation=_evaluation(None, _two(60, 60))), RISING)
    assert "before alignment it was not measured" in account.verdict
    assert account.warnings == ()


def test_many_absences_are_a_warning(make_summary: Callable[..., Summary]) -> None:
    account = tell(make_summary(traffic=(TrafficRow("colour", "score", 100, 1000, 10, 40),)), [])
    assert "40\u00a0% of the messages unanswered" in account.warnings[0]


def test_one_site(make_summary: Callable[..., Summary]) -> None:
    account = tell(make_summary(sites=make_summary().sites[:1], traffic=()), [])
    assert account.setting.startswith("One site, colour, trained")


def test_who_is_good_at_what_in_words() -> None:
    """colour: a 2 of 2, b 1 of 2; shape: both 1 of 2. c said nothing."""
    known = competence_summary(
        ["a", "b", "c"],
        ["colour", "shape", "colour", "shape"],
        [[1, 0, 1, 1], [0, 1, 1, 0], [math.nan] * 4],
        neighbours=3,
        experts=2,
    )
    assert tell_competence(known).replace("\u00a0", " ") == (
        "The server put 4 labelled questions of its own to every site and graded the answers itself. "
        "Best at colour: a (100 %); at shape: a and b (50 %). "
        "No answers came from c, so nothing is known of it. "
        "FedGRPO has a prompt's answers judged by the two sites that did best on the three of these questions nearest "
        "to it."
    )


def test_many_equals_are_counted_and_one_of_all_is_said_as_one() -> None:
    known = competence_summary(list("abcd"), ["x"], [[1]] * 4, neighbours=1, experts=1)
    assert tell_competence(known).replace("\u00a0", " ") == (
        "The server put 1 labelled question of its own to every site and graded the answers itself. "
        "Best at x: four sites alike (100 %). "
        "FedGRPO has a prompt's answers judged by the site that did best on the one of these questions nearest to it."
    )

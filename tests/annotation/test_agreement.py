"""Agreement and sides against numbers derived by hand."""

import pytest

from accord.annotation.agreement import Sides, cohen_kappa, krippendorff_alpha, measure_agreement, value_of
from accord.annotation.journal import Judgement


def test_kappa_by_hand():
    """Two clerks and 50 claims: 20 times yes of both, 15 times no of both, 5 and 10 times apart.

    p_o = 35/50 = 0.7; the first says yes in 25 of 50, the second in 30 of 50, p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5;
    κ = 0.2 / 0.5 = 0.4.
    """
    first = ["yes"] * 20 + ["no"] * 15 + ["yes"] * 5 + ["no"] * 10
    second = ["yes"] * 20 + ["no"] * 15 + ["no"] * 5 + ["yes"] * 10
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(second, first) == pytest.approx(0.4)


def test_kappa_at_its_ends():
    """Agreement is 1, the opposite of two balanced annotators −1, and one value throughout says nothing: 0/0."""
    assert cohen_kappa(["a", "b"], ["a", "b"]) == 1
    assert cohen_kappa(["a", "b"], ["b", "a"]) == -1
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None
    assert cohen_kappa([], []) is None


def test_alpha_of_krippendorffs_own_example():
    """Four observers and twelve units of Krippendorff 2011, section C, with values missing: 0.743 for names."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[str(value) for value in unit if value is not None] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_hand():
    """Of three pairs two are given aa and bb, one ab: n = 6, D_o = 2/6, n_a = n_b = 3, D_e = 18/30, α = 1 − 5/9."""
    assert krippendorff_alpha([["a", "a"], ["b", "b"], ["a", "b"]]) == pytest.approx(4 / 9)
    assert krippendorff_alpha([["a", "a"], ["b", "b"], ["a", "b"], ["a"], []]) == pytest.approx(4 / 9)


def test_alpha_at_its_ends():
    assert krippendorff_alpha([["a", "a", "a"], ["b", "b"]]) == 1
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None


def said(annotator, pair, choice, left=0):
    return Judgement(f"{annotator}{pair}", pair, annotator, choice, left, "", 1.0, "2026-01-01T00:00:00+00:00")


def test_what_is_compared_is_the_answer_and_not_the_side():
    """The left of one is the right of the other; a skip is no value."""
    assert value_of(said("a", "1", "left", left=0)) == value_of(said("b", "1", "right", left=1)) == "first"
    assert value_of(said("a", "1", "right", left=0)) == value_of(said("b", "1", "left", left=1)) == "second"
    assert [value_of(said("a", "1", choice)) for choice in ("tie", "both bad", "skip")] == ["tie", "both bad", None]


def test_agreement_of_two_annotators():
    """Both judged four pairs: first/first, second/second, tie/tie, and first/second. A fifth was skipped by one.

    p_o = 3/4; one has (2, 1, 1) of first, second, tie, the other (1, 2, 1): p_e = (2 + 2 + 1)/16 = 5/16, so that
    κ = (12 − 5)/(16 − 5) = 7/11. For α: n = 8, counts (3, 3, 2), D_o = 2/8, D_e = (64 − 22)/56 = 3/4, α = 2/3.
    """
    found = measure_agreement(
        [
            *(said("a", "1", "left"), said("a", "2", "right"), said("a", "3", "tie"), said("a", "4", "left")),
            *(said("b", "1", "right", 1), said("b", "2", "left", 1), said("b", "3", "tie"), said("b", "4", "right")),
            *(said("a", "5", "left"), said("b", "5", "skip"), said("a", "6", "both bad")),
        ]
    )
    assert found.kappa == {("a", "b"): (4, pytest.approx(7 / 11))}
    assert found.alpha == pytest.approx(2 / 3) and found.compared == 4
    assert found.sides == {"a": Sides(3, 1), "b": Sides(1, 2)} and found.everyone == Sides(4, 3)
    assert found.annotators["b"] == {"right": 2, "left": 1, "tie": 1, "skip": 1}


def test_the_interval_of_a_side():
    """Wilson's of 3 in 4, z = 1.96: centre (0.75 + 3.8415/8) / (1 + 3.8415/4) = 0.6275, half 0.3269."""
    low, high = Sides(3, 1).interval
    assert (low, high) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))
    assert Sides(0, 0).interval is None


def test_nobody_has_judged():
    found = measure_agreement([])
    assert (found.kappa, found.alpha, found.compared, found.everyone) == ({}, None, 0, Sides(0, 0))

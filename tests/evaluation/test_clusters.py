"""Cluster-robust errors and effective numbers by hand."""

import math

import pytest

from accord.evaluation.clusters import clustered_error, effective_number


def test_with_an_image_each_it_is_the_plain_standard_error():
    """p = 1/4 of 4: p(1-p)/(n-1) = (3/16)/3 = 1/16."""
    assert clustered_error({"a": [1, 0, 0, 0]}, {"a": [0, 1, 2, 3]}) == pytest.approx(0.25)
    assert effective_number([1, 0, 0, 0], [0, 1, 2, 3]) == pytest.approx(4)


def test_an_image_counts_once_however_often_it_is_asked_about():
    """Every question doubled: moves of (6, -2, -2, -2) / 32 by image, SE² = 4/3 · 48 / 1024 = 1/16 as with one each.

    Questions with an image each would have (3/16) / 7 = 3/112, so that n_eff = 8 · 3/112 · 16 = 24/7.
    """
    outcomes, images = [1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    assert clustered_error({"a": outcomes}, {"a": images}) == pytest.approx(0.25)
    assert effective_number(outcomes, images) == pytest.approx(24 / 7)


def test_questions_of_two_types_about_one_image_go_together():
    """Two images, right for both types or wrong for both: twice ±1/8 makes moves of ±1/4, SE² = 2 · 2/16 = 1/4.

    With an image each there are four moves of ±1/8, SE² = 4/3 · 4/64.
    """
    outcomes = {"a": [1, 0], "b": [1, 0]}
    assert clustered_error(outcomes, {"a": [0, 1], "b": [0, 1]}) == pytest.approx(0.5)
    assert clustered_error(outcomes, {"a": [0, 1], "b": [2, 3]}) == pytest.approx(math.sqrt(4 / 3 * 4 / 64))
    assert clustered_error(outcomes, {"a": [0, 1], "b": [1, 0]}) == 0  # what is right for one is wrong for the other


def test_outcomes_may_be_scores():
    """2.5 and 0.5 about two images: moves ±1/2, SE² = 2 · 1/2 = 1. Columns that are not asked for are not looked at."""
    assert clustered_error({"score": [2.5, 0.5]}, {"score": [3, 9], "other": [1, 1, 1]}) == pytest.approx(1)


def test_what_cannot_be_told():
    """One image; all right about three images; and images that are each half right, which cannot count for more."""
    assert clustered_error({"a": [1, 0]}, {"a": [4, 4]}) is None and effective_number([1, 0], [4, 4]) == 1
    assert effective_number([1, 1, 1, 1], [0, 0, 1, 2]) == 3
    assert effective_number([1, 0, 1, 0], [0, 0, 1, 1]) == 4

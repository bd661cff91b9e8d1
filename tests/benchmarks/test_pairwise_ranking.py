import math

import pytest
import torch
from pairwise_ranking import count_right, markdown, pair_accuracy, ranking_table
from pytest import approx
from torch import tensor

from accord.errors import DataError
from accord.evaluation.summary import wilson_interval
from accord.routing.anchors import Anchors

# Two sites: the first is right about pairs 0 and 1 and ties on 2, the second about pairs 2 and 3.
SCORES = tensor(
    [
        [[1.0, 0.0], [0.0, 0.5]],
        [[0.8, 0.0], [0.2, 1.0]],
        [[0.0, 1.5], [0.0, 1.0]],
        [[0.0, 1.0], [2.0, 0.0]],
    ]
)
TYPES = ["colour", "colour", "shape", "shape"]


def anchors(scores=SCORES):
    n = len(scores)
    return Anchors(scores, torch.zeros(n, 3), torch.zeros(n, 2, 3), torch.arange(n))


def constant(*weights):
    return lambda anchors: tensor(weights).expand_as(anchors.scores)


def test_pair_accuracy_by_hand():
    """Halves: (0.5 > 0.25), (0.4 > 0.6), (0.75 > 0.5), (0.5 > 1)."""
    half = torch.full_like(SCORES, 0.5)
    assert pair_accuracy(SCORES, half).tolist() == [True, False, True, False]
    first = tensor([1.0, 0.0]).expand_as(SCORES)
    assert pair_accuracy(SCORES, first).tolist() == [True, True, False, False]  # the third is a tie


def test_the_answers_of_a_pair_may_have_two_judges():
    """The first site judges the chosen answer (0.8), the second the rejected one (1.0), which is no fair comparison."""
    weights = tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert pair_accuracy(SCORES[1:2], weights).tolist() == [False]
    assert pair_accuracy(SCORES[1:2], weights.flip(1)).tolist() == [False]  # 0.0 against 0.2
    assert pair_accuracy(SCORES[3:], weights.flip(1)).tolist() == [False]  # 1.0 against 2.0
    assert pair_accuracy(SCORES[2:3], weights.flip(1)).tolist() == [True]  # 1.5 against 0.0


def test_an_absent_site_is_left_out_and_an_answer_without_a_score_is_not_right():
    nan = math.nan
    scores = tensor([[[1.0, nan], [0.0, 9.0]], [[nan, nan], [0.0, 0.0]], [[1.0, 0.0], [nan, nan]]])
    weights = tensor([[[0.5, 0.5], [1.0, 0.0]]] * 3)
    assert pair_accuracy(scores, weights).tolist() == [True, False, False]


def test_the_table_by_hand():
    """Weights (0.6, 0.4) mix the pairs to 0.6 > 0.2, 0.48 < 0.52 (colour), 0.6 > 0.4, 0.4 < 1.2 (shape).

    Its top site is the first. The router `split` sends chosen answers to the second site, rejected ones to the first:
    0 > 0, 0 > 0.2, 1.5 > 0, 1 > 2.
    """

    def split(anchors):
        return tensor([[0.1, 0.9], [0.8, 0.2]]).expand_as(anchors.scores)

    rows = ranking_table(anchors(), TYPES, ["a", "b"], {"fixed": constant(0.6, 0.4), "split": split})
    assert [(row.name, row.mode) for row in rows] == [
        *(("a", "single"), ("b", "single")),
        *(("fixed", "soft"), ("fixed", "top1"), ("split", "soft"), ("split", "top1")),
    ]
    right = [{kind: t.correct for kind, t in row.accuracy.by_type.items()} for row in rows]
    assert right[0] == {"colour": 2, "shape": 0}
    assert right[1] == {"colour": 0, "shape": 2}
    assert right[2] == {"colour": 1, "shape": 1}
    assert right[3] == {"colour": 2, "shape": 0}
    assert right[5] == {"colour": 0, "shape": 1}
    assert [row.two_judges for row in rows] == [0, 0, 0, 0, 0, 1]
    of_type = rows[2].accuracy.by_type["shape"]
    assert (of_type.n, of_type.accuracy) == (2, 0.5)
    assert (of_type.low, of_type.high) == wilson_interval(1, 2)
    assert rows[2].accuracy.macro == approx(0.5)


def test_types_are_in_alphabetical_order_and_weigh_alike_in_the_macro():
    """1 of 1 and 1 of 3: macro (1 + 1/3) / 2 = 2/3, overall 2/4."""
    found = count_right(tensor([True, False, False, True]), ["shape", "shape", "shape", "colour"])
    assert list(found.by_type) == ["colour", "shape"]
    assert (found.macro, found.overall) == (approx(2 / 3), 0.5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match="1 types and 2 site names"):
        ranking_table(anchors(), ["colour"], ["a", "b"], {})
    with pytest.raises(DataError, match="4 types and 1 site names"):
        ranking_table(anchors(), TYPES, ["a"], {})
    with pytest.raises(DataError, match=r"router 'x' gives weights \(4, 2\), expected \(4, 2, 2\)"):
        ranking_table(anchors(), TYPES, ["a", "b"], {"x": lambda anchors: torch.ones(4, 2)})


def test_markdown():
    """1 of 2 is 50 %, Wilson's 95 % interval 9.5 to 90.5; 2 of 2 is 34.2 to 100; none 0 to 65.8."""
    rows = ranking_table(anchors(), TYPES, ["a", "b"], {"fixed": constant(0.6, 0.4)})
    lines = markdown(rows).splitlines()
    assert lines[0] == "| router | mode | colour (n = 2) | shape (n = 2) | macro | two judges |"
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    assert lines[2].startswith("| a | single | 100.0 [34.2, 100.0] | 0.0 [0.0, 65.8] | 50.0 [")
    assert lines[4].startswith("| fixed | soft | 50.0 [9.5, 90.5] | 50.0 [9.5, 90.5] |")
    assert len(lines) == 6 and lines[5].endswith("| 0.0 |")

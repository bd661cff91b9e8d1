"""Davidson's likelihood against numbers derived by hand, and what a training makes of ties and weights."""

import math
from dataclasses import replace

import pytest
import torch
from pytest import approx

from accord.errors import DataError
from accord.rewards.alone import ALONE, train_on_pairs
from accord.rewards.ties import davidson
from accord.rewards.train import PairGroup, bradley_terry, group_pairs, pair_margins, rank_pairs

COLOURS = ("red", "blue", "green", "yellow")


def likelihood(margin, tied, nu):
    """The loss of one judgement, and its derivative by the margin."""
    given = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    loss = davidson(given, torch.tensor([tied]), nu)
    loss.backward()
    return loss.item(), given.grad.item()


@pytest.mark.parametrize(
    ("margin", "tied", "nu", "loss", "gradient"),
    [
        (0.0, False, 1.0, math.log(3), -1 / 2),  # each of three outcomes has a third
        (0.0, True, 1.0, math.log(3), 0.0),  # a tie is content with equal scores
        (2 * math.log(2), False, 1.0, math.log(1.75), -2 / 7),  # e^(m/2) = 2: (2 + 1/2 + 1) / 2, and 3/7 / ... - 1/2
        (2 * math.log(2), True, 1.0, math.log(3.5), 3 / 14),  # (2 - 1/2) / 2 / 3.5
        (-2 * math.log(2), True, 1.0, math.log(3.5), -3 / 14),
        (2 * math.log(2), True, 0.5, math.log(6), 1 / 4),  # (2 + 1/2 + 1/2) / (1/2), and 3/4 / 3
    ],
)
def test_loss_and_gradient_by_hand(margin, tied, nu, loss, gradient):
    assert likelihood(margin, tied, nu) == approx((loss, gradient), abs=1e-12)


def test_without_ties_it_is_bradley_terry_in_the_limit_and_does_not_overflow():
    margins = torch.tensor([-3.0, 0.0, 0.5, 40.0], dtype=torch.float64)
    untied = torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(davidson(margins, untied, 1e-12), -torch.nn.functional.logsigmoid(margins))
    far = davidson(torch.tensor([2000.0, -2000.0]), torch.tensor([True, False]), 1.0)
    assert far.tolist() == [1000.0, 2000.0]


def test_a_mean_with_weights_and_an_accuracy_without_ties():
    """One group: margins 0 and 2 ln 2, the second a tie. ν = 1, weights 1 and 3: (log 3 + 3 log 3.5) / 4.

    The accuracy is that of the first alone, which is no better than equal. Weights alone: (log 2 + 3 log 1.25) / 4.
    """
    scores, weights = torch.tensor([0.0, 0.0, -2 * math.log(2)]), torch.tensor([1.0, 3.0])
    loss, accuracy = bradley_terry(scores, [3], 0.0, weights=weights, tied=torch.tensor([False, True]), nu=1.0)
    assert loss.item() == approx((math.log(3) + 3 * math.log(3.5)) / 4) and accuracy.item() == 0.0
    loss, accuracy = bradley_terry(scores, [3], 0.0, weights=weights)
    assert loss.item() == approx((math.log(2) + 3 * math.log(1.25)) / 4) and accuracy.item() == 0.5


def test_groups_know_weights_and_ties(prefer):
    given = [prefer(0, "red", "blue", weight=2.0), prefer(0, "red", "green", tie=True), prefer(1, "blue", "red")]
    assert group_pairs(given) == [
        PairGroup(given[0], ("blue", "green"), (2.0, 1.0), (False, True)),
        PairGroup(given[2], ("red",)),
    ]


@pytest.fixture(scope="module")
def pairs(prefer):
    """Twelve preferences; and as many ties, of two wrong answers."""
    kinds = [(4 * n + k, right, wrong) for n, right in enumerate(COLOURS) for k, wrong in enumerate(COLOURS)]
    preferred = [prefer(n, right, wrong) for n, right, wrong in kinds if right != wrong]
    return preferred, [replace(pair, chosen="cat", rejected="dog", tie=True) for pair in preferred]


SHORT = replace(ALONE, steps=12, prompts_per_batch=8, evaluate_every=12, kept_back=0.25)


def test_ties_draw_scores_together(pairs, monkeypatch):
    """Trained on the same pairs from the same start, a model scores tied answers nearer to each other with ties."""
    preferred, tied = pairs
    apart = {}
    for nu in (0.0, 1.0):
        model, ranking = train_on_pairs("accord/idefics3", [*preferred, *tied], replace(SHORT, ties=nu), seed=3)
        scale = model.standardisation.deviation
        apart[nu] = sum(abs(scale * margin) for margin in pair_margins(model, tied)) / len(tied)
        assert ranking.by_type.keys() == {"colour"}
        assert rank_pairs(model, [*preferred, *tied]) == rank_pairs(model, preferred)
    assert apart[1.0] < apart[0.0]


def test_a_weight_moves_the_scores(pairs):
    """Contradicting pairs: the model sides with those that weigh more."""
    preferred, _ = pairs
    contrary = [replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in preferred]
    for ours, theirs in ((9.0, 1.0), (1.0, 9.0)):
        given = [replace(p, weight=ours) for p in preferred] + [replace(p, weight=theirs) for p in contrary]
        model, _ = train_on_pairs("accord/idefics3", given, SHORT, seed=3)
        margins = pair_margins(model, preferred)
        assert (sum(margins) > 0) == (ours > theirs)


def test_nothing_but_ties_chooses_no_weights(pairs):
    with pytest.raises(DataError, match="all of them are ties; raise kept_back, or give pairs of which one"):
        train_on_pairs("accord/idefics3", pairs[1], SHORT)

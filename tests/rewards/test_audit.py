import math

import pytest
import torch

from accord.errors import DataError
from accord.rewards.accounting import Mechanism, epsilon_of, label_mechanism
from accord.rewards.audit import (
    agreement,
    apart,
    canaries,
    draw_bits,
    epsilon_bound,
    guess_bound,
    leak,
    lira,
    margins,
    one_run,
    presence,
    surrogate,
)
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, private_head
from accord.rewards.private_labels import draw_flips, label_head

SITE = Privacy(dimensions=0, steps=60, sampling=0.3, learning_rate=8.0)
ENOUGH = Sigmas(gradient=8.0, projection=0.0, standardisation=0.0)
STATED = epsilon_of([Mechanism(8.0, 0.3, 60)], 1e-6)
"""ε of `ENOUGH` at δ = 1e-6: 60 releases at a rate of 0.3."""


def pairs(count, features=40, seed=0):
    return torch.randn(count, 2, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def training(sigmas, privacy=SITE):
    def train(features, number):
        key = SecretNoise(number.to_bytes(32))
        return private_head(features, torch.arange(len(features)), privacy, sigmas, key)

    return train


def test_a_leak_by_hand():
    """Of members 3, 1 and others 0, 1: above 3 of 4, half of the tie; above the largest other one of two."""
    found = leak(torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert (found.auc, found.at_001, found.at_01) == (3.5 / 4, 0.5, 0.5)


@pytest.mark.parametrize(
    ("right", "guesses", "epsilon"),
    [
        (5, 5, math.log(0.05**0.2 / (1 - 0.05**0.2))),  # p⁵ = 0.05
        (50, 100, 0.0),
        (0, 0, 0.0),
    ],
)
def test_the_bound_by_hand(right, guesses, epsilon):
    assert epsilon_bound(right, guesses) == pytest.approx(epsilon, abs=1e-6)


def test_the_bound_holds_as_often_as_it_says():
    """Randomised response with ε = 1 is right with p = e/(1+e); the bound is above 1 in 5 % of runs at most."""
    p = math.e / (1 + math.e)
    drawn = torch.distributions.Binomial(500, torch.tensor(p)).sample((400,))
    bounds = [epsilon_bound(int(v), 500) for v in drawn]
    assert sum(b > 1 for b in bounds) <= 400 * 0.05 + 3 * (400 * 0.05 * 0.95) ** 0.5
    assert max(bounds) > 0.6


def test_lira_finds_members_and_noise_hides_them():
    """Random pairs, as few as features: what a head without noise says of them is learnt by heart."""
    data = pairs(80)
    bare = lira(data, training(Sigmas(0, 0, 0)), shadows=16, targets=6, seed=0)
    hidden = lira(data, training(ENOUGH), shadows=16, targets=6, seed=0)
    assert bare.auc > 0.8 and bare.at_01 > 0.05
    assert 0.4 < hidden.auc < 0.65 and hidden.auc < bare.auc - 0.15
    with pytest.raises(DataError, match="at least 4 shadow heads, got 2"):
        lira(data, training(ENOUGH), shadows=2, targets=1, seed=0)


def test_the_audit_believes_an_honest_build_and_catches_a_sabotaged_one():
    """T20, short: with σ = 0 the bound is above the stated ε; with the noise that was paid for it is below."""
    site, planted = pairs(50, features=400, seed=1), pairs(200, features=400, seed=2)
    assert one_run(site, planted, training(ENOUGH), seed=0) <= STATED
    assert one_run(site, planted, training(Sigmas(0, 0, 0)), seed=0) > STATED


@pytest.mark.parametrize("stages", [1, 2])
def test_the_audit_believes_honest_labels_and_catches_those_that_are_never_flipped(stages):
    """T20, short: which answer of a canary won is guessed from its margin."""
    privacy = Privacy(epsilon=1.0, unit="label", dimensions=0, steps=60, stages=stages)
    told, planted, first = label_mechanism(privacy), pairs(200, features=400, seed=2), draw_bits(200, seed=0)

    def bound(flip):
        noise = SecretNoise(bytes(32))
        turned = draw_flips(200, flip, noise) ^ ~first
        noisy = torch.where(turned[:, None, None], planted.flip(1), planted)
        return guess_bound(margins(label_head(noisy, told.flip, privacy, noise), planted), first)

    assert bound(told.flip) <= epsilon_of([told], 0.0) < bound(0.0)


def test_a_bound_from_guesses_by_hand():
    """Of 20 canaries 2, 4 and 20 are guessed. With all right the 20 say most: p²⁰ = 0.05/3; a score of none says 0."""
    inside = draw_bits(20, seed=0)
    inside[:10], inside[10:] = True, False
    p = (0.05 / 3) ** (1 / 20)
    assert guess_bound(torch.arange(20.0).flip(0), inside) == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
    assert guess_bound(torch.arange(20.0), inside) == 0
    assert 0.4 < draw_bits(1000, seed=1).double().mean() < 0.6


def test_presence_by_hand():
    """Gradients (2, 0) and (3, 4), of directions a and b with ab = 0.6; a sum of 1 a and 3 b is (2.8, 2.4).

    Without a ridge least squares gives 1 and 3 back; a large one leaves the products, (2.8, 3.6) / λ.
    """
    gradients = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    seen = torch.tensor([2.8, 2.4])
    assert presence(seen, gradients, ridge=0.0).tolist() == pytest.approx([1, 3], abs=1e-5)
    assert (1e6 * presence(seen, gradients, ridge=1e6)).tolist() == pytest.approx([2.8, 3.6], abs=1e-4)


def test_gradients_that_are_apart_are_chosen():
    """Three of one direction and one of another, whose products are 0.71: of two chosen it is one; lengths say nothing.

    The third is again one that was not chosen.
    """
    rows = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.1, 0.0], [1.0, 1.0]])
    assert 3 in apart(rows, 2).tolist()
    assert len(set(apart(rows, 3).tolist())) == 3


def test_canaries_are_answers_of_the_site_with_labels_by_lot():
    data = pairs(50)
    found = canaries(data, 400, seed=3)
    assert found.shape == (400, 2, 40) and (found[:, 0] != found[:, 1]).any(dim=1).all()
    known = {tuple(row.tolist()) for row in data.flatten(0, 1)}
    assert all(tuple(row.tolist()) in known for row in found.flatten(0, 1)[:20])
    head = torch.ones(40, dtype=torch.float64)
    assert abs((margins(head, found) > 0).double().mean() - 0.5) < 0.1


def test_a_head_is_recovered_from_its_replies():
    """T21: exactly from exact replies; nearly from 8 bits; in its order from ranks alone."""
    states = torch.randn(60, 8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fresh = torch.randn(100, 8, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    head = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = states @ head + 3.0
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(surrogate(states, scores, "exact"), head, dim=0) == pytest.approx(1, abs=1e-9)
    assert cosine(surrogate(states, scores, "8 bits"), head, dim=0) > 0.9999
    ranked = surrogate(states, torch.exp(scores), "ranks")  # whatever keeps the order
    assert cosine(ranked, head, dim=0) > 0.97
    assert agreement(ranked, head, fresh) > 0.93 and agreement(head, head, fresh) == 1
    assert agreement(head, -head, fresh) == 0

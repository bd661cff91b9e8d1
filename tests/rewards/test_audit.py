import math

import pytest
import torch

from accord.errors import DataError
from accord.rewards.accounting import Mechanism, epsilon_of
from accord.rewards.audit import (
    agreement,
    canaries,
    epsilon_bound,
    leak,
    lira,
    margins,
    one_run,
    surrogate,
)
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, private_head

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

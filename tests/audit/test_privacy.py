"""The long forms of the attacks on private reward models; figures on real features are in docs/privacy.md."""

import pytest
import torch

from accord.data.easy_vqa import load_easy_vqa
from accord.rewards import private
from accord.rewards.accounting import Mechanism, calibrate, epsilon_of
from accord.rewards.audit import agreement, lira, one_run, surrogate
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, pair_features, private_head
from accord.types import PreferencePair, vqa_prompt

pytest.importorskip("dp_accounting")

SITE = Privacy(dimensions=0, steps=60, sampling=0.05, learning_rate=8.0)
PAID = Sigmas(gradient=1.5, projection=0.0, standardisation=0.0)
STATED = epsilon_of([Mechanism(1.5, 0.05, 60)], 1e-6)
"""ε of `PAID` at δ = 1e-6, 1.55: 60 releases at a rate of 0.05."""

SEEDS = range(5)


def random_pairs(count, seed):
    return torch.randn(count, 2, 1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def training(sigmas=PAID, privacy=SITE):
    def train(features, number):
        return private_head(features, torch.arange(len(features)), privacy, sigmas, SecretNoise(number.to_bytes(32)))

    return train


def bounds(train):
    """Audit a build with 500 canaries beside 50 pairs, five times."""
    return [one_run(random_pairs(50, 1), random_pairs(500, 2), train, seed=seed) for seed in SEEDS]


@pytest.mark.audit
def test_an_honest_build_is_believed():
    """T20: the lower bound of 95 % is below the stated ε, five times of five."""
    assert max(bounds(training())) <= STATED


@pytest.mark.audit
@pytest.mark.parametrize("wrong", ["no noise", "a wrong sampling rate", "no clipping"])
def test_a_sabotaged_build_is_caught(wrong, monkeypatch):
    """T20: four times of five at least the bound is above the ε that was stated.

    The wrong rate: a step takes all units, and is accounted for as if it took one in twenty. Without clipping gradients
    are as long as the answers make them. A tenth of the noise is too much to be caught: two times of five.
    """
    sigmas, privacy = PAID, SITE
    if wrong == "no noise":
        sigmas = Sigmas(0, 0, 0)
    elif wrong == "a wrong sampling rate":
        privacy = Privacy(dimensions=0, steps=60, sampling=1.0, learning_rate=8.0)
    else:
        monkeypatch.setattr(private, "to_sphere", lambda rows: rows)
        monkeypatch.setattr(private, "clip_rows", lambda rows, limit: rows)
    assert sum(bound > STATED for bound in bounds(training(sigmas, privacy))) >= 4


@pytest.mark.audit
def test_a_build_with_a_projection():
    """T20: what it is projected by is paid for. Believed with the noise, five times of five, and caught without."""
    privacy = Privacy(dimensions=400, steps=60, sampling=0.05, learning_rate=8.0)
    sigmas = Sigmas(gradient=1.5, projection=6.0, standardisation=0.0)
    stated = epsilon_of([Mechanism(1.5, 0.05, 60), Mechanism(6.0)], 1e-6)
    assert max(bounds(training(sigmas, privacy))) <= stated
    assert sum(bound > stated for bound in bounds(training(Sigmas(0, 0, 0), privacy))) >= 4


@pytest.fixture(scope="module")
def features():
    """What a shipped model makes of 600 questions about pictures and two of their answers, `[600, 2, D]`."""
    asked = [q for q in load_easy_vqa() if q.split == "private"][:600]
    answers = {}
    for q in asked:
        answers.setdefault(q.question_type, []).append(q.answer)
    pairs = [
        PreferencePair(
            vqa_prompt(q.text), q.answer, next(a for a in answers[q.question_type] if a != q.answer), (q.image,), q.id,
            q.question_type, True,
        )
        for q in asked
    ]  # fmt: skip
    return pair_features(RewardModel.from_checkpoint("accord/llava-siglip-qwen2"), pairs).double()


@pytest.mark.audit
def test_membership_of_real_pairs(features):
    """LiRA with 16 shadow heads: with the noise of ε = 8 it tells members no better than a coin, within five points."""
    privacy = Privacy()
    hidden = lira(features, training(calibrate(privacy), privacy), shadows=16, targets=4, seed=0)
    assert 0.45 < hidden.auc < 0.55 and hidden.at_01 < 0.03


@pytest.mark.audit
def test_extraction_from_real_features(features):
    """T21: exact replies give the head away, in order; 8 bits and ranks nearly so, with or without the noise.

    What was learnt of one half of the questions is tried on the other.
    """
    head = training(calibrate(Privacy()), Privacy())(features, 0)
    known, fresh = features[:300], features[300:]
    found = {
        kind: agreement(surrogate(known, known @ head, kind), head, fresh) for kind in ("exact", "8 bits", "ranks")
    }
    assert found["exact"] > 0.999 and found["8 bits"] > 0.95 and found["ranks"] > 0.9, found

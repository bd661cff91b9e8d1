"""DisCO by hand, and against its public code's way of writing it; on shared prefixes it is in test_trainer.py."""

from math import exp, log

import pytest
import torch
from pytest import approx

from accord.alignment import grpo
from accord.alignment.discriminative import CUT, discriminative_loss
from accord.alignment.grpo import AlignmentConfig, align
from accord.errors import RecipeError
from accord.models.load import load_model

ONES = torch.ones(3, 1)


def test_a_group_by_hand():
    """Scores −1 (good), −2 and −3 (bad), τ = 1: J = −1 − log((e⁻² + e⁻³) / 2); KL = 0, no penalty."""
    logps = torch.tensor([[-1.0], [-2.0], [-3.0]], requires_grad=True)
    advantages, groups = torch.tensor([1.2, -0.6, -0.6]), torch.zeros(3)
    loss = discriminative_loss(logps, logps.detach(), advantages, ONES, groups, temperature=1.0)
    assert loss.item() == approx(1 + log((exp(-2) + exp(-3)) / 2))
    loss.backward()
    share = 1 / (1 + exp(-1))  # the likelier of the bad ones is pushed down the most
    assert logps.grad.flatten().tolist() == approx([-1, share, 1 - share])


def test_a_completions_score_is_a_mean_over_its_own_tokens():
    """(−1 − 3) / 2 = −2 and −4, whose second token is none: J = −2 + 4 at any τ, since one bad one is its own mean."""
    logps, mask = torch.tensor([[-1.0, -3.0], [-4.0, -9.0]]), torch.tensor([[1, 1], [1, 0]])
    loss = discriminative_loss(logps, logps, torch.tensor([0.7, -0.7]), mask, torch.zeros(2))
    assert loss.item() == approx(-2.0)


def test_the_constraint_by_hand():
    """Each token has lost 0.3 nats: KL = .3; β/2 (.3 − .1)² = 1000/2 · .04 = 20; J = 0 − 0, as both score alike."""
    old = torch.zeros(2, 2)
    advantages, groups = torch.tensor([1.0, -1.0]), torch.zeros(2)
    given = (old - 0.3, old, advantages, torch.ones(2, 2), groups)
    assert discriminative_loss(*given, radius=0.1).item() == approx(20.0, rel=1e-5)
    assert discriminative_loss(*given, radius=0.31).item() == approx(0.0, abs=1e-6)
    assert discriminative_loss(old + 0.3, *given[1:], radius=0.1).item() == approx(0.0, abs=1e-6)


def test_groups_that_say_nothing_count_in_the_mean():
    """Three groups, of which one has good and bad: a third of its J = −1 + 2."""
    logps = torch.tensor([-1.0, -2.0, -5.0, -6.0, -7.0, -8.0])[:, None].requires_grad_()
    advantages = torch.tensor([0.7, -0.7, 0.0, 0.0, CUT / 2, -CUT / 2])
    groups = torch.tensor([4, 4, 0, 0, 2, 2])
    loss = discriminative_loss(logps, logps.detach(), advantages, torch.ones(6, 1), groups)
    assert loss.item() == approx(-1 / 3)
    loss.backward()
    assert logps.grad.flatten()[2:].tolist() == [0.0] * 4
    none = discriminative_loss(logps, logps.detach(), torch.zeros(6), torch.ones(6, 1), groups)
    assert none.item() == 0.0 and none.requires_grad


def public_code(logps, old, rewards, mask, tau, beta, delta):
    """One group as its public code writes it: the gradient is right, the value is not."""
    score = (logps * mask).sum(1) / mask.sum(1)
    good, bad = score[rewards == 1], score[rewards == 0]
    sums = (bad / tau).exp().sum()
    kl = ((old - logps) * mask).sum() / mask.sum()
    return -(good.mean() - tau * sums / sums.detach()) + max(beta * (kl.item() - delta), 0.0) * kl


def test_the_gradient_is_that_of_the_public_code():
    torch.manual_seed(0)
    logps, mask = (-torch.rand(6, 4, dtype=torch.float64)).requires_grad_(), torch.rand(6, 4) < 0.8
    mask[:, 0] = True
    old, rewards = logps.detach() + 0.01, torch.tensor([1.0, 0, 0, 1, 0, 0])
    advantages = (rewards - rewards.mean()) / rewards.std()
    ours = discriminative_loss(logps, old, advantages, mask, torch.zeros(6))
    (mine,) = torch.autograd.grad(ours, logps)
    (theirs,) = torch.autograd.grad(public_code(logps, old, rewards, mask, 10.0, 1e3, 1e-4), logps)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("count", "told"), [(8, True), (99, True), (100, False)])
def test_right_and_wrong_are_good_and_bad(count, told):
    """All but one right: they are 1/n from the mean, and the deviation is √(1/n): 1/√n, which is .1005 of 99."""
    rewards = torch.ones(count)
    rewards[0] = 0
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert advantages[0] < -CUT and bool((advantages[1:] > CUT).all()) is told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_rewards": "none"}, 'got scale_rewards = "none"; set it to "group"'),
        ({"completions_per_device": 4}, "completions_per_device = 4; make it a multiple of group_size = 8"),
        ({"iterations": 3}, "save_every must be a multiple of iterations = 3, .* got 50"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(RecipeError, match=message):
        AlignmentConfig(loss="discriminative", **settings)


def test_the_constraint_acts_from_the_second_update_on(llava, ask, tmp_path):
    """Two updates a rollout: at the first no token has moved, at the second all have; all four losses are noted."""
    seen, records = [], []

    def spied(logps, old, *rest):
        seen.append(float((old - logps.detach()).abs().max()))
        return discriminative_loss(logps, old, *rest)

    config = AlignmentConfig(
        steps=4,
        prompts_per_step=2,
        group_size=4,
        max_completion_length=3,
        learning_rate=1e-2,
        evaluate_every=0,
        save_every=0,
        loss="discriminative",
        iterations=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grpo.OBJECTIVES, "discriminative", spied)
        align(
            *load_model(llava),
            [ask(0), ask(1, "blue")],
            lambda prompts, completions, **_: [float(len(set(c[-1]["content"]))) for c in completions],
            config,
            seed=0,
            out=tmp_path / "out",
            log=records.append,
        )
    assert len(seen) == 4 and max(seen[0], seen[2]) < 1e-5 < 1e-3 < min(seen[1], seen[3])
    assert [record["step"] for record in records] == [1, 2, 3, 4] or [r["step"] for r in records] == [1, 3]
    assert all({"loss", "kl", "entropy"} <= record.keys() for record in records)

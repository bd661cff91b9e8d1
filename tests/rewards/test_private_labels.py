import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from accord.errors import RecipeError
from accord.rewards.accounting import Mechanism, epsilon_of, label_mechanism
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy
from accord.rewards.private_labels import (
    descend,
    draw_flips,
    label_head,
    likeliest_labels,
    randomise,
    standardisation_of,
)

LABELS = Privacy(epsilon=1.0, unit="label", dimensions=0)
F = 1 / (1 + math.e)
"""The probability of a flip at ε = 1, 0.269."""


def noise(n=0):
    return SecretNoise(bytes([n] * 32))


def learnable(count, features=8, seed=0, sharpness=3.0):
    """Pairs whose chosen answer is drawn by Bradley–Terry from a fixed head; `[N, 2, D]`."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(features, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    answers = torch.randn(count, 2, features, generator=generator, dtype=torch.float64)
    score = sharpness * answers @ (truth / truth.norm())
    right = torch.rand(count, generator=generator) < torch.sigmoid(score[:, 0] - score[:, 1])
    return torch.where(right[:, None, None], answers, answers.flip(1))


def noisy(features, flip, n=0):
    turned = draw_flips(len(features), flip, noise(n))
    return torch.where(turned[:, None, None], features.flip(1), features)


def accuracy(head, features):
    return float(((features[:, 0] - features[:, 1]) @ head > 0).double().mean())


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_labels_are_flipped_as_often_as_they_say(epsilon, prefer):
    """f = 1/(1+e^ε), within five deviations; and a pair that is turned differs in nothing but its label."""
    f = label_mechanism(Privacy(epsilon=epsilon, unit="label")).flip
    assert f == pytest.approx(1 / (1 + math.exp(epsilon)))
    turned = draw_flips(40_000, f, noise())
    assert abs(turned.double().mean() - f) < 5 * (f * (1 - f) / 40_000) ** 0.5
    pairs = [prefer(n, "red", "blue") for n in range(3)]
    found = randomise(pairs, torch.tensor([False, True, False]))
    assert [(pair.chosen, pair.rejected) for pair in found] == [("red", "blue"), ("blue", "red"), ("red", "blue")]
    assert found[1].images == pairs[1].images and found[1].question_id == pairs[1].question_id


def test_the_loss_is_unbiased():
    """Its gradient over both labels, each as often as it comes, is that of the true label; Bradley–Terry's is not.

    ∇ℓ̃ with f = 0 is ∇ℓ, so that one step from 0 shows both: θ₁ = η z (σ(0) + f/(1−2f)) for a label that was kept.
    """
    z = torch.tensor([[0.6, -0.8]], dtype=torch.float64)
    step = Privacy(unit="label", steps=1, learning_rate=1.0)
    kept, turned = descend(z, F, step), descend(-z, F, step)
    torch.testing.assert_close((1 - F) * kept + F * turned, descend(z, 0.0, step))
    torch.testing.assert_close(descend(z, 0.0, step), 0.5 * z[0])
    plain = (1 - F) * descend(z, 0.0, step) + F * descend(-z, 0.0, step)
    assert (plain - 0.5 * z[0]).norm() > 0.2


def test_the_descent_is_that_of_the_loss_as_it_is_written():
    """By autograd on ((1 − f) ℓ(ỹ m) − f ℓ(−ỹ m)) / (1 − 2f), over the mean of the second half of the iterates."""
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta, seen = torch.zeros(4, dtype=torch.float64), []
    for _ in range(6):
        leaf = theta.clone().requires_grad_()
        loss = ((1 - F) * -logsigmoid(rows @ leaf) - F * -logsigmoid(-(rows @ leaf))) / (1 - 2 * F)
        (gradient,) = torch.autograd.grad(loss.mean(), leaf)
        theta = theta - 2.0 * gradient
        seen.append(theta)
    found = descend(rows, F, Privacy(unit="label", steps=6, learning_rate=2.0))
    torch.testing.assert_close(found, torch.stack(seen[3:]).mean(0))


def test_the_unbiased_loss_finds_the_scale_that_noise_would_hide():
    """With all data the head is as long as that of true labels; Bradley–Terry on noisy ones is less sure of all."""
    features = learnable(20_000)
    rows = features[:, 0] - features[:, 1]
    rows = rows / rows.norm(dim=1, keepdim=True)
    turned = draw_flips(len(rows), F, noise())
    bad = torch.where(turned[:, None], -rows, rows)
    settings = Privacy(unit="label", steps=200)
    true, unbiased, plain = (descend(*each, settings) for each in ((rows, 0.0), (bad, F), (bad, 0.0)))
    assert unbiased.norm() == pytest.approx(true.norm().item(), rel=0.1)
    assert plain.norm() < 0.6 * true.norm()


def test_a_head_learns_from_noisy_labels():
    """At ε = 1 more than a quarter of the labels is wrong; at 0.01 half are, and nothing is left to learn."""
    features, fresh = learnable(4000), learnable(4000, seed=1)
    clean = label_head(features, 0.0, LABELS, noise())
    private = label_head(noisy(features, F), F, LABELS, noise(1))
    assert accuracy(clean, fresh) > 0.83
    assert accuracy(clean, fresh) - 0.03 < accuracy(private, fresh) <= accuracy(clean, fresh) + 0.01
    little = label_head(noisy(features, 0.4975, 2), 0.4975, LABELS, noise(1))
    assert accuracy(little, fresh) < 0.75


def test_likeliest_labels_by_hand():
    """f = 0.1. Disagreement of 1 in 5: γ = (0.2 − 0.1) / 0.8 = 0.125 > f, so that noisy labels win where they differ.

    With f = 0.25 and 3 in 10: γ = (0.3 − 0.25) / 0.5 = 0.1 < f, and the model's win.
    """
    given = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    guessed = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])
    assert torch.equal(likeliest_labels(given, guessed, 0.1), given)
    given, guessed = torch.ones(10), torch.tensor([1.0] * 7 + [-1.0] * 3)
    assert torch.equal(likeliest_labels(given, guessed, 0.25), guessed)
    assert torch.equal(likeliest_labels(given, -given, 0.25), given)  # a model that is worse than chance is not heard


def test_two_stages_correct_labels():
    """PROPS: of the labels of the second half more are right after they are joined with the first head's."""
    features, f = learnable(6000, sharpness=20.0), 0.4
    turned = draw_flips(6000, f, noise())
    bad = torch.where(turned[:, None, None], features.flip(1), features)
    rows = bad[:, 0] - bad[:, 1]
    rows = rows / rows.norm(dim=1, keepdim=True)
    theta = descend(rows[:3000], f, LABELS)
    joined = likeliest_labels(torch.ones(3000).double(), torch.sign(rows[3000:] @ theta), f)
    right = torch.where(turned[3000:], -1.0, 1.0)
    assert (joined == right).double().mean() > 0.85 > 0.65 > (~turned).double().mean()
    head = label_head(bad, f, Privacy(epsilon=0.4, unit="label", stages=2, dimensions=0), noise(1))
    assert accuracy(head, learnable(4000, seed=1, sharpness=20.0)) > 0.85


def test_nothing_but_the_noisy_labels_is_read_of_the_labels():
    """Of two data sets that differ in labels, with flips that make them alike, the heads and the scales are alike."""
    features = learnable(200)
    labels = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.5
    other = torch.where(labels[:, None, None], features.flip(1), features)
    alike = torch.where(labels[:, None, None], other.flip(1), other)  # flipped where the labels differ
    for stages in (1, 2):
        settings = Privacy(unit="label", stages=stages, dimensions=4)
        heads = [label_head(each, F, settings, noise()) for each in (features, alike)]
        assert torch.equal(*heads)
    scales = [standardisation_of(each @ heads[0]) for each in (features, other)]
    assert scales[0].mean == pytest.approx(scales[1].mean) and scales[0].deviation == pytest.approx(scales[1].deviation)


def test_what_it_costs_is_what_dp_accounting_says():
    """Two trainings of ε = ½ and 1½ are 2, without δ; dp-accounting's upper bound for replaced labels is within 2 %."""
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting.pld import PLDAccountant

    spent = [Mechanism(0.0, flip=1 / (1 + math.exp(e))) for e in (0.5, 1.5)]
    assert epsilon_of(spent, 0.0) == pytest.approx(2.0)
    accountant = PLDAccountant(accounting.NeighboringRelation.REPLACE_ONE, value_discretization_interval=1e-3)
    for each in spent:
        accountant.compose(accounting.RandomizedResponseDpEvent(2 * each.flip, 2))
    assert accountant.get_epsilon(1e-9) == pytest.approx(2.0, rel=0.02)


def test_a_budget_of_labels_is_spent_once():
    first = label_mechanism(Privacy(epsilon=1.0, unit="label"))
    more = label_mechanism(Privacy(epsilon=3.0, unit="label"), [first])
    assert epsilon_of([first, more], 0.0) == pytest.approx(3.0)
    with pytest.raises(RecipeError, match="ε = 1 is spent"):
        label_mechanism(Privacy(epsilon=1.0, unit="label"), [first])
    assert 0 < label_mechanism(Privacy(epsilon=1e4, unit="label")).flip < 1e-20


def test_stages_are_of_labels():
    with pytest.raises(RecipeError, match="stages must be 1, or 2 with the unit 'label', got 2 with 'pair'"):
        Privacy(stages=2)
    with pytest.raises(RecipeError, match="got 3 with 'label'"):
        Privacy(stages=3, unit="label")

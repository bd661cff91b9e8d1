"""The benchmark of active choice: its counting, its training, and that it takes what the model doubts."""

import pytest
import torch
from active_choice import BATCH, FIRST, MOST, curve, needed, train


def test_needed_is_on_the_line_between_two_points():
    """0.7 is half-way from 0.6, at 75 judgements, to 0.8, at 100; what is there at once, and what never comes."""
    assert needed([0.5, 0.6, 0.8], 0.7) == 87.5
    assert needed([0.5, 0.6, 0.8], 0.4) == FIRST
    assert needed([0.5, 0.6, 0.6], 0.7) is None


def test_training_minimises_the_loss_and_ties_train_nothing():
    """At the minimum the gradient of mean log(1 + e^(−y w·x)) + r|w|² is 0; ties in between change nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator).double()
    y = torch.where(x[:, 0] + torch.randn(40, generator=generator) > 0, 1.0, -1.0).double()
    w = train(x, y).requires_grad_()
    loss = torch.nn.functional.softplus(-y * (x @ w)).mean() + 1e-2 * w.square().sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert gradient.abs().max() < 1e-9 and w[0] > 0
    with_ties = train(torch.cat([x, 5 * x]), torch.cat([y, torch.zeros(40).double()]))
    assert torch.allclose(with_ties, w.detach(), atol=1e-12)


@pytest.mark.parametrize("choice", ["random", "once", "again"])
def test_a_curve_has_a_point_for_each_batch_and_all_begin_alike(choice):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(MOST + 100, 4, generator=generator).double()
    truth = torch.tensor([1.0, -1.0, 0.5, 0.0]).double()
    y = torch.sign(x @ truth)
    found = curve(choice, (x, y), (x[:200], y[:200]), seed=3)
    assert len(found) == 1 + (MOST - FIRST) // BATCH
    assert found[0] == curve("random", (x, y), (x[:200], y[:200]), seed=3)[0] and found[-1] > 0.95

import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from accord.data.images import load_image
from accord.errors import DataWarning, RunError
from accord.models import load
from accord.models.inputs import build_batch
from accord.models.load import LoraSettings
from accord.rewards import model as reward_model
from accord.rewards import private_adapter as module
from accord.rewards.audit import margins
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, pair_features
from accord.rewards.private_adapter import (
    fresh_model,
    pair_gradients,
    private_adapter,
    trained_weights,
    unit_gradients,
)

pytest.importorskip("opacus")

COLOURS = ("red", "blue", "green", "yellow")
LORA = LoraSettings(rank=2, alpha=4)
SETTINGS = Privacy(dimensions=0, sampling=1.0, steps=4, clip=1e9, learning_rate=0.01)


def noise(n=0):
    return SecretNoise(bytes([n] * 32))


@pytest.fixture
def pairs(prefer):
    return [
        prefer(n, COLOURS[n % 4], ("blue, and red", "no", "green green")[n % 3] if n % 2 else COLOURS[(n + 1) % 4])
        for n in range(10)
    ]


def started(checkpoint, scale=0.3):
    """A model whose adapter does something: a fresh one's B is 0, and so are the gradients of its A."""
    model = fresh_model(checkpoint, LORA, noise())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trained_weights(model).values():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model


def loss_of(model, pairs):
    batch = build_batch(
        model.processor,
        [pair.prompt for pair in pairs],
        [load_image(pair.image) for pair in pairs],
        [[pair.chosen, pair.rejected] for pair in pairs],
    )
    return -logsigmoid(model(batch).view(-1, 2) @ torch.tensor([1.0, -1.0])).sum()


def loop(model, pairs):
    """The gradient of one pair after the other, by autograd alone."""
    weights = list(trained_weights(model).values())
    each = [torch.autograd.grad(loss_of(model, [pair]), weights) for pair in pairs]
    return torch.stack([torch.cat([gradient.flatten() for gradient in gradients]) for gradients in each])


def close(found, expected):
    """Within 1e-5 of a gradient's length, or of 1 where two answers' gradients all but cancel."""
    return bool(((found - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1).clamp_min(1)).all())


def flat(model):
    return torch.cat([weight.detach().flatten() for weight in trained_weights(model).values()])


def test_gradients_are_those_of_a_loop(family, checkpoints, pairs):
    """T19: of three families, of pairs whose answers differ in length, through adapter and head."""
    model = started(checkpoints[family])
    expected = loop(model, pairs)
    with pair_gradients(model) as gradients:
        found = gradients(pairs)
        again = gradients(pairs[:3])
    assert expected.norm(dim=1).min() > 0.01
    assert close(found, expected)
    torch.testing.assert_close(again, found[:3], rtol=1e-4, atol=1e-6)
    assert not any(hasattr(weight, "grad_sample") for weight in model.parameters())
    torch.testing.assert_close(loop(model, pairs[:1]), expected[:1])  # the hooks are gone


def test_rows_that_stand_for_themselves_are_added(llava, pairs, monkeypatch):
    """T19: a model that cannot share a prompt has a row for each answer, and a pair is their sum."""
    model = started(llava)
    expected = loop(model, pairs)
    monkeypatch.setattr("accord.models.inputs.why_alone", lambda _: "the test says so")
    with pair_gradients(model) as gradients, pytest.warns(DataWarning, match="because the test says so"):
        found = gradients(pairs)
    assert close(found, expected)


@pytest.mark.parametrize("clip", [0.01, 0.5])
def test_no_unit_adds_more_than_the_clip(llava, pairs, clip):
    """T19: pairs alone, and persons with one to four; without the clip every one of them is longer."""
    model = started(llava)
    for units in ([[n] for n in range(10)], [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9]]):
        with pair_gradients(model) as gradients:
            found = unit_gradients(gradients, pairs, units, clip, pairs_at_once=3)
            bare = unit_gradients(gradients, pairs, units, 1e9, pairs_at_once=3)
        assert found.norm(dim=1).max() <= clip * (1 + 1e-6) < bare.norm(dim=1).max()
        alone = loop(model, pairs).double()
        expected = torch.stack([alone[unit].sum(0) for unit in units])
        torch.testing.assert_close(bare, expected, rtol=1e-4, atol=1e-6)
        short = expected * (clip / expected.norm(dim=1, keepdim=True)).clamp_max(1)
        torch.testing.assert_close(found, short, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_adds_nothing():
    """Else one pair could turn every weight into NaN, whatever the noise is: its presence would show."""

    def gradients(pairs):
        return torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [float("inf"), 1.0]])[torch.tensor(pairs)]

    found = unit_gradients(gradients, [0, 1, 2], [[0], [1], [2]], 1.0, pairs_at_once=2)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0, 0], [0, 0]], dtype=torch.float64))


def test_without_noise_and_clipping_it_is_adam_on_the_mean_loss(llava, pairs):
    """T19: σ = 0, C large and q = 1; the mean of the last two of four iterates; within float32 all weights agree."""
    model, plain = started(llava), started(llava)
    private_adapter(model, pairs, torch.arange(10), SETTINGS, 0.0, noise(), pairs_at_once=4)
    weights, seen = list(trained_weights(plain).values()), []
    optimiser = torch.optim.Adam(weights, lr=0.01)
    for _ in range(4):
        optimiser.zero_grad()
        (loss_of(plain, pairs) / len(pairs)).backward()
        optimiser.step()
        seen.append(flat(plain))
    torch.testing.assert_close(flat(model), (seen[2] + seen[3]) / 2, rtol=1e-4, atol=1e-5)
    assert (flat(model) - flat(started(llava))).abs().max() > 0.01


def test_an_adapter_without_noise_is_usable(llava, prefer):
    """T19: of red and blue squares the square's own colour is preferred; all fresh pairs are ranked so after training.

    Before it they are not: one answer scores higher whatever the square is.
    """
    given = [prefer(n, *order) for n, order in enumerate([("red", "blue"), ("blue", "red")] * 12)]
    model = fresh_model(llava, LoraSettings(rank=4, alpha=8), noise())

    def ranked():
        return (margins(model.head.weight[0].detach(), pair_features(model, given[:2])) > 0).tolist()

    assert ranked() != [True, True]
    private_adapter(model, given, torch.arange(24), replace(SETTINGS, steps=60), 0.0, noise(1), pairs_at_once=24)
    assert ranked() == [True, True]


def test_the_noise_of_a_step_by_hand(llava, prefer, monkeypatch):
    """One step of plain descent at a rate of 1, on pairs of twice the same answer, whose gradients are 0.

    So the weights move by −σ C ξ / (q U), of deviation 4 · 0.5 / (0.5 · 8) = 0.5.
    """
    monkeypatch.setattr(torch.optim, "Adam", lambda weights, lr: torch.optim.SGD(weights, lr=1.0))
    model = started(llava)
    before = flat(model)
    settings = replace(SETTINGS, sampling=0.5, clip=0.5, steps=1)
    private_adapter(model, [prefer(n, "red", "red") for n in range(8)], torch.arange(8), settings, 4.0, noise())
    moved = flat(model) - before
    assert moved.std().item() == pytest.approx(0.5, rel=5 / (2 * len(moved)) ** 0.5)
    assert moved.mean().abs() < 5 * 0.5 / len(moved) ** 0.5


def test_everything_that_is_drawn_is_the_key_s(llava, pairs):
    settings = replace(SETTINGS, sampling=0.5, clip=0.5, steps=2)

    def trained(n):
        stream = noise(n)
        model = fresh_model(llava, LORA, stream)
        private_adapter(model, pairs, torch.arange(10), settings, 1.0, stream)
        return flat(model)

    one = trained(1)
    torch.manual_seed(5)
    assert torch.equal(one, trained(1))
    assert not torch.allclose(one, trained(2))


def test_the_model_is_on_its_device_before_the_adapter_is_added(llava, monkeypatch):
    """With torch's device without memory in place of an accelerator: whatever came later would still be on the CPU."""
    there = []
    add = reward_model.add_lora

    def watched(model, settings):
        there.append({weight.device.type for weight in model.parameters()})
        return add(model, settings)

    monkeypatch.setattr(load, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(reward_model, "add_lora", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        RewardModel.from_checkpoint(llava, lora=LORA)
    assert there == [{"meta"}]


def replace_weights(model):
    """Put every trained weight anew, as a move to another device may do."""
    for layer in model.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            if weight.requires_grad:
                setattr(layer, name, torch.nn.Parameter(weight.detach().clone()))


def test_a_model_that_moves_under_its_optimiser_is_not_trained_in_silence(llava, pairs):
    """The corruption of Opacus issue 820: an optimiser that holds old weights runs, and the model never changes."""
    model = started(llava)
    optimiser = torch.optim.Adam(trained_weights(model).values(), lr=0.1)
    replace_weights(model)
    before = flat(model)
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(model, pairs).backward()
        optimiser.step()
    assert torch.equal(flat(model), before)  # no error, and nothing learnt
    with pytest.raises(RunError, match=r"is not trained.*put the model on its device before the adapter is added"):
        private_adapter(model, pairs, torch.arange(10), SETTINGS, 1.0, noise(), on_step=lambda: replace_weights(model))


def test_hooks_on_layers_that_are_not_used_are_noticed(llava, pairs, monkeypatch):
    """Where the model that computes is not the one with the hooks, no weight has a gradient of its own."""
    model, other = started(llava), started(llava)
    monkeypatch.setattr(module._Margins, "forward", lambda self, batch: other(batch).view(-1, 2).sum(dim=1))
    with pair_gradients(model) as gradients, pytest.raises(RunError, match="is not trained"):
        gradients(pairs)

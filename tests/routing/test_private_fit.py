from dataclasses import replace

import msgspec
import pytest
import torch
from pytest import approx
from safetensors.torch import load
from torch import tensor
from torch.nn.utils import parameters_to_vector

from accord.errors import DataError
from accord.federation.aggregation import Aggregation
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.weights import to_bytes, trainable_weights
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.rewards.accounting import Mechanism, epsilon_of
from accord.rewards.audit import draw_bits, guess_bound, presence
from accord.rewards.noise import SecretNoise
from accord.routing.fit import LocalRouterTraining
from accord.routing.private_fit import Answers, Guarantee, clipped_sum, digest_of, pair_gradients, private_steps
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss

SMALL = RouterConfig(layers=1, width=8, heads=2, rounds=2, local_steps=2, pairs_per_batch=4, aggregation=Aggregation())
GUARANTEE = Guarantee("pair", 0.5, 2.0, 0.1, "pairs", lambda _digest, _steps, make: make(SecretNoise(bytes(32))))


class Planted:
    """Noise of 1 on every weight, and the samples that are given."""

    def __init__(self, *samples):
        self.samples = iter(samples)

    def uniform(self, count):
        drawn = tensor(next(self.samples), dtype=torch.float64)
        assert len(drawn) == count
        return drawn

    def normal(self, *shape):
        return torch.ones(shape, dtype=torch.float64)


def network_of(seed=0, **fields):
    torch.manual_seed(seed)
    return RouterNetwork(4, 2, replace(SMALL, **fields)).train()


def states_of(pairs, seed=0):
    """Hidden states and masks of pairs, of one to five tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * pairs, 5, 4, generator=generator)
    return hidden, torch.arange(5) <= torch.randint(5, (2 * pairs, 1), generator=generator)


def silent_network():
    """A router whose logits are 0 and whose gradient is that of the head's bias alone."""
    network = network_of()
    for weight in (network.head.weight, network.head.bias, network.norm.weight, network.norm.bias):
        torch.nn.init.zeros_(weight)
    return network


def test_a_step_by_hand():
    """The gradient of a pair is (σ(0) − e) / K = (1/4, −1/4) in the bias, √2/4 = 0.354 long: clipped to 0.1, ±0.0707.

    Three pairs, of which u = (0.1, 0.6, 0.3) < q = 0.5 draws two: ±0.141421. Noise of σ C = 2 · 0.1 on every weight,
    divided by q U = 1.5, times η = 0.6: a bias moves by −0.4 (0.2 ± 0.141421), and all other weights by −0.08.
    """
    network = silent_network()
    before = trainable_weights(network)
    hidden, mask = states_of(3)
    noise = Planted([0.1, 0.6, 0.3])
    private_steps(network, hidden, mask, torch.arange(3), 1, GUARANTEE, noise, steps=1, rate=0.6)
    moved = {name: weight - before[name] for name, weight in trainable_weights(network).items()}
    assert moved.pop("head.bias").tolist() == approx([-0.136569, -0.023431], abs=1e-6)
    assert all(change.flatten().tolist() == approx([-0.08] * change.numel(), abs=1e-6) for change in moved.values())


def test_the_pairs_of_a_unit_are_clipped_together():
    """Pairs 0, 1 and 3 are one person's: together 3 · 0.354 long, and clipped to 0.1 as the single pair of the other.

    Without noise: −η · 2 · 0.070711 / (q U) = −0.6 · 0.141421 / 1 for the two of them.
    """
    network = silent_network()
    hidden, mask = states_of(4)
    still = replace(GUARANTEE, sigma=0.0)
    private_steps(network, hidden, mask, tensor([0, 0, 1, 0]), 1, still, Planted([0.1, 0.2]), steps=1, rate=0.6)
    assert network.head.bias.tolist() == approx([-0.084853, 0.084853], abs=1e-6)


def test_an_empty_sample_still_has_noise():
    """−0.6 · 0.2 / (0.5 · 2) on every weight, and it cannot be told from a step that drew somebody."""
    network = silent_network()
    private_steps(network, *states_of(2), torch.arange(2), 1, GUARANTEE, Planted([0.9, 0.5]), steps=1, rate=0.6)
    assert network.head.bias.tolist() == approx([-0.12, -0.12], abs=1e-6)


@pytest.mark.parametrize("fields", [{}, {"layers": 2, "width": 16, "heads": 4}])
@pytest.mark.parametrize("at_once", [2**24, 1])
def test_contributions_are_those_of_a_loop(monkeypatch, fields, at_once):
    """T19: of eight pairs of four units, one of which is not drawn; one at a time, or all."""
    monkeypatch.setattr("accord.routing.private_fit._AT_ONCE", at_once)
    network, (hidden, mask) = network_of(**fields), states_of(8)
    unit, drawn, clip = tensor([0, 1, 2, 3, 3, 1, 0, 1]), tensor([0, 1, 3]), 3.5
    expected, lengths = 0, []
    for u in drawn:
        network.zero_grad()
        for n in (unit == u).nonzero()[:, 0]:
            client_id_loss(network(hidden[2 * n : 2 * n + 2], mask[2 * n : 2 * n + 2]), 0).backward()
        gradient = torch.cat([weight.grad.flatten() for weight in network.parameters()]).double()
        lengths.append(float(gradient.norm()))
        expected += gradient * min(1.0, clip / lengths[-1])
    found = clipped_sum(network, hidden, mask, unit, drawn, 0, clip)
    assert min(lengths) < clip < max(lengths)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_no_unit_adds_more_than_the_clip():
    """T19: whatever its answers are, the sum moves by no more than C where they count for nothing."""
    network, (hidden, mask) = network_of(), states_of(6)
    hidden[4:8] *= 1e4
    unit = tensor([0, 1, 2, 2, 3, 3])
    for left_out in range(4):
        others = tensor([u for u in range(4) if u != left_out])
        with_it, without = (clipped_sum(network, hidden, mask, unit, u, 0, 0.3) for u in (torch.arange(4), others))
        assert (with_it - without).norm() <= 0.3 + 1e-9


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_what_overflows_on_one_answer_counts_for_nothing(value):
    """Else one answer that makes a step not finite would be told from its absence by weights that a server chose."""
    network, (hidden, mask) = network_of(), states_of(3)
    hidden[2] = value
    found = pair_gradients(network, hidden, mask, torch.arange(3), 0)
    assert found.isfinite().all() and found[0].any() and found[2].any()
    total = clipped_sum(network, hidden, mask, torch.arange(3), torch.arange(3), 0, 0.1)
    others = clipped_sum(network, hidden, mask, torch.arange(3), tensor([0, 2]), 0, 0.1)
    assert total.isfinite().all() and (total - others).norm() <= 0.1 + 1e-9


def test_the_audit_believes_an_honest_router_and_catches_one_without_noise():
    """T20, short: 200 canaries beside 20 pairs, guessed by how present their gradients are in what 60 steps change."""
    torch.manual_seed(0)
    network = RouterNetwork(400, 2, replace(SMALL, heads=1)).train()
    hidden = torch.randn(440, 2, 400, generator=torch.Generator().manual_seed(1))
    mask, inside, before = torch.ones(440, 2, dtype=torch.bool), draw_bits(200, seed=0), network.to_bytes()
    gradients = pair_gradients(network, hidden, mask, torch.arange(220), 0)
    rows = torch.cat([inside, torch.ones(20, dtype=torch.bool)]).repeat_interleave(2)
    begun = parameters_to_vector(network.parameters()).detach()

    def bound(sigma):
        network.from_bytes(before)
        settings = replace(GUARANTEE, sampling=0.05, sigma=sigma)
        unit, noise = torch.arange(int(rows.sum()) // 2), SecretNoise(bytes(32))
        private_steps(network, hidden[rows], mask[rows], unit, 0, settings, noise, steps=60, rate=1e-4)
        moved = parameters_to_vector(network.parameters()).detach() - begun
        return guess_bound(presence(-moved, gradients)[:200], inside)

    assert bound(1.5) <= epsilon_of([Mechanism(1.5, 0.05, 60)], 1e-6) < bound(0.0)


def test_a_digest_is_of_all_that_an_answer_depends_on():
    request = UpdateRequest("r", "router", 1, b"weights", 7)
    first = digest_of(request, GUARANTEE, SMALL, 0)
    assert first == digest_of(UpdateRequest("other", "router", 1, b"weights", 7), GUARANTEE, SMALL, 0)
    others = [
        digest_of(UpdateRequest("r", "router", 2, b"weights", 7), GUARANTEE, SMALL, 0),
        digest_of(UpdateRequest("r", "router", 1, b"others", 7), GUARANTEE, SMALL, 0),
        digest_of(UpdateRequest("r", "router", 1, b"weights", 8), GUARANTEE, SMALL, 0),
        digest_of(UpdateRequest("r", "router", 1, b"weights", 7, bits=16), GUARANTEE, SMALL, 0),
        digest_of(request, replace(GUARANTEE, data="other pairs"), SMALL, 0),
        digest_of(request, replace(GUARANTEE, clip=0.2), SMALL, 0),
        digest_of(request, GUARANTEE, replace(SMALL, learning_rate=0.2), 0),
        digest_of(request, GUARANTEE, SMALL, 1),
    ]
    assert len({first, *others}) == 9


def test_a_site_sends_noisy_steps_and_no_loss(llava, prefer, tmp_path):
    """The same request has the same bytes, and is paid for once; another has other noise, and is paid for."""
    paid = []
    answers = Answers(tmp_path / "answers", lambda *steps: paid.append(steps))
    encoder = Encoder(*load_model(llava))
    pairs = [prefer(0, "red", "blue"), prefer(1, "green", "yellow"), prefer(2, "blue", "red")]
    network = RouterNetwork(32, 2, SMALL)
    request = UpdateRequest("r", "router", 0, to_bytes(trainable_weights(network)), 3)
    training = LocalRouterTraining(encoder, pairs, 0, 2, SMALL, replace(GUARANTEE, answers=answers))
    reply = training(request)
    assert (reply.loss, reply.examples, reply.steps, reply.state, reply.distance) == (0.0, 3, 2, b"", None)
    assert all(change.any() for change in load(reply.change).values())
    assert training(request) == reply and paid == [(2, 0)]
    again = training(UpdateRequest("again", "router", 0, request.weights, 3))
    assert again == msgspec.structs.replace(reply, id="again") and paid == [(2, 0)]
    assert training(UpdateRequest("r", "router", 0, request.weights, 4)).change != reply.change
    assert paid == [(2, 0), (2, 2)]
    nameless = LocalRouterTraining(encoder, pairs, 0, 2, SMALL, replace(GUARANTEE, unit="person", answers=answers))
    with pytest.raises(DataError, match="3 of 3 pairs have no person"):
        nameless(request)
    assert len(paid) == 2


def test_an_answer_that_was_never_kept_is_paid_for_again(tmp_path):
    """A kill between payment and answer costs the steps: the next answer has other noise."""
    paid, drawn = [], []
    answers = Answers(tmp_path / "answers", lambda *steps: paid.append(steps))

    def killed(noise):
        drawn.append(noise.normal(3))
        raise KeyboardInterrupt

    def answered(noise):
        drawn.append(noise.normal(3))
        return UpdateReply("r", b"change", 1, 0.0)

    with pytest.raises(KeyboardInterrupt):
        answers("ab" * 32, 2, killed)
    assert answers("ab" * 32, 2, answered) == answers("ab" * 32, 2, killed)
    assert paid == [(2, 0), (2, 0)] and not torch.equal(*drawn)

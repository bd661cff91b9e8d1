import math
import zlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pytest import approx
from safetensors.torch import load, save
from torch import tensor

from accord.data.images import load_image
from accord.errors import CheckpointError, DataWarning, RunError
from accord.federation.aggregation import Aggregation
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreReply, UpdateReply, UpdateRequest
from accord.federation.weights import to_bytes, trainable_weights
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.routing.fit import LocalRouterTraining, fit_router, pace
from accord.routing.router import LearnedRouter, RouterConfig, RouterNetwork, client_id_loss
from accord.types import vqa_prompt

SMALL = RouterConfig(layers=1, width=8, heads=2, rounds=2, local_steps=2, pairs_per_batch=4, aggregation=Aggregation())
"""With the plain average, in full, so that what the sites say can be read off the weights."""


def adding(value, examples=1, loss=1.0):
    """A site that adds `value` to every weight."""

    def answer(request):
        change = {name: torch.full_like(tensor, value) for name, tensor in load(request.weights).items()}
        return UpdateReply(request.id, save(change), examples, loss)

    return answer


def silent(request):
    raise RuntimeError("gone")


class Spy(InProcessEngine):
    """The in-process engine, which also keeps what it was asked to carry."""

    def __init__(self, handlers):
        super().__init__(handlers)
        self.asked = []

    def ask(self, requests, *, deadline=None):
        self.asked.append(dict(requests))
        return super().ask(requests, deadline=deadline)


def fit(handlers, config=SMALL, **settings):
    """Return what the sites were asked, and the trained network."""
    engine = Spy(handlers)
    return engine, fit_router(engine, 4, config, seed=0, **settings)


def moves(engine, network):
    """Return by how much every weight moved in each round: one number a round, or the test fails.

    It is what took the weights of a round's request, to the bit, to those of the next one, or of the network.
    """
    states = [load(next(iter(asked.values())).weights) for asked in engine.asked] + [network.state_dict()]
    found = []
    for before, after in pairwise(states):
        name = next(iter(before))
        step = round((after[name].double() - before[name].double()).mean().item(), 3)
        assert all(torch.equal(after[n], (w.double() + step).to(w.dtype)) for n, w in before.items())
        found.append(step)
    return found


@pytest.fixture
def encoder(llava):
    return Encoder(*load_model(llava))


def test_client_id_loss_by_hand():
    """Site 1 of 2, logits (0, ln 3) and (0, 0).

    σ(0) = 1/2, so each 0 costs ln 2 = 0.693147, as target or not; σ(ln 3) = 3/4 costs -ln(3/4) = 0.287682.
    Mean of the four: (3 · 0.693147 + 0.287682) / 4 = 0.591781.
    """
    assert client_id_loss(tensor([[0.0, math.log(3)], [0.0, 0.0]]), 1).item() == approx(0.591781, abs=1e-6)


def test_client_id_loss_pulls_towards_the_site_alone():
    """The gradient of BCE is (σ(z) - e) / (N K) = (0.5 - 1, 0.5 - 0, 0.5 - 0) / 3."""
    logits = torch.zeros(1, 3, requires_grad=True)
    client_id_loss(logits, 0).backward()
    torch.testing.assert_close(logits.grad, tensor([[-0.5, 0.5, 0.5]]) / 3)


def test_a_round_averages_by_examples():
    """(1 · 1 + 3 · 5) / 4 = 4; the losses' mean is (2 + 4) / 2 = 3."""
    rounds = []
    sites = {"a": adding(1.0, 1, 2.0), "b": adding(5.0, 3, 4.0)}
    engine, network = fit(sites, on_round=lambda *told: rounds.append(told))
    assert moves(engine, network) == [4.0, 4.0]
    assert rounds == [(1, 3.0), (2, 3.0)]
    assert not network.training


@pytest.mark.parametrize(
    "bad",
    [
        silent,
        adding(math.nan, 9),
        adding(math.inf, 9),
        adding(7.0, 0),
        adding(7.0, -5),
        lambda request: UpdateReply("another id", request.weights, 9, 0.0),
        lambda request: UpdateReply(request.id, b"no weights", 9, 0.0),
        lambda request: UpdateReply(request.id, save({"a": torch.zeros(1)}), 9, 0.0),
        lambda request: UpdateReply(request.id, request.weights, 9, 0.0, steps=0),
        lambda request: ScoreReply(request.id, []),
    ],
    ids=["gone", "nan", "inf", "no examples", "negative", "id", "bytes", "names", "no steps", "type"],
)
def test_a_site_without_a_usable_update_sits_the_round_out(bad, caplog):
    """As if it did not exist: the rest add 2. An average with it would be NaN or another number. It is counted."""
    rounds = []
    with pytest.warns(DataWarning, match=r"site bad .*; round [12] of the router goes on without it") as warned:
        engine, network = fit({"a": adding(2.0), "bad": bad}, on_round=lambda *told: rounds.append(told))
    assert moves(engine, network) == [2.0, 2.0] and rounds == [(1, 1.0), (2, 1.0)]
    assert [f"round {n} of" in str(w.message) for n, w in enumerate(warned, start=1)] == [True, True]
    assert [engine.traffic.counts[site, "router"].absences for site in ("a", "bad")] == [0, 2]


def test_a_site_cannot_claim_more_than_its_draw():
    """pairs_per_site = 500 caps the claim of 2**62: (500 · 1 + 500 · 5) / 1000 = 3."""
    assert moves(*fit({"a": adding(1.0, 500), "greedy": adding(5.0, 2**62)})) == [3.0, 3.0]


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_a_loss_that_is_not_finite_is_not_believed():
    rounds = []
    sites = {"a": adding(2.0), "odd": adding(9.0, 1, math.nan)}
    assert moves(*fit(sites, on_round=lambda *told: rounds.append(told))) == [2.0, 2.0]
    assert rounds == [(1, 1.0), (2, 1.0)]


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_a_site_may_come_back():
    """Absent in round 1, which adds 2; there in round 2: (2 + 6) / 2 = 4."""

    def late_riser(request):
        return adding(6.0)(request) if request.round else silent(request)

    assert moves(*fit({"a": adding(2.0), "b": late_riser})) == [2.0, 4.0]


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_the_network_knows_what_it_was_trained_on():
    """Two rounds. 3 pairs twice are 6; 5 pairs in the second round alone are 5; 2**62 counts as 500; gone is 0."""

    def late_riser(request):
        return adding(6.0, 5)(request) if request.round else silent(request)

    _, network = fit({"a": adding(1.0, 3), "b": late_riser, "greedy": adding(1.0, 2**62), "gone": silent})
    assert network.examples == (6, 5, 1000, 0)


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_nobody_answers(caplog):
    with pytest.raises(RunError, match=r"no site answered in round 1 of 'router'; .*--resume"):
        fit({"a": silent, "b": adding(math.nan)})


def test_only_router_messages_are_sent():
    """2 rounds, 2 sites: each is asked once a round, with the common weights and the seed of its name and round."""
    engine = Spy({"a": adding(1.0), "b": adding(3.0)})
    fit_router(engine, 4, SMALL, seed=5)
    requests = [request for round_ in engine.asked for request in round_.values()]
    assert [list(round_) for round_ in engine.asked] == [["a", "b"], ["a", "b"]]
    assert all(type(request) is UpdateRequest and request.task == "router" for request in requests)
    assert [(request.round, request.group, request.state, request.bits) for request in requests] == [
        (0, 0, b"", 32),
        (0, 0, b"", 32),
        (1, 0, b"", 32),
        (1, 0, b"", 32),
    ]
    assert requests[0].weights == requests[1].weights != requests[2].weights == requests[3].weights
    names = ["router-0-0-a", "router-0-0-b", "router-0-1-a", "router-0-1-b"]
    assert [request.id for request in requests] == names
    assert [request.seed for request in requests] == [zlib.crc32(f"5-{name}".encode()) for name in names]
    assert len({request.seed for request in requests}) == 4
    assert {kind for _, kind in engine.traffic.counts} == {"router"}


def test_the_recipe_says_how_updates_are_combined_and_travel():
    """The median of 1, 2 and 9 is 2, though the third has 500 pairs; in float16, which holds all three."""
    config = replace(SMALL, aggregation=Aggregation("median", bits=16))
    asked = []

    def site(value, examples):
        def answer(request):
            asked.append(request)
            change = {name: torch.full_like(tensor, value) for name, tensor in load(request.weights).items()}
            return UpdateReply(request.id, save(change), examples, 1.0)

        return answer

    engine = InProcessEngine({"a": site(1.0, 1), "b": site(9.0, 500), "c": site(2.0, 1)})
    network = fit_router(engine, 4, config, seed=0)
    still = fit_router(InProcessEngine({"a": site(0.0, 1)} | dict.fromkeys("bc", site(0.0, 1))), 4, config, seed=0)
    for name, weight in still.state_dict().items():
        once = (weight.double() + 2).float()
        assert torch.equal(network.state_dict()[name], (once.double() + 2).float())
    assert {request.bits for request in asked} == {16}
    assert {tensor.dtype for request in asked for tensor in load(request.weights).values()} == {torch.float16}


def test_the_default_is_fedadam_at_the_server():
    """All weights of both sites move by 1, then by −1; β₁ = 0.8, β₂ = 0.95, τ = 10⁻⁵, η = 0.003.

    m = 0.2, v = 0.95 τ² + 0.05: 0.003 · 0.2 / (√0.05 + τ) = 0.0026832. Then m = 0.16 − 0.2 = −0.04 and
    v = 0.0475 + 0.05 = 0.0975: 0.003 · −0.04 / (√0.0975 + τ) = −0.00038430. How far a site goes does not matter.
    """
    steps = [0.003 * 0.2 / (math.sqrt(0.05) + 1e-5), -0.003 * 0.04 / (math.sqrt(0.0975) + 1e-5)]
    assert steps == [approx(0.0026832, abs=1e-7), approx(-0.00038430, abs=1e-8)]

    def site(request):
        return adding(-1.0 if request.round else 1.0)(request)

    start = trainable_weights(fit({"a": adding(0.0), "b": adding(0.0)})[1])
    default = replace(SMALL, aggregation=RouterConfig().aggregation)
    engine, network = fit({"a": site, "b": site}, default)
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weight, start[name] + sum(steps), atol=1e-6, rtol=0)
    assert {request.bits for asked in engine.asked for request in asked.values()} == {16}


def training_request(network, seed=0, bits=32, number=0):
    return UpdateRequest("r", "router", number, to_bytes(trainable_weights(network), bits=bits), seed, bits=bits)


def test_local_training_starts_from_what_it_is_sent(encoder, prefer):
    """A learning rate of 0 changes nothing; otherwise loss and change depend on site, seed and weights alone."""
    pairs = [prefer(0, "red", "blue"), prefer(1, "green", "yellow"), prefer(2, "blue", "red")]
    config = replace(SMALL, pairs_per_batch=2)
    network = RouterNetwork(32, 2, config)
    request, other_seed = training_request(network, 3), training_request(network, 4)
    still = LocalRouterTraining(encoder, pairs, 0, 2, replace(config, learning_rate=0.0))(request)
    assert not any(change.any() for change in load(still.change).values())
    training = LocalRouterTraining(encoder, pairs, 0, 2, config)
    first = training(request)
    change = load(first.change)
    assert (first.id, first.examples, first.steps, first.state) == ("r", 3, 2, b"")
    assert change.keys() == network.state_dict().keys() and any(tensor.any() for tensor in change.values())
    moved = {name: weight + change[name] for name, weight in trainable_weights(network).items()}
    training(UpdateRequest("r", "router", 1, to_bytes(moved), 4))
    assert training(request) == first == LocalRouterTraining(encoder, pairs, 0, 2, config)(request)
    assert training(other_seed).change != first.change
    assert LocalRouterTraining(encoder, pairs, 1, 2, config)(request).change != first.change


def test_a_change_is_the_way_from_the_weights_that_were_sent(encoder, prefer):
    """Logits are 0, so the gradient of the head's bias is (σ(0) − e) / K = (1/4, −1/4), whatever the pairs.

    One step of SGD: η = 1/2 in round 0 of 2, 1/2 · (1 + cos π/2) / 2 = 1/4 in round 1: ∓1/8, then ∓1/16.
    """
    network = RouterNetwork(32, 2, SMALL)
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    config = replace(SMALL, local_steps=1, learning_rate=0.5)
    training = LocalRouterTraining(encoder, [prefer(0)], 1, 2, config)
    for number, way in ((0, 1 / 8), (1, 1 / 16)):
        reply = training(training_request(network, number=number))
        assert load(reply.change)["head.bias"].tolist() == approx([-way, way], abs=1e-6)


def test_an_output_learns_as_fast_among_many(encoder, prefer):
    """Of 6 outputs the gradient is (σ(0) − e) / 6, and the rate 1/2 · 6/3 = 1: ∓1/12."""
    network = RouterNetwork(32, 6, SMALL)
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    training = LocalRouterTraining(encoder, [prefer(0)], 1, 6, replace(SMALL, local_steps=1, learning_rate=0.5))
    change = load(training(training_request(network)).change)["head.bias"]
    assert change.tolist() == approx([-1 / 12, 1 / 12, *[-1 / 12] * 4], abs=1e-6)
    assert [pace(sites) for sites in (1, 2, 3, 6, 64)] == approx([1, 1, 1, 2, 64 / 3])


@pytest.mark.parametrize(("sites", "shift"), [(1, 0), (3, 0), (5, math.log(2)), (65, math.log(32))])
def test_outputs_of_many_sites_start_lower(sites, shift):
    """By log((K − 1) / 2), from what `nn.Linear` draws: up to 1/√8, the head's width being 8."""
    bias = RouterNetwork(32, sites, SMALL).head.bias + shift
    assert bias.abs().max() <= 8**-0.5


def test_a_change_in_16_bits_is_that_in_32_rounded(encoder, prefer):
    """Where the weights are float16's already, both begin alike."""
    network = RouterNetwork(32, 2, SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.half())
    training = LocalRouterTraining(encoder, [prefer(0)], 1, 2, SMALL)
    full, narrow = (load(training(training_request(network, bits=bits)).change) for bits in (32, 16))
    assert all(torch.equal(narrow[name], change.half()) for name, change in full.items())


@pytest.mark.parametrize("bits", [32, 16])
def test_weights_of_another_router_are_refused(encoder, prefer, bits):
    request = training_request(RouterNetwork(32, 3, SMALL), bits=bits)
    with pytest.raises(CheckpointError, match=r"weights of the task 'router': head\.\w+ is \(3"):
        LocalRouterTraining(encoder, [prefer(0)], 0, 2, SMALL)(request)


def test_the_features_of_pairs(encoder, prefer):
    """Rows: chosen, rejected, chosen, …, each as when it is encoded alone, whatever the rows at once."""
    pairs = [prefer(0, "red", "no idea at all"), prefer(1, "green", "yellow"), prefer(2, "blue", "red")]
    training = LocalRouterTraining(encoder, pairs, 0, 2, SMALL)
    small = LocalRouterTraining(encoder, pairs, 0, 2, replace(SMALL, rows_at_once=2))
    for hidden, mask in (training.features, small.features):
        assert hidden.shape[:2] == mask.shape and len(hidden) == 6
        for n, pair in enumerate(training.pairs):
            for row, text in ((2 * n, pair.chosen), (2 * n + 1, pair.rejected)):
                alone, _ = encoder([pair.prompt], [load_image(pair.images[0])], [[text]])
                torch.testing.assert_close(hidden[row][mask[row]], alone[0], atol=1e-5, rtol=1e-5)


def test_a_site_trains_where_the_encoder_is(encoder, prefer):
    """On the device `meta`, which every machine has; the features stay on the CPU."""
    training = LocalRouterTraining(encoder, [prefer(0)], 0, 2, SMALL)
    assert {tensor.device.type for tensor in training.features} == {"cpu"}
    encoder.model.to("meta")
    training = LocalRouterTraining(encoder, [prefer(0)], 0, 2, SMALL)
    assert {parameter.device.type for parameter in training.network.parameters()} == {"meta"}


def test_the_first_local_loss(encoder, prefer):
    """A head of zeros gives the logits 0, so the loss of one step is ln 2 whatever the pairs."""
    network = RouterNetwork(32, 2, SMALL)
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    training = LocalRouterTraining(encoder, [prefer(0)], 1, 2, replace(SMALL, local_steps=1))
    assert training(training_request(network)).loss == approx(math.log(2), abs=1e-6)


def test_two_sites_of_different_questions_are_told_apart(encoder, prefer, square):
    """Red squares here, questions about numbers there; each site trains on its own pairs only."""
    config = replace(
        SMALL, rounds=6, local_steps=4, aggregation=replace(RouterConfig().aggregation, learning_rate=1e-2)
    )
    here = [prefer(n, "red", "blue") for n in range(4)]
    there = [
        prefer(n, "two", "one", prompt=vqa_prompt("how many squares?"), images=(square("green"),)) for n in range(4)
    ]

    losses = []
    sites = {"colour": here, "number": there}
    network = fit_router(
        InProcessEngine(
            {site: LocalRouterTraining(encoder, pairs, k, 2, config) for k, (site, pairs) in enumerate(sites.items())}
        ),
        encoder.features,
        config,
        seed=0,
        on_round=lambda _, loss: losses.append(loss),
    )
    weights = LearnedRouter(encoder, network)(
        [here[0].prompt, there[0].prompt],
        [load_image(here[0].images[0]), load_image(there[0].images[0])],
        [["red", "blue"], ["two", "one"]],
    )
    assert weights.argmax(dim=-1).tolist() == [0, 0, 1, 1]
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_router():
    """The first weights come from the seed, whatever the caller drew before, and leave the caller's draws alone."""

    networks = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(networks))
        expected = torch.random.get_rng_state()
        networks.append(
            fit_router(InProcessEngine({"a": adding(0.0), "b": adding(0.0)}), 4, SMALL, seed=seed).to_bytes()
        )
        assert torch.equal(torch.random.get_rng_state(), expected)
    assert networks[0] == networks[1] != networks[2]

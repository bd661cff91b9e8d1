import math
from dataclasses import replace

import pytest
import torch
from pytest import approx
from safetensors.torch import load, save
from torch import tensor

from accord.data.images import load_image
from accord.errors import DataWarning, RunError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import RouterReply, RouterRequest, ScoreReply
from accord.models.load import load_model
from accord.routing.fit import LocalRouterTraining, client_id_loss, federated_average, fit_router
from accord.routing.router import Encoder, LearnedRouter, RouterConfig, RouterNetwork
from accord.types import vqa_prompt

SMALL = RouterConfig(layers=1, width=8, heads=2, rounds=2, local_steps=2, pairs_per_batch=4)


def constant(value, examples=1, loss=1.0):
    """A site that sets every weight to `value`."""

    def answer(request):
        weights = {name: torch.full_like(tensor, value) for name, tensor in load(request.weights).items()}
        return RouterReply(request.id, save(weights), examples, loss)

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


def values(network):
    return {tensor.unique().item() for tensor in network.state_dict().values() if tensor.numel()}


def fit(handlers, config=SMALL, **settings):
    return fit_router(InProcessEngine(handlers), 4, config, seed=0, **settings)


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


def test_federated_average_by_hand():
    """n = 1 and 3: (1 · 1 + 3 · 4) / 4 = 3.25, (1 · 2 + 3 · 8) / 4 = 6.5; (1 · 0 + 3 · 4) / 4 = 3."""
    averaged = federated_average(
        [{"a": tensor([1.0, 2.0]), "b": tensor(0.0)}, {"a": tensor([4.0, 8.0]), "b": tensor(4.0)}], [1, 3]
    )
    assert averaged["a"].tolist() == [3.25, 6.5] and averaged["b"].item() == 3.0
    assert averaged["a"].dtype == torch.float32


def test_the_average_of_equals_is_bitwise_the_same():
    weights = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(federated_average([weights] * 3, [5, 7, 11])["a"], weights["a"])


def test_a_round_averages_by_examples():
    """(1 · 1 + 3 · 5) / 4 = 4; the losses' mean is (2 + 4) / 2 = 3."""
    rounds = []
    network = fit({"a": constant(1.0, 1, 2.0), "b": constant(5.0, 3, 4.0)}, on_round=lambda *told: rounds.append(told))
    assert values(network) == {4.0}
    assert rounds == [(1, 3.0), (2, 3.0)]
    assert not network.training


@pytest.mark.parametrize(
    "bad",
    [
        silent,
        constant(math.nan, 9),
        constant(math.inf, 9),
        constant(7.0, 0),
        constant(7.0, -5),
        lambda request: RouterReply("another id", request.weights, 9, 0.0),
        lambda request: RouterReply(request.id, b"no weights", 9, 0.0),
        lambda request: RouterReply(request.id, save({"a": torch.zeros(1)}), 9, 0.0),
        lambda request: ScoreReply(request.id, []),
    ],
    ids=["gone", "nan", "inf", "no examples", "negative", "id", "bytes", "names", "type"],
)
def test_a_site_without_a_usable_update_sits_the_round_out(bad, caplog):
    """As if it did not exist: the rest give 2. An average with it would be NaN or another number. It is counted."""
    rounds = []
    engine = InProcessEngine({"a": constant(2.0), "bad": bad})
    with pytest.warns(DataWarning, match=r"site bad .*; the router was averaged without it"):
        network = fit_router(engine, 4, SMALL, seed=0, on_round=lambda *told: rounds.append(told))
    assert values(network) == {2.0} and rounds == [(1, 1.0), (2, 1.0)]
    assert [engine.traffic.counts[site, "router"].absences for site in ("a", "bad")] == [0, 2]


def test_a_site_cannot_claim_more_than_its_draw():
    """pairs_per_site = 500 caps the claim of 2**62: (500 · 1 + 500 · 5) / 1000 = 3."""
    assert values(fit({"a": constant(1.0, 500), "greedy": constant(5.0, 2**62)})) == {3.0}


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_a_loss_that_is_not_finite_is_not_believed():
    rounds = []
    sites = {"a": constant(2.0), "odd": constant(9.0, 1, math.nan)}
    assert values(fit(sites, on_round=lambda *told: rounds.append(told))) == {2.0}
    assert rounds == [(1, 1.0), (2, 1.0)]


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_a_site_may_come_back():
    """Absent in round 1, there in round 2: (2 + 6) / 2 = 4."""

    def late_riser(request):
        return constant(6.0)(request) if request.round else silent(request)

    assert values(fit({"a": constant(2.0), "b": late_riser})) == {4.0}


@pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
def test_nobody_answers(caplog):
    with pytest.raises(RunError, match=r"no site answered in router round 1; .*--resume"):
        fit({"a": silent, "b": constant(math.nan)})


def test_only_router_messages_are_sent():
    """2 rounds, 2 sites: each is asked once a round, with its own place, the common weights and its own seed."""
    engine = Spy({"a": constant(1.0), "b": constant(3.0)})
    fit_router(engine, 4, SMALL, seed=5)
    requests = [request for round_ in engine.asked for request in round_.values()]
    assert [list(round_) for round_ in engine.asked] == [["a", "b"], ["a", "b"]]
    assert all(type(request) is RouterRequest for request in requests)
    assert [(request.round, request.site) for request in requests] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert requests[0].weights == requests[1].weights != requests[2].weights == requests[3].weights
    assert len({request.id for request in requests}) == len({request.seed for request in requests}) == 4
    assert {kind for _, kind in engine.traffic.counts} == {"router"}


def test_local_training_starts_from_what_it_is_sent(encoder, prefer):
    """A learning rate of 0 returns the same bytes; otherwise loss and weights depend on seed and weights alone."""
    pairs = [prefer(0, "red", "blue"), prefer(1, "green", "yellow"), prefer(2, "blue", "red")]
    config = replace(SMALL, pairs_per_batch=2)
    sent = RouterNetwork(32, 2, config).to_bytes()
    still = LocalRouterTraining(encoder, pairs, 2, replace(config, learning_rate=0.0))
    assert still(sent, 0, 0)[0] == sent
    training = LocalRouterTraining(encoder, pairs, 2, config)
    first = training(sent, 0, 3)
    assert first[0] != sent
    training(first[0], 1, 4)
    assert training(sent, 0, 3) == first == LocalRouterTraining(encoder, pairs, 2, config)(sent, 0, 3)
    assert training(sent, 0, 4) != first


def test_the_features_of_pairs(encoder, prefer):
    """Rows: chosen, rejected, chosen, …, each as when it is encoded alone, whatever the rows at once."""
    pairs = [prefer(0, "red", "no idea at all"), prefer(1, "green", "yellow"), prefer(2, "blue", "red")]
    training = LocalRouterTraining(encoder, pairs, 2, SMALL)
    small = LocalRouterTraining(encoder, pairs, 2, replace(SMALL, rows_at_once=2))
    for hidden, mask in (training.features, small.features):
        assert hidden.shape[:2] == mask.shape and len(hidden) == 6
        for n, pair in enumerate(training.pairs):
            for row, text in ((2 * n, pair.chosen), (2 * n + 1, pair.rejected)):
                alone, _ = encoder([pair.prompt], [load_image(pair.images[0])], [[text]])
                torch.testing.assert_close(hidden[row][mask[row]], alone[0], atol=1e-5, rtol=1e-5)


def test_a_site_trains_where_the_encoder_is(encoder, prefer):
    """On the device `meta`, which every machine has; the features stay on the CPU."""
    training = LocalRouterTraining(encoder, [prefer(0)], 2, SMALL)
    assert {tensor.device.type for tensor in training.features} == {"cpu"}
    encoder.model.to("meta")
    training = LocalRouterTraining(encoder, [prefer(0)], 2, SMALL)
    assert {parameter.device.type for parameter in training.network.parameters()} == {"meta"}


def test_the_first_local_loss(encoder, prefer):
    """A head of zeros gives the logits 0, so the loss of one step is ln 2 whatever the pairs."""
    network = RouterNetwork(32, 2, SMALL)
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    training = LocalRouterTraining(encoder, [prefer(0)], 2, replace(SMALL, local_steps=1))
    assert training(network.to_bytes(), 1, 0)[1] == approx(math.log(2), abs=1e-6)


def test_two_sites_of_different_questions_are_told_apart(encoder, prefer, square):
    """Red squares here, questions about numbers there; each site trains on its own pairs only."""
    config = replace(SMALL, rounds=6, local_steps=4, learning_rate=1e-2)
    here = [prefer(n, "red", "blue") for n in range(4)]
    there = [
        prefer(n, "two", "one", prompt=vqa_prompt("how many squares?"), images=(square("green"),)) for n in range(4)
    ]

    def site(pairs):
        training = LocalRouterTraining(encoder, pairs, 2, config)

        def answer(request):
            weights, loss = training(request.weights, request.site, request.seed)
            return RouterReply(request.id, weights, len(pairs), loss)

        return answer

    losses = []
    network = fit_router(
        InProcessEngine({"colour": site(here), "number": site(there)}),
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

    def echo(request):
        return RouterReply(request.id, request.weights, 1, 0.0)

    networks = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(networks))
        expected = torch.random.get_rng_state()
        networks.append(fit_router(InProcessEngine({"a": echo, "b": echo}), 4, SMALL, seed=seed).to_bytes())
        assert torch.equal(torch.random.get_rng_state(), expected)
    assert networks[0] == networks[1] != networks[2]

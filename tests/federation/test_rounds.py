import pytest
import torch
from pytest import approx
from safetensors.torch import load, save
from torch import tensor

from accord.errors import DataWarning, ReplyError, RunError
from accord.federation.aggregation import Aggregation
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreReply, UpdateReply, UpdateRequest, encode
from accord.federation.rounds import federated_rounds
from accord.federation.weights import to_bytes

START = {"w": tensor([1.0, 2.0])}


def adding(value, examples=1, loss=1.0):
    """A site that adds `value` to every weight."""

    def answer(request):
        change = {name: torch.full_like(weight, value) for name, weight in load(request.weights).items()}
        return UpdateReply(request.id, save(change), examples, loss)

    return answer


def silent(request):
    raise RuntimeError("gone")


def sending(change=None, *, id=None, examples=1, loss=1.0, steps=1, distance=None):
    """A site whose reply is wrong in one way."""

    def answer(request):
        sent = save(change or load(request.weights))
        return UpdateReply(id or request.id, sent, examples, loss, steps=steps, distance=distance)

    return answer


class Spy(InProcessEngine):
    """The in-process engine, which also keeps what it was asked to carry."""

    def __init__(self, handlers):
        super().__init__(handlers)
        self.asked = []

    def ask(self, requests, *, deadline=None):
        self.asked.append(dict(requests))
        return super().ask(requests, deadline=deadline)


def average(handlers, rounds=1, **settings):
    return federated_rounds(InProcessEngine(handlers), "supervised", START, rounds, seed=0, **settings)


def test_two_rounds_by_hand():
    """Sites add 1 (n = 1) and 4 (n = 3): each round adds (1 · 1 + 3 · 4) / 4 = 3.25; two add 6.5. Loss (1 + 2) / 2."""
    told = []
    averaged = average(
        {"a": adding(1.0), "b": adding(4.0, examples=3, loss=2.0)}, 2, on_round=lambda *given: told.append(given)
    )
    assert averaged["w"].tolist() == [7.5, 8.5]
    assert told == [(1, 1.5), (2, 1.5)]
    assert START["w"].tolist() == [1.0, 2.0]


def test_the_order_of_the_sites_does_not_matter():
    """(1 · 1 + 2 · 2 + 5 · 8) / 8 = 5.625, exact in binary; each site is asked the same, its seed included."""
    sites = {"a": adding(1.0), "b": adding(2.0, 2), "c": adding(8.0, 5)}
    engines = [Spy(sites), Spy(dict(reversed(sites.items())))]
    averaged = [federated_rounds(engine, "supervised", START, 1, seed=0)["w"].tolist() for engine in engines]
    assert averaged == [[6.625, 7.625]] * 2
    assert engines[0].asked == engines[1].asked


def test_a_site_cannot_claim_more_weight_than_the_limit():
    """n = 1 and a thousand, 3 at most: as in the first test, 1 + (1 + 3 · 4) / 4 = 4.25; unlimited, 4.997."""
    sites = {"a": adding(1.0), "b": adding(4.0, examples=1000)}
    assert average(sites, most=3)["w"].tolist() == [4.25, 5.25]
    assert average(sites)["w"][0].item() == approx(1 + 4001 / 1001)


def test_an_absent_site_is_left_out_and_is_no_zero():
    told = r"site b gave no answer \(error\); round 1 of the supervised goes on without it"
    with pytest.warns(DataWarning, match=told):
        averaged = average({"a": adding(1.0), "b": silent})
    assert averaged["w"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (sending({"v": tensor([1.0, 2.0])}), r"an update of the reward with other names: \['v', 'w'\]"),
        (sending({"w": tensor([1.0])}), r"an update of the reward: w is \(1,\) .*expected \(2,\) torch.float32"),
        (sending({"w": tensor([1.0, 2.0]).double()}), r"an update of the reward: w is \(2,\) torch.float64"),
        (sending({"w": tensor([1.0, 2.0]).half()}), r"an update of the reward: w is \(2,\) torch.float16"),
        (sending({"w": tensor([1.0, float("nan")])}), "an update of the reward: w holds a value that is not finite"),
        (sending({"w": tensor([float("inf"), 1.0])}), "an update of the reward: w holds a value that is not finite"),
        (sending(id="another"), "reply to request 'another'"),
        (sending(examples=0), "0 examples"),
        (sending(examples=-5), "-5 examples"),
        (sending(steps=0), "1 examples and 0 steps"),
        (sending(loss=float("inf")), "loss of inf"),
        (sending(distance=float("nan")), "a distance of nan, which must be finite and at least 0"),
        (sending(distance=float("inf")), "a distance of inf"),
        (sending(distance=-0.5), "a distance of -0.5"),
        (
            lambda request: UpdateReply(request.id, b"no tensors", 1, 1.0),
            "an update of the reward: 10 bytes that cannot be",
        ),
        (lambda request: ScoreReply(request.id, []), "expected an update, got a ScoreReply"),
    ],
)
def test_a_malformed_reply_is_refused_and_counted_as_absence(site, reason):
    engine = InProcessEngine({"a": adding(1.0), "b": site})
    with pytest.warns(DataWarning, match=f"site b sent an update that cannot be used .*{reason}"):
        averaged = federated_rounds(engine, "reward", START, 1, seed=0)
    assert averaged["w"].tolist() == [2.0, 3.0]
    assert engine.traffic.counts["b", "reward"].absences == 1


@pytest.mark.filterwarnings("ignore::accord.errors.DataWarning")
def test_nobody_answers():
    with pytest.raises(RunError, match="no site answered in round 1 of 'supervised'"):
        average({"a": silent, "b": sending(loss=float("nan"))})


def test_finite_updates_that_end_in_weights_that_are_not():
    """2e38 and 3e38 add up to no float32: the longer is left out, and named; with a bound both take part."""
    sites = {"a": adding(1.0), "b": adding(2e38), "c": adding(3e38)}
    total = Aggregation(rule="task-arithmetic", bound=0).start(0)
    with pytest.warns(DataWarning, match=r"site c sent an update that breaks the supervised: .*; round 1 of the"):
        assert average(sites, aggregate=total)["w"][0].item() == approx(2e38)
    bounded = Aggregation(rule="task-arithmetic", bound=3).start(0)
    with pytest.warns(DataWarning, match=r"site c sent an update 1.5e\+38 times as long as the median"):
        assert all(w.isfinite().all() for w in average({**sites, "b": adding(2.0)}, aggregate=bounded).values())


def test_the_bytes_of_both_ways_are_counted():
    """Per round and site: one encoded request down, one encoded reply up; under what is trained."""
    engine = Spy({"a": adding(1.0), "b": adding(1.0)})
    federated_rounds(engine, "preference", START, 2, seed=0)
    sent = [encode(round["a"]) for round in engine.asked]
    returned = [encode(adding(1.0)(round["a"])) for round in engine.asked]
    count = engine.traffic.counts["a", "preference"]
    assert (count.messages, count.bytes_to_site) == (2, sum(map(len, sent)))
    assert count.bytes_from_site == sum(map(len, returned))
    assert {kind for _, kind in engine.traffic.counts} == {"preference"}


def test_only_the_named_sites_take_part_and_draw_as_they_would_with_all():
    engine = Spy({"a": silent, "b": adding(1.0), "c": adding(3.0)})
    federated_rounds(engine, "selector", START, 1, seed=5, sites=["b", "c"], group=2, first=3)
    everybody = Spy({"a": adding(1.0), "b": adding(1.0), "c": adding(1.0)})
    federated_rounds(everybody, "selector", START, 1, seed=5, group=2, first=3)
    assert engine.asked[0] == {site: everybody.asked[0][site] for site in ("b", "c")}
    assert engine.asked[0]["b"].round == 3 and engine.asked[0]["b"].group == 2


def test_every_site_round_and_group_has_its_own_seed():
    engine = Spy({"a": adding(1.0), "b": adding(1.0)})
    for group in (0, 1):
        federated_rounds(engine, "selector", START, 3, seed=4_294_966, group=group)
    seeds = [request.seed for round in engine.asked for request in round.values()]
    assert len(set(seeds)) == 12 and all(0 <= seed < 2**32 for seed in seeds)


def test_a_server_sends_and_receives_and_may_refuse():
    """It sends how many it has heard; b's answer it refuses, so that only a is averaged."""

    class Counting:
        heard = ()

        def send(self):
            return str(len(self.heard)).encode()

        def receive(self, site, examples, state):
            if site == "b":
                raise ReplyError("not you")
            self.held = site, examples, state

        def keep(self, sites, where):
            assert [*sites] == [self.held[0]]
            self.heard += (self.held,)

    def answer(request):
        return UpdateReply(request.id, adding(1.0)(request).change, 7, 1.0, b"heard " + request.state)

    server = Counting()
    with pytest.warns(DataWarning, match=r"site b sent an update that cannot be used \(not you\)"):
        averaged = average({"a": answer, "b": adding(50.0)}, 2, server=server)
    assert averaged["w"].tolist() == [3.0, 4.0]
    assert server.heard == (("a", 7, b"heard 0"), ("a", 7, b"heard 1"))


def test_the_rule_gets_weights_updates_with_their_steps_and_shares():
    """n = 1 and 3: p = (1/4, 3/4); what it returns is sent in the next round, and returned after the last."""
    seen = []

    def rule(previous, updates, weights):
        told = [(u.change["w"].tolist(), u.steps, u.distance) for u in updates]
        seen.append((previous["w"].tolist(), told, list(weights)))
        return {"w": previous["w"] * 2}

    def working(request):
        return UpdateReply(request.id, save({"w": tensor([-1.0, 0.0])}), 3, 1.0, steps=5, distance=0.0)

    engine = Spy({"a": adding(1.0), "b": working})
    averaged = federated_rounds(engine, "router", START, 2, seed=0, aggregate=rule)
    told = [([1.0, 1.0], 1, None), ([-1.0, 0.0], 5, 0.0)]
    assert seen == [([1.0, 2.0], told, [0.25, 0.75]), ([2.0, 4.0], told, [0.25, 0.75])]
    assert averaged["w"].tolist() == [4.0, 8.0]
    assert load(engine.asked[1]["b"].weights)["w"].tolist() == [2.0, 4.0]


def test_a_rule_that_remembers_goes_through_the_rounds():
    """FedAvgM, β = 1/2, both sites add 1: m = 1, then 1.5; w + 1 + 1.5. FedAvg adds 2."""
    rule = Aggregation("fedavgm", momentum=0.5).start(0)
    assert average({"a": adding(1.0), "b": adding(1.0, 7)}, 2, aggregate=rule)["w"].tolist() == [3.5, 4.5]
    assert average({"a": adding(1.0), "b": adding(1.0, 7)}, 2)["w"].tolist() == [3.0, 4.0]


def test_with_16_bits_the_server_keeps_its_weights_in_full():
    """float16 has steps of 2⁻¹⁰ between 1 and 2; the weight begins at 1 + 2⁻¹², and each round adds 2⁻¹².

    So the sites read 1 + 2⁻¹² as 1, 1 + 2⁻¹¹, halfway, as 1 (to even), and 1 + 3 · 2⁻¹² as 1 + 2⁻¹⁰; the server is at
    1 + 2⁻¹⁰ after three rounds. Had it kept what it sent, every round would begin at 1 and end at 1 + 2⁻¹².
    """
    tiny = 2.0**-12
    start = {"w": tensor([1 + tiny, 2.0])}
    engine = Spy({"a": adding(tiny), "b": adding(tiny, examples=3)})
    averaged = federated_rounds(engine, "reward", start, 3, seed=0, bits=16)
    sent = [round["b"] for round in engine.asked]
    assert [load(request.weights)["w"][0].item() for request in sent] == [1.0, 1.0, 1 + 2**-10]
    assert averaged["w"].tolist() == [1 + 4 * tiny, 2 + 3 * tiny] and averaged["w"].dtype == torch.float32
    assert [request.bits for request in sent] == [16] * 3
    full = federated_rounds(Spy({"a": adding(tiny)}), "reward", start, 3, seed=0)
    assert torch.equal(full["w"], averaged["w"])


def test_with_16_bits_an_update_in_32_is_refused():
    """And so is one with a value beyond float16's 65504, which is infinite there."""

    def full(request):
        return UpdateReply(request.id, save({"w": tensor([1.0, 1.0])}), 1, 1.0)

    def huge(request):
        return UpdateReply(request.id, save({"w": tensor([70_000.0, 1.0]).half()}), 1, 1.0)

    with pytest.warns(DataWarning) as told:
        averaged = average({"a": adding(1.0), "b": full, "c": huge, "d": adding(1.0)}, bits=16)
    assert averaged["w"].tolist() == [2.0, 3.0]
    assert [str(warning.message) for warning in told] == [
        "site b sent an update that cannot be used (an update of the supervised: w is (2,) torch.float32, expected "
        "(2,) torch.float16); round 1 of the supervised goes on without it",
        "site c sent an update that cannot be used (an update of the supervised: w holds a value that is not finite); "
        "round 1 of the supervised goes on without it",
    ]


def test_a_request_is_what_the_wire_carries():
    """What leaves the server: an id, the task, the round from 0, the weights."""
    engine = Spy({"a": adding(1.0)})
    federated_rounds(engine, "reward", START, 1, seed=2)
    request = engine.asked[0]["a"]
    assert request == UpdateRequest("reward-0-0-a", "reward", 0, to_bytes(START), request.seed)

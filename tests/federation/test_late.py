import pytest
import torch
from pytest import approx
from safetensors.torch import load, save

from accord.errors import DataWarning, RunError
from accord.federation.aggregation import Aggregation, fedavg
from accord.federation.engine import InProcessEngine
from accord.federation.late import late_rounds
from accord.federation.messages import Absence, UpdateReply
from accord.federation.rounds import federated_rounds

START = {"w": torch.zeros(2)}


def adding(value, *, steps=1, seen=None):
    """A site that adds `value` to every weight, and notes in which rounds it was asked, and from what."""

    def answer(request):
        weights = load(request.weights)
        if seen is not None:
            seen.append((request.round, weights["w"][0].item()))
        return UpdateReply(request.id, save({"w": torch.full_like(weights["w"], value)}), 1, float(value), steps=steps)

    return answer


def run(handlers, rounds=3, **settings):
    settings = {"aggregate": fedavg, "pace": {}} | settings
    found = late_rounds(InProcessEngine(handlers), "router", START, rounds, seed=0, **settings)
    return found["w"].tolist()


def test_who_is_late_is_heard_later_by_hand():
    """a: 1 in each round; b: 10 from round 0, heard in round 2: 0 + 1 + 1 + (1 + 10) / 2 = 7.5, then a again."""
    seen, losses = [], []
    told = {"on_round": lambda number, loss: losses.append((number, loss))}
    assert run({"a": adding(1.0), "b": adding(10.0, seen=seen)}, 4, pace={"b": 3}, **told) == [8.5, 8.5]
    assert seen == [(0, 0.0), (3, 7.5)]
    assert losses == [(1, 1.0), (2, 1.0), (3, 5.5), (4, 1.0)]


def test_a_step_waits_for_as_many_as_are_wanted():
    """M = 2: a alone makes none; a twice: 1; then a and b: 1 + 5.5."""
    assert run({"a": adding(1.0), "b": adding(10.0)}, 3, pace={"b": 3}, wanted=2) == [6.5, 6.5]


def test_unequal_work_is_divided_out():
    """a changes by 1 in a step, b by 8 in four: Δ = (1 + 2) / 2 = 1.5; m = .1 · 1.5 = .15, v̂ = max(τ², .01 · 2.25 + …).

    τ = .1: v₀ = .01, v = .99 · .01 + .01 · 2.25 = .0324, √ = .18; the step is η .15 / (.18 + .1).
    """
    rule = Aggregation("fedamsgrad", learning_rate=1.0, adaptivity=0.1, bound=0)
    found = run({"a": adding(1.0), "b": adding(8.0, steps=4)}, 1, aggregate=rule.start(0))
    assert found == approx([0.15 / 0.28] * 2)


def noisy(name):
    """A site whose change is drawn from the request's seed."""

    def answer(request):
        draw = torch.Generator().manual_seed(request.seed)
        return UpdateReply(request.id, save({"w": torch.randn(2, generator=draw)}), len(name), 1.0)

    return answer


def test_where_none_is_late_it_is_the_ordinary_rounds_to_the_bit():
    handlers = {name: noisy(name) for name in ("a", "bb", "ccc")}
    rule = Aggregation("fedadam")
    usual = federated_rounds(InProcessEngine(handlers), "router", START, 4, seed=3, aggregate=rule.start(3))
    late = late_rounds(InProcessEngine(handlers), "router", START, 4, seed=3, aggregate=rule.start(3), pace={})
    assert torch.equal(usual["w"], late["w"]) and usual["w"].abs().sum() > 0


def test_nobody_waits_for_one_that_is_gone_while_another_works():
    """b is gone in round 2 (from 1), where a is still at work: it is asked again in round 3.

    Round 1: b's 10. Round 3: a's 1, from round 1, and b's 10: 10 + 5.5.
    """

    class Gone(InProcessEngine):
        def ask(self, requests, *, deadline=None):
            if set(requests) == {"b"} and requests["b"].round == 1:
                return {"b": Absence("b", "gone")}
            return super().ask(requests, deadline=deadline)

    engine = Gone({"a": adding(1.0), "b": adding(10.0)})
    with pytest.warns(DataWarning, match="site b"):
        found = late_rounds(engine, "router", START, 3, seed=0, aggregate=fedavg, pace={"a": 3})
    assert found["w"].tolist() == [15.5, 15.5]


def test_an_update_that_breaks_the_model_is_left_out():
    """b's 1e3 is beyond what the probe takes: a alone makes the step, twice."""
    probe = {"probe": lambda weights: bool(weights["w"].abs().max() < 100)}
    with pytest.warns(DataWarning, match="site b sent an update that breaks the router"):
        assert run({"a": adding(1.0), "b": adding(1e3)}, 2, **probe) == [2.0, 2.0]


def test_what_makes_no_step_is_an_error():
    with pytest.raises(RunError, match="no update made a step of the router in 2 rounds; ask for fewer than 5 at once"):
        run({"a": adding(1.0)}, 2, wanted=5)
    with pytest.raises(RunError, match=r"set router\.audit = 0"):
        run({"a": adding(1.0)}, audit=object())

import math

import pytest
import torch
from pytest import approx
from safetensors.torch import load, save

from accord.attacks.updates import huge, lying
from accord.errors import DataWarning, RunError
from accord.federation import late as late_module
from accord.federation.aggregation import BOUND, Aggregation, fedavg
from accord.federation.engine import InProcessEngine
from accord.federation.late import late_rounds
from accord.federation.messages import Absence, UpdateReply
from accord.federation.rounds import federated_rounds

START = {"w": torch.zeros(2)}
PACE = {"a": 1, "b": 2, "c": 3}


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
    """M = 2: a waits for b, which is heard in round 3: (1 + 10) / 2, and a is asked again after that alone."""
    seen = []
    assert run({"a": adding(1.0, seen=seen), "b": adding(10.0)}, 4, pace={"b": 3}, wanted=2) == [5.5, 5.5]
    assert seen == [(0, 0.0), (3, 5.5)]


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


def pulling(request):
    """A site whose steps go a fifth of the way to 3."""
    weights = load(request.weights)["w"].float()
    return UpdateReply(request.id, save({"w": 0.2 * (3 - weights)}), 1, 1.0)


def once(round_):
    """A site that is honest but for one round, in which it sends 3e38."""
    return lambda request: (lying(pulling, huge) if request.round == round_ else pulling)(request)


def trained(liar, handler, rule, bound, *, pace=PACE):
    aggregate = Aggregation(rule, learning_rate=0.1 if rule == "fedamsgrad" else 0.5, bound=bound).start(0)
    handlers = {**dict.fromkeys(pace, pulling), liar: handler}
    return run(handlers, 40, aggregate=aggregate, pace=pace)[0]


@pytest.mark.filterwarnings("ignore::accord.errors.DataWarning")
@pytest.mark.parametrize(("liar", "handler"), [*((site, once(0)) for site in "abc"), ("a", once(1)), ("a", once(6))])
@pytest.mark.parametrize("rule", ["fedamsgrad", "fedavg"])
def test_one_huge_update_is_bounded_also_where_its_sender_is_alone_in_the_step(rule, liar, handler):
    """a alone makes the steps of rounds 1, 5 and 7 (from 1). Weights go from 0 to 3 as without the lie.

    Without the bound v̂ is 1e76 for ever: the momentum of the lie adds up to η · 10 = 1, and there the weights stay.
    """
    honest = trained("a", pulling, rule, BOUND)
    assert trained(liar, handler, rule, BOUND) == approx(honest, abs=0.15 * honest)
    off = trained(liar, handler, rule, 0.0)
    assert off < 0.7 * honest if rule == "fedamsgrad" else off > 1e20


def test_who_sends_a_huge_update_is_named_and_the_steps_before_others_were_heard_are_lost():
    """The lie of round 1 is known for one when c is heard; all are asked again in round 4, from the first weights."""
    seen = []

    def watched(request):
        seen.append((request.round, load(request.weights)["w"][0].item()))
        return pulling(request)

    rule = Aggregation("fedavg").start(0)
    with pytest.warns(DataWarning) as told:
        run({"a": once(0), "b": pulling, "c": watched}, 4, aggregate=rule, pace=PACE)
    assert seen == [(0, 0.0), (3, 0.0)]
    assert any("site a sent an update more than 5 times as long" in str(each.message) for each in told)
    with pytest.warns(DataWarning, match=r"site c .* times as long as the median of rounds 1 to 3 of .*look at that"):
        trained("c", once(0), "fedavg", BOUND)


def test_sites_that_send_nothing_are_named():
    handlers = {"a": adding(0.0), "b": adding(0.0), "c": adding(1.0)}
    with pytest.warns(DataWarning, match="sites a, b sent updates that change nothing in rounds 1 to 3 of the router"):
        assert run(handlers, 3, aggregate=Aggregation().start(0), pace=PACE) == [0.0, 0.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ["fedamsgrad", "fedadam", "fedavg"])
def test_honest_late_sites_are_not_bounded_by_what_others_sent(monkeypatch, rule):
    """Work of 1, 2 and 4, a rate that falls to a 460th: the bound between the rounds leaves no trace and no word."""

    def falling(work):
        def answer(request):
            rate = 1 + math.cos(math.pi * request.round / 23)
            return UpdateReply(request.id, save({"w": torch.full((2,), work * rate)}), 1, 1.0, steps=work)

        return answer

    def found():
        aggregate = Aggregation(rule).start(0)
        return run({"a": falling(1), "b": falling(2), "c": falling(4)}, 23, aggregate=aggregate, pace=PACE)

    bounded = found()
    monkeypatch.setattr(late_module, "bounded", lambda updates, *_: updates)
    assert found() == bounded


def test_where_most_fail_it_ends():
    """b and c fail while a is at work: two of three. One that fails alone does not end it, nor one that is gone."""

    def fails(request):
        raise RuntimeError("broken")

    told = r"round 1 of the router: 2 of 3 sites failed .*\(b, c\)"
    with pytest.warns(DataWarning, match="gave no answer"), pytest.raises(RunError, match=told):
        run({"a": adding(1.0), "b": fails, "c": fails}, pace={"a": 3})
    with pytest.warns(DataWarning, match="gave no answer"):
        assert run({"a": fails, "b": adding(1.0), "c": adding(1.0)}, pace={"b": 3, "c": 3}) == [1.0, 1.0]


def test_where_most_break_the_model_it_ends():
    """b breaks it when it is heard in round 2, c in round 3 (from 1): of three that is most."""
    probe = {"probe": lambda weights: bool(weights["w"].abs().max() < 100)}
    told = r"round 3 of the router: 2 of 3 sites .*\(b, c\).* longest update of the round before was that of site a"
    with pytest.warns(DataWarning, match="breaks the router"), pytest.raises(RunError, match=told):
        run({"a": adding(1.0), "b": adding(1e3), "c": adding(1e3)}, pace=PACE, **probe)


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

"""The audit of a training's updates: each poisoning is named, and nobody who is honest."""

import json
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from accord.attacks.updates import alie, hostile, ipm, norm_bounded, sign_flip
from accord.errors import DataWarning
from accord.federation.aggregation import Aggregation, Update
from accord.federation.audit import Audit, Finding
from accord.federation.engine import InProcessEngine
from accord.federation.local import begin, finish
from accord.recipe import SiteConfig
from accord.routing.fit import fit_router, router_audit
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss
from accord.runs import read_lines
from accord.stages import routing
from accord.stages.routing import train_router
from accord.types import texts_of

D, SITES = 8, ("a", "b", "c", "d", "e")
CONFIG = RouterConfig(
    layers=1, width=8, heads=2, rounds=6, local_steps=3, aggregation=Aggregation("fedadam", learning_rate=0.01)
)


def states(site, count, seed):
    """Hidden states `[count, 2, D]` of answers that are this site's: feature `site` is large."""
    hidden = torch.randn(count, 2, D, generator=torch.Generator().manual_seed(seed))
    hidden[..., site] += 3.0
    return hidden, torch.ones(count, 2, dtype=torch.bool)


def router_sites(names=SITES):
    """Sites that train the real router on states of their own."""

    def site(k):
        network = RouterNetwork(D, len(names), CONFIG)

        def answer(request):
            start = begin(network, request)
            optimiser = torch.optim.SGD(network.parameters(), lr=0.3)
            for _ in range(CONFIG.local_steps):
                loss = client_id_loss(network(*states(k, 16, seed=k)), k)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return finish(network, request, start, examples=16, loss=loss.item(), steps=CONFIG.local_steps)

        return answer

    return {name: site(k) for k, name in enumerate(names)}


def audit(names=SITES, of_each=8):
    """The audit by states that no site has: of each kind as many."""
    hidden, mask = (
        torch.cat(parts) for parts in zip(*(states(k, of_each, 50 + k) for k in range(len(names))), strict=True)
    )
    kinds = [name for name in names for _ in range(of_each)]
    return router_audit(hidden, mask, kinds, {name: [kind == name for kind in kinds] for name in names}, CONFIG)


def trained(sites, found=None):
    return fit_router(InProcessEngine(sites), D, CONFIG, seed=0, audit=found)


def told(sites, found=None):
    """What a training warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(sites, found)
    return [str(each.message) for each in caught if each.category is DataWarning]


POISONINGS = {
    "sign flip": sign_flip,
    "ALIE": partial(alie, z=1.5),
    "IPM": ipm,
    "norm-bounded": norm_bounded,
}


@pytest.mark.parametrize("attack", POISONINGS.values(), ids=POISONINGS)
def test_a_poisoner_is_named_and_nobody_else(attack):
    """One of five sends what the attack makes of the others' updates."""
    found = audit()
    (warning,) = told(hostile(router_sites(), ["e"], attack), found)
    assert "site e: the router is no better at the server's labelled questions" in warning
    assert {site for site, each in found.findings.items() if each.named} == {"e"}


@pytest.mark.parametrize("attack", POISONINGS.values(), ids=POISONINGS)
def test_without_the_audit_nobody_is_named(attack):
    """None of these is longer than five times the median, and none breaks a weight."""
    assert told(hostile(router_sites(), ["e"], attack)) == []


def test_a_named_site_is_left_out_where_that_is_wanted():
    """The router is that of a federation in which e says nothing: it is named and left out in the first round."""

    def silent(request):
        raise RuntimeError("gone")

    found = audit()
    found.leaves_out = True
    with pytest.warns(DataWarning, match="site e: the router is no better"):
        left_out = trained(hostile(router_sites(), ["e"], norm_bounded), found)
    with pytest.warns(DataWarning, match="gave no answer"):
        without = trained(router_sites() | {"e": silent})
    assert found.findings["e"].named == 1
    assert all(torch.equal(weight, without.state_dict()[name]) for name, weight in left_out.state_dict().items())


def test_a_site_that_is_left_out_later_on_is_never_chosen():
    """Honest in the first round, and named after a later one: a prior of these rounds alone would favour it."""
    found, honest, poisoning = audit(), router_sites(), hostile(router_sites(), ["e"], sign_flip)
    found.leaves_out = True
    sleeper = poisoning | {"e": lambda request: (poisoning if request.round else honest)["e"](request)}
    with pytest.warns(DataWarning, match="site e: the router is no better"):
        network = trained(sleeper, found)
    assert 1 < found.findings["e"].named < CONFIG.rounds
    assert network.examples == (16 * CONFIG.rounds,) * 4 + (0,)


def test_two_of_five_are_named():
    found = audit()
    told(hostile(router_sites(), ["d", "e"], sign_flip), found)
    assert {site for site, each in found.findings.items() if each.named} == {"d", "e"}


class Encoder:
    """Hidden states of a question by the letter that it ends with: its site's own."""

    features = D
    model = SimpleNamespace(device=torch.device("cpu"))

    def __call__(self, prompts, images, completions):
        hidden, mask = zip(
            *(states(SITES.index(texts_of(turns[-1])[-1][-1]), 1, seed=n) for n, turns in enumerate(prompts)),
            strict=True,
        )
        return torch.cat(hidden), torch.cat(mask)


def test_a_runs_router_is_audited_and_what_was_found_is_in_its_records(job, ask, monkeypatch):
    """By the run's own questions; one of five sends the opposite of what the others teach."""
    sites = tuple(SiteConfig(name, "accord/idefics3", question_types=(name,)) for name in SITES)
    job.recipe = replace(job.recipe, sites=sites, router=replace(CONFIG, audit=8))
    asked = [ask(n, question_type=SITES[n % 5], text=f"what is {SITES[n % 5]}") for n in range(40)]
    job.questions = {"base": asked, "dev": []}
    vars(job)["encoder"] = Encoder()
    engine = InProcessEngine(hostile(router_sites(), ["e"], sign_flip))
    monkeypatch.setattr(routing, "open_federation", lambda *_, **__: engine)
    monkeypatch.setattr(routing, "routing_accuracy", lambda *_: 0.5)
    with pytest.warns(DataWarning, match="site e: the router is no better at the server's labelled questions"):
        train_router(job)
    rounds = [line for line in read_lines(job.path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in rounds] == [*range(1, 7)] and set(rounds[0]["taught"]) == {*SITES}
    assert rounds[-1]["taught"]["e"] < 0 < min(rounds[-1]["taught"][name] for name in SITES[:4])
    measured = json.loads((job.path / "router" / "measured.json").read_text())
    assert {name for name, each in measured["audit"].items() if each.get("named")} == {"e"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [SITES, SITES[:3]])
def test_honest_sites_raise_no_alarm_and_no_weight_changes(names):
    found = audit(names)
    audited, plain = trained(router_sites(names), found), trained(router_sites(names))
    assert all(torch.equal(weight, plain.state_dict()[name]) for name, weight in audited.state_dict().items())
    assert all(each.named == 0 and each.taught > 0 for each in found.findings.values())
    assert [*found.findings] == [*names]


@pytest.mark.filterwarnings("error")
def test_a_site_without_labelled_questions_is_not_judged():
    """Nobody can tell whether e teaches a kind of which the server has no question: even a flip is not named."""
    names, kinds = SITES, [name for name in SITES[:4] for _ in range(8)]
    hidden, mask = (torch.cat(parts) for parts in zip(*(states(k, 8, 50 + k) for k in range(4)), strict=True))
    found = router_audit(hidden, mask, kinds, {name: [kind == name for kind in kinds] for name in names}, CONFIG)
    trained(hostile(router_sites(), ["e"], sign_flip), found)
    assert [*found.findings] == ["a", "b", "c", "d"] and not any(each.named for each in found.findings.values())


def linear(own):
    """An audit of a model whose loss on question i is −w_i: an update teaches what it adds to w."""
    kinds = [site for site, count in own.items() for _ in range(count)]
    return Audit(lambda w: -w["w"], kinds, {site: [kind == site for kind in kinds] for site in own})


def changes(**by_site):
    return {site: Update({"w": tensor(values, dtype=torch.double)}) for site, values in by_site.items()}


THIRDS = {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}


def test_the_findings_by_hand():
    """Each of three sites has four questions. a and b add 3 to their own, times ⅓: taught 1.

    c adds 0.6 to its own, times ⅓ 0.2, which is below ¼ of the usual 1. All have no spread. Over all kinds a adds a
    third of its 1, c a third of 0.2.
    """
    found = linear({"a": 4, "b": 4, "c": 4})
    own = [[3.0] * 4, [0.0] * 4]
    sent = changes(a=own[0] + own[1] * 2, b=own[1] + own[0] + own[1], c=own[1] * 2 + [0.6] * 4)
    assert found.round(1, {"w": torch.zeros(12).double()}, sent, THIRDS) == ["c"]
    assert found.findings["a"].taught == pytest.approx(1.0) and found.findings["a"].spoilt == pytest.approx(-1 / 3)
    assert found.findings["c"] == Finding(pytest.approx(0.2), pytest.approx(-0.2 / 3), 1)
    assert found.round(2, {"w": torch.zeros(12).double()}, sent, THIRDS) == []  # it was named before
    assert found.findings["c"].named == 1


def test_a_site_that_teaches_its_own_and_spoils_others_is_named():
    """c adds 3 to its own kind and takes 6 from the others', times ⅓: spoilt (2 + 2 − 1) / 3 = 1, above ½ of 1."""
    found = linear({"a": 4, "b": 4, "c": 4})
    nothing = [0.0] * 4
    sent = changes(a=[3.0] * 4 + nothing * 2, b=nothing + [3.0] * 4 + nothing, c=[-6.0] * 8 + [3.0] * 4)
    assert found.round(1, {"w": torch.zeros(12).double()}, sent, THIRDS) == ["c"]
    assert found.findings["c"].taught == pytest.approx(1.0) and found.findings["c"].spoilt == pytest.approx(1.0)


def test_a_site_that_comes_late_is_compared_over_its_own_rounds():
    """All teach alike, 1 a round in the first four and a tenth in two more, and d is there for these alone."""
    found = linear(dict.fromkeys("abcd", 4))
    for number in range(1, 7):
        size = 3.0 if number < 5 else 0.3
        sent = changes(**{site: [size * (kind == site) for kind in "abcd" for _ in range(4)] for site in "abcd"})
        if number < 5:
            del sent["d"]
        start = {"w": torch.zeros(16).double()}
        assert found.round(number, start, sent, dict.fromkeys(sent, 1 / 3)) == []
    assert found.findings["d"].taught == pytest.approx(0.2) and found.findings["a"].taught == pytest.approx(4.2)


@pytest.mark.parametrize("sites", ["ab", "abc"])
def test_two_sites_and_three_questions_tell_nothing(sites):
    """Of two sites no median tells which is usual; of three questions none is judged."""
    found = linear(dict.fromkeys(sites, 4 if len(sites) == 2 else 3))
    size = len(found.alike)
    sent = changes(**{site: [-1.0] * size for site in sites})
    assert found.round(1, {"w": torch.zeros(size).double()}, sent, dict.fromkeys(sites, 1 / len(sites))) == []
    assert found.findings == {}

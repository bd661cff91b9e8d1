"""Updates that would take a shared model over. Each attack is shown once with its defence and once without."""

from functools import partial

import pytest
import torch
from safetensors.torch import load, save
from torch import tensor

from accord.attacks.updates import alie, hostile, huge, ipm, lying, norm_bounded, scale, sign_flip
from accord.errors import DataWarning, RunError
from accord.federation import rounds as rounds_module
from accord.federation.aggregation import BOUND, Aggregation, Update, bounded
from accord.federation.engine import InProcessEngine
from accord.federation.local import begin, finish
from accord.federation.messages import Absence, UpdateReply
from accord.federation.rounds import combine, federated_rounds
from accord.federation.weights import probe_of, set_trainable_weights, to_bytes, trainable_weights
from accord.routing.fit import fit_router
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss

D, K = 6, 3
START = {"w": tensor([1.0, 2.0])}


def config(**aggregation):
    return RouterConfig(layers=1, width=8, heads=2, rounds=6, local_steps=2, aggregation=Aggregation(**aggregation))


def examples(site):
    """Hidden states `[16, 3, D]` of answers that are this site's: feature `site` is large."""
    hidden = torch.randn(16, 3, D, generator=torch.Generator().manual_seed(site))
    hidden[..., site] += 4.0
    return hidden, torch.ones(16, 3, dtype=torch.bool)


def router_site(site, settings):
    """A site that trains the real router on its own states."""
    network = RouterNetwork(D, K, settings)

    def answer(request):
        start = begin(network, request)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
        for _ in range(settings.local_steps):
            loss = client_id_loss(network(*examples(site)), site)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return finish(network, request, start, examples=16, loss=loss.item(), steps=settings.local_steps)

    return answer


def router_sites(settings):
    return {name: router_site(k, settings) for k, name in enumerate("abc")}


def losses(network):
    return [client_id_loss(network(*examples(k)), k).item() for k in range(K)]


def adding(value):
    def answer(request):
        change = {name: torch.full_like(weight, value) for name, weight in load(request.weights).items()}
        return UpdateReply(request.id, save(change), 1, 1.0)

    return answer


def average(sites, rounds=1, **settings):
    return federated_rounds(InProcessEngine(sites), "router", START, rounds, seed=0, **settings)


def no_probe(monkeypatch):
    monkeypatch.setattr("accord.routing.fit.probe_of", lambda *_: None)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ["fedavg", "fedadam", "fedavgm", "median"])
def test_an_honest_router_is_the_same_to_the_bit(monkeypatch, rule):
    """No update of an honest site is near the bound, and neither the bound nor the probe leaves a trace."""

    def trained(bound):
        settings = config(rule=rule, bound=bound, learning_rate=1.0 if rule != "fedadam" else 0.01)
        return fit_router(InProcessEngine(router_sites(settings)), D, settings, seed=0).state_dict()

    defended = trained(BOUND)
    no_probe(monkeypatch)
    monkeypatch.setattr(rounds_module, "refuse_most", lambda *_: None)
    plain = trained(0.0)
    assert all(torch.equal(weight, plain[name]) for name, weight in defended.items())


def test_huge_finite_weights_do_not_take_the_router_over():
    """A site of three sends 3e38 everywhere in every round: the router still learns from the others."""
    settings = config()
    sites = hostile(router_sites(settings), ["c"], huge, loss=0.5)
    with pytest.warns(DataWarning, match=r"site c sent an update .* times as long as the median of round . of the"):
        network = fit_router(InProcessEngine(sites), D, settings, seed=0)
    assert all(weight.isfinite().all() and weight.abs().max() < 100 for weight in network.state_dict().values())


def test_without_the_bound_and_the_probe_the_sender_is_named_and_nobody_is_averaged_alone(monkeypatch):
    """Round 1 averages 1e38; the honest train to NaN and are refused in round 2: the training ends and names c."""
    no_probe(monkeypatch)
    settings = config(bound=0)
    engine = InProcessEngine(hostile(router_sites(settings), ["c"], huge, loss=0.5))
    told = r"round 2 of the router: 2 of 3 .*\(a, b\).* longest update of the round before was that of site c"
    with (
        pytest.warns(DataWarning, match="site [ab] sent an update that cannot be used"),
        pytest.raises(RunError, match=told),
    ):
        fit_router(engine, D, settings, seed=0)


@pytest.mark.filterwarnings("ignore::accord.errors.DataWarning")
def test_without_any_defence_the_liar_is_averaged_alone(monkeypatch):
    """The hole: finite weights, which nobody but the liar has made."""
    no_probe(monkeypatch)
    monkeypatch.setattr(rounds_module, "refuse_most", lambda *_: None)
    settings = config(bound=0)
    sites = hostile(router_sites(settings), ["c"], partial(huge, value=3e37), loss=0.5)
    network = fit_router(InProcessEngine(sites), D, settings, seed=0)
    assert max(weight.abs().max().item() for weight in network.state_dict().values()) > 1e37


def test_without_the_bound_the_probe_takes_the_round_back():
    """As if the liar were absent: the same weights as of the two others in a federation in which it says nothing."""
    settings = config(bound=0)

    def silent(request):
        raise RuntimeError("gone")

    with pytest.warns(DataWarning, match=r"site c sent an update that breaks the router.* round . of the router"):
        engine = InProcessEngine(hostile(router_sites(settings), ["c"], huge, loss=0.5))
        network = fit_router(engine, D, settings, seed=0)
    with pytest.warns(DataWarning, match="gave no answer"):
        without = fit_router(InProcessEngine(router_sites(settings) | {"c": silent}), D, settings, seed=0)
    assert all(torch.equal(weight, without.state_dict()[name]) for name, weight in network.state_dict().items())
    assert engine.traffic.counts["c", "router"].absences == settings.rounds


def test_the_last_round_is_no_exception():
    """Honest for five rounds; what comes in the sixth is bounded, and refused where it is not."""

    def late(settings):
        sites = router_sites(settings)
        honest = sites["c"]
        return sites | {"c": lambda request: (lying(honest, huge) if request.round == 5 else honest)(request)}

    for settings, told in ((config(), "times as long"), (config(bound=0), "breaks the router")):
        with pytest.warns(DataWarning, match=f"site c sent an update .*{told}.* round 6|site c .*round 6.*"):
            network = fit_router(InProcessEngine(late(settings)), D, settings, seed=0)
        assert max(losses(network)[:2]) < 1.0


def test_the_longest_update_is_not_always_the_one_that_breaks():
    """The probe fails where the second weight is beyond 5: b's doing, though a's is longer."""
    sites = {
        "a": lambda request: UpdateReply(request.id, to_bytes({"w": tensor([9.0, 0.0])}), 1, 1.0),
        "b": lambda request: UpdateReply(request.id, to_bytes({"w": tensor([0.0, 8.0])}), 1, 1.0),
        "c": adding(0.0),
    }
    rule = Aggregation("task-arithmetic", bound=0).start(0)
    with pytest.warns(DataWarning, match="site b sent an update that breaks the router"):
        averaged = average(sites, aggregate=rule, probe=lambda weights: bool(weights["w"][1] < 5))
    assert averaged["w"].tolist() == [10.0, 2.0]


def test_a_round_that_is_taken_back_leaves_nothing_in_the_rule():
    """FedAvgM, β = ½: the momentum after the round is that of the two honest updates, 1, and not of the 1e30 too."""
    rule = Aggregation("fedavgm", momentum=0.5, bound=0).start(0)
    sites = {"a": adding(1.0), "b": adding(1.0), "c": adding(1e30)}
    with pytest.warns(DataWarning, match="site c sent an update that breaks"):
        averaged = average(sites, 2, aggregate=rule, probe=lambda weights: bool((weights["w"] < 100).all()))
    assert averaged["w"].tolist() == [3.5, 4.5] and rule.m["w"].tolist() == [1.5, 1.5]


@pytest.mark.parametrize(
    ("values", "left_out"),
    [([1e30], "a"), ([1.0, 1e30, 1e30], "b, c"), ([1e30, 1e30, 1.0, 1e30, 1.0], "a, b, d")],
    ids=["alone", "two of three", "three of five"],
)
@pytest.mark.filterwarnings("ignore::accord.errors.DataWarning")
def test_most_sites_break_the_model(values, left_out):
    sites = {name: adding(value) for name, value in zip("abcde", values, strict=False)}
    told = f"round 1 of the router: .* of {len(values)} sites failed .*\\({left_out}\\), and what is left over is not"
    with pytest.raises(RunError, match=told):
        average(sites, probe=lambda weights: bool((weights["w"] < 100).all()))


def test_one_of_two_is_left_out_where_it_alone_breaks_the_model():
    """Half is not most: the other goes on alone, as where one is absent."""
    with pytest.warns(DataWarning, match="site b sent an update that breaks"):
        averaged = average(
            {"a": adding(1.0), "b": adding(1e30)},
            aggregate=Aggregation(bound=0).start(0),
            probe=lambda weights: bool((weights["w"] < 100).all()),
        )
    assert averaged["w"].tolist() == [2.0, 3.0]


def test_of_two_the_shorter_is_the_measure():
    """1 and 1e6: the long one counts as 5, (1 + 5) / 2 = 3; the warning blames neither. Alone a site is not bounded."""
    rule = Aggregation().start(0)
    with pytest.warns(DataWarning, match="site b sent an update 1e.06 times .* of two sites either may be wrong"):
        assert average({"a": adding(1.0), "b": adding(1e6)}, aggregate=rule)["w"].tolist() == [4.0, 5.0]
    assert average({"a": adding(1e6)}, aggregate=Aggregation().start(0))["w"].tolist() == [1e6 + 1, 1e6 + 2]


def test_sites_that_are_gone_or_do_not_take_part_are_not_failures():
    """Two of three say that they do not do that: the third goes on, as a training of few sites."""

    class Refusing(InProcessEngine):
        def ask(self, requests, *, deadline=None):
            given = super().ask({"a": requests["a"]}, deadline=deadline)
            return {**given, "b": Absence("b", "refused"), "c": Absence("c", "gone")}

    engine = Refusing(dict.fromkeys("abc", adding(1.0)))
    with pytest.warns(DataWarning, match=r"gave no answer \((refused|gone)\)"):
        averaged = federated_rounds(engine, "router", START, 1, seed=0)
    assert averaged["w"].tolist() == [2.0, 3.0]


def test_an_update_of_no_length_has_no_multiple():
    """Two of three did not move: the third, whose length nothing measures, does not either."""
    given = [Update({"w": tensor([0.0])}), Update({"w": tensor([0.0])}), Update({"w": tensor([3e38])})]
    assert [update.change["w"].item() for update in bounded(given, BOUND)] == [0.0, 0.0, 0.0]


def test_who_sends_nothing_is_named_and_not_the_honest():
    """Half of those present freeze a round; the operator is told whose updates have no length."""
    sites = {"a": adding(0.0), "b": adding(0.0), "c": adding(1.0), "d": adding(2.0)}
    with pytest.warns(DataWarning) as told:
        assert average(sites, aggregate=Aggregation().start(0))["w"].tolist() == START["w"].tolist()
    (warning,) = [str(each.message) for each in told]
    assert warning.startswith("sites a, b sent updates that change nothing in round 1") and "site c" not in warning


def test_a_probe_tells_weights_and_leaves_the_mode():
    network = RouterNetwork(D, K, config()).train()
    probe = probe_of(network, lambda: network(*examples(0)))
    good = trainable_weights(network)
    bad = {name: torch.full_like(weight, 3e38) for name, weight in good.items()}
    assert probe(good) and not probe(bad) and network.training
    assert all(torch.equal(weight, bad[name]) for name, weight in trainable_weights(network).items())
    set_trainable_weights(network, good)
    assert probe(good)


def test_combine_by_hand():
    """The mean of 1, 2 and 6 with n = 1, 1, 2 is (1 + 2 + 12) / 4; without the last 1.5."""
    rule = Aggregation(bound=0).start(0)
    updates = {name: Update({"w": tensor([value])}) for name, value in zip("abc", (1.0, 2.0, 6.0), strict=True)}
    counts = {"a": 1, "b": 1, "c": 2}
    whole, none = combine(rule, {"w": tensor([0.0])}, updates, counts)
    assert whole["w"].item() == 3.75 and none == []
    part, broken = combine(rule, {"w": tensor([0.0])}, updates, counts, lambda weights: weights["w"].item() < 3)
    assert part["w"].item() == 1.5 and broken == ["c"]


@pytest.mark.filterwarnings("ignore::accord.errors.DataWarning")
@pytest.mark.parametrize("attack", [sign_flip, partial(sign_flip, factor=1000.0), huge, norm_bounded])
@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_robust_rule_learns_where_one_of_three_lies(attack, rule):
    """The bound stops a takeover and no lie; under a robust rule the two honest outputs are learned through the lie.

    Their losses add up to 1.22 before, 0.29 where all are honest, and at most 0.52 here.
    """
    settings = config(rule=rule)
    lied = fit_router(InProcessEngine(hostile(router_sites(settings), ["c"], attack)), D, settings, seed=0)
    honest = fit_router(InProcessEngine(router_sites(settings)), D, settings, seed=0)
    assert sum(losses(lied)[:2]) < 2 * sum(losses(honest)[:2])


def pulled(attack, bound):
    """Five sites pull two weights from 4 to centres of their own, and e lies: how far from the mean of the others?"""
    centres = [[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]

    def site(centre):
        def answer(request):
            change = 0.3 * (tensor(centre) - load(request.weights)["w"])
            return UpdateReply(request.id, save({"w": change}), 1, 1.0)

        return answer

    engine = InProcessEngine(hostile(dict(zip("abcde", map(site, centres), strict=True)), ["e"], attack))
    aggregate = Aggregation(bound=bound).start(0)
    start = {"w": tensor([4.0, 4.0])}
    weights = federated_rounds(engine, "supervised", start, 30, seed=0, aggregate=aggregate)["w"]
    return (weights - tensor(centres[:4]).mean(dim=0)).norm().item()


@pytest.mark.parametrize("attack", [scale, huge])
def test_the_bound_stops_what_is_long_in_the_honest_direction(attack):
    """The sites' centres are up to 1.8 apart from that mean, which is as far as one site may pull."""
    with pytest.warns(DataWarning, match="site e sent an update .* times as long as the median"):
        assert pulled(attack, BOUND) < 1.8
    assert not pulled(attack, 0.0) < 1e9


@pytest.mark.parametrize("attack", [partial(sign_flip, factor=20.0), partial(ipm, epsilon=20.0)])
def test_the_bound_names_who_sends_a_long_opposite_and_slows_it_only(attack):
    """−5 outweighs four ones, as the bound says: the weights still run away, but by a tenth a round and not at once."""
    with pytest.warns(DataWarning, match="site e sent an update .* times as long as the median"):
        defended = pulled(attack, BOUND)
    assert 10 < defended < 100 and pulled(attack, 0.0) > 1e9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("attack", [sign_flip, norm_bounded, alie, ipm])
def test_the_bound_does_not_see_what_is_no_longer_than_it_allows(attack):
    assert pulled(attack, BOUND) == pulled(attack, 0.0)

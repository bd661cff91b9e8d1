import math

import pytest
import torch
from pytest import approx
from torch import tensor

from accord.errors import RecipeError
from accord.federation.aggregation import (
    Aggregation,
    Update,
    fedavg,
    geometric_median,
    mean,
    median,
    moved,
    shares,
    ties,
    total,
    trimmed_mean,
)

RULES = (
    "fedavg",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedamsgrad",
    "task-arithmetic",
    "ties",
    "dare",
    "median",
    "trimmed-mean",
    "geometric-median",
)


def change(*values):
    return {"w": tensor(values)}


def changes(*values):
    """One change of one number by each site."""
    return [change(value) for value in values]


def equal(k):
    return [1 / k] * k


def train(rule, rounds, weights=None, **settings):
    """Return a number, 0 at first, after each round; a round is the sites' changes of it, or (change, steps)."""
    step, current, told = Aggregation(rule, bound=0, **settings).start(0), change(0.0), []
    for sites in rounds:
        updates = [Update(change(s[0]), s[1]) if isinstance(s, tuple) else Update(change(s)) for s in sites]
        current = step(current, updates, weights or equal(len(sites)))
        told.append(current["w"].item())
    return told


def test_shares_by_hand():
    assert shares([1, 3, 4]) == [0.125, 0.375, 0.5]


def test_moved_by_hand():
    """(1, 2) + 0.5 · (4, −4) = (3, 0); what it began from stays."""
    start = change(1.0, 2.0)
    assert moved(start, change(4.0, -4.0), 0.5)["w"].tolist() == [3.0, 0.0] and start["w"].tolist() == [1.0, 2.0]


def test_fedavg_by_hand():
    """n = 1 and 3: Δ = ((1 · 1 + 3 · −3) / 4, (1 · 0 + 3 · 4) / 4) = (−2, 3), and (1 · 4 + 3 · 0) / 4 = 1."""
    a, b = {"w": tensor([1.0, 0.0]), "v": tensor(4.0)}, {"w": tensor([-3.0, 4.0]), "v": tensor(0.0)}
    start = {"w": tensor([1.0, 2.0]), "v": tensor(0.5)}
    for step in (fedavg, Aggregation().start(0)):
        averaged = step(start, [Update(a), Update(b)], shares([1, 3]))
        assert averaged["w"].tolist() == [-1.0, 5.0] and averaged["v"].item() == 1.5
    slower = Aggregation(learning_rate=0.5).start(0)(start, [Update(a), Update(b)], shares([1, 3]))
    assert slower["w"].tolist() == [0.0, 3.5] and slower["v"].item() == 1.0
    assert start["w"].tolist() == [1.0, 2.0]


def test_the_mean_of_equals_is_what_they_are():
    """To a rounding of float64, which float32 does not see: 5/23 + 7/23 + 11/23 is 1 but for that."""
    one = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(mean([one] * 3, shares([5, 7, 11]))["a"].float(), one["a"])


def test_fedavgm_over_three_rounds():
    """β = 1/2, η = 1, Δ = 1, 4, 0: m = 1, then 1/2 + 4 = 4.5, then 2.25; w = 1, 5.5, 7.75. With η = 2 twice that."""
    rounds = [[0.0, 2.0], [4.0, 4.0], [1.0, -1.0]]
    assert train("fedavgm", rounds, momentum=0.5) == [1.0, 5.5, 7.75]
    assert train("fedavgm", rounds, momentum=0.5, learning_rate=2.0) == [2.0, 11.0, 15.5]
    assert train("fedavgm", rounds, momentum=0.0) == train("fedavg", rounds) == [1.0, 5.0, 5.0]


def test_fedadam_over_two_rounds():
    """β₁ = β₂ = 1/2, τ = 1, so v begins at 1. Δ = 7: m = 3.5, v = 1/2 + 49/2 = 25, the step 3.5 / (5 + 1) = 7/12.

    Δ = −5: m = 1.75 − 2.5 = −0.75, v = 25/2 + 25/2 = 25, the step −0.75 / 6 = −1/8. With η = 2, twice that.
    """
    rounds, settings = [[7.0, 7.0], [-4.0, -6.0]], {"momentum": 0.5, "second_momentum": 0.5, "adaptivity": 1.0}
    assert train("fedadam", rounds, **settings) == approx([7 / 12, 7 / 12 - 1 / 8])
    assert train("fedadam", rounds, **settings, learning_rate=2.0) == approx([7 / 6, 7 / 6 - 1 / 4])


def test_fedyogi_over_two_rounds():
    """β₁ = β₂ = 1/2, τ = 1. Δ = 4, Δ² = 16 above v = 1: v = 1 + 16/2 = 9, m = 2, the step 2 / (3 + 1) = 1/2.

    Δ = 2, Δ² = 4 below 9: v = 9 − 4/2 = 7, m = 1 + 1 = 2, the step 2 / (√7 + 1). FedAdam's v would be 8.5, then 6.25.
    """
    rounds, settings = [[4.0, 4.0], [1.0, 3.0]], {"momentum": 0.5, "second_momentum": 0.5, "adaptivity": 1.0}
    assert train("fedyogi", rounds, **settings) == approx([1 / 2, 1 / 2 + 2 / (math.sqrt(7) + 1)])
    adam = [2 / (math.sqrt(8.5) + 1), 2 / (math.sqrt(8.5) + 1) + 2 / 3.5]
    assert train("fedadam", rounds, **settings) == approx(adam)


def test_fedamsgrad_with_unequal_steps_and_a_running_maximum():
    """β₁ = β₂ = 1/2, τ = 1, p = (1/4, 3/4). 8 in 2 steps and 32 in 4: Δ = (4 + 3 · 8) / 4 = 7, as FedAdam's above.

    Then nobody moves: v = 25/2, but its maximum stays 25; m = 1.75, the step 1.75 / 6. FedAdam divides by √12.5 + 1.
    Then 18 in 2 steps and 36 in 4, Δ = 9: v = 6.25 + 40.5 = 46.75 is the new maximum, m = 0.875 + 4.5 = 5.375.
    """
    settings = {"momentum": 0.5, "second_momentum": 0.5, "adaptivity": 1.0}
    rounds, p = [[(8.0, 2), (32.0, 4)], [(0.0, 1), (0.0, 9)], [(18.0, 2), (36.0, 4)]], [0.25, 0.75]
    first, second, third = 7 / 12, 1.75 / 6, 5.375 / (math.sqrt(46.75) + 1)
    assert train("fedamsgrad", rounds, p, **settings) == approx([first, first + second, first + second + third])
    adam = train("fedadam", [[7.0, 7.0], [0.0, 0.0]], p, **settings)
    assert adam == approx([first, first + 1.75 / (math.sqrt(12.5) + 1)])


def test_only_fedamsgrad_divides_by_the_steps():
    for rule in set(RULES) - {"fedamsgrad"}:
        assert train(rule, [[(8.0, 2), (2.0, 4)]]) == train(rule, [[8.0, 2.0]])
    assert train("fedamsgrad", [[(8.0, 2), (2.0, 4)]]) == train("fedamsgrad", [[4.0, 0.5]])


def test_task_arithmetic_by_hand():
    """(1, 0) + (−3, 4) = (−2, 4) whatever the weights; with η = 1/2 half of that."""
    given = [change(1.0, 0.0), change(-3.0, 4.0)]
    for p in ([0.5, 0.5], [0.25, 0.75]):
        assert total(given, p)["w"].tolist() == [-2.0, 4.0]
    step = Aggregation("task-arithmetic", learning_rate=0.5).start(0)
    assert step(change(1.0, 2.0), [Update(c) for c in given], [0.25, 0.75])["w"].tolist() == [0.0, 4.0]


def test_ties_by_hand():
    """Half of the entries are kept, over the whole update: of a its 4 and 3, of b its −2 and 5, none of v.

    Elected with p = (1/4, 3/4): 4/4 − 3 · 2/4 = −0.5, so minus, and b's −2 alone; b's 5; a's 3, not 3/4 of it, since b
    has no say there; and 0. With equal weights 4/2 − 2/2 = 1, so plus, and a's 4.
    """
    a = {"u": tensor([4.0, -1.0]), "v": tensor([[3.0], [0.5]])}
    b = {"u": tensor([-2.0, 5.0]), "v": tensor([[1.0], [-0.5]])}
    merged = ties([a, b], [0.25, 0.75], density=0.5)
    assert merged["u"].tolist() == [-2.0, 5.0] and merged["v"].tolist() == [[3.0], [0.0]]
    assert ties([a, b], [0.5, 0.5], density=0.5)["u"].tolist() == [4.0, 5.0]


def test_the_disjoint_mean_of_ties():
    """2, 6 and −4 with p = (1/2, 1/4, 1/4): 1 + 1.5 − 1 > 0, so (2/2 + 6/4) / (1/2 + 1/4) = 10/3, and no 1.5."""
    assert ties(changes(2.0, 6.0, -4.0), [0.5, 0.25, 0.25], density=1.0)["w"].item() == approx(10 / 3)


def test_where_no_sign_is_elected_nothing_moves():
    """3 and −3 cancel, 0 and 0 have no sign."""
    assert ties([change(3.0, 0.0), change(-3.0, 0.0)], equal(2), density=1.0)["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("density", "kept"),
    [(1.0, [1.0, -2.0, 3.0, -4.0]), (0.5, [0.0, 0.0, 3.0, -4.0]), (0.25, [0.0, 0.0, 0.0, -4.0]), (0.01, [0, 0, 0, -4])],
)
def test_ties_keeps_the_largest_and_at_least_one(density, kept):
    """Of one site alone: its update, trimmed, and not rescaled."""
    assert ties([change(1.0, -2.0, 3.0, -4.0)], [1.0], density)["w"].tolist() == kept


def test_dare_keeps_the_expectation():
    """Each of 10 000 ones is 1 / d = 4 with probability d = 1/4, else 0: mean 1, deviation √(d (1 − d)) / d = √3.

    So the mean of all is 1 give or take 3.5 · √3 / 100 = 0.061, and 2500 ± 3.5 · √(10 000 · 3/16) = 152 are kept.
    """
    ones = {"w": torch.ones(100, 100)}
    thinned = Aggregation("dare", density=0.25).start(0)({"w": torch.zeros(100, 100)}, [Update(ones)], [1.0])["w"]
    assert set(thinned.unique().tolist()) == {0.0, 4.0}
    assert thinned.mean().item() == approx(1.0, abs=0.061) and abs((thinned > 0).sum().item() - 2500) < 152


def test_dare_drops_by_its_seed_and_anew_for_every_site_and_round():
    """p = (1/2, 1/2), d = 1/2: an entry is 0, 1/2 · 2 where one site's was kept, or 2 where both were."""
    start, ones = {"w": torch.zeros(200)}, Update({"w": torch.ones(200)})

    def rounds(seed):
        step = Aggregation("dare", density=0.5).start(seed)
        return [step(start, [ones, ones], equal(2))["w"] for _ in range(2)]

    first, second = rounds(3)
    assert set(first.tolist()) == {0.0, 1.0, 2.0}  # sites that drew alike would give 0 and 2
    assert not torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(rounds(3), [first, second], strict=True))
    assert not torch.equal(rounds(4)[0], first)


def test_dare_that_drops_nothing_is_fedavg():
    rounds = [[1.0, -3.0], [5.0, 2.0]]
    assert train("dare", rounds, [0.25, 0.75], density=1.0) == train("fedavg", rounds, [0.25, 0.75]) == [-2.0, 0.75]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([change(1.0, 9.0), change(6.0, 7.0), change(2.0, 8.0)], [2.0, 8.0]),
        ([change(1.0, -1.0), change(100.0, -4.0), change(2.0, -2.0), change(6.0, -9.0)], [4.0, -3.0]),
        ([change(1.0, 9.0)], [1.0, 9.0]),
    ],
    ids=["odd", "even", "one"],
)
def test_median_by_hand(given, expected):
    """Coordinate by coordinate; of four the mean of the middle two, (2 + 6) / 2 and (−2 − 4) / 2."""
    assert median(given)["w"].tolist() == expected
    p = shares(list(range(1, 1 + len(given))))  # each site has one vote, whatever its n
    step = Aggregation("median", bound=0).start(0)
    assert step(change(0.0, 1.0), [Update(c) for c in given], p)["w"].tolist() == [expected[0], expected[1] + 1]


@pytest.mark.parametrize(
    ("given", "trim", "expected"),
    [
        ([0.0, 100.0, 2.0, 6.0, 1.0], 0.2, 3.0),  # ⌊0.2 · 5⌋ = 1: (1 + 2 + 6) / 3
        ([0.0, 100.0, 2.0, 6.0, 1.0], 0.4, 2.0),  # ⌊0.4 · 5⌋ = 2: the median
        ([0.0, 100.0, 2.0, 6.0, 1.0], 0.0, 21.8),  # the mean, 109 / 5
        ([0.0, 1.0, 5.0], 0.2, 1.0),  # ⌊0.6⌋ = 0, and one at least: the median
        ([-9.0, 1.0, 2.0, 1e6], 0.2, 1.5),  # ⌊0.8⌋ = 0, and one at least: (1 + 2) / 2
        ([0.0, 1.0, 5.0], 0.0, 2.0),  # nothing is to be cut: the mean
        ([1.0, 4.0], 0.2, 2.5),  # of two nothing would be left: the mean
        ([3.0], 0.49, 3.0),
        ([0.0, 1.0, 5.0], 0.34, 1.0),  # ⌊1.02⌋ = 1
        ([-1e6] * 29 + [1.0] * 42 + [2e6] * 29, 0.29, 1.0),  # ⌊29⌋, though 0.29 · 100 is 28.999… in float64
    ],
)
def test_trimmed_mean_by_hand(given, trim, expected):
    assert trimmed_mean(changes(*given), trim)["w"].item() == approx(expected, rel=1e-12)
    assert train("trimmed-mean", [given], trim=trim) == approx([expected], rel=1e-6)


def test_the_trimmed_mean_is_of_each_coordinate():
    """b = 1 of 3: the middle of 1, 2, 9 and of 9, 1, 4, from two sites."""
    assert trimmed_mean([change(1.0, 9.0), change(2.0, 1.0), change(9.0, 4.0)], 1 / 3)["w"].tolist() == [2.0, 4.0]


def test_the_geometric_median_on_a_line():
    """At 0, 1 and 10 with p = (1/5, 3/5, 1/5): the weighted median, 1; the mean would be 2.6.

    With p = (3/5, 1/5, 1/5) it is 0, the site of more than half the weight; near it, a step leaves (1/5 + 1/5) / (3/5)
    of the way, and 32 of them leave 2.2 · (2/3)³² = 5 · 10⁻⁶, or a little more since the first ones are slower.
    """
    assert geometric_median(changes(0.0, 1.0, 10.0), [0.2, 0.6, 0.2])["w"].item() == approx(1.0, abs=1e-6)
    assert geometric_median(changes(0.0, 1.0, 10.0), [0.6, 0.2, 0.2])["w"].item() == approx(0.0, abs=5e-5)
    assert train("geometric-median", [[0.0, 1.0, 10.0]], [0.2, 0.6, 0.2]) == approx([1.0], abs=1e-6)


def test_the_geometric_median_of_four_points():
    """Of a convex quadrilateral it is where the diagonals cross: y = x / 2 and x = 2 at (2, 1); the mean is (3, 1).

    The coordinates stand in two parameters: the distance is that of whole updates. 32 steps get within 10⁻⁴.
    """
    corners = [(0.0, 0.0), (8.0, 4.0), (2.0, 4.0), (2.0, -4.0)]
    found = geometric_median([{"x": tensor([x]), "y": tensor(y)} for x, y in corners], equal(4))
    assert found["x"].tolist() == approx([2.0], abs=1e-4) and found["y"].item() == approx(1.0, abs=1e-4)


def test_one_far_point_moves_the_geometric_median_little():
    """1, 2, 3, 4 and a million: the middle one, 3, and the same with ten times the million; the mean is 200 002."""
    for far in (5.0, 1e6, 1e7):
        assert geometric_median(changes(1.0, 2.0, 3.0, 4.0, far), equal(5))["w"].item() == approx(3.0, abs=1e-4)
    assert mean(changes(1.0, 2.0, 3.0, 4.0, 1e6), equal(5))["w"].item() == approx(200_002)


def test_the_geometric_median_leaves_a_site_that_the_mean_falls_on():
    """−9, 0, 1, 2 and 6: the mean is 0, where a site is, and the median 1."""
    assert geometric_median(changes(-9.0, 0.0, 1.0, 2.0, 6.0), equal(5))["w"].item() == approx(1.0, abs=1e-4)


def random_changes(k, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (), "c": (4,)}
    return [{n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()} for _ in range(k)]


WHOLE = {"density": 1.0}
"""Settings under which no entry is dropped."""


@pytest.mark.parametrize("sites", [1, 2, 5])
@pytest.mark.parametrize("rule", ["fedavg", "fedavgm", "ties", "dare", "median", "trimmed-mean", "geometric-median"])
def test_where_all_sites_say_the_same_it_is_done(rule, sites):
    """w + Δ, whatever the weights; and w where Δ = 0."""
    start, same = random_changes(2)
    p = shares(list(range(1, sites + 1)))
    for said in (same, {name: torch.zeros_like(t) for name, t in same.items()}):
        merged = Aggregation(rule, **WHOLE).start(0)(start, [Update(said)] * sites, p)
        torch.testing.assert_close(merged, {name: start[name] + said[name] for name in start})


@pytest.mark.parametrize("rule", ["fedadam", "fedyogi", "fedamsgrad"])
def test_where_nobody_moves_the_adaptive_rules_stay(rule):
    (start,) = random_changes(1)
    zero = Update({name: torch.zeros_like(t) for name, t in start.items()})
    assert all(torch.equal(t, start[name]) for name, t in Aggregation(rule).start(0)(start, [zero], [1.0]).items())


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "dare"])
def test_the_order_of_the_sites_does_not_matter(rule):
    """Over two rounds, with weights and steps of their own; but for a rounding of float64."""
    p, steps = shares([1, 2, 5, 3]), [1, 4, 2, 7]
    rounds = [[Update(c, s) for c, s in zip(random_changes(4, torch.float64, n), steps, strict=True)] for n in (1, 2)]

    def run(order):
        (current,) = random_changes(1, torch.float64)
        step = Aggregation(rule).start(0)
        for updates in rounds:
            current = step(current, [updates[k] for k in order], [p[k] for k in order])
        return current

    expected = run([0, 1, 2, 3])
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        torch.testing.assert_close(run(order), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_names_shapes_and_types_are_those_of_the_weights(rule, dtype):
    start, *given = random_changes(4, dtype)
    before = {name: t.clone() for name, t in start.items()}
    step = Aggregation(rule).start(0)
    for _ in range(2):
        merged = step(start, [Update(c) for c in given], shares([1, 2, 3]))
        assert list(merged) == list(start)
        assert all(t.shape == start[name].shape and t.dtype == dtype for name, t in merged.items())
        assert all(torch.isfinite(t).all() and torch.equal(start[name], before[name]) for name, t in merged.items())


@pytest.mark.parametrize("rule", ["fedavgm", "fedadam", "fedyogi", "fedamsgrad"])
def test_a_rule_that_remembers_begins_anew_with_every_training(rule):
    settings = Aggregation(rule)
    one, two = settings.start(0), settings.start(0)
    first = one(change(0.0), [Update(change(1.0))], [1.0])
    one(first, [Update(change(1.0))], [1.0])
    assert torch.equal(two(change(0.0), [Update(change(1.0))], [1.0])["w"], first["w"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.inf}, "learning_rate must be finite"),
        ({"adaptivity": 0.0}, "adaptivity must be above 0"),
        ({"momentum": -0.1}, "momentum must be at least 0, got -0.1"),
        ({"momentum": 1.0}, "momentum must be below 1, got 1.0; lower it"),
        ({"momentum": math.nan}, "momentum must be at least 0"),
        ({"second_momentum": -0.1}, "second_momentum must be at least 0"),
        ({"second_momentum": 1.0}, "second_momentum must be below 1, got 1.0; lower it"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0; correct it"),
        ({"density": 1.01}, "density must be above 0 and at most 1, got 1.01"),
        ({"density": math.nan}, "density must be above 0 and at most 1, got nan"),
        ({"trim": -0.1}, "trim must be at least 0"),
        ({"trim": 0.5}, "trim must be below 0.5, or no site would be left, got 0.5; lower it"),
        ({"trim": math.nan}, "trim must be at least 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(RecipeError, match=message):
        Aggregation(**settings)


def test_the_limits_themselves_are_allowed():
    Aggregation(momentum=0.0, second_momentum=0.0, density=1.0, trim=0.0)
    Aggregation(momentum=0.99, density=1e-6, trim=0.49)

import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import get_args

import pytest
import torch
from pytest import approx
from torch import nn, tensor

from accord.errors import DataWarning, RecipeError, RunError
from accord.federation.aggregation import Aggregation, Bounded, Rule, Update, bounded, fedavg, mean, shares
from accord.federation.engine import InProcessEngine
from accord.federation.messages import UpdateReply
from accord.federation.reliability import (
    VARIANTS,
    FedCmp,
    Reliability,
    Variant,
    capped,
    fused,
    magnitude,
    polar,
    rotation,
    site_weights,
    smoothing,
    stacked_svd,
)
from accord.federation.rounds import federated_rounds
from accord.federation.weights import to_bytes
from accord.toml import build, dump_toml

SHAPES = {"0.weight": (7, 5), "0.bias": (7,), "2.weight": (7, 7), "2.bias": (7,), "scale": ()}
"""A projector of 5 features to 7, as Hugging Face stores it, O × I; and a number."""
NEEDS_SCIPY = pytest.mark.skipif(find_spec("scipy") is None, reason="SciPy is not installed")
NAMES = [pytest.param(name, marks=NEEDS_SCIPY if VARIANTS[name].matching == "hungarian" else ()) for name in VARIANTS]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(seed, scale=1.0, dtype=torch.float64):
    return {
        name: (scale * random(*shape, seed=100 * seed + n)).to(dtype) for n, (name, shape) in enumerate(SHAPES.items())
    }


def round_of(number, sites=3, dtype=torch.float64):
    """Updates of some length, and distances of 10 to 20."""
    return [Update(projector(10 * number + k, 0.3, dtype), 1, 10.0 + 5 * k) for k in range(1, sites + 1)]


def average_of(start, updates, weights):
    change = mean([update.change for update in updates], weights)
    return {name: start[name] + change[name] for name in start}


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(random(rows, columns, seed=seed)).Q


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# Weights


def test_site_weights_by_hand():
    """m = 1, 2, 4 and d = 0, ln 2, ln 4 at α = 1: 1 · 1, 2 / 2, 4 / 4, so a third each; at α = 0 as m: 1/7, 2/7, 4/7.

    Ones for m: 1, 1/2, 1/4 of 7/4.
    """
    m, d = tensor([1.0, 2.0, 4.0]), tensor([0.0, math.log(2), math.log(4)], dtype=torch.float64)
    assert site_weights(m, d).tolist() == approx([1 / 3] * 3)
    assert site_weights(m, d, alpha=0.0).tolist() == approx([1 / 7, 2 / 7, 4 / 7])
    assert site_weights(torch.ones(3), d).tolist() == approx([4 / 7, 2 / 7, 1 / 7])
    assert site_weights(torch.ones(2), tensor([1.0, 3.0]), relative=True).tolist() == approx(
        [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]
    )  # d / mean = 1/2 and 3/2


def test_weights_of_sites_that_stand_still_or_lie_far_off():
    """Nobody moved: equal. One moved: all of it, however far off. Distances of 0 have no mean to divide by."""
    assert site_weights(torch.zeros(4), torch.arange(4.0)).tolist() == [0.25] * 4
    assert site_weights(tensor([0.0, 1.0]), tensor([0.0, 5000.0])).tolist() == [0.0, 1.0]
    assert site_weights(torch.ones(2), tensor([5000.0, 5000.0])).tolist() == [0.5, 0.5]
    assert site_weights(tensor([1.0, 3.0]), torch.zeros(2), relative=True).tolist() == approx([0.25, 0.75])


@pytest.mark.parametrize("relative", [False, True])
def test_no_distance_that_a_site_may_send_makes_a_weight_that_is_no_number(relative):
    """The largest floats overflow when they are added or doubled, the smallest underflow; a site may be alone."""
    for told in ([1.7e308], [1.7e308] * 3, [1.7e308, 14.0, 16.0], [5e-324, 0.0, 0.0]):
        w = site_weights(torch.ones(len(told)), tensor(told, dtype=torch.float64), alpha=2.0, relative=relative)
        assert w.sum().item() == approx(1.0), told
    w = site_weights(tensor([0.0, 1.0]), tensor([1.0, 1.7e308], dtype=torch.float64), alpha=2.0, relative=relative)
    assert w.tolist() == [0.0, 1.0]


def test_relative_distances_put_less_weight_on_one_site():
    """Sites that moved alike, at the distances that a projector of 896 features has."""
    m, d = torch.ones(5), tensor([14.0, 16.0, 18.0, 20.0, 22.0])
    raw, relative = site_weights(m, d).max().item(), site_weights(m, d, relative=True).max().item()
    assert raw > 0.8 and relative < 0.25


def test_a_magnitude_by_hand():
    """diag(3, 4) and a bias of length 5 · √2: the spectral norms are 4 and 5√2, Frobenius √(9 + 16 + 50)."""
    change = {"w": tensor([[3.0, 0.0], [0.0, 4.0]]), "b": tensor([5.0, 5.0]), "s": tensor(-1.0)}
    assert magnitude(change, "spectral") == approx(5 * math.sqrt(2))
    assert magnitude({"w": change["w"]}, "spectral") == approx(4.0)
    assert magnitude(change, "frobenius") == approx(math.sqrt(76))


def test_a_cap_by_hand():
    """.6, .3, .1 at most .5: .1 is shared 3 to 1. At most .4: .4, then .45, which is too much: .4 and .2. .1: equal."""
    w = tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    assert capped(w, 0.5).tolist() == approx([0.5, 0.375, 0.125])
    assert capped(w, 0.4).tolist() == approx([0.4, 0.4, 0.2])
    assert capped(w, 0.1).tolist() == approx([1 / 3] * 3)
    assert capped(w, 0.7).tolist() == w.tolist()
    assert capped(tensor([1.0, 0.0, 0.0]).double(), 0.5).tolist() == approx([0.5, 0.25, 0.25])


# CRA


def test_the_basis_of_two_matrices():
    """U has I rows and orthonormal columns, and U S V_kᵀ is W_k; p = min(I, K O)."""
    for rows, columns, p in ((5, 7, 5), (9, 3, 6)):
        matrices = [random(rows, columns, seed=k) for k in range(2)]
        u, s, v = stacked_svd(matrices)
        assert u.shape == (rows, p) and s.shape == (p,) and v.shape == (2, columns, p)
        torch.testing.assert_close(u.T @ u, torch.eye(p).double(), rtol=0, atol=1e-12)
        for matrix, v_k in zip(matrices, v, strict=True):
            torch.testing.assert_close((u * s) @ v_k.T, matrix, rtol=0, atol=1e-12)


def test_cra_without_opm_is_the_weighted_average():
    matrices, w = [random(8, 6, seed=k) for k in range(4)], tensor([0.1, 0.2, 0.3, 0.4]).double()
    u, s, v = stacked_svd(matrices)
    average = sum(p * matrix for p, matrix in zip(w, matrices, strict=True))
    torch.testing.assert_close((u * s) @ fused(s, v, w).T, average, rtol=0, atol=1e-12)


def test_a_truncated_merge_has_that_rank():
    matrices = [random(8, 6, seed=k) for k in range(3)]
    u, s, v = stacked_svd(matrices, rank=2)
    assert u.shape == (8, 2) and torch.linalg.matrix_rank((u * s) @ fused(s, v, torch.ones(3).double() / 3).T) == 2
    assert stacked_svd(matrices, rank=100)[0].shape == (8, 8)


def test_ties_in_the_common_basis_by_hand():
    """W_1 = diag(4, 1) and W_2 = diag(−2, 3) share the basis (e_1, e_2) up to order and sign, S = (√20, √10).

    V_1 S and V_2 S hold 4, 1 and −2, 3 but for signs of whole columns; half of four entries each stay: all that are not
    0. Elected with equal weights: 4's and 3's signs; where 1 and 3 agree their mean, 2; where 4 and −2 differ, 4.
    """
    u, s, v = stacked_svd([tensor([4.0, 1.0]).double().diag(), tensor([-2.0, 3.0]).double().diag()])
    merged = (u * s) @ fused(s, v, tensor([0.5, 0.5]).double(), density=0.5).T
    torch.testing.assert_close(merged, tensor([4.0, 2.0]).double().diag(), rtol=0, atol=1e-12)


def test_a_direction_without_a_singular_value_merges_to_nothing():
    """Both matrices are e_1 e_1ᵀ: S = (√2, 0), and 0 / 0 must not appear."""
    matrix = tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    u, s, v = stacked_svd([matrix, matrix])
    merged = (u * s) @ fused(s, v, tensor([0.5, 0.5]).double(), density=1.0).T
    torch.testing.assert_close(merged, matrix, rtol=0, atol=1e-12)


# OPM


def test_u_and_v_flip_together_or_the_product_is_another():
    """Half of the columns of U_{r−1} point the other way. With U alone turned U S Vᵀ is lost, with V too not."""
    matrices, w = [random(8, 6, seed=k) for k in range(2)], tensor([0.5, 0.5]).double()
    u, s, v = stacked_svd(matrices)
    v_f = fused(s, v, w)
    turn = rotation(u * tensor([1.0, -1.0] * 4).double(), u)
    assert turn.diag().tolist() == [1.0, -1.0] * 4
    product = (u * s) @ v_f.T
    assert relative_error((u @ turn * s) @ v_f.T, product) > 0.3
    assert relative_error((u @ turn * s) @ (v_f @ turn).T, product) < 1e-12


def test_a_polar_factor_is_orthonormal_and_the_nearest():
    """Of A = Q H with H symmetric and positive it is Q; and no turn of it is nearer to A."""
    q, h = orthonormal(6, 4), random(4, 4, seed=1)
    matrix = q @ (h @ h.T + torch.eye(4))
    found = polar(matrix)
    torch.testing.assert_close(found.T @ found, torch.eye(4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, q, rtol=0, atol=1e-12)
    assert all((orthonormal(6, 4, seed) - matrix).norm() > (found - matrix).norm() for seed in range(1, 9))


@pytest.mark.parametrize("matching", [pytest.param("hungarian", marks=NEEDS_SCIPY), "procrustes"])
def test_permuted_and_flipped_singular_vectors_are_recovered(matching):
    """And the product stays, when S and V turn with U; by index, hardly a column meets its own."""
    u = orthonormal(8, 5)
    s, v = tensor([5.0, 4.0, 3.0, 2.0, 1.0]).double().diag(), random(6, 5, seed=3)
    given = u[:, [3, 0, 4, 1, 2]] * tensor([1.0, -1.0, 1.0, 1.0, -1.0]).double()
    turn = rotation(u, given, matching)
    torch.testing.assert_close(turn.T @ turn, torch.eye(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(given @ turn, u, rtol=0, atol=1e-12)
    torch.testing.assert_close((given @ turn) @ (turn.T @ s @ turn) @ (v @ turn).T, given @ s @ v.T, rtol=0, atol=1e-12)
    assert (u * (given @ rotation(u, given))).sum(0).mean() < 0.1


def test_only_procrustes_recovers_a_rotation():
    """Two directions of the same singular value may come as any rotation of themselves."""
    u, quarter = orthonormal(8, 2), tensor([[1.0, -1.0], [1.0, 1.0]]).double() / math.sqrt(2)
    torch.testing.assert_close(u @ quarter @ rotation(u, u @ quarter, "procrustes"), u, rtol=0, atol=1e-12)
    assert (u * (u @ quarter @ rotation(u, u @ quarter))).sum(0).mean() == approx(math.sqrt(0.5))


def test_eq_8_as_printed_smooths_less_under_drift_and_the_prose_more():
    """cos = 1: .9 and .5; cos = 0: .5 and .9; cos = ¾: .8 and .6; with λ = 2 half of the way."""
    printed, prose = Reliability(), Reliability(formula="prose")
    assert [smoothing(cosine, printed) for cosine in (1.0, 0.75, 0.0)] == approx([0.9, 0.8, 0.5])
    assert [smoothing(cosine, prose) for cosine in (1.0, 0.75, 0.0)] == approx([0.5, 0.6, 0.9])
    assert smoothing(0.75, replace(printed, sensitivity=2.0)) == approx(0.7)
    assert smoothing(0.0, replace(printed, sensitivity=2.0)) == approx(0.5)
    assert smoothing(0.2, Reliability(momentum="fixed", beta=0.3)) == 0.3


# The rule


@pytest.mark.parametrize("name", ["cra", "fed-cmp", "fed-cmp-updates", "fed-cmp-procrustes", "fed-cmp-frobenius"])
def test_the_first_round_is_the_average_with_those_weights(name):
    """Of matrices that are stored O × I, of biases, and of numbers."""
    start, updates = projector(0), round_of(1)
    rule = FedCmp(VARIANTS[name])
    merged = rule(start, updates, [0.2, 0.3, 0.5])
    w = site_weights(
        tensor([magnitude(update.change, VARIANTS[name].norm) for update in updates]),
        tensor([update.distance for update in updates]),
    )
    torch.testing.assert_close(merged, average_of(start, updates, w.tolist()), rtol=0, atol=1e-6)
    exact = average_of(start, updates, rule.diagnostics[0]["weights"])
    torch.testing.assert_close(merged, exact, rtol=0, atol=1e-12)
    assert rule.diagnostics[0]["lag"] < 1e-12 and rule.diagnostics[0]["beta"] == {}


def test_standard_weights_without_opm_are_fedavg():
    start, updates, p = projector(0), round_of(1), shares([1, 2, 5])
    bare = [update._replace(distance=None) for update in updates]
    for rank in (0, 100):  # 100 goes by the SVD
        rule = FedCmp(Reliability(weights="standard", momentum="none", rank=rank))
        torch.testing.assert_close(rule(start, bare, p), fedavg(start, bare, p), rtol=0, atol=1e-12)


def test_two_rounds_by_hand():
    """One site, a diagonal matrix, fixed β = ½. W_1 = diag(2, 1): U = I, S = (2, 1).

    W_2 = diag(4, −3): U = I up to signs, S = (4, 3), V = diag(1, −1). U stays, S_2 = (3, 2), and W = diag(3, −2): it
    lags by |(1, 1)| / |(4, 3)| = √2 / 5, with β = ½ and cos 1. As a round with a plain average it is diag(4, −3).
    """
    start, one = {"w": torch.zeros(2, 2).double()}, [1.0]
    rule = FedCmp(Reliability(weights="standard", momentum="fixed", beta=0.5))
    first = rule(start, [Update({"w": tensor([2.0, 1.0]).double().diag()})], one)
    second = rule(first, [Update({"w": tensor([2.0, -4.0]).double().diag()})], one)
    torch.testing.assert_close(first["w"], tensor([2.0, 1.0]).double().diag(), rtol=0, atol=1e-12)
    torch.testing.assert_close(second["w"], tensor([3.0, -2.0]).double().diag(), rtol=0, atol=1e-12)
    assert rule.diagnostics[1]["lag"] == approx(math.sqrt(2) / 5)
    assert rule.diagnostics[1]["beta"] == {"w": 0.5} and rule.diagnostics[1]["cosine"]["w"] == approx(1.0)
    assert len(rule.diagnostics) == 2 and rule.diagnostics[1]["weights"] == [1.0]


def test_two_rounds_on_updates_by_hand():
    """As above, with the same matrices as changes: from ones, 1 + diag(2, 1), then that and diag(3, −2)."""
    rule = FedCmp(Reliability(weights="standard", momentum="fixed", beta=0.5, stacked="updates"))
    current = {"w": torch.ones(2, 2).double()}
    for change, expected in ((tensor([2.0, 1.0]), tensor([2.0, 1.0])), (tensor([4.0, -3.0]), tensor([5.0, -1.0]))):
        current = rule(current, [Update({"w": change.double().diag()})], [1.0])
        torch.testing.assert_close(current["w"], 1 + expected.double().diag(), rtol=0, atol=1e-12)


def test_a_turning_basis_is_followed_half_way():
    """W_1 = diag(2, 1)ᵀ and W_2 = (R(60°) diag(2, 1))ᵀ, β = ½: the polar factor of I + R(60°) is R(30°)."""

    def turned(degrees):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return (tensor([[c, -s], [s, c]]).double() @ tensor([2.0, 1.0]).double().diag()).T

    rule = FedCmp(Reliability(weights="standard", momentum="fixed", beta=0.5))
    first = rule({"w": torch.zeros(2, 2).double()}, [Update({"w": turned(0)})], [1.0])
    second = rule(first, [Update({"w": turned(60) - first["w"]})], [1.0])
    torch.testing.assert_close(second["w"], turned(30), rtol=0, atol=1e-6)
    assert rule.diagnostics[1]["cosine"]["w"] == approx(0.5)


@pytest.mark.parametrize("matching", ["index", pytest.param("hungarian", marks=NEEDS_SCIPY), "procrustes"])
def test_the_signs_and_the_order_that_an_svd_happens_to_give_do_not_matter(matching, monkeypatch):
    """By index the order does: there only the signs are turned."""

    def run():
        rule, current = FedCmp(Reliability(matching=matching)), projector(0)
        for number in (1, 2, 3):
            current = rule(current, round_of(number), [1 / 3] * 3)
        return current

    def other_svd(matrices, rank):
        u, s, v = stacked_svd(matrices, rank)
        signs = random(len(s), seed=int(1e6 * s[0])).sign()
        order = torch.arange(len(s)) if matching == "index" else torch.arange(len(s)).roll(int(1e6 * s[0]) % len(s))
        return (u * signs)[:, order], s[order], (v * signs)[..., order]

    expected = run()
    monkeypatch.setattr("accord.federation.reliability.stacked_svd", other_svd)
    torch.testing.assert_close(run(), expected, rtol=1e-9, atol=1e-9)


def test_a_matrix_that_is_not_square_is_turned():
    """U spans the input side, I = 5 of an O × I = 7 × 5 weight, and stays orthonormal over the rounds."""
    rule, current = FedCmp(VARIANTS["fed-cmp"]), projector(0)
    for number in range(1, 4):
        current = rule(current, round_of(number), [1 / 3] * 3)
    basis, core = rule.bases["0.weight"]
    assert basis.shape == (5, 5) and core.shape == (5, 5) and set(rule.bases) == {"0.weight", "2.weight"}
    torch.testing.assert_close(basis.T @ basis, torch.eye(5).double(), rtol=0, atol=1e-12)
    assert current["0.weight"].shape == (7, 5) == nn.Linear(5, 7).weight.shape


def test_momentum_begins_in_the_round_that_is_set():
    """Until then it is the average: no lag. From then on the printed and the prose β add up to β_min + β_max."""
    told = {}
    for formula in ("printed", "prose"):
        rule, current = FedCmp(Reliability(momentum_from=4, formula=formula)), projector(0)
        for number in range(1, 5):
            current = rule(current, round_of(number), [1 / 3] * 3)
        assert all(told["lag"] < 1e-12 and not told["beta"] for told in rule.diagnostics[:3])
        assert rule.diagnostics[3]["lag"] > 1e-3
        told[formula] = rule.diagnostics[3]
    for name in ("0.weight", "2.weight"):
        assert told["printed"]["beta"][name] + told["prose"]["beta"][name] == approx(1.4)
        assert told["printed"]["cosine"][name] == approx(told["prose"]["cosine"][name])


def test_a_basis_starts_anew_when_its_size_changes():
    """I = 9 and O = 2: p is 6 with three sites and 4 with two, whose round is a plain average."""
    start = {"w": random(2, 9)}
    rule = FedCmp(Reliability(weights="standard"))
    for sites in (3, 2, 2):
        updates = [Update({"w": random(2, 9, seed=k)}) for k in range(1, sites + 1)]
        rule(start, updates, [1 / sites] * sites)
    assert [len(told["beta"]) for told in rule.diagnostics] == [0, 0, 1] and rule.bases["w"][0].shape == (9, 4)


def test_half_a_step_of_the_server():
    """η = ½: halfway from W_{r−1} to W_r."""
    start, updates = projector(0), round_of(1)
    whole, half = (FedCmp(Reliability(), eta)(start, updates, [1 / 3] * 3) for eta in (1.0, 0.5))
    torch.testing.assert_close(half, {name: (start[name] + whole[name]) / 2 for name in start}, rtol=0, atol=1e-12)


def test_the_order_of_the_sites_does_not_matter():
    def run(order):
        rule, current = FedCmp(VARIANTS["fed-cmp-relative"]), projector(0)
        for number in (1, 2, 3):
            updates = round_of(number, 4)
            current = rule(current, [updates[k] for k in order], [0.25] * 4)
        return current

    torch.testing.assert_close(run([3, 1, 0, 2]), run([0, 1, 2, 3]), rtol=1e-9, atol=1e-9)


def test_a_capped_weight():
    """Raw distances 15, 20, 25 put nearly all weight on the first site; `cap` leaves it half."""
    rule = FedCmp(Reliability(cap=0.5, momentum="none"))
    rule(projector(0), round_of(1), [1 / 3] * 3)
    assert rule.diagnostics[0]["weights"][0] == approx(0.5) and sum(rule.diagnostics[0]["weights"]) == approx(1.0)


@pytest.mark.parametrize("weights", ["reliability", "quality"])
def test_without_a_distance_there_is_no_reliability(weights):
    bare = [Update(projector(k)) for k in (1, 2)]
    with pytest.raises(RunError, match=f'no update came with a distance, which weights = "{weights}" needs; train a'):
        FedCmp(Reliability(weights=weights))(projector(0), bare, [0.5, 0.5])
    for needless in ("magnitude", "standard"):
        FedCmp(Reliability(weights=needless))(projector(0), bare, [0.5, 0.5])


def test_one_update_without_a_distance_is_left_out():
    start, updates = projector(0), round_of(1)
    with pytest.warns(DataWarning, match="1 of 3 updates came without a distance and are left out of the round"):
        rule, plain = FedCmp(Reliability()), FedCmp(Reliability())
        merged = rule(start, [updates[0]._replace(distance=None), *updates[1:]], [1 / 3] * 3)
    torch.testing.assert_close(merged, plain(start, updates[1:], [0.5, 0.5]), rtol=0, atol=0)
    assert rule.diagnostics[0]["weights"] == [0.0, *plain.diagnostics[0]["weights"]]


def test_hungarian_matching_says_that_it_needs_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr("accord.federation.reliability.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs SciPy; install it with `pip install scipy`, or take \"procrustes\""):
        Aggregation("fed-cmp-hungarian").start(0)


# Behind the seam


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_runs_by_its_name(name, dtype):
    start = projector(0, dtype=dtype)
    rule, current = Aggregation(name).start(0), start
    for number in (1, 2):
        current = rule(current, round_of(number, dtype=dtype), [1 / 3] * 3)
        assert list(current) == list(start)
        assert all(t.shape == start[n].shape and t.dtype == dtype and t.isfinite().all() for n, t in current.items())
        assert sum(rule.diagnostics[-1]["weights"]) == approx(1.0)
    assert bool(rule.diagnostics[1]["beta"]) == (
        VARIANTS[name].momentum != "none" and VARIANTS[name].momentum_from == 2
    )


def test_every_variant_is_a_rule_and_differs_from_the_others():
    assert set(VARIANTS) == set(get_args(Variant)) and set(VARIANTS) < set(get_args(Rule))
    assert len(set(VARIANTS.values())) == len(VARIANTS) and VARIANTS["fed-cmp"] == Reliability()


def test_settings_in_a_recipe():
    table = {"rule": "fed-cmp", "bound": 3, "reliability": {"distances": "relative", "alpha": 2}}
    read = build(Aggregation, table)
    assert read == Aggregation("fed-cmp", bound=3.0, reliability=Reliability(distances="relative", alpha=2.0))
    assert isinstance(read.start(0), Bounded)
    assert 'rule = "fed-cmp"' in dump_toml(read) and "[reliability]" in dump_toml(read)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0, got -1.0"),
        ({"alpha": math.nan}, "alpha must be at least 0"),
        ({"cap": 1.5}, "cap must be at most 1, got 1.5; lower it"),
        ({"density": 1.1}, "density must be at most 1"),
        ({"rank": -1}, "rank must be at least 0"),
        ({"momentum_from": 1}, "momentum_from must be at least 2, got 1"),
        ({"beta": 1.1}, "beta must be at most 1"),
        ({"beta_min": 0.9, "beta_max": 0.5}, "beta_max must be at least 0.9, got 0.5"),
        ({"beta_max": 1.1}, "beta_max must be at most 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(RecipeError, match=message):
        Reliability(**settings)


def test_settings_of_fed_cmp_need_that_rule():
    for rule in ("fedavg", "cra"):
        with pytest.raises(RecipeError, match=f'reliability has settings of the rule "fed-cmp", got "{rule}"; take'):
            Aggregation(rule, reliability=Reliability())


def test_a_distance_comes_from_the_site_to_the_rule():
    """At distances 0 and ln 3 the weights are ¾ and ¼; the moves (4, 0) and (0, 4) average to (3, 1)."""

    def site(distance, *change):
        return lambda request: UpdateReply(request.id, to_bytes({"w": tensor(change)}), 1, 1.0, distance=distance)

    engine = InProcessEngine({"a": site(0.0, 4.0, 0.0), "b": site(math.log(3), 0.0, 4.0)})
    rule = Aggregation("quality").start(0)
    merged = federated_rounds(engine, "supervised", {"w": torch.zeros(2)}, 1, seed=0, aggregate=rule)
    assert merged["w"].tolist() == approx([3.0, 1.0])


# Bounds on a site that does harm


def test_bounded_by_hand():
    """Lengths 5, 10 and 50; twice the median is 20: the last is scaled by 2/5, over all its parameters together."""
    given = [Update({"w": tensor([3.0, 0.0]) * k, "b": tensor([4.0]) * k}, steps=k, distance=1.0) for k in (1, 2, 10)]
    a, b, c = bounded(given, 2.0)
    assert a is given[0] and b is given[1]
    assert c.change["w"].tolist() == approx([12.0, 0.0]) and c.change["b"].tolist() == approx([16.0])
    assert (c.steps, c.distance) == (10, 1.0) and c.change["w"].dtype == torch.float32
    assert given[2].change["w"].tolist() == [30.0, 0.0]


def test_one_of_two_cannot_raise_the_bound():
    _, long = bounded([Update({"w": tensor([1.0])}), Update({"w": tensor([1e6])})], 3.0)
    assert long.change["w"].item() == approx(3.0)


@pytest.mark.parametrize(
    ("rule", "most"),
    [("fedavg", 1), ("task-arithmetic", 4), ("ties", 4), ("cra", 1), ("cra-relative", 1), ("fed-cmp-frobenius", 1)],
)
def test_a_hostile_update_is_bounded_under_any_rule(rule, most):
    """One of four sites sends a thousand times its update, and says that it is near.

    With a bound of 2 no update is longer than twice the median, nor is an average of them; a sum of four, or their
    coordinates from different sites, are no longer than four.
    """
    start, updates = projector(0), round_of(1, 4)
    loud = {name: 1000 * change for name, change in updates[3].change.items()}
    hostile = [*updates[:3], updates[3]._replace(change=loud, distance=1.0)]

    def length(weights):
        return math.sqrt(sum(weight.square().sum().item() for weight in weights.values()))

    def moved(bound):
        merged = Aggregation(rule, bound=bound).start(0)(start, hostile, [0.25] * 4)
        return length({name: merged[name] - start[name] for name in start})

    limit = 2 * sorted(length(update.change) for update in hostile)[1]
    assert moved(2.0) <= most * limit * (1 + 1e-9)
    assert moved(0.0) > 20 * most * limit


def test_a_bound_shows_the_diagnostics_of_its_rule():
    rule = Aggregation("cra", bound=2.0).start(0)
    rule(projector(0), round_of(1), [1 / 3] * 3)
    assert len(rule.diagnostics) == 1 and Aggregation(bound=2.0).start(0).diagnostics == []


@pytest.mark.parametrize("bound", [0.5, -1.0, math.inf, math.nan])
def test_a_bound_that_cannot_work(bound):
    with pytest.raises(RecipeError, match="bound must be"):
        Aggregation(bound=bound)


@pytest.mark.parametrize(
    ("rule", "bound", "moved"), [("cra-relative", 2.0, -1), ("cra-capped", 5.0, -1), ("cra-capped", 2.0, 1)]
)
def test_a_capped_weight_and_a_bound_together_hold_a_hostile_site(rule, bound, moved):
    """Four of five sites send 1, the last −20 and a distance of 0 where the others say 1, which α = 1 makes e¹·²⁵.

    Shortened to 2 its raw weight is 2 e¹·²⁵ against 4, .64: it turns the sum round. At ¼ it sends −¼ b against ¾: round
    with b = 5, and ¼ forward with b = 2.
    """
    sent = [Update({"w": tensor([[1.0]])}, distance=1.0)] * 4 + [Update({"w": tensor([[-20.0]])}, distance=0.0)]
    result = Aggregation(rule, bound=bound).start(0)({"w": torch.zeros(1, 1)}, sent, [0.2] * 5)["w"].item()
    assert result * moved > 0
    if moved > 0:
        assert result == approx(0.25)

"""Ranks, the gate on spread, the order statistics and the cap, by hand and as laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from torch import tensor

from accord.errors import RecipeError
from accord.routing.fusion import group_relative
from accord.routing.robust import Deviations, Ranks, RobustConfig, VarianceGate, capped, flat, ranks, weighted_median

NAN = math.nan


def even(scores):
    return torch.ones_like(scores)


def test_ranks_by_hand():
    """Of 4: 3 is above three, the two 1s above one and below one, 0 below all; of 2 present the rest is absent."""
    scores = tensor([[3.0, NAN], [1.0, 5.0], [1.0, NAN], [0.0, 4.0]])
    expected = tensor([[1.0, NAN], [0.0, 1.0], [0.0, NAN], [-1.0, -1.0]])
    torch.testing.assert_close(ranks(scores), expected, equal_nan=True)
    assert ranks(tensor([[7.0]])).tolist() == [[0.0]]


@settings(max_examples=2000, deadline=None)
@given(
    scores=st.lists(st.integers(-200, 200), min_size=2, max_size=8),
    scale=st.sampled_from([1e-6, 1e-3, 0.5, 1.0, 3.0, 1e3, 1e6]),
    shift=st.integers(-1000, 1000),
    rule=st.sampled_from(["mean", "median", "trimmed"]),
)
def test_t4_a_scaled_site_changes_no_byte(scores, scale, shift, rule):
    """T4: s → a s + b, a > 0, at one of three sites: fused ranks are the same bytes, whatever the rule."""
    own = torch.tensor(scores, dtype=torch.double)[:, None] / 100
    others = torch.stack([own.squeeze(1).sin(), own.squeeze(1).cos()], dim=1)
    honest, scaled = torch.cat([own, others], 1), torch.cat([scale * own + shift, others], 1)
    fuse = Ranks(rule)
    assert fuse(scaled, even(scaled)).numpy().tobytes() == fuse(honest, even(honest)).numpy().tobytes()


def test_t4_without_ranks_a_scale_decides():
    """One of three says −1000 s: its ranks are those of −s, and the plain mean is its own order."""
    s = tensor([[0.0, 0.1, 0.0], [1.0, 0.9, 1.1], [2.0, 2.0, 1.9]], dtype=torch.double)
    lie, flip = s.clone(), s.clone()
    lie[:, 0] *= -1000
    flip[:, 0] *= -1
    assert torch.equal(Ranks()(lie, even(lie)), Ranks()(flip, even(flip)))
    assert Ranks()(lie, even(lie)).argmax() == 2 and lie.mean(dim=1).argmax() == 0


def test_deviations_by_hand():
    """A site's level over the group is no opinion, its scale is one; an absent site counts nowhere.

    Of D = 5/8, 0, −5/8 the deviation is 5/8, and of D = −½, 0, ½ it is ½; below `spread` that is the divisor. A flat
    site keeps its weight, and has no opinion.
    """
    scores = tensor([[1.0, 10.0, NAN], [0.0, 10.5, NAN], [-1.0, 11.0, NAN]])
    weights = tensor([3.0, 1.0, 9.0]).expand(3, 3)
    assert Deviations(0.01)(scores, weights).tolist() == approx([1, 0, -1])
    assert Deviations(0.01)(scores, weights * tensor([0.0, 1, 1])).tolist() == approx([-1, 0, 1])
    assert Deviations(0.9)(scores, weights).tolist() == approx([0.75 / 0.9, 0, -0.75 / 0.9])  # the second is flat
    assert Deviations(0.0)(torch.ones(3, 2), torch.ones(3, 2)).tolist() == [0, 0, 0]
    assert Deviations(0.1)(scores * NAN, weights).isnan().all()
    rewards, shares = capped(Deviations(0.01), [(scores, weights)], 0.5)
    assert all(reward.isfinite().all() for reward in rewards) and shares.argmax() == 0 and shares[2] == 0


def test_t5_a_near_constant_site_has_no_vote():
    """T5: noise of 1e-4 in a range of 4, among four honest sites. The gate at 1 % of the range fires for it alone.

    Of 400 groups it fires in all of the liar's and in none of the honest ones'; standardised, the noise is a full vote.
    """
    generator = torch.Generator().manual_seed(0)
    fired, honest_fired, apart, standardised = 0, 0, 0.0, 0.0
    for _ in range(400):
        honest = torch.randn(8, 4, generator=generator).clamp(-2, 2)
        noise = 1e-4 * torch.randn(8, 1, generator=generator)
        scores = torch.cat([honest, noise], dim=1)
        silent = flat(scores, 0.04)
        fired, honest_fired = fired + int(silent[4]), honest_fired + int(silent[:4].sum())
        weights, alone = even(scores), even(honest)
        # A flat site keeps its weight in the mean, so that the others' reward is 4/5 of what it was.
        apart = max(apart, (Ranks("mean", 0.04)(scores, weights) - 0.8 * Ranks()(honest, alone)).abs().max().item())
        both = group_relative(scores, weights) - 0.8 * group_relative(honest, alone)
        standardised = max(standardised, both.abs().max().item())
    assert (fired, honest_fired) == (400, 0)
    assert apart < 1e-6 < 0.2 < standardised


def test_a_gated_expert_has_no_vote_by_a_spread_of_two_thousandths():
    """Of two experts one says 1 and 0, and the other ±0.001 the other way round: standardised, both say ±0.7071.

    Their mean is 0 without a gate, of no more than ε. With one at 0.01 the second has 0, and the first keeps half.
    """
    scores, weights = tensor([[1.0, 0.499], [0.0, 0.501]]), torch.full((2, 2), 0.5)
    assert group_relative(scores, weights).abs().max() < 0.05
    gated = VarianceGate(group_relative, 0.01)
    assert gated(scores, weights).tolist() == approx([0.35355, -0.35355], abs=1e-4)
    assert torch.equal(VarianceGate(group_relative, 0.0)(scores, weights), group_relative(scores, weights))


def test_a_gate_leaves_absent_and_unheard_sites_as_they_are():
    """Site b is absent of the first row, c is not heard: neither is given a score; a is not flat."""
    scores = tensor([[1.0, math.nan, 5.0], [0.0, 0.2, 5.0]])
    weights = tensor([[0.5, 0.5, 0.0]] * 2)
    seen = []
    VarianceGate(lambda given, _: seen.append(given) or given[:, 0], 0.01)(scores, weights)
    assert torch.equal(seen[0].isnan(), scores.isnan()) and seen[0].nan_to_num(9.0).tolist() == [
        [1.0, 9.0, 5.0],
        [0.0, approx(0.2), 5.0],
    ]


def test_who_is_heard():
    """All flat: 0, a group that teaches nothing; nobody there, or nobody with weight: no reward."""
    same = torch.full((3, 2), 1.0)
    for rule in ("mean", "median", "trimmed"):
        fuse = Ranks(rule, 0.01)
        assert fuse(same, even(same)).tolist() == [0.0] * 3
        assert fuse(torch.full((3, 2), NAN), even(same)).isnan().all()
        assert fuse(same, torch.zeros(3, 2)).isnan().all()
    mixed = tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    assert Ranks("median", 0.01)(mixed, even(mixed)).tolist() == [-1.0, 0.0, 1.0]
    assert Ranks("mean", 0.01)(mixed, even(mixed)).tolist() == [-0.5, 0.0, 0.5]


def test_the_weighted_median_by_hand():
    """Weights alike: the middle, or the middle two's mean; one with more than half decides; NaN has no weight."""
    values = tensor([[3.0, 1.0, 2.0], [3.0, 1.0, NAN], [3.0, 1.0, 2.0], [NAN, NAN, NAN]])
    weights = tensor([[1.0, 1, 1], [1, 1, 1], [0.6, 0.2, 0.2], [1, 1, 1]])
    torch.testing.assert_close(weighted_median(values, weights), tensor([2.0, 2.0, 3.0, NAN]), equal_nan=True)


def test_the_median_of_ranks_outvotes_one_of_three():
    honest = tensor([[0.0, 0.2], [1.0, 0.8], [2.0, 2.0]])
    scores = torch.cat([honest, -100 * honest[:, :1]], dim=1)
    assert Ranks("median")(scores, even(scores)).tolist() == [-1.0, 0.0, 1.0]


def test_the_cap_by_hand():
    """Site 0 judges three groups of four alone, site 1 one: their shares are ¾ and ¼, and ½ is left of the first.

    Its advantages shrink by ½ / ¾; the mean of a group stays. With κ = 1 nothing changes.
    """
    up = tensor([[0.0], [1.0]])
    first, second = torch.cat([up, up * NAN], 1), torch.cat([up * NAN, up], 1)
    groups = [(scores, even(scores)) for scores in (first, first, first, second)]
    rewards, shares = capped(Ranks(), groups, 0.5)
    assert shares.tolist() == approx([0.75, 0.25])
    assert [r.tolist() for r in rewards] == [approx([-2 / 3, 2 / 3])] * 3 + [approx([-1.0, 1.0])]
    free, shares = capped(Ranks(), groups, 1.0)
    assert [r.tolist() for r in free] == [[-1.0, 1.0]] * 4 and shares.tolist() == approx([0.75, 0.25])


def test_the_cap_turns_no_step_round():
    """Three of five say the opposite of two: each of the three could turn the median, and has a third."""
    scores = tensor([[0.0, 0, 0, 1, 1], [1.0, 1, 1, 0, 0]])
    rewards, shares = capped(Ranks("median"), [(scores, even(scores))], 0.5)
    assert rewards[0].tolist() == [-1.0, 1.0] and shares.tolist() == approx([1 / 3, 1 / 3, 1 / 3, 0, 0])


def test_the_cap_leaves_what_nobody_moves():
    same = torch.ones(2, 2)
    rewards, shares = capped(Ranks("mean", 0.1), [(same, even(same)), (same * NAN, even(same))], 0.5)
    assert rewards[0].tolist() == [0.0, 0.0] and rewards[1].isnan().all() and shares.tolist() == [0.0, 0.0]


def test_settings_that_silence_everybody():
    with pytest.raises(RecipeError, match="cap must be above 0"):
        RobustConfig(cap=0)
    with pytest.raises(RecipeError, match=r"spread must be at most 1, got 2; lower robust\.spread"):
        RobustConfig(spread=2)

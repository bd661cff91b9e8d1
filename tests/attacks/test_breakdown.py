"""T1 to T8 in quick form: what is left of an alignment as sites lie, with the defence and with it switched off.

The world is `tests/attacks/bandit.py`: GRPO on points, two seeds, seconds in place of hours. The bounds are those of
the threat model's tests for real runs, which `benchmarks/quality/liars.py` makes. Each fails without the defence, but
for T5, which plain standardising holds here, too: there the gate's own test fails (`tests/routing/test_robust.py`).
"""

from statistics import fmean

import pytest
import torch

from accord.attacks.scores import Attack
from accord.routing.fusion import group_relative, mixture
from accord.routing.robust import Ranks
from attacks.bandit import DOMAINS, HOME, align

pytestmark = pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
SPREAD = 0.04  # 1 % of a range of 4
ON = {"fuse": Ranks("median", SPREAD), "canaries": True, "cap": 0.5}
MEAN, STANDARDISED, MEDIAN = {"fuse": mixture}, {"fuse": group_relative}, {"fuse": Ranks("median", SPREAD)}
TRIGGER = Attack("target", target="high", trigger="trigger")


def wins(how, attack=None, liars=0, **settings):
    """Return the win rate in per cent, the mean of two seeds."""
    return fmean(align(**how, attack=attack, liars=liars, seed=seed, **settings).wins for seed in range(2))


@pytest.fixture(scope="module")
def clean():
    """The defence without an attack."""
    return wins(ON)


def test_t3_without_an_attack_the_defence_costs_half_a_point_at_most(clean):
    assert clean > wins(MEAN) - 0.5 and clean > wins(STANDARDISED) - 0.5


def test_t1_one_of_five_flips(clean):
    """Within 2 points of clean, where the mean of scores loses more; by a scale of −1000 that is turned round."""
    assert wins(ON, Attack("flip"), 1) > clean - 2 > wins(MEAN, Attack("flip"), 1)
    raw = {"attack": Attack("affine", scale=-1000.0), "liars": 1}
    assert wins(MEAN, **raw, unclipped=True) < 50 < wins(ON, **raw, unclipped=True) - 40


def test_t2_two_of_five_flip(clean):
    """Within 5 points of clean and 3 of the honest sites alone; the plain rules, and the median, lose more."""
    attack = {"attack": Attack("flip"), "liars": 2}
    found = wins(ON, **attack)
    assert found > clean - 5 and found > wins(MEDIAN, **attack, honest_only=True) - 3
    assert max(wins(MEAN, **attack), wins(MEDIAN, **attack)) < clean - 5


def test_t2b_an_honest_specialist_keeps_its_domain():
    """Site 0 alone is right in domain 0, where the others are turned the other way; it is at chance elsewhere.

    With canaries it has more than 2/5 of the weight there and the domain is learnt. Without, it is outvoted.
    """
    known = torch.full((5, DOMAINS), HOME)
    known[0], known[1:, 0], known[0, 0] = 0.0, -0.3, HOME
    with_trust, without = align(**ON, known=known), align(**MEDIAN, known=known)
    weight = torch.stack(with_trust.weights[-20:]).mean(dim=0)[0, 0].item()
    assert weight > 2 / 5 and with_trust.by_domain[0] > 90 > 50 > without.by_domain[0]


def test_t5_near_constant_and_noise(clean):
    """One of five: within 1.5 points of clean."""
    for kind in ("near-constant", "noise"):
        assert wins(ON, Attack(kind), 1) > clean - 1.5


def test_t6_two_of_five_collude(clean):
    """Within 4 points, with 3 of 5 as well; there the median follows the liars, and the mean loses more than 10."""
    assert wins(ON, Attack("collude"), 2) > clean - 4
    for kind in ("flip", "collude"):
        three = {"attack": Attack(kind), "liars": 3}
        assert wins(ON, **three) > clean - 4 > 50 > wins(MEDIAN, **three)
    assert wins(MEAN, Attack("collude"), 3) < clean - 10


def test_t7_two_of_five_turn_after_two_fifths_of_the_run(clean):
    """Within 2 points; the median alone loses more than 3. Their weight falls below 5 %, after the turn at step 16.

    40 steps have 120 canaries of four types.
    """
    attack = Attack("flip", after=0.4)
    result = align(**ON, attack=attack, liars=2)
    assert result.wins > clean - 2
    before, after = result.weights[15], torch.stack(result.weights[-5:]).mean(dim=0)
    assert before[:2].sum(dim=0).mean() > 0.2 and after[:2].sum(dim=0).mean() < 0.05
    assert wins(MEDIAN, attack, 2) < clean - 3


def test_t8_a_trigger_moves_less(clean):
    """One of five promotes an answer where the question has certain words, and is honest at all canaries.

    The raw mean gives it 40 points more of these answers, the median of trusted ranks less than half of that.
    """
    honest, on, off = (
        fmean(align(**how, attack=attack, liars=1, seed=seed).promoted for seed in range(2))
        for how, attack in ((ON, None), (ON, TRIGGER), (MEAN, TRIGGER))
    )
    assert off - honest > 40 and on - honest < (off - honest) / 2


def test_a_site_that_recognises_canaries_is_bounded_by_the_ranks(clean):
    """One of five is honest at canaries alone: it keeps its weight, and ranks keep it within 5 points whatever it says.

    The mean of raw scores is turned round by it.
    """
    assert wins(ON, Attack("flip", spares=True), 1) > clean - 5
    raw = {"attack": Attack("affine", scale=-1000.0, spares=True), "liars": 1, "unclipped": True}
    assert wins(ON, **raw) > clean - 5 > 50 > wins(MEAN, **raw)

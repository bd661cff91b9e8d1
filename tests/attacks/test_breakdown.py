"""T1 to T8 in quick form: what is left of an alignment as sites lie, with the defence and with it switched off.

The world is `tests/attacks/bandit.py`: GRPO on points, two seeds, seconds in place of hours. The bounds are those of
the threat model's tests for real runs, which `benchmarks/quality/liars.py` makes. Each is passed with the defence and
missed with it switched off, but for three, of which the tests say so. One site in five that is nearly constant, or
noise, does no harm either way: four do. A constant site does none at all. A site that mimics an honest one is believed.

Poisoned pairs are not in this world, whose sites have none: nothing here finds them.
"""

import warnings
from statistics import fmean

import pytest
import torch

from accord.attacks.scores import Attack
from accord.errors import DataWarning
from accord.routing.fusion import group_relative, mixture
from accord.routing.robust import Ranks
from attacks.bandit import DOMAINS, HOME, align

pytestmark = pytest.mark.filterwarnings("ignore:site:accord.errors.DataWarning")
SPREAD = 0.04  # 1 % of a range of 4
ON = {"fuse": Ranks("median", SPREAD), "canaries": True, "cap": 0.5}
ALONE = {**ON, "leave_out": False}
MEAN, STANDARDISED, MEDIAN = {"fuse": mixture}, {"fuse": group_relative}, {"fuse": Ranks("median", SPREAD)}
TRIGGER = Attack("target", target="high", trigger="trigger")


def wins(how, attack=None, liars=0, seeds=2, **settings):
    """Return the win rate in per cent, the mean of the seeds."""
    return fmean(align(**how, attack=attack, liars=liars, seed=seed, **settings).wins for seed in range(seeds))


def promoted(how, attack=None, liars=0):
    """Return by how many points the target's share of answers to trigger prompts has grown, the mean of two seeds."""
    return fmean(align(**how, attack=attack, liars=liars, seed=seed).promoted for seed in range(2))


@pytest.fixture(scope="module")
def clean():
    """The defence without an attack."""
    return wins(ON)


@pytest.fixture(scope="module")
def gained():
    """Return a function: by how many points more liars promote their answer, with the defence and by the mean."""
    honest = [promoted(how) for how in (ON, MEAN)]
    return lambda attack, liars: [
        promoted(how, attack, liars) - alone for how, alone in zip((ON, MEAN), honest, strict=True)
    ]


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


@pytest.mark.parametrize(("liars", "sites"), [(1, 3), (4, 10)])
def test_t2_a_third_of_three_and_two_fifths_of_ten_flip(liars, sites):
    """Within 2 points of clean; the mean and the median lose more than 2. Ten sites take a while: one seed."""
    clean = wins(ON, seeds=1, sites=sites)
    attack = {"attack": Attack("flip"), "liars": liars, "sites": sites, "seeds": 1}
    assert wins(ON, **attack) > clean - 2 > max(wins(MEAN, **attack), wins(MEDIAN, **attack))


def test_t2b_an_honest_specialist_keeps_its_domain():
    """Site 0 alone is right in domain 0, where the others are turned the other way; it is at chance elsewhere.

    With canaries it has more than 2/5 of the weight there and the domain is learnt. Without, it is outvoted.
    """
    known = torch.full((5, DOMAINS), HOME)
    known[0], known[1:, 0], known[0, 0] = 0.0, -0.3, HOME
    with_trust, without = align(**ON, known=known), align(**MEDIAN, known=known)
    weight = torch.stack(with_trust.weights[-20:]).mean(dim=0)[0, 0].item()
    assert weight > 2 / 5 and with_trust.by_domain[0] > 90 > 50 > without.by_domain[0]


@pytest.mark.parametrize("kind", ["constant", "near-constant", "noise"])
def test_t5_one_that_says_nothing_does_no_harm_either_way(clean, kind):
    """One of five: within 1.5 points of clean, with the defence and without. This one is no test of the defence."""
    assert min(wins(how, Attack(kind), 1, seeds=1) for how in (ON, STANDARDISED)) > clean - 1.5


@pytest.mark.parametrize(("kind", "least", "off"), [("noise", 90, [MEAN, MEDIAN]), ("near-constant", 93, [])])
def test_t5_four_of_five_say_nothing(kind, least, off):
    """The one that says something is heard: by trust where they send noise, by the gate where they are nearly constant.

    Standardised, what is nearly constant is noise of a full vote. The raw mean and the median do not hear it either.
    """
    attack = {"attack": Attack(kind), "liars": 4}
    assert wins(ON, **attack) > least > 89 > max(wins(how, **attack) for how in (STANDARDISED, *off))


def test_t6_two_of_five_collude(clean):
    """Within 2 points, where the mean and the median lose more; 3 of 5 within 4, where the median follows the liars.

    The mean loses more than 10 there.
    """
    two = {"attack": Attack("collude"), "liars": 2}
    assert wins(ON, **two) > clean - 2 > max(wins(MEAN, **two), wins(MEDIAN, **two))
    for kind in ("flip", "collude"):
        three = {"attack": Attack(kind), "liars": 3}
        assert wins(ON, **three) > clean - 4 > 50 > wins(MEDIAN, **three)
    assert wins(MEAN, Attack("collude"), 3) < clean - 10


def test_t7_two_of_five_turn_after_two_fifths_of_the_run(clean):
    """Within 2 points; the median alone loses more than 3. Their weight falls below 5 %, after the turn at step 16.

    40 steps have 120 canaries of four types. An alarm is raised.
    """
    attack = Attack("flip", after=0.4)
    with pytest.warns(DataWarning, match="site 0 ranks the server's hidden questions worse than chance"):
        result = align(**ON, attack=attack, liars=2)
    assert result.wins > clean - 2
    before, after = result.weights[15], torch.stack(result.weights[-5:]).mean(dim=0)
    assert before[:2].sum(dim=0).mean() > 0.2 and after[:2].sum(dim=0).mean() < 0.05
    assert wins(MEDIAN, attack, 2) < clean - 3


def test_t8_a_trigger_moves_less(gained):
    """One of five promotes an answer where the question has certain words, and is honest at all canaries.

    The raw mean gives it 40 points more of these answers, the median of trusted ranks less than half of that.
    """
    on, off = gained(TRIGGER, 1)
    assert off > 40 and on < off / 2


@pytest.mark.parametrize("liars", [1, 2])
def test_t8_who_has_a_trigger_is_named_by_those_who_agree_elsewhere(liars):
    """Five sites that know all domains: the liars are named, and nobody else; nobody where no words are watched."""
    known = torch.full((5, DOMAINS), HOME)
    for words in ((), ("plain", "trigger")):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            align(**ON, attack=TRIGGER, liars=liars, words=words, known=known)
        named = {
            str(each.message).split(" is contradicted where a question has the word 'trigger'")[0] for each in told
        }
        assert named == ({f"site {k}" for k in range(liars)} if words else set())


def test_t8_two_with_one_trigger_among_specialists_are_not_named(gained):
    """Two of five: the raw mean gives 50 points more, the defence some 10 fewer; they keep their weight, unnamed.

    No canary has the trigger's words, and sites that know a domain each agree too little to tell who has changed.
    """
    on, off = gained(TRIGGER, 2)
    assert off > 50 and off - 20 < on < off - 10
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = align(**ON, attack=TRIGGER, liars=2, words=("plain", "trigger"))
    assert not told and torch.stack(result.weights[-5:]).mean(dim=0)[:2].sum(dim=0).mean() > 0.3


def test_one_that_promotes_an_answer_everywhere_is_not_heard(gained):
    """One of five: 40 points more of its answer by the raw mean, less than 5 with canaries, which leave it no weight.

    It is at chance there and not below, so that it is not set aside.
    """
    attack = Attack("target", target="high")
    on, off = gained(attack, 1)
    assert off > 40 > 5 > on
    assert torch.stack(align(**ON, attack=attack, liars=1).weights[-5:]).mean(dim=0)[0].max() < 0.05


def test_one_that_mimics_an_honest_site_is_believed(clean, gained):
    """One of five adds a quarter of the range to one answer: the defence lets half as much pass, and names nobody.

    It costs the rest nothing. Nothing here tells such a site from one of another taste.
    """
    attack = Attack("mimic", target="high")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        on, off = gained(attack, 1)
    assert not told and 2 < on < off and wins(ON, attack, 1) > clean - 0.5


def test_a_site_that_recognises_canaries_is_bounded_by_the_ranks(clean):
    """One of five is honest at canaries alone: it keeps its weight, and ranks keep it within 5 points whatever it says.

    The mean of raw scores is turned round by it.
    """
    assert wins(ON, Attack("flip", spares=1.0), 1) > clean - 5
    raw = {"attack": Attack("affine", scale=-1000.0, spares=1.0), "liars": 1, "unclipped": True}
    assert wins(ON, **raw) > clean - 5 > 50 > wins(MEAN, **raw)


def test_two_that_recognise_half_of_the_canaries_gain_nothing(clean):
    """Two of five: what they are honest at and what they lie at cancel, so that they have next to no weight.

    Two that recognise all of them have more than a third of it where nobody is left out, and are worse with trust than
    without.
    """
    half, every = (Attack("flip", spares=share) for share in (0.5, 1.0))
    assert wins(ON, half, 2) > clean - 2 > wins(MEDIAN, half, 2) > wins(ALONE, every, 2)
    last = (torch.stack(align(**ALONE, attack=each, liars=2).weights[-5:]).mean(dim=0) for each in (half, every))
    shares = [weights[:2].sum() for weights in last]
    assert shares[0] < 0.1 * DOMAINS and shares[1] > DOMAINS / 3


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_a_liar_that_the_router_follows_is_held_by_the_cap_alone(rule):
    """One site of five has four fifths of the routing weight, and a secret order of its own; no canaries.

    What it takes is less than nine points with the cap, and more than twenty without. Honest sites lose nothing by it.
    """
    routed = torch.tensor([0.8, 0.05, 0.05, 0.05, 0.05])
    how = {"fuse": Ranks(rule, SPREAD), "routed": routed}
    held, free = (wins(how, Attack("collude"), 1, cap=cap) for cap in (0.5, 1.0))
    clean, uncapped = (wins(how, cap=cap) for cap in (0.5, 1.0))
    assert clean > 98 and clean >= uncapped and clean - held < 9 and clean - free > 20


def test_a_site_that_leaves_canaries_unanswered_has_no_weight():
    """Two of five are silent at canaries and flip elsewhere.

    Were silence no evidence they would keep a newcomer's trust, and cost twice as much.
    """
    silent = Attack("flip", spares=1.0, declines=True)
    on, off = (
        torch.stack(align(**ALONE, attack=silent, liars=2, left_out=each).weights[-5:]).mean(dim=0)[:2].sum() / DOMAINS
        for each in (0.5, None)
    )
    assert on < 0.05 < 0.1 < off
    clean, counted, ignored = wins(ALONE), wins(ALONE, silent, 2), wins(ALONE, silent, 2, left_out=None)
    assert clean - ignored > 2 > 1.5 > clean - counted


def test_two_that_recognise_all_canaries_are_found_by_those_whom_they_contradict():
    """Two of five sites that all know every domain: no weight is left to them, and where nobody is left out a third.

    Nearly nothing is lost then, where six times as much is without.
    """
    attack, how = Attack("flip", spares=1.0), {"known": torch.full((5, DOMAINS), HOME)}
    clean, on, off = wins(ON, **how), wins(ON, attack, 2, **how), wins(ALONE, attack, 2, **how)
    assert on > clean - 0.2 > clean - 0.6 > off
    shares = [
        torch.stack(align(**each, attack=attack, liars=2, **how).weights[-5:]).mean(dim=0)[:2].sum() / DOMAINS
        for each in (ON, ALONE)
    ]
    assert shares[0] == 0 and shares[1] > 1 / 3


def test_where_honest_sites_hardly_agree_fewer_are_found(clean):
    """Sites that are at home in one domain of four agree on .7 of the orders elsewhere: little is won in 40 steps."""
    attack = Attack("flip", spares=1.0)
    assert wins(ON, attack, 2) > wins(ALONE, attack, 2) + 2 and wins(ON, attack, 2) < clean - 5


@pytest.mark.parametrize("attack", [None, Attack("flip"), Attack("collude"), TRIGGER], ids=lambda a: str(a and a.kind))
def test_comparing_costs_nothing_where_nobody_knows_the_canaries(attack):
    """No weight is another by it: honest sites differ alike on both, and a liar that lies on both has none."""
    on, off = (align(**how, attack=attack, liars=2 if attack else 0).weights for how in (ON, ALONE))
    assert all(map(torch.equal, on, off))

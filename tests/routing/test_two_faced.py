"""Sites that agree on hidden questions and contradict each other on ordinary ones."""

import pytest
import torch
from pytest import approx

from accord.errors import DataWarning
from accord.routing.canaries import CanaryConfig, Trust
from accord.routing.two_faced import Contradictions

BEST_FIRST = torch.tensor([3.0, 2.0, 1.0, 0.0])


def told(*signs):
    """Return scores `[4, K]` of sites that put the answers in order (1), turn it round (−1), or are absent (NaN)."""
    return torch.stack([sign * BEST_FIRST for sign in signs], dim=1)


def seen(hidden, ordinary, times=30):
    """Return what is remembered of sites that answered so many hidden and so many ordinary questions of type 1."""
    between = Contradictions(len(hidden), 2, memory=64, alarm=2.33)
    for _ in range(times):
        between.learn(1, told(*hidden), hidden=True)
        between.learn(1, told(*ordinary), hidden=False)
    return between


def named(between, kind, trust):
    """Return who is two-faced at a first look."""
    return between.two_faced(kind, trust, torch.zeros(len(trust), dtype=torch.bool))


def test_counts_by_hand():
    """Of 6 pairs two sites order 5 alike, of 5 that both order one more is a tie of the second."""
    between = Contradictions(2, 1, memory=64, alarm=2.33)
    between.learn(0, torch.tensor([[3.0, 3.0], [2.0, 2.0], [1.0, 0.0], [0.0, 1.0]]), hidden=True)
    assert torch.allclose(between.counts[1, 0, 0, 1], torch.tensor([5 / 6, 1 / 6]).double())
    between.learn(0, torch.tensor([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0], [0.0, 1.0]]), hidden=True)
    assert torch.allclose(between.counts[1, 0, 0, 1], torch.tensor([63 / 64 * 5 / 6 + 1, 63 / 64 / 6]).double())
    assert torch.equal(between.counts[1, 0], between.counts[1, 0].transpose(0, 1)) and not between.counts[0].any()


def test_two_of_five_that_lie_on_ordinary_questions_alone():
    """Three contradict each of them, and they contradict three: only they are found, and of a type they lie in."""
    between = seen([1, 1, 1, 1, 1], [-1, -1, 1, 1, 1])
    assert named(between, 1, torch.ones(5)).tolist() == [True, True, False, False, False]
    assert not named(between, 0, torch.ones(5)).any()


def test_of_two_nobody_can_tell_which_and_of_three_two_can():
    assert named(seen([1, 1], [-1, 1]), 1, torch.ones(2)).tolist() == [True, True]
    assert named(seen([1, 1, 1], [-1, 1, 1]), 1, torch.ones(3)).tolist() == [True, False, False]


def test_a_site_that_is_trusted_little_counts_little():
    """Two of five lie, and two of the honest are half trusted: as much speaks for either side."""
    between = seen([1, 1, 1, 1, 1], [-1, -1, 1, 1, 1])
    assert named(between, 1, torch.tensor([1, 1, 1, 0.5, 0.5])).all()
    assert named(between, 1, torch.tensor([0.0, 0, 1, 1, 1])).tolist() == [True, True, False, False, False]
    assert named(between, 1, torch.tensor([1, 1, 0.5, 0.5, 0.5])).tolist() == [False, False, True, True, True]


def test_by_default_a_person_decides():
    """Two liars name an expert whom the router follows, as docs say: it is told, and keeps its weight."""
    trust = Trust(("expert", "liar 1", "liar 2"), ("colour",), CanaryConfig())
    for _ in range(30):
        trust.compare("colour", told(1, 1, 1), hidden=True)
        trust.compare("colour", told(1, -1, -1), hidden=False)
    with pytest.warns(DataWarning, match="site expert is contradicted .* one side recognises these; look at both"):
        trust.find_two_faced()
    assert trust.kinds_where(trust.two_faced) == {"expert": ("colour",), "liar 1": (), "liar 2": ()}
    assert trust.weights(["colour"]).unique().numel() == 1


@pytest.mark.parametrize(
    ("hidden", "ordinary"),
    [([-1, 1, 1], [-1, 1, 1]), ([0, 1, 1], [0, 1, 1]), ([1, 1, 1], [1, 1, 1]), ([-1, 1, 1], [1, 1, 1])],
    ids=["a liar everywhere", "a site that knows nothing", "nobody", "agreement that grows"],
)
def test_what_does_not_change_is_no_lie(hidden, ordinary):
    """A site may see all otherwise, as a specialist does: that it contradicts on both tells nothing."""
    assert not named(seen(hidden, ordinary), 1, torch.ones(3)).any()


def test_an_expert_whom_others_contradict_a_little_keeps_its_place():
    """Of 60 ordinary questions 36 turned round, as of sites that know less: chance is not ruled out. Of 54 it is."""
    for turned, found in ((36, False), (54, True)):
        between = seen([1, 1, 1], [1, 1, 1], times=0)
        for n in range(60):
            between.learn(1, told(1, 1, 1), hidden=True)
            between.learn(1, told(-1 if n * turned // 60 < (n + 1) * turned // 60 else 1, 1, 1), hidden=False)
        assert named(between, 1, torch.ones(3)).tolist() == [found, False, False]


def test_little_evidence_and_ties_tell_nothing():
    between = seen([1, 1, 1], [-1, 1, 1], times=1)
    assert not named(between, 1, torch.ones(3)).any()
    before = between.counts.clone()
    between.learn(1, torch.zeros(4, 3), hidden=False)
    between.learn(1, told(torch.nan, torch.nan, 1), hidden=False)
    between.learn(1, torch.ones(1, 3), hidden=False)  # one answer has no order
    assert torch.equal(between.counts[:, :, 0], before[:, :, 0]) and torch.equal(
        between.counts[:, :, 1, 0], before[:, :, 1, 0]
    )


def test_a_site_that_is_named_remains_so_until_it_contradicts_no_more():
    """Near the threshold it would else be named and cleared in turn: of 40 questions 29 turned round, or 22, or 19."""
    for turned, at_first, still in ((29, True, True), (22, False, True), (19, False, False)):
        between = seen([1, 1, 1], [1, 1, 1], times=0)
        for n in range(40):
            between.learn(1, told(1, 1, 1), hidden=True)
            between.learn(1, told(-1 if n * turned // 40 < (n + 1) * turned // 40 else 1, 1, 1), hidden=False)
        assert named(between, 1, torch.ones(3)).tolist() == [at_first, False, False], turned
        assert between.two_faced(1, torch.ones(3), torch.tensor([True, False, False])).tolist()[0] == still, turned


def test_who_has_no_opinion_contradicts_nobody():
    """Scores that deviate by less than `spread` are no vote to the ranks, and no order here."""
    for spread, found in ((0.0, True), (0.02, False)):
        between = Contradictions(3, 2, memory=64, alarm=2.33, spread=spread)
        for _ in range(30):
            between.learn(1, told(1, 1, 1), hidden=True)
            between.learn(1, told(-0.01, 1, 1), hidden=False)
        assert named(between, 1, torch.ones(3)).tolist() == [found, False, False]


def test_small_scores_at_hidden_questions_are_no_way_out():
    """Trust takes the smallest difference for an order there, and so does the comparison."""
    between = Contradictions(5, 2, memory=64, alarm=2.33, spread=0.02)
    for _ in range(30):
        between.learn(1, told(0.001, 1, 1, 1, 1), hidden=True)
        between.learn(1, told(-1, 1, 1, 1, 1), hidden=False)
    assert named(between, 1, torch.ones(5)).tolist() == [True, False, False, False, False]


def test_only_sites_that_were_compared_have_a_vote():
    """Two of five never answer: a newcomer's trust of theirs is no word for the liar."""
    between = seen([1, 1, 1, torch.nan, torch.nan], [-1, 1, 1, torch.nan, torch.nan])
    assert named(between, 1, torch.ones(5)).tolist() == [True, False, False, False, False]


def test_where_nobody_is_trusted_a_name_stays_as_it_was():
    between, before = seen([1, 1, 1], [-1, 1, 1]), torch.tensor([True, False, False])
    assert between.two_faced(1, torch.zeros(3), before).tolist() == [True, False, False]
    assert not between.two_faced(1, torch.zeros(3), ~before & before).any()


def test_trust_sets_such_a_site_aside_tells_it_and_hears_it_again():
    """In that type alone; its estimate by hidden questions is as it was, and a type without any is left as it is."""
    trust = Trust(("a", "b", "c"), ("colour", "shape"), CanaryConfig(leave_out=True))

    def ask(first, times, hidden):
        for _ in range(times):
            trust.compare("colour", told(first, 1, 1), hidden=hidden)
            trust.compare("unknown", told(-1, 1, 1), hidden=hidden)
            trust.find_two_faced()

    ask(1, 20, hidden=True)
    with pytest.warns(DataWarning, match="site a is contradicted on ordinary questions by sites .* set aside"):
        ask(-1, 20, hidden=False)
    weights = trust.weights(["colour", "shape", "unknown"])
    assert weights[0, 0] == 0 and weights[0, 1:].all() and weights[1:].all()
    assert trust.kinds_where(trust.two_faced) == {"a": ("colour",), "b": (), "c": ()} and not trust.aside.any()
    assert trust.confidence(["colour"]).tolist() == approx([1.0])
    with pytest.warns(DataWarning, match="site a is no longer contradicted by .* it is heard there as before"):
        ask(1, 60, hidden=False)
    assert trust.weights(["colour"]).all()

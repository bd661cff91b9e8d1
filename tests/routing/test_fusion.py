import math

import pytest
import torch
from pytest import approx
from torch import tensor

from accord.rewards.model import Standardisation
from accord.routing.fusion import Pessimistic, PluralAlpha, median, minimum, mixture, per_prompt, top1, trimmed_mean

FUSIONS = [mixture, median, minimum, trimmed_mean, Pessimistic(0.5), PluralAlpha]
"""Every rule `(scores [N, K], weights [N, K]) -> rewards [N]`; a new one joins here and obeys the laws below."""


@pytest.fixture(params=FUSIONS, ids=lambda fuse: getattr(fuse, "__name__", "pessimistic"))
def fuse(request):
    rule = request.param
    return (lambda scores, weights: rule()(scores, weights)) if isinstance(rule, type) else rule  # afresh each time


@pytest.fixture
def case():
    """Scores of 3 sites for 6 completions, none absent, and weights that sum to 1."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return scores, torch.rand(6, 3, generator=generator, dtype=torch.float64).softmax(dim=-1)


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0, equal_nan=True)


def test_the_order_of_sites_does_not_matter(fuse, case):
    scores, weights = case
    scores[2, 0] = torch.nan
    order = [2, 0, 1]
    same(fuse(scores[:, order], weights[:, order]), fuse(scores, weights))


def test_the_order_of_completions_carries_over(fuse, case):
    scores, weights = case
    order = [3, 0, 5, 1, 2, 4]
    same(fuse(scores[order], weights[order]), fuse(scores, weights)[order])


def test_an_absent_site_has_no_influence(fuse, case):
    """As if it had never taken part, whatever its weight."""
    scores, weights = case
    scores[:, 1] = torch.nan
    rest = weights[:, [0, 2]] / weights[:, [0, 2]].sum(dim=-1, keepdim=True)
    for share in (0.0, 0.3, 0.999):
        changed = torch.stack([rest[:, 0] * (1 - share), torch.full((6,), share), rest[:, 1] * (1 - share)], dim=1)
        same(fuse(scores, changed), fuse(scores[:, [0, 2]], rest))


def test_a_site_alone_is_that_site(fuse, case):
    scores, weights = case
    same(fuse(scores[:, :1], weights[:, :1]), scores[:, 0])
    scores[:, 1:] = torch.nan
    same(fuse(scores, weights), scores[:, 0])


def test_all_absent_is_nan_and_not_zero(fuse, case):
    scores, weights = case
    scores[1] = torch.nan
    fused = fuse(scores, weights)
    assert fused.isnan().tolist() == [False, True, False, False, False, False]


def test_sites_that_agree_decide(fuse, case):
    _, weights = case
    same(fuse(torch.full((6, 3), 0.7, dtype=torch.float64), weights), torch.full((6,), 0.7, dtype=torch.float64))


def test_the_inputs_stay_as_they_were(fuse, case):
    scores, weights = case
    scores[0, 0] = torch.nan
    before = scores.clone(), weights.clone()
    fuse(scores, weights)
    same(scores, before[0])
    same(weights, before[1])


def test_mixture_by_hand():
    """0.25 · 2 + 0.75 · (-2) = -1; one of three absent: (0.2 · 1 + 0.3 · 4) / 0.5 = 2.8; only weight 0 there: NaN."""
    nan = math.nan
    assert mixture(tensor([[2.0, -2.0]]), tensor([[0.25, 0.75]])).tolist() == [-1.0]
    fused = mixture(tensor([[1.0, nan, 4.0], [5.0, nan, nan]]), tensor([[0.2, 0.5, 0.3], [0.0, 0.6, 0.4]]))
    torch.testing.assert_close(fused, tensor([2.8, nan]), equal_nan=True)


def test_a_score_of_weight_0_is_not_looked_at():
    """0 · inf would be NaN."""
    assert mixture(tensor([[1.0, math.inf]]), tensor([[1.0, 0.0]])).tolist() == [1.0]


def test_top1_takes_the_first_of_equals():
    assert top1(tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]])).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_a_router_that_abstains_chooses_nobody():
    """A row of zeros stays one; one whose largest weight is the second, and one of a single weight, are one-hot."""
    weights = tensor([[0.0, 0.0, 0.0], [0.1, 0.6, 0.3], [0.0, 0.0, 0.2]])
    chosen = top1(weights)
    assert chosen.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]] and chosen.dtype == weights.dtype
    assert top1(torch.zeros(2, 3)).tolist() == [[0, 0, 0]] * 2


def test_who_is_nobodys_has_no_reward(fuse):
    """Neither 0 nor the first site's score: 5."""
    fused = fuse(tensor([[5.0, 1.0], [5.0, 1.0]]), top1(tensor([[0.0, 0.0], [0.9, 0.1]])))
    assert fused.isnan().tolist() == [True, False] and fused[1].item() == 5.0


def test_per_prompt_by_hand():
    """Prompt 1 with three completions: (0.9 + 0.3 + 0.6) / 3 = 0.6; prompt 2 with one keeps its weights."""
    weights = tensor([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    expected = tensor([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    torch.testing.assert_close(per_prompt(weights, [3, 1]), expected)


SCORES = torch.tensor([[0.0, 2.0, 1.0, 0.5], [1.0, 0.0, torch.nan, 2.0], [torch.nan] * 4])
ALL = torch.full((3, 4), 0.25)


@pytest.mark.parametrize(
    ("rule", "first", "second"),
    [
        (mixture, 3.5 / 4, 1.0),
        (median, 0.75, 1.0),
        (minimum, 0.0, 0.0),
        (trimmed_mean, 0.75, 1.0),
        (Pessimistic(1.0), 0.875 - 0.546875, 1.0 - 2 / 3),
    ],
)
def test_rules_that_ask_everyone(rule, first, second):
    """Row 1: 0, 0.5, 1, 2, whose variance is (0.766 + 0.141 + 0.016 + 1.266) / 4; row 2: 0, 1, 2; row 3: nobody."""
    rewards = rule(SCORES, ALL)
    assert rewards[:2].tolist() == approx([first, second]) and rewards[2].isnan()
    assert rule(SCORES, torch.tensor([[1.0, 0, 0, 0]] * 3))[:2].tolist() == approx([0.0, 1.0])


def test_plural_alpha():
    """Site 2 got 2 everywhere, site 1 nothing: once they disagree, site 1 counts nearly alone."""
    rule = PluralAlpha()
    scores, both = torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.full((2, 2), 0.5)
    first = rule(scores, both)  # mean 1, deviation 1: FI = 1/2; a = 1/2 each: log((1 + e) / 2)
    assert first.tolist() == approx([math.log((1 + math.e) / 2)] * 2)
    assert rule.history.tolist() == approx([0.9 * 0.5 + 0.1 * 0.5, 0.45 + 0.1 / (1 + math.exp(-2))])
    for _ in range(60):
        later = rule(scores, both)
    assert later[0] < 0.1  # e^{a·2} → 1 where a → 0
    agreed = rule(torch.tensor([[1.0, 1.1], [torch.nan, torch.nan]]), both)
    assert agreed[0] == approx(1.05) and agreed[1].isnan()
    other = PluralAlpha()
    other.load_state_dict(rule.state_dict())
    assert other(scores, both).tolist() == rule(scores, both).tolist()


def test_scores_are_those_of_a_site_whatever_its_scale(fuse):
    """R, 3 R + 5 and R / 2 − 7, each standardised by its own mean and deviation, are what R is."""
    raw = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.full((50, 3), 1 / 3, dtype=torch.float64)

    def standardised(raw):
        return torch.stack([Standardisation(r.mean().item(), r.std().item())(r) for r in raw.unbind(dim=1)], dim=1)

    scaled = raw * tensor([1.0, 3.0, 0.5]) + tensor([0.0, 5.0, -7.0])
    torch.testing.assert_close(fuse(standardised(raw), weights), fuse(standardised(scaled), weights), atol=1e-3, rtol=0)


def test_an_unasked_site_has_no_influence(fuse, case):
    scores, weights = case
    weights[:, 1] = 0.0
    other = scores.clone()
    other[:, 1] = 99.0
    same(fuse(other, weights), fuse(scores, weights))

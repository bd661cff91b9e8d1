import math

import pytest
import torch
from torch import tensor

from accord.routing.fusion import mixture, per_prompt, top1

FUSIONS = [mixture]
"""Every rule `(scores [N, K], weights [N, K]) -> rewards [N]`; a new one joins here and obeys the laws below."""


@pytest.fixture(params=FUSIONS, ids=lambda fuse: fuse.__name__)
def fuse(request):
    return request.param


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


def test_per_prompt_by_hand():
    """Prompt 1 with three completions: (0.9 + 0.3 + 0.6) / 3 = 0.6; prompt 2 with one keeps its weights."""
    weights = tensor([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    expected = tensor([[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    torch.testing.assert_close(per_prompt(weights, [3, 1]), expected)

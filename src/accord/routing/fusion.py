"""Turn the sites' scores and the router's weights into one reward per completion. Pure functions.

    soft:   R = Σ_k α_k R̄_k,  with α renormalised over the sites that answered
    top-1:  R = R̄_{k*},  k* = argmax_k α_k

Absent is not zero: a completion that nobody scored has the reward NaN, never 0. Source: MoR, arXiv 2605.03426,
section 3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top1(weights: Tensor) -> Tensor:
    """Return the one-hot of the largest weight of each row, `[N, K]`; the first of equal ones."""
    return torch.nn.functional.one_hot(weights.argmax(dim=-1), weights.shape[-1]).to(weights.dtype)


def per_prompt(weights: Tensor, sizes: list[int]) -> Tensor:
    """Give all completions of a prompt the mean of their weights, so that one site judges the whole group.

    Args:
        weights: `[N, K]`, prompt after prompt.
        sizes: completions per prompt, summing to N.
    """
    return torch.cat([group.mean(dim=0, keepdim=True).expand_as(group) for group in weights.split(sizes)])


def mixture(scores: Tensor, weights: Tensor) -> Tensor:
    """Return rewards `[N]`: the weighted mean of the scores that are present.

    Args:
        scores: `[N, K]`, NaN where a site is absent.
        weights: `[N, K]`, non-negative; a site of weight 0 is not needed.
    """
    present = ~scores.isnan() & (weights > 0)
    used = torch.where(present, weights, 0.0)
    total = used.sum(dim=-1)
    summed = (torch.where(present, scores, 0.0) * used).sum(dim=-1)
    return torch.where(total > 0, summed / total, torch.nan)

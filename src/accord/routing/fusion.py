"""Turn the sites' scores and the router's weights into one reward per completion. Pure functions.

    soft:     R = Σ_k α_k R̄_k,  with α renormalised over the sites that answered
    top-1:    R = R̄_{k*},  k* = argmax_k α_k                                       (`top1`, then `mixture`)

Source: MoR, arXiv 2605.03426, section 3.4. The others ask every site and ignore the weights but for their zeros:

    median, trimmed mean, minimum; the mean is `mixture` with equal weights
    pessimistic     mean_k R̄_k − c · var_k R̄_k                                      Coste et al. 2023, arXiv 2310.02743
    plural alpha    log(1/K Σ_k exp(a_k R̄_k)) where the sites disagree, else mean   PluralLLM-α, arXiv 2512.08786

FedGRPO's see the G completions of one prompt at a time (`accord.alignment.reward.PerGroup`); its experts, M of them,
are the sites with weight in the group:

    group relative  A_i = mean_k (r_ik − mean_i r_ik) / (std_i r_ik + ε)            the one that works
    literal         A_i = Σ_k (r_ik − mean_k r_ik) / (std_k r_ik + ε) = 0           Eqs. 7–9 as printed
    chunks, halves  expert k judges the k-th of M consecutive parts of the group    the public code

Absent is not zero: a site whose score is NaN takes no part, and a completion without any score has the reward NaN,
never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from accord.errors import check_least


class Fusion(Protocol):
    """Rewards `[N]` from scores `[N, K]`, NaN where a site is absent, and weights `[N, K]`; a function qualifies."""

    def __call__(self, scores: Tensor, weights: Tensor, /) -> Tensor:
        """Return one reward per row, NaN where no site scored it."""
        ...


def top1(weights: Tensor) -> Tensor:
    """Return the one-hot of the largest weight of each row, `[N, K]`; the first of equal ones.

    A row without any weight is a router that abstains, and stays as it is: no site is asked about that completion.
    """
    chosen = torch.nn.functional.one_hot(weights.argmax(dim=-1), weights.shape[-1]).to(weights.dtype)
    return chosen * (weights > 0).any(dim=-1, keepdim=True)


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


def median(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the median `[N]` of the scores that are present, the mean of the middle two where they are even."""
    return _asked(scores, weights).nanquantile(0.5, dim=-1)


def minimum(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the worst score `[N]` that is present (Coste et al. 2023, arXiv 2310.02743, eq. 3)."""
    asked = _asked(scores, weights)
    worst = asked.nan_to_num(torch.inf).amin(dim=-1)
    return worst.where(~asked.isnan().all(dim=-1), torch.nan)


def trimmed_mean(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the mean `[N]` without the best and the worst score; of two or fewer, the plain mean."""
    asked = _asked(scores, weights)
    there = (~asked.isnan()).sum(dim=-1)
    order = asked.nan_to_num(torch.inf).sort(dim=-1).values
    place = torch.arange(asked.shape[-1], device=asked.device)
    cut = (there > 2).long()[:, None]
    kept = (place >= cut) & (place < there[:, None] - cut)
    return torch.where(kept, order, torch.nan).nanmean(dim=-1)


@dataclass(frozen=True)
class Pessimistic:
    """Mean minus `c` times the variance of the scores that are present (Coste et al. 2023, arXiv 2310.02743, eq. 4)."""

    c: float = 0.5

    def __post_init__(self) -> None:
        """Refuse a bonus for disagreement."""
        check_least(self, c=0)

    def __call__(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Return rewards `[N]`; the variance is over the sites, divided by their number."""
        asked = _asked(scores, weights)
        middle = asked.nanmean(dim=-1, keepdim=True)
        return (middle - self.c * (asked - middle).square().nanmean(dim=-1, keepdim=True)).squeeze(-1)


class PluralAlpha:
    """PluralLLM-α (arXiv 2512.08786): where sites disagree, weigh those more whose people have been served worse.

        h_k    what site k has got so far, in (0, 1)
        a      = softmax((1 − h) / T),  T = 0.1
        FI     = mean over completions of 1 / (1 + CoV²),  CoV = deviation / |mean| over sites
        R      = mean_k R̄_k                          where FI ≥ 0.9
                 log(1/K Σ_k exp(a_k R̄_k))           else

    Differs: its text is known to us second-hand; h is ours, the running mean of σ(R̄_k) at rate 0.1.
    """

    temperature = 0.1
    rate = 0.1
    fair = 0.9

    def __init__(self) -> None:
        self.history: Tensor | None = None  # h, [K]

    def __call__(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Return rewards `[N]`, and note what each site got."""
        asked = _asked(scores, weights)
        if self.history is None:
            self.history = asked.new_full((asked.shape[-1],), 0.5)
        middle = asked.nanmean(dim=-1)
        deviation = (asked - middle[:, None]).square().nanmean(dim=-1).sqrt()
        fairness = (1 / (1 + (deviation / middle.abs().clamp(min=1e-6)).square())).nanmean()
        if fairness >= self.fair:
            rewards = middle
        else:
            there = ~asked.isnan()
            wanting = ((1 - self.history) / self.temperature).expand_as(asked)
            urgent = wanting.masked_fill(~there, -torch.inf).softmax(dim=-1)
            scaled = (urgent * asked).masked_fill(~there, -torch.inf)
            rewards = scaled.logsumexp(dim=-1) - there.sum(dim=-1).log()
            rewards = rewards.where(there.any(dim=-1), torch.nan)
        got = asked.sigmoid().nanmean(dim=0)
        self.history = torch.where(got.isnan(), self.history, (1 - self.rate) * self.history + self.rate * got)
        return rewards

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run must know."""
        return {} if self.history is None else {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.history = state.get("history")


def _asked(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the scores `[N, K]` of the sites that count, NaN elsewhere."""
    return torch.where(weights > 0, scores, torch.nan)


EPSILON = 1e-4
"""What TRL adds to the deviation of a group's rewards; group relative and literal standardisation do as TRL does."""


def group_relative(scores: Tensor, weights: Tensor) -> Tensor:
    """Return A `[G]`: the mean over the experts of their scores standardised over the group.

        z_ik = (r_ik − mean_i r_ik) / (std_i r_ik + ε),    A_i = mean_k z_ik

    Only experts that are present count. The deviation is the sample's (divisor G − 1), as TRL's of a group. An expert
    with one opinion on all completions, or with a score for one alone, has z = 0. A positive affine change of an
    expert's scale changes nothing, but for ε.

    Args:
        scores: `[G, K]` of the completions of one prompt, NaN where a site is absent.
        weights: `[G, K]`; a site with weight is an expert, and all experts count alike.

    Source: FedGRPO (AAAI 2026), Remark 2: the group may be a set of completions.
    Differs: Eqs. 7–9 standardise over the experts, which is `literal`.
    """
    asked = _asked(scores, weights)
    centred = asked - asked.nanmean(dim=0, keepdim=True)
    there = (~asked.isnan()).sum(dim=0, keepdim=True)
    deviation = (centred.square().nansum(dim=0, keepdim=True) / (there - 1).clamp(min=1)).sqrt()
    return (centred / (deviation + EPSILON)).nanmean(dim=-1)


def literal(scores: Tensor, weights: Tensor) -> Tensor:
    """Return FedGRPO's Eqs. 7–9 as printed, `[G]`: 0 for every completion that anybody scored.

        R_ik = (r_ik − mean_k r_ik) / (std_k r_ik + ε),    A_i = Σ_k R_ik

    For one completion the mean over the experts is taken from each of them, so whatever they say sums to 0, and GRPO
    learns nothing. Of two experts one always says 1 and the other −1. An ablation.

    Args:
        scores: `[N, K]`, NaN where a site is absent.
        weights: `[N, K]`; a site with weight is an expert.
    """
    asked = _asked(scores, weights).double()
    centred = asked - asked.nanmean(dim=-1, keepdim=True)
    deviation = centred.square().nanmean(dim=-1, keepdim=True).sqrt()
    summed = (centred / (deviation + EPSILON)).nansum(dim=-1)
    summed = summed.where(summed.abs() > ROUNDING, 0.0)
    return summed.where(~asked.isnan().all(dim=-1), torch.nan).to(scores.dtype)


ROUNDING = 1e-6
"""Sums below it are rounding, which an optimiser that scales its gradient would take for a reward."""


def chunks(scores: Tensor, weights: Tensor) -> Tensor:
    """Return r `[G]`: the group is cut into M consecutive parts, and the k-th expert's scores stand for the k-th part.

    The scores stay as they are: GRPO centres them over all G, though they are on M scales. An absent expert's part is
    NaN. Parts differ in size by one at most. Experts are taken in the order of the sites, so their order matters.

    Args:
        scores: `[G, K]` of the completions of one prompt, NaN where a site is absent.
        weights: `[G, K]`; a site with weight is an expert.

    Source: FedGRPO's public code, its newest state. Differs: there a rest that M does not divide had reward 0.
    """
    return torch.cat(_parts(scores, weights))


def halves(scores: Tensor, weights: Tensor) -> Tensor:
    """Return `chunks`' r `[G]` with each part centred on its own mean: two halves where there are two experts.

    Source: FedGRPO's public code of July 2025, when the paper was submitted.
    """
    return torch.cat([part - part.nanmean() for part in _parts(scores, weights)])


def _parts(scores: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the scores that count in FedGRPO's code, part after part: M tensors that hold G scores in all."""
    experts = (weights > 0).any(dim=0).nonzero().flatten().tolist()
    if not experts:
        return [scores.new_full((len(scores),), torch.nan)]
    asked = _asked(scores, weights).tensor_split(len(experts))
    return [part[:, k] for part, k in zip(asked, experts, strict=True)]

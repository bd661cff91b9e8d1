"""Fuse what sites say of one group so that a lie is bounded: by ranks, a gate on spread, and a cap on influence.

    rank    v_ik = (#{j : s_jk < s_ik} − #{j : s_jk > s_ik}) / (n_k − 1)       in [−1, 1], ties share their places
    gate    v_ik = 0 where the deviation of s_·k is below d                     an opinion on nothing
    mean    R_i = Σ_k α_k v_ik / Σ_k α_k
    median, trimmed mean of the v_ik of the sites that are not gated
    deviations    R_i = D_i / max(d, deviation of D),  D_i = Σ_k α_k (s_ik − mean_j s_jk) / Σ_k α_k, gated as ranks are
    part    B_ik = (A_i − A_i^(−k)) / max(1, Σ_l Σ_i |A_i − A_i^(−l)| / Σ_i |A_i|)      of site k in a step
    cap     A_i ← A_i − Σ_k (1 − min(1, κ / c_k)) B_ik,   c_k = Σ_i |B_ik| / Σ_i |A_i|

A rank is the same for s and a s + b, a > 0: a site that scales or shifts its scores gains nothing, and by −1000 s it
gets no further than by −s. Standardising (`accord.routing.fusion.group_relative`) does that too, but divides by the
deviation: noise of 0.002 becomes a full vote. Here the deviation is held against the agreed range. A flat site keeps
its weight in the mean: were it left out, a liar would have the groups to itself in which honest sites see no
difference. It is left out of the order statistics, which its zeros would otherwise decide.

A^(−k) is what the advantages of the step, the rewards less their group's mean, would be without site k. c_k is a site's
influence on the step, whatever the rule, and a metric of every step. Where several sites could each turn a median the
parts would add up to more than there is; they are scaled down to that, for else the cap would turn the step round. A
site that judges alone has c_k = 1.

Ranks lose how much better an answer is, and where nobody lies that costs more than canaries do (docs/liars.md).
Deviations keep it within a group: a liar that canaries have not found yet pulls as far there as the agreed range lets
it. Between groups scores are of no one size, as those of a sigmoid that is near 0, so that each group is divided by its
own deviation.

The mean of ranks is large where sites agree. So their rewards are divided by one deviation a step (TRL's
`scale_rewards="batch"`), and no group where sites contradict each other gets the weight of one where they agree. With
deviations it does.

Sources: the median and the trimmed mean under Byzantine faults, Yin et al. 2018, arXiv 1803.01498; ranks in their place
are ours. No rule here knows who is right: a majority of liars wins, and one specialist is outvoted. For that there are
canaries (`accord.routing.canaries`). Krum and trust by consensus are left out: with 5 sites and 2 that collude they
choose the liars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from accord.errors import RecipeError, check_least
from accord.routing.fusion import Fusion, mixture, trimmed_mean

Rule: TypeAlias = Literal["mean", "median", "trimmed"]


def ranks(scores: Tensor) -> Tensor:
    """Return v `[G, K]` in [−1, 1]: each site's ranks of the scores it gave, 0 in the middle.

    Ties share the mean of their places; a score that is alone has rank 0.

    Args:
        scores: `[G, K]` of the completions of one prompt, NaN where a site is absent.
    """
    above = (scores[:, None] > scores[None]).sum(dim=1)  # NaN is neither above nor below
    below = (scores[:, None] < scores[None]).sum(dim=1)
    there = (~scores.isnan()).sum(dim=0)
    places = (above - below).to(scores.dtype) / (there - 1).clamp(min=1)
    return places.where(~scores.isnan(), torch.nan)


def flat(scores: Tensor, spread: float) -> Tensor:
    """Return of which sites `[K]` the scores `[G, K]` deviate by less than `spread`; those of a site absent do not.

    One score alone has no deviation.
    """
    return (deviation(scores) < spread) & ~scores.isnan().all(dim=0)


def deviation(values: Tensor) -> Tensor:
    """Return the deviation of each column of `[G, …]` over what is there: the sample's, 0 of one value or none."""
    there = (~values.isnan()).sum(dim=0)
    squares = (values - values.nanmean(dim=0)).square().nansum(dim=0)
    return (squares / (there - 1).clamp(min=1)).sqrt()


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Return `[N]` the value at half of the weight, the mean of two where half lies between them; NaN of none.

    Args:
        values: `[N, K]`, NaN where there is none.
        weights: `[N, K]`, non-negative.
    """
    used = torch.where(values.isnan(), 0.0, weights).double()
    total = used.sum(dim=-1, keepdim=True)
    order = values.nan_to_num(torch.inf).sort(dim=-1)
    reached = used.gather(-1, order.indices).cumsum(dim=-1) / total
    low, high = (reached >= 0.5 - 1e-9).int().argmax(dim=-1), (reached > 0.5 + 1e-9).int().argmax(dim=-1)
    middle = (order.values.gather(-1, torch.stack([low, high], dim=-1))).mean(dim=-1)
    return middle.where(total.squeeze(-1) > 0, torch.nan)


@dataclass(frozen=True)
class RobustConfig:
    """How ranks, or scores in their place, are fused."""

    spread: float = 0.01  # deviation, as a share of the agreed range, below which a site has no opinion on a group
    cap: float = 0.5  # largest share of one site in a step; 1 for none

    def __post_init__(self) -> None:
        """Refuse shares that are none, and a cap that leaves nothing."""
        check_least(self, spread=0, cap=0)
        for name in ("spread", "cap"):
            if getattr(self, name) > 1:
                raise RecipeError(f"{name} must be at most 1, got {getattr(self, name)}; lower robust.{name}")
        if self.cap == 0:
            raise RecipeError("cap must be above 0, got 0: no site could say anything; raise robust.cap")


@dataclass(frozen=True)
class Ranks:
    """The fused ranks of a group `[G]`: a `Fusion` of the completions of one prompt.

    Attributes:
        rule: the weighted mean, the weighted median, or the mean without the best and the worst.
        spread: deviation below which a site is flat, in units of a score.
    """

    rule: Rule = "mean"
    spread: float = 0.0

    def __call__(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Return rewards `[G]` in [−1, 1]; 0 where all that answered are flat, NaN where nobody did.

        Args:
            scores: `[G, K]`, NaN where a site is absent.
            weights: `[G, K]`, non-negative; a site of weight 0 is not heard.
        """
        asked = torch.where(weights > 0, scores, torch.nan)
        given, silent = ranks(asked), flat(asked, self.spread)
        if self.rule == "mean":
            return mixture(torch.where(silent & ~given.isnan(), 0.0, given), weights)
        voting = torch.where(silent, torch.nan, given)
        fused = _ORDER[self.rule](voting, weights)
        return fused.where(~voting.isnan().all(dim=-1), torch.where(given.isnan().all(dim=-1), torch.nan, 0.0))


_ORDER: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {"median": weighted_median, "trimmed": trimmed_mean}


@dataclass(frozen=True)
class Deviations:
    """The weighted mean of what each site's scores are above its own mean of the group, in deviations of that mean.

    Attributes:
        spread: deviation below which a site is flat, and the least that is divided by, in units of a score.
    """

    spread: float

    def __call__(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Return rewards `[G]`, NaN where nobody answered.

        Args:
            scores: `[G, K]`, NaN where a site is absent.
            weights: `[G, K]`, non-negative; a site of weight 0 is not heard.
        """
        return VarianceGate(self._fuse, self.spread)(scores, weights)

    def _fuse(self, scores: Tensor, weights: Tensor) -> Tensor:
        fused = mixture(scores - scores.nanmean(dim=0), weights)
        return fused / deviation(fused).clamp(min=max(self.spread, 1e-9))


UNCLIPPED: Final = 4.0
"""The range of standardised scores that no range was agreed for: two deviations on each side."""


@dataclass(frozen=True)
class VarianceGate:
    """A fusion for which a site that sees no difference within a group has one opinion on all of it.

        r_ik ← mean_i r_ik    where the deviation of r_·k is below `spread`

    Standardised scores (`accord.routing.fusion.group_relative`) of such a site are 0, where noise of any size would be
    a full vote. The site keeps its seat, as one that scores all alike does.

    Attributes:
        fusion: of one group.
        spread: the deviation, in units of a score; 0 for no gate.
    """

    fusion: Fusion
    spread: float

    def __call__(self, scores: Tensor, weights: Tensor) -> Tensor:
        """Return `fusion`'s rewards `[G]` of the gated scores, from scores and weights `[G, K]`, NaN for absent."""
        given = torch.where(weights > 0, scores, torch.nan)
        gated = flat(given, self.spread) & ~given.isnan()
        return self.fusion(torch.where(gated, given.nanmean(dim=0), scores), weights)


def capped(fuse: Fusion, groups: Sequence[tuple[Tensor, Tensor]], cap: float) -> tuple[list[Tensor], Tensor]:
    """Fuse the groups of a step, and hold each site's influence on it to `cap`.

    Args:
        fuse: of one group; a rule that `torch.vmap` takes, without a state or a branch on what scores are.
        groups: scores and weights of each, both `[G, K]`.
        cap: κ in (0, 1].

    Returns:
        The rewards `[G]` of every group, with the mean that they had, and c `[K]` as it was before the cap; 0 where
        nothing moves the policy.
    """
    if not groups:
        return [], torch.zeros(0)
    fused = _each_left_out(fuse, groups)
    rewards = [each[-1] for each in fused]
    advantages = [_centred(each) for each in fused]
    total = sum(float(a[-1].abs().sum()) for a in advantages)
    if not total:
        return rewards, torch.zeros(len(fused[0]) - 1)
    parts = [a[-1] - a[:-1] for a in advantages]
    moved = torch.stack([part.abs().sum(dim=-1) for part in parts]).sum(dim=0) / total
    shares = moved / moved.sum().clamp(min=1)
    excess = ((shares - cap).clamp(min=0) / moved.clamp(min=1e-30))[:, None]
    return [r - (excess * part).sum(dim=0) for r, part in zip(rewards, parts, strict=True)], shares


def _each_left_out(fuse: Fusion, groups: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return of every group the rewards `[K + 1, G]` without the first site, the second, …, and with all of them.

    Groups of one shape are fused at once.
    """
    every = torch.vmap(torch.vmap(fuse, in_dims=(None, 0)), chunk_size=16)
    found: list[Tensor] = [torch.empty(0)] * len(groups)
    for shape in {scores.shape for scores, _ in groups}:
        places = [n for n, (scores, _) in enumerate(groups) if scores.shape == shape]
        scores, weights = (torch.stack(each) for each in zip(*(groups[n] for n in places), strict=True))
        kept = torch.cat([1 - torch.eye(shape[-1]), torch.ones(1, shape[-1])]).to(weights)
        fused = every(scores, weights[:, None] * kept[:, None])
        for place, rewards in zip(places, fused, strict=True):
            found[place] = rewards
    return found


def _centred(rewards: Tensor) -> Tensor:
    """Return the advantages of rewards `[…, G]` of a group, 0 where there is no reward."""
    return (rewards - rewards.nanmean(dim=-1, keepdim=True)).nan_to_num(0.0)

"""Sites that are honest on hidden questions alone: they contradict on ordinary ones those with whom they agree there.

    order        +1, 0, −1: which of two answers to a question a site gives the higher score, 0 where both are equal or
                 where the site has no opinion on an ordinary question (`accord.routing.robust.flat`); on hidden ones
                 the smallest difference counts, as it does for trust
    q_kl         the share of the pairs of answers, that both sites k and l order, which they order alike
    memory n     S ← (1 − 1/n) S + q,  F ← (1 − 1/n) F + (1 − q)      of every question, for two sites, a type, and
                 hidden or ordinary questions; the posterior is Beta(1 + S, 1 + F)
    contradict   q_kl is above ½ on hidden questions, more than z deviations below ½ on ordinary ones, and the two
                 differ by more than z deviations of their difference
    two-faced    Σ_l c_l [k and l contradict] > 0.45 Σ_l c_l       over k, and the sites whose orders were compared with
                 its own on both kinds of questions;
                 a site that is two-faced already remains it as long as the same holds with z = 0

A site that recognises canaries can be right at all of them, and lie at everything else (the attack `off-canary`). It
cannot agree with honest sites on orders that it turns round. That alone says nothing: sites may differ because they
know different things. But those differ on hidden questions too, so that only the change is held against a site. Which
of the two has changed, their number must tell: two that lie among five equally trusted ones contradict three, and each
of these contradicts two. c_l is 1 for a site that is trusted as a newcomer is, and less for one that is trusted less
(`accord.routing.canaries`).

**Where it fails.** It hears votes, so that liars who are half of the trust, or more, have honest sites named in their
place: one honest site that is trusted less than the one liar beside it, or an expert whom the router follows and two
liars contradict. So by default it tells, and a person decides (`leave_out`). A lie that turns less than half of the
orders round, such as one answer that is promoted, is not found. Agreement on ordinary questions is that of answers that
the policy gives, and may fall as the policy learns what only some sites like, or where answers differ in form alone; it
must fall below chance to count. z is of one look, and there is one after every step; how often honest sites are named
in a run, docs/liars.md says.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from accord.routing.robust import flat

SHARE: Final = 0.45
"""Of the trusted sites, those that contradict one that is set aside: a tie is a half, two of five are 0.4."""


class Contradictions:
    """Remember how often every two sites agree on hidden and on ordinary questions.

    Args:
        sites: K.
        kinds: how many question types there are.
        memory: n, in questions of a type.
        alarm: z.
        spread: deviation of a site's scores, in units of a score, below which it has no opinion on ordinary questions.

    Attributes:
        counts: S and F, `[2, kinds, K, K, 2]`, of ordinary questions first.
    """

    def __init__(self, sites: int, kinds: int, *, memory: float, alarm: float, spread: float = 0.0) -> None:
        self.memory = memory
        self.alarm = alarm
        self.spread = spread
        self.counts = torch.zeros(2, kinds, sites, sites, 2, dtype=torch.double)

    def learn(self, kind: int, scores: Tensor, *, hidden: bool) -> tuple[Tensor, Tensor]:
        """Take in how the sites order the answers to a question; return their `agreement` on it.

        Args:
            kind: the number of its type.
            scores: `[G, K]` of its answers, NaN where a site has given none.
            hidden: whether it is a canary.
        """
        share, compared = agreement(scores, 0.0 if hidden else self.spread)
        counts = self.counts[int(hidden), kind]
        self.counts[int(hidden), kind] = take_in(counts, share, compared, self.memory)
        return share, compared

    def expected(self, kind: int) -> Tensor:
        """Return how often every two sites `[K, K]` have agreed on ordinary questions of a type."""
        return posterior(self.counts[0, kind])[0]

    def contradict(self, kind: int, alarm: float) -> Tensor:
        """Return which sites `[K, K]` contradict each other on ordinary questions of a type and not on hidden ones.

        Args:
            kind: the number of the type.
            alarm: z.
        """
        mean, variance = posterior(self.counts[:, kind])
        below = mean[0] + alarm * variance[0].sqrt() < 0.5
        return below & (mean[1] > 0.5) & (mean[1] - mean[0] > alarm * variance.sum(dim=0).sqrt())

    def two_faced(self, kind: int, trust: Tensor, before: Tensor) -> Tensor:
        """Return which sites `[K]` too many trusted ones contradict on ordinary questions of a type.

        Where nobody is trusted it is as it was before.

        Args:
            kind: the number of the type.
            trust: c `[K]` in 0..1.
            before: which were two-faced at the last look, `[K]`.
        """
        counts = self.counts[:, kind]
        first, nobody = against(self.contradict(kind, self.alarm), counts, trust, SHARE)
        still, _ = against(self.contradict(kind, 0), counts, trust, SHARE)
        return torch.where(before, still | nobody, first)


def agreement(scores: Tensor, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return q and whether it is known, both `[K, K]`, of a question's scores `[G, K]`.

    Args:
        scores: NaN where a site has given none.
        spread: a site whose scores deviate by less has no opinion.
    """
    i, j = torch.combinations(torch.arange(len(scores))).T
    order = (scores[i] - scores[j]).sign().nan_to_num().double()  # [pairs, K]
    if spread:
        order *= ~flat(scores, spread)
    both = order.abs().T @ order.abs()
    return (order.T @ order / both.clamp(min=1) + 1) / 2, both > 0


def take_in(counts: Tensor, share: Tensor, known: Tensor, memory: float) -> Tensor:
    """Return S and F `[…, K, K, 2]` after one question more, of which `share` and `known` `[K, K]` tell."""
    new = (1 - 1 / memory) * counts + torch.stack([share, 1 - share], dim=-1)
    return torch.where(known[..., None], new, counts)


def against(apart: Tensor, counts: Tensor, trust: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return of which sites too many trusted ones are apart, and where nobody is trusted, both `[…, K]`.

    Args:
        apart: which sites are, `[…, K, K]`.
        counts: S and F of both kinds of questions, `[2, …, K, K, 2]`; sites that were not compared have no say.
        trust: c in 0..1, `[…, K]`.
        share: of the trust, beyond which they are too many.
    """
    compared = counts.sum(dim=-1).gt(0).all(dim=0).to(trust.dtype)
    most = share * (compared @ trust[..., None])[..., 0]
    return (apart.to(trust.dtype) @ trust[..., None])[..., 0] > most, most == 0


def posterior(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of Beta(1 + S, 1 + F), S and F in the last dimension of `counts`."""
    right, wrong = counts[..., 0] + 1, counts[..., 1] + 1
    mean = right / (right + wrong)
    return mean, mean * (1 - mean) / (right + wrong + 1)

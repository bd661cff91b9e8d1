"""Scale rewards by how rare a prompt's domain is, and how hard the prompt (DISCO).

    w_d(q)  = log(1 + 1 / p_d)             p_d, the share of the domain of prompt q among the prompts
    w_s(q)  = 1 / (SC(q) + ε)              SC(q) = mean_i r_i, the mean over the group's completions
    r_i'    = r_i · w_d(q) · w_s(q),       A_i = r_i' − mean_j r_j'         divided by no deviation

Source: Zhou et al. 2025, DISCO, arXiv 2505.15074 (its weight `Log` and its code's constants). There rewards are 0 or 1,
the domain is a label and ε is 1e-5. Differs: r is a fused score brought from the agreed range into [0, 1], and ε is
0.05, since a group whose best answer is 0.01 would else be blown up a hundred times. Without labels, which no server
has, the domain of a prompt is the site that is asked about most of its completions, and p_k is a running share, ours:

    p_k = (c_k + 1) / (Σ_j c_j + K)        c_k, the prompts that site k has judged up to this step, this one included
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from accord.alignment.reward import Group
from accord.federation.messages import ScoreRange
from accord.types import Question

EPSILON: Final = 0.05
"""ε: least mean score that a group is taken to have, as a share of the range."""


class DomainScaling:
    """Rewards of a step's groups, scaled: a `Scaling`.

    Args:
        sites: K.
        scores: the range of the rewards.
        shares: p_d of each question type; None for the running shares of the sites.
    """

    def __init__(self, sites: int, scores: ScoreRange, shares: Mapping[str, float] | None = None) -> None:
        self.scores, self.shares = scores, shares
        self.judged = torch.zeros(sites, dtype=torch.float64)  # c [K]

    def __call__(
        self, groups: Sequence[Group], weights: Sequence[Tensor], rewards: Sequence[Tensor], /
    ) -> list[Tensor]:
        """Return r' `[G]` of every group; NaN stays NaN, and a group without any score is no site's prompt.

        Args:
            groups: of a step.
            weights: of each, `[G, K]`; a row without weight is a completion that no site was asked about.
            rewards: of each, `[G]`.
        """
        if self.shares is not None:
            shares = [self.shares[group.kind] for group in groups]
        else:
            total = torch.stack([of_group.sum(dim=0) for of_group in weights])
            asked, site = (total > 0).any(dim=1), total.argmax(dim=1)
            self.judged += torch.bincount(site[asked], minlength=len(self.judged))
            known = (self.judged + 1) / (self.judged.sum() + len(self.judged))
            shares = known[site].tolist()
        low, width = self.scores.low, self.scores.high - self.scores.low
        return [scaled((of_group - low) / width, share) for of_group, share in zip(rewards, shares, strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return c, which a resumed run must know."""
        return {"judged": self.judged}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.judged = state["judged"]


def scaled(rewards: Tensor, share: float) -> Tensor:
    """Return r' `[G]` of a group's rewards r `[G]` in [0, 1], NaN where there is none; `share` is p_d in (0, 1]."""
    weight = torch.tensor(1 + 1 / share).log()
    return rewards * weight / (rewards.nanmean() + EPSILON)


def type_shares(questions: Sequence[Question], *, balanced: bool) -> dict[str, float]:
    """Return p_d of every question type among the prompts that are drawn: all alike where the draw is `balanced`."""
    counts = Counter(q.question_type for q in questions)
    return {name: 1 / len(counts) if balanced else n / len(questions) for name, n in counts.items()}

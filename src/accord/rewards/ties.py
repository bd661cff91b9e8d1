"""Judgements that find two answers equally good, by Davidson's extension of Bradley–Terry.

With strengths π = e^R, margin m = R(x, y⁺) − R(x, y⁻) and ν > 0,

    P(y⁺ ≻ y⁻) = π⁺ / (π⁺ + π⁻ + ν √(π⁺π⁻)) = e^(m/2) / (e^(m/2) + e^(−m/2) + ν)
    P(y⁺ ~ y⁻) =                               ν       / (e^(m/2) + e^(−m/2) + ν)

(Davidson 1970, "On extending the Bradley–Terry model to accommodate ties in paired comparison experiments", JASA
65:317, eq. 2.1, https://doi.org/10.1080/01621459.1970.10481082). Equally good answers are a tie with probability
ν / (2 + ν), a third for ν = 1. As ν → 0 this is Bradley–Terry. A tie pulls the two scores together, in proportion to
how far they are apart; its gradient is

    ∂ −log P(~) / ∂m = sinh(m/2) / (2 cosh(m/2) + ν)

Differs: ν is given and not estimated, so that a model is a backbone and a head and nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def davidson(margin: Tensor, tied: Tensor, nu: float) -> Tensor:
    """Return the negative log-likelihood of each judgement, `[N]`, in nats.

    Args:
        margin: m, `[N]`.
        tied: whether the two answers were found equally good, boolean `[N]`; else the first was preferred.
        nu: ν, above 0.
    """
    half, tie = margin / 2, torch.full_like(margin, math.log(nu))
    return torch.stack((half, -half, tie)).logsumexp(0) - torch.where(tied, tie, half)

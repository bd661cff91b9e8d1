"""The discriminative objective DisCO: raise what the good completions score, lower what the bad ones do.

    s(o)  = 1/|o| Σ_t log π(o_t)                                           mean log-likelihood of a completion
    J     = mean_q [ mean_{o⁺} s − τ log mean_{o⁻} exp(s / τ) ]            o⁺ good, o⁻ bad completions of prompt q
    loss  = −J + β/2 [KL − δ]₊²,     KL = mean_t (log π_old − log π)       π_old drew the completions

A prompt whose completions are all alike adds nothing to J, and counts among the prompts that the mean is over. The
constraint acts only where completions are used for more than one update (`alignment.iterations`): before, KL = 0.

Source: Li et al. 2025, arXiv 2505.12366, with its score log-L, τ = 10, β = 1000 and δ = 1e-4. Differs: there a reward
is 0 or 1; of a learned reward, good is what is above the group's mean by a tenth of its deviation and bad what is below
it by as much. Of fewer than a hundred completions that makes 1 good and 0 bad. The loss has its own value here, and not
only its own gradient, as in the public code. The KL term to the reference, which they have not, stays beside it
(`accord.alignment.trainer`).

Not to be confused with DISCO, which scales rewards (`accord.alignment.difficulty`).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

CUT: Final = 0.1
"""Deviations from the group's mean that make a completion good or bad; between them it is neither."""


def discriminative_loss(
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    groups: Tensor,
    /,
    *,
    temperature: float = 10.0,
    penalty: float = 1e3,
    radius: float = 1e-4,
) -> Tensor:
    """Return the loss of some whole groups.

    Args:
        logps: log π of every token, `[N, T]`.
        old: log π_old, `[N, T]`.
        advantages: rewards less their group's mean, by its deviation, `[N]`; 0 where there is no reward.
        mask: 1 for tokens of the completion, `[N, T]`.
        groups: number of each completion's group, `[N]`.
        temperature: τ.
        penalty: β.
        radius: δ, in nats.
    """
    score = (logps * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    member = groups.unique()[:, None] == groups  # [Q, N]
    good, bad = member & (advantages > CUT), member & (advantages < -CUT)
    told = good.any(dim=1) & bad.any(dim=1)
    good, bad = good[told], bad[told]
    raised = (score * good).sum(dim=1) / good.sum(dim=1)
    held = (score / temperature).expand_as(bad).masked_fill(~bad, -torch.inf).logsumexp(dim=1) - bad.sum(dim=1).log()
    objective = (raised - temperature * held).sum() / len(member)
    kl = ((old - logps) * mask).sum() / mask.sum().clamp(min=1)
    loss: Tensor = penalty / 2 * (kl - radius).clamp(min=0).square() - objective
    return loss

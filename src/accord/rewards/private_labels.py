"""A reward model that hides which answer of a pair was preferred, and nothing else: randomised response.

    f  = 1 / (1 + e^ε)                                     a label y_i = ±1 is flipped with this probability, ỹ_i
    ℓ̃(m, ỹ) = ((1 − f) ℓ(ỹ m) − f ℓ(−ỹ m)) / (1 − 2f)      ℓ(t) = −log σ(t), m = θᵀ z;   E ℓ̃(m, ỹ) = ℓ(y m)
            = ℓ(ỹ m) − f / (1 − 2f) ỹ m                    since ℓ(−t) = ℓ(t) + t: convex
    θ  ←  θ − η ∇ mean_i ℓ̃(θᵀ z_i, ỹ_i)                    all pairs at every step; the mean of the second half of the θ

Labels are flipped once, before anything reads them; what follows is post-processing, so that no step, no projection and
no standardisation costs more. ε holds without δ. The images, prompts and answers are used as they are: who sees the
model may learn that a pair was there, and never, but for ε, which of its answers won.

In two stages (PROPS) the first half of the pairs trains a head by ℓ̃, whose labels ŷ join the noisy ones ỹ of the other
half, by maximum likelihood:

    γ  = (P[ŷ ≠ ỹ] − f) / (1 − 2f)                         how often the head is wrong, from how often they disagree
    y* = sign(ỹ log (1 − f) / f + ŷ log (1 − γ) / γ)       trains the second head, by ℓ

Sources: Warner 1965 (https://doi.org/10.1080/01621459.1965.10480775); Natarajan et al. 2013 (Learning with noisy
labels, lemma 1) for ℓ̃; Ghazi et al. 2021 (arXiv 2102.06062) for privacy of labels; Teku et al. 2025 (arXiv
2508.06783) for PROPS.
Differs from PROPS: a linear head on frozen features, and the first stage has the unbiased loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from accord.rewards.model import Standardisation
from accord.rewards.noise import SecretNoise
from accord.rewards.private import RATE, Privacy, private_projection, to_sphere
from accord.types import PreferencePair


def draw_flips(count: int, flip: float, noise: SecretNoise) -> Tensor:
    """Return which of so many labels are flipped, `[N]`: each with probability f."""
    return noise.uniform(count) < flip


def randomise(pairs: Sequence[PreferencePair], flipped: Tensor) -> list[PreferencePair]:
    """Return pairs with noisy labels: those that are flipped have their rejected answer preferred."""
    return [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) if turned else pair
        for pair, turned in zip(pairs, flipped.tolist(), strict=True)
    ]


def descend(rows: Tensor, flip: float, privacy: Privacy, *, on_step: Callable[[], None] = lambda: None) -> Tensor:
    """Minimise the mean unbiased loss of ỹ z `[N, k]`; return θ `[k]`. With f = 0 it is Bradley–Terry's."""
    push = flip / (1 - 2 * flip)
    theta = rows.new_zeros(rows.shape[1])
    total, averaged = torch.zeros_like(theta), 0
    for step in range(privacy.steps):
        gradient = -((torch.sigmoid(-(rows @ theta)) + push)[:, None] * rows).mean(dim=0)
        theta = theta - (privacy.learning_rate or RATE) * gradient
        if 2 * step >= privacy.steps - 1:
            total, averaged = total + theta, averaged + 1
        on_step()
    return total / averaged


def likeliest_labels(noisy: Tensor, guessed: Tensor, flip: float) -> Tensor:
    """Return y*, ±1 `[N]`: labels of randomised response and of a model together, by maximum likelihood.

    Args:
        noisy: ỹ, ±1 `[N]`, wrong with probability `flip`.
        guessed: ŷ, ±1 `[N]`, wrong as often as its disagreement with ỹ says.
        flip: f.
    """
    disagreed = float((noisy != guessed).double().mean())
    wrong = min(0.5, max(1e-6, (disagreed - flip) / (1 - 2 * flip)))
    flip = max(flip, 1e-12)  # a label that was never flipped is believed
    trust = math.log((1 - flip) / flip)
    joined = trust * noisy + math.log((1 - wrong) / wrong) * guessed
    return torch.where(joined >= 0, 1.0, -1.0).to(noisy)


def label_head(
    noisy: Tensor, flip: float, privacy: Privacy, noise: SecretNoise, *, on_step: Callable[[], None] = lambda: None
) -> Tensor:
    """Train the head on noisy labels, in one stage or two; return w `[D]`.

    Args:
        noisy: φ of the noisily chosen and rejected answers, `[N, 2, D]`.
        flip: f.
        privacy: settings; of `stages`, `dimensions`, `steps` and `learning_rate`.
        noise: halves the pairs by lot, for two stages.
        on_step: called after every step, told nothing.
    """
    rows = to_sphere((noisy[:, 0] - noisy[:, 1]).double())
    # Second moments are the same whichever answer won: no label is read, and the rest is not protected.
    projection = private_projection(rows, torch.arange(len(rows)), privacy.dimensions, 0.0, noise)
    rows = to_sphere(rows @ projection)
    if privacy.stages == 1:
        return projection @ descend(rows, flip, privacy, on_step=on_step)
    first = torch.zeros(len(rows), dtype=torch.bool)
    first[noise.uniform(len(rows)).argsort()[: len(rows) // 2]] = True
    theta = descend(rows[first], flip, privacy, on_step=on_step)
    rest = rows[~first]  # ỹ z, so that ỹ is 1 here, and ŷ is relative to it
    guessed = torch.where(rest @ theta >= 0, 1.0, -1.0).to(rest)
    labels = likeliest_labels(torch.ones_like(guessed), guessed, flip)
    return projection @ descend(labels[:, None] * rest, 0.0, privacy, on_step=on_step)


def standardisation_of(scores: Tensor) -> Standardisation:
    """Return mean and deviation of raw scores `[N, 2]`, of both answers alike: no label is read."""
    return Standardisation(float(scores.mean()), float(scores.std().clamp_min(1e-12)))

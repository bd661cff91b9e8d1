"""Attacks on what was trained privately that would find a lie in its certificate; of a head in seconds.

    LiRA          which pairs were members: is the margin of pair i, R(c_i) − R(r_i), likelier under shadow heads that
                  trained on it than under those that did not?   Λ_i = log N(m_i; in) − log N(m_i; out)
    one run       canary pairs, each trained on with probability ½; guess from a score which were. Where v of r
                  guesses are right, and (ε, δ) held, that many would be right with probability at most that of
                  Binomial(r, e^ε / (1 + e^ε)), so that the largest ε at which it is below 5 % is a lower bound.
                  The score is a canary's margin, or, where the sum ĝ of all noisy gradients is seen, its presence
                  in it: m = argmin |ĝ − Gᵀ m|² + λ |m|², with each unit's own clipped gradient a row of G.
                  Of labels what is guessed is not which canaries were in, but which of their answers won
    extraction    a surrogate head that is fitted to every reply of a run, exact, in 8 bits, or ranks alone

Sources: Carlini et al. 2022 (arXiv 2112.03570, algorithm 1, with one variance for all pairs); Steinke, Nasr and
Jagielski 2023 (arXiv 2305.08846, theorem 5.2). Differs: the theorem's term in δ,
at most 2 m δ for m canaries (4e-4 of 200 at 1e-6), is left out; a whole training is audited, projection included; an
auditor who sees gradients knows those of all units, and guesses by least squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from accord.errors import DataError
from accord.rewards.private import to_sphere

Training: TypeAlias = Callable[[Tensor, int], Tensor]
"""Features of pairs `[N, 2, D]` and the number of a training → a head `[D]`; every number has its own randomness."""


def margins(head: Tensor, features: Tensor) -> Tensor:
    """Return R(c) − R(r) of every pair, `[N]`."""
    return (features[:, 0] - features[:, 1]).double() @ head.double()


@dataclass(frozen=True)
class Leak:
    """How well members are told from others: area under the curve, and true positives at rates of false ones."""

    auc: float
    at_001: float  # at 0.1 %
    at_01: float  # at 1 %


def leak(members: Tensor, others: Tensor) -> Leak:
    """Measure scores that should be higher for members, both 1-D."""
    below = torch.searchsorted(others.sort().values, members.contiguous())
    ties = torch.searchsorted(others.sort().values, members.contiguous(), right=True) - below
    auc = float((below + ties / 2).double().mean() / len(others))

    def at(rate: float) -> float:
        threshold = others.sort(descending=True).values[math.floor(rate * len(others))]
        return float((members > threshold).double().mean())

    return Leak(auc, at(0.001), at(0.01))


def lira(features: Tensor, train: Training, *, shadows: int, targets: int, seed: int) -> Leak:
    """Attack `targets` heads, each trained on a random half of the pairs, with `shadows` heads of the same kind.

    The scores of all targets are pooled.

    Raises:
        DataError: fewer than 4 shadows, which leave no spread to measure.
    """
    if shadows < 4:
        raise DataError(f"an attack needs at least 4 shadow heads, got {shadows}; raise shadows")
    generator = torch.Generator().manual_seed(seed)
    count = shadows + targets
    inside = torch.stack([torch.rand(len(features), generator=generator) < 0.5 for _ in range(count)])
    found = torch.stack([_normal(margins(train(features[inside[n]], n), features)) for n in range(count)])
    known, used = found[:shadows], inside[:shadows].double()
    mean = {}
    residual = torch.zeros_like(known)
    for name, mask in (("in", used), ("out", 1 - used)):
        mean[name] = (known * mask).sum(0) / mask.sum(0).clamp_min(1)
        residual += (known - mean[name]) * mask
    variance = residual.square().sum() / max(1, known.numel() - 2 * known.shape[1])
    ratio = ((found[shadows:] - mean["out"]).square() - (found[shadows:] - mean["in"]).square()) / (2 * variance)
    member = inside[shadows:]
    return leak(ratio[member], ratio[~member])


def _normal(values: Tensor) -> Tensor:
    """Bring margins to one scale: that of a head says nothing of its members."""
    scaled: Tensor = values / values.square().mean().sqrt().clamp_min(1e-12)
    return scaled


def canaries(features: Tensor, count: int, seed: int) -> Tensor:
    """Return pairs `[count, 2, D]` that nothing but membership teaches: answers of the site's, labels by lot.

    They are differences of random pairs of answers, so that a canary's label is right with probability ½.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = features.flatten(0, 1)
    chosen = torch.randint(len(answers), (count, 2), generator=generator)
    chosen[:, 1] = (chosen[:, 1] + (chosen[:, 0] == chosen[:, 1])) % len(answers)
    return answers[chosen]


def epsilon_bound(right: int, guesses: int, confidence: float = 0.95) -> float:
    """Return the largest ε that so many right guesses refute at `confidence`; 0 where they refute none.

    P[Binomial(r, e^ε / (1 + e^ε)) ≥ v] ≤ 1 − confidence
    """

    def tail(epsilon: float) -> float:
        p = 1 / (1 + math.exp(-epsilon))
        logs = (
            math.lgamma(guesses + 1) - math.lgamma(k + 1) - math.lgamma(guesses - k + 1)
            + k * math.log(p) + (guesses - k) * math.log1p(-p)
            for k in range(right, guesses + 1)
        )  # fmt: skip
        return sum(map(math.exp, logs))

    if guesses == 0 or tail(0.0) > 1 - confidence:
        return 0.0
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) <= 1 - confidence else (low, middle)
    return low


def draw_bits(count: int, seed: int) -> Tensor:
    """Return what an audit guesses, `[M]`: whether each of so many canaries is in, each with probability ½."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5


def guess_bound(scores: Tensor, inside: Tensor, confidence: float = 0.95) -> float:
    """Return a lower bound of ε, by guesses from any score that is higher for canaries that are in.

    The canaries of the largest and the smallest scores are guessed to be in and out, at numbers that were fixed
    before: a tenth and a quarter of all, and all; the bound is the best of the three, each at a third of the error.

    Args:
        scores: of the canaries, `[M]`; computed without `inside`.
        inside: of `draw_bits`, `[M]`.
        confidence: of the bound.
    """
    order = scores.argsort(descending=True)
    best = 0.0
    for guesses in (len(scores) // 10, len(scores) // 4, len(scores)):
        half = guesses // 2
        right = int(inside[order[:half]].sum()) + int((~inside[order[len(order) - half :]]).sum())
        best = max(best, epsilon_bound(right, 2 * half, 1 - (1 - confidence) / 3))
    return best


def presence(seen: Tensor, gradients: Tensor, ridge: float = 0.1) -> Tensor:
    """Return how much of each unit's gradient is in a sum of gradients, `[U]`, by least squares.

    Args:
        seen: ĝ, summed over all steps, `[Ψ]`, up to a factor.
        gradients: of every unit that may be in it, `[U, Ψ]`; each is scaled to length 1, as long as a clipped one.
        ridge: λ, which keeps gradients that are nearly in each other's span from being told by noise.
    """
    rows = to_sphere(gradients.double())
    solved: Tensor = torch.linalg.solve(rows @ rows.T + ridge * torch.eye(len(rows)).double(), rows @ seen.double())
    return solved


def apart(gradients: Tensor, count: int) -> Tensor:
    """Return which so many units' gradients are the least in each other's span, `[count]`: those make good canaries.

    Each is the one that is farthest from the span of those before, by a Cholesky factorisation with pivots.

    Args:
        gradients: of the units to choose from, `[U, Ψ]`; only their directions count.
        count: how many.

    Raises:
        DataError: there are fewer units.
    """
    if count > len(gradients):
        raise DataError(f"{count} canaries cannot be chosen from {len(gradients)} units; give more, or lower count")
    rows = to_sphere(gradients)
    products = (rows @ rows.T).double()
    left, factor, chosen = products.diagonal().clone(), products.new_zeros(len(rows), count), []
    for n in range(count):
        best = int(left.argmax())
        factor[:, n] = (products[:, best] - factor[:, :n] @ factor[best, :n]) / left[best].clamp_min(1e-12).sqrt()
        left -= factor[:, n].square()
        chosen.append(best)
        left[chosen] = -torch.inf
    return torch.tensor(chosen)


def one_run(features: Tensor, planted: Tensor, train: Training, *, seed: int, confidence: float = 0.95) -> float:
    """Audit one training of a head: return a lower bound of its ε, with canaries beside the site's own pairs.

    What is trained otherwise is audited by `draw_bits` and `guess_bound` around it.

    Args:
        features: of the site's pairs, `[N, 2, D]`.
        planted: of the canaries, `[M, 2, D]`.
        train: what is audited.
        seed: of which canaries are in.
        confidence: of the bound.
    """
    inside = draw_bits(len(planted), seed)
    return guess_bound(margins(train(torch.cat([features, planted[inside]]), seed), planted), inside, confidence)


Replies: TypeAlias = Literal["exact", "8 bits", "ranks"]


def surrogate(states: Tensor, scores: Tensor, replies: Replies) -> Tensor:
    """Fit a head to what a site replied, `[D]`: least squares, or Bradley–Terry on the order within groups.

    Args:
        states: features of candidates by group, `[P, G, D]`.
        scores: the head's scores of them, `[P, G]`; what the replies keep of them is all that is used.
        replies: scores as they are; in 256 steps between the least and the largest; or their order in each group.
    """
    states, scores = states.double(), scores.double()
    if replies == "ranks":
        order = scores.argsort(dim=1, descending=True)
        ranked = states.gather(1, order[..., None].expand_as(states))
        rows = (ranked[:, :-1] - ranked[:, 1:]).flatten(0, 1)
        rows = rows / rows.norm(dim=1).median()
        head = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = -torch.nn.functional.logsigmoid(rows @ head).mean() + 1e-5 * head.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        return head.detach()
    if replies == "8 bits":
        low, high = scores.min(), scores.max()
        scores = low + (high - low) / 255 * ((scores - low) / (high - low) * 255).round()
    rows = torch.cat([states.flatten(0, 1), torch.ones(states.shape[0] * states.shape[1], 1).double()], dim=1)
    solved = torch.linalg.lstsq(rows, scores.flatten()[:, None], driver="gelsd").solution
    head_of: Tensor = solved[:-1, 0]
    return head_of


def agreement(head: Tensor, other: Tensor, states: Tensor) -> float:
    """Return the share of pairs within groups that two heads put in the same order; states `[P, G, D]`."""
    one, two = (states.double() @ each.double() for each in (head, other))
    same = (one[:, :, None] > one[:, None]) == (two[:, :, None] > two[:, None])
    off = ~torch.eye(states.shape[1], dtype=torch.bool)
    return float(same[:, off].double().mean())

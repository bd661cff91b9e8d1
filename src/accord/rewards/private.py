"""A reward model with a guarantee: a Bradley–Terry head on frozen features, trained by DP-SGD.

    x_i = (φ(c_i) − φ(r_i)) / |·|                       φ the frozen backbone's last state, of chosen and rejected
    M   = Σ_u clip_1(Σ_{i∈u} x_i x_iᵀ) + σ_M Z          Z symmetric, its upper triangle standard normal
    P   = V Λ^(−1/2)                                    of the k largest eigenvalues of M; no more is read from x
    z_i = Pᵀ x_i / |·|
    g_u = clip_C(Σ_{i∈u} −σ(−θᵀ z_i) z_i)               one unit's contribution: a pair's, a question's, a person's
    θ  ←  θ − η (Σ_{u∈S} g_u + σ C ξ) / (q U)           S: every unit with probability q; ξ standard normal
    w   = P θ̄                                           θ̄ the mean of the second half of the iterates

The head is the ordinary linear one, R = w · φ: nothing that loads, scores or serves a reward model can tell it from
another. The guarantee is (ε, δ)-differential privacy under zeroing out: two data sets are neighbours where one unit's
pairs count for nothing in one of them; the number U of units is public. By post-processing it holds for every score
that the model ever gives. Which iterate is taken is no choice of the data's, and mean and deviation of the scores are
released with noise, too (`private_standardisation`).

Sources: Abadi et al. 2016 (arXiv 1607.00133, algorithm 1) for DP-SGD; Dwork et al. 2014
(https://doi.org/10.1145/2591796.2591883) for M; Kairouz et al. 2021 (arXiv 2103.00039, definition 1.1) for neighbours
by zeroing out. Differs: one vector per pair is clipped, and not one for each of its two answers, whose gradients would
count twice; whitening by P; a fixed step size, since a tuned one would be paid for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from accord.data.images import load_images
from accord.data.preferences import digest_of
from accord.data.questions import image_identity
from accord.errors import DataError, RecipeError, check_least, check_positive
from accord.rewards.certificate import Unit
from accord.rewards.model import RewardModel, Standardisation
from accord.rewards.noise import SecretNoise
from accord.types import PreferencePair

RATE = 16.0
"""Step size of the head, where `privacy.learning_rate` is 0."""

EPSILON_AT_MOST = 10_000.0
"""The weakest guarantee that may be asked for: far beyond it nothing is protected, and σ cannot be computed."""

DIMENSIONS_AT_MOST = 65_536
"""The largest k: no model has so many features."""

ROUTER_AT_MOST = 0.5
"""The largest share of a budget that a router may have: projection and standardisation take 0.3 of it."""


@dataclass(frozen=True)
class Privacy:
    """The guarantee that a site's reward model gives, and how it is trained for it."""

    epsilon: float = 8.0  # ε of everything in the ledger together, once this model is trained
    delta: float = 1e-6  # δ; with the unit "label" it is 0, whatever is here
    unit: Unit = "pair"
    ledger: str = ""  # absolute path; empty for a file in the run's folder, which other runs do not see
    dimensions: int = 32  # k; 0 for none, the features as they are
    sampling: float = 0.2  # q
    steps: int = 100
    stages: int = 1  # with the unit "label": 2 for PROPS
    learning_rate: float = 0.0  # η; 0 for 16, of gradients at most C long, with a head, and 0.01 (Adam) with an adapter
    clip: float = 0.5  # C; the gradient of a pair is ½ long at the first step
    router: float = 0.0  # share of the budget for the router's steps; 0: its updates carry no noise, and no guarantee

    def __post_init__(self) -> None:
        """Refuse a guarantee that is none, and settings that train nothing."""
        check_positive(self, "epsilon", "delta", "sampling", "clip")
        check_least(self, dimensions=0, steps=1, learning_rate=0, stages=1, router=0)
        at_most = {"epsilon": EPSILON_AT_MOST, "delta": 0.1, "sampling": 1, "dimensions": DIMENSIONS_AT_MOST}
        for name, most in at_most.items():
            if (value := getattr(self, name)) > most:
                raise RecipeError(f"{name} must be at most {most:g}, got {value:g}; lower privacy.{name}")
        if self.ledger and not Path(self.ledger).expanduser().is_absolute():
            raise RecipeError(
                f"ledger must be an absolute path, got {self.ledger!r}: in another folder it would be another file, "
                f"and a new budget; write privacy.ledger = {str(Path(self.ledger).absolute())!r}"
            )
        if self.stages > (2 if self.unit == "label" else 1):
            raise RecipeError(
                f"stages must be 1, or 2 with the unit 'label', got {self.stages} with {self.unit!r}; lower "
                "privacy.stages"
            )
        if self.router > ROUTER_AT_MOST:
            raise RecipeError(
                f"router must be at most {ROUTER_AT_MOST:g}, got {self.router:g}: it is a share of the budget, and the "
                "reward model needs the rest; lower privacy.router"
            )
        if self.router and self.unit == "label":
            raise RecipeError(
                f"router must be 0 with the unit 'label', got {self.router:g}: the router learns whose images, prompts "
                'and answers these are, which that unit does not hide; take privacy.router out, or set unit = "pair"'
            )


@dataclass(frozen=True)
class Sigmas:
    """Standard deviations of the noise over the sensitivity of what it is added to; 0 adds none, for tests."""

    gradient: float  # σ, at every step
    projection: float  # σ_M
    standardisation: float  # of each of four releases


def unit_index(pairs: Sequence[PreferencePair], unit: Unit) -> Tensor:
    """Return which unit each pair belongs to, `[N]`, counted from 0 in order of first appearance.

    Pairs are of one question where images and prompt are the same, whatever their `question_id`s say.

    Raises:
        DataError: the unit is a person, and a pair does not say whose it is.
    """
    if unit in ("pair", "label"):
        return torch.arange(len(pairs))
    identify = image_identity()
    names = [pair.person if unit == "person" else digest_of(pair, identify) for pair in pairs]
    if nameless := sum(not name for name in names):
        raise DataError(
            f"{nameless} of {len(pairs)} pairs have no {unit}, which is the unit of privacy; add the column {unit!r} "
            'to the preferences, or set unit = "pair"'
        )
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([places[name] for name in names])


def check_delta(privacy: Privacy, units: int) -> None:
    """Refuse a δ with which one of so many units may be told as it is: that has a probability of δ for each.

    Labels have ε without δ.

    Raises:
        RecipeError: δ times the number of units is 1 or more.
    """
    if privacy.unit != "label" and privacy.delta * units >= 1:
        raise RecipeError(
            f"delta must be below 1 / {units} for {units} {privacy.unit}s, got {privacy.delta:g}: with it a mechanism "
            f"may publish one of them whole; lower privacy.delta, to {0.01 / units:.0e} or less"
        )


def pair_features(
    model: RewardModel,
    pairs: Sequence[PreferencePair],
    *,
    prompts_at_once: int = 32,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Return φ of the chosen and the rejected answer of every pair, `[N, 2, D]`, on the CPU.

    Every answer to a question is computed once, however many pairs it is in.

    Args:
        model: whose backbone computes φ.
        pairs: N pairs.
        prompts_at_once: questions in one go.
        on_batch: told how many pairs were just computed.
    """
    asked: dict[str, list[int]] = defaultdict(list)
    for n, pair in enumerate(pairs):
        asked[pair.question_id].append(n)
    groups = list(asked.values())
    found = torch.empty(len(pairs), 2, model.features)
    for start in range(0, len(groups), prompts_at_once):
        chunk = groups[start : start + prompts_at_once]
        answers = [list(dict.fromkeys(a for n in g for a in (pairs[n].chosen, pairs[n].rejected))) for g in chunk]
        first = [pairs[group[0]] for group in chunk]
        states = model.states([pair.prompt for pair in first], [load_images(pair.images) for pair in first], answers)
        for group, given, state in zip(chunk, answers, states, strict=True):
            place = {answer: n for n, answer in enumerate(given)}
            for n in group:
                found[n] = state[[place[pairs[n].chosen], place[pairs[n].rejected]]]
        on_batch(sum(map(len, chunk)))
    return found


def to_sphere(rows: Tensor) -> Tensor:
    """Scale every row to length 1; a row of zeros stays one."""
    scaled: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return scaled


def clip_rows(rows: Tensor, limit: float) -> Tensor:
    """Shorten every row of `[U, D]` that is longer than `limit` to it."""
    clipped: Tensor = rows * (limit / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return clipped


def contributions(theta: Tensor, rows: Tensor, unit: Tensor, units: int, clip: float) -> Tensor:
    """Return what each unit adds to the gradient of Bradley–Terry, `[U, k]`, none longer than `clip`.

        g_u = clip_C(Σ_{i∈u} −σ(−θᵀ z_i) z_i)

    Args:
        theta: the head, `[k]`.
        rows: z, `[N, k]`.
        unit: of every row, `[N]`, from 0 to U − 1.
        units: U.
        clip: C.
    """
    gradients = -torch.sigmoid(-(rows @ theta))[:, None] * rows
    return clip_rows(rows.new_zeros(units, rows.shape[1]).index_add_(0, unit, gradients), clip)


def private_projection(rows: Tensor, unit: Tensor, dimensions: int, sigma: float, noise: SecretNoise) -> Tensor:
    """Return P `[D, k]`: whitened principal directions of unit vectors, from their noisy second moments.

    An eigenvalue is no smaller here than what noise alone would give, 2 σ_M √D.

    Args:
        rows: x, `[N, D]`, none longer than 1.
        unit: of every row, `[N]`.
        dimensions: k; 0 returns the identity, and reads nothing.
        sigma: σ_M; M changes by 1 at most (Frobenius) where a unit is zeroed out.
        noise: draws Z.
    """
    features = rows.shape[1]
    if not dimensions:
        return torch.eye(features, dtype=rows.dtype)
    if len(rows) == int(unit.max()) + 1:  # each alone: |x xᵀ| = |x|² needs no clipping
        moments = rows.T @ rows
    else:
        outer = [rows[unit == u].T @ rows[unit == u] for u in range(int(unit.max()) + 1)]
        moments = torch.stack([each / each.norm().clamp_min(1) for each in outer]).sum(dim=0)
    if sigma:
        drawn = noise.normal(features, features).triu()
        moments += sigma * (drawn + drawn.triu(1).T)
    values, vectors = torch.linalg.eigh(moments)
    kept = min(dimensions, features)
    least = max(2 * sigma * math.sqrt(features), 1e-6 * float(values[-1]), 1e-12)
    projection: Tensor = vectors.flip(1)[:, :kept] / values.flip(0)[:kept].clamp_min(least).sqrt()
    return projection


def private_head(
    features: Tensor,
    unit: Tensor,
    privacy: Privacy,
    sigmas: Sigmas,
    noise: SecretNoise,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Train the head by DP-SGD; return w `[D]`.

    Args:
        features: φ of chosen and rejected, `[N, 2, D]`.
        unit: of every pair, `[N]`.
        privacy: settings.
        sigmas: of the noise, which `accord.rewards.accounting.calibrate` finds.
        noise: draws the noise and the samples; of a key that was never used.
        on_step: called after every step, told nothing.
    """
    rows = to_sphere((features[:, 0] - features[:, 1]).double())
    projection = private_projection(rows, unit, privacy.dimensions, sigmas.projection, noise)
    rows, units = to_sphere(rows @ projection), int(unit.max()) + 1
    theta = rows.new_zeros(rows.shape[1])
    total, averaged = torch.zeros_like(theta), 0
    for step in range(privacy.steps):
        drawn = noise.uniform(units) < privacy.sampling
        mine = drawn[unit]
        gradient = contributions(theta, rows[mine], unit[mine], units, privacy.clip).sum(dim=0)
        gradient = gradient + sigmas.gradient * privacy.clip * noise.normal(len(theta))
        theta = theta - (privacy.learning_rate or RATE) * gradient / (privacy.sampling * units)
        if 2 * step >= privacy.steps - 1:
            total, averaged = total + theta, averaged + 1
        on_step()
    return projection @ (total / averaged)


_OCTAVES = range(-30, 11)
"""Powers of two that the spread of scores may have."""

_PLACES = 64
"""How many bins of eight spreads the middle of the scores may lie from 0, on either side."""


def private_standardisation(scores: Tensor, unit: Tensor, sigma: float, noise: SecretNoise) -> Standardisation:
    """Return mean and deviation of raw scores, by four releases with Gaussian noise.

        S  =  2^(the fullest octave of |s_c − s'_r| / 2)        from a histogram; s' of another unit, drawn by lot
        B  =  the fullest bin of (s_c + s_r) / 2, 8 S wide      from a histogram; its middle is b
        μ  =  b + 16 S mean clip_1((s − b) / 16 S)              over both scores of every pair
        σ² =  64 S² mean clip_1((s − μ) / 8 S)²                 no less than (S / 2)²

    Scores differ far more between questions than within a pair, so that S is of two units' scores: of the first pair of
    each, and no unit is in two couples. A unit adds one vector to each release, no longer than 1: a couple that counts
    for nothing where one of its units does, or the mean over its pairs.

    Args:
        scores: raw, of chosen and rejected, `[N, 2]`.
        unit: of every pair, `[N]`.
        sigma: noise over sensitivity, of each release.
        noise: draws it, and the couples.
    """
    units = int(unit.max()) + 1
    share = 1 / torch.bincount(unit)[unit].double()  # of a pair in its unit

    def fullest(index: Tensor, counts: Tensor, bins: int) -> int:
        filled = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, counts)
        return int((filled + sigma * noise.normal(bins)).argmax())

    half = _across(scores.double(), unit, noise).abs() / 2
    octave = half.clamp_min(2.0 ** _OCTAVES[0]).log2().floor().long().clamp(_OCTAVES[0], _OCTAVES[-1])
    spread = 2.0 ** (_OCTAVES[0] + fullest(octave - _OCTAVES[0], torch.ones_like(half), len(_OCTAVES)))
    width = 8 * spread
    place = (scores.double().mean(dim=1) / width).round().clamp(-_PLACES, _PLACES).long() + _PLACES
    centre = width * (fullest(place, share, 2 * _PLACES + 1) - _PLACES)

    def mean(values: Tensor) -> float:
        """Release the mean over units of what is in [−1, 1]."""
        return float(((values.mean(dim=1) * share).sum() + sigma * noise.normal(1)) / units)

    moved = (scores.double() - centre) / (2 * width)
    centre += 2 * width * min(1.0, max(-1.0, mean(moved.clamp(-1, 1))))
    variance = width**2 * mean(((scores.double() - centre) / width).clamp(-1, 1).square())
    return Standardisation(centre, math.sqrt(max(variance, spread**2 / 4)))


def _across(scores: Tensor, unit: Tensor, noise: SecretNoise) -> Tensor:
    """Return s_c of one unit less s_r of another, by couples drawn by lot; the odd one out has itself."""
    sizes = torch.bincount(unit)
    first = unit.argsort(stable=True)[sizes.cumsum(0) - sizes]  # pair of each unit
    order = first[noise.uniform(len(first)).argsort()]
    couples = (len(first) + 1) // 2
    difference: Tensor = scores[order[:couples], 0] - scores[order.flip(0)[:couples], 1]
    return difference

"""Turn the sites' updates of one round into the next shared weights: `(previous, updates, weights) -> next`.

    Δ_k = w_k − w^t      what site k's local steps changed, S_k of them
    p_k = n_k / Σ_j n_j  its weight;  Δ = Σ_k p_k Δ_k

    fedavg           w + η Δ                                                      McMahan et al. 2017, arXiv 1602.05629
    fedavgm          m ← β₁ m + Δ;  w + η m                                       Hsu et al. 2019, arXiv 1909.06335
    fedadam          m ← β₁ m + (1−β₁) Δ;  v ← β₂ v + (1−β₂) Δ²;  w + η m / (√v + τ)
    fedyogi          as fedadam, v ← v − (1−β₂) Δ² sign(v − Δ²)                   Reddi et al. 2021, arXiv 2003.00295
    fedamsgrad       Δ = Σ_k p_k Δ_k / S_k;  v̂ ← max(v̂, v);  w + η m / (√v̂ + τ)   Wang et al. 2022, arXiv 2205.02719
    task-arithmetic  w + η Σ_k Δ_k                                                Ilharco et al. 2023, arXiv 2212.04089
    ties             trim each Δ_k to its largest entries, elect a sign for each coordinate, and average the
                     entries that have it                                         Yadav et al. 2023, arXiv 2306.01708
    dare             drop each entry of Δ_k with probability 1 − d, divide the rest by d, then Δ
                                                                                  Yu et al. 2024, arXiv 2311.03099
    median           coordinate by coordinate                                     Yin et al. 2018, arXiv 1803.01498
    trimmed-mean     the same without the b largest and b smallest of each        the same, definition 2
    geometric-median argmin_z Σ_k p_k ‖Δ_k − z‖, by smoothed Weiszfeld steps      Pillutla et al. 2022, arXiv 1912.13445

    fed-cmp, cra, …  sites weighted by their reliability, in a common basis that is smoothed over the rounds: see
                     `accord.federation.reliability`                              Xiong et al. 2026, arXiv 2603.26786

Under any rule, `bound` shortens updates that are much longer than the others: no site of three or more moves the
weights by more than that many times what the others do. It stops a takeover and no lie: an update that is five times as
long and opposite still outweighs two honest ones in a mean. The division by S_k is not Wang et al.'s:
it lets sites work unequally, as in arXiv 2501.09946, whose formulas are not public. The first moments of Adam, Yogi and
AMSGrad start at 0 and the second at τ², as in Reddi et al.; nothing is corrected for bias. Median and trimmed mean give
all sites one vote: their definitions know no n_k. FedProx and SCAFFOLD change a site's local steps, and are in
`accord.methods.fedit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from accord.errors import RecipeError, check_least, check_positive
from accord.federation.reliability import VARIANTS, Diagnosis, FedCmp, Reliability, Variant
from accord.toml import CHOICE

Weights: TypeAlias = Mapping[str, Tensor]
Key = TypeVar("Key")


class Update(NamedTuple):
    """What a site's local steps changed, Δ_k by parameter, how many they were, S_k, and d_k where it is measured."""

    change: Weights
    steps: int = 1
    distance: float | None = None  # between what images and text become, for `accord.federation.reliability`


class Aggregate(Protocol):
    """The next shared weights; a plain function qualifies. One that remembers serves one training."""

    def __call__(self, previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
        """Return w^{t+1} from w^t, the updates of the sites that answered, and p_k, which sum to 1."""
        ...


Rule: TypeAlias = Literal[
    "fedavg",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedamsgrad",
    "task-arithmetic",
    "ties",
    "dare",
    "median",
    "trimmed-mean",
    "geometric-median",
    Variant,
]


BOUND: Final = 5.0
"""Times the round's median length that an update may have, unless a recipe says otherwise.

Honest updates stay below: of three sites that hold one question type each, in 66 rounds of a router, of adapters and of
a shared reward model, the longest had 3.3 times the median.
"""


@dataclass(frozen=True)
class Aggregation:
    """How the server combines updates, and in how many bits weights and updates travel."""

    rule: Rule = field(default="fedavg", metadata={CHOICE: True})
    learning_rate: float = 1.0  # η
    momentum: float = 0.9  # β₁ of fedavgm, fedadam, fedyogi, fedamsgrad
    second_momentum: float = 0.99  # β₂
    adaptivity: float = 1e-3  # τ
    density: float = 0.2  # share of an update's entries that ties and dare keep
    trim: float = 0.2  # share of the sites that trimmed-mean leaves out at either end, one at least of three or more
    bits: Literal[16, 32] = 32  # of a number on its way
    bound: float = BOUND  # times the round's median length, to which longer updates are shortened; 0 for any length
    reliability: Reliability | None = None  # settings of fed-cmp in the place of its own

    def __post_init__(self) -> None:
        """Refuse shares outside their range, and steps of no length."""
        check_positive(self, "learning_rate", "adaptivity")
        check_least(self, momentum=0, second_momentum=0, trim=0, bound=0)
        for name, value in (("momentum", self.momentum), ("second_momentum", self.second_momentum)):
            if value >= 1:
                raise RecipeError(f"{name} must be below 1, got {value}; lower it")
        if not 0 < self.density <= 1:
            raise RecipeError(f"density must be above 0 and at most 1, got {self.density}; correct it")
        if self.trim >= 0.5:
            raise RecipeError(f"trim must be below 0.5, or no site would be left, got {self.trim}; lower it")
        if 0 < self.bound < 1:
            raise RecipeError(f"bound must be at least 1, or 0 for none, got {self.bound}; raise it")
        if self.reliability and self.rule != "fed-cmp":
            raise RecipeError(f'reliability has settings of the rule "fed-cmp", got "{self.rule}"; take that rule')

    def start(self, seed: int) -> Aggregate:
        """Return the rule for one training; `seed` is of what dare drops."""
        rule = self._rule(seed)
        return Bounded(rule, self.bound) if self.bound else rule

    def _rule(self, seed: int) -> Aggregate:
        eta = self.learning_rate
        if self.rule in VARIANTS:
            return FedCmp(self.reliability or VARIANTS[self.rule], eta)
        if self.rule == "fedavgm":
            return Momentum(eta, self.momentum)
        if self.rule in ("fedadam", "fedyogi", "fedamsgrad"):
            return Adaptive(self.rule, eta, self.momentum, self.second_momentum, self.adaptivity)
        if self.rule == "dare":
            return Dare(self.density, eta, seed)
        rules: dict[str, Callable[[Sequence[Weights], Sequence[float]], dict[str, Tensor]]] = {
            "fedavg": mean,
            "task-arithmetic": total,
            "ties": lambda changes, weights: ties(changes, weights, self.density),
            "median": lambda changes, _: median(changes),
            "trimmed-mean": lambda changes, _: trimmed_mean(changes, self.trim),
            "geometric-median": geometric_median,
        }
        merge = rules[self.rule]

        def step(previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
            return moved(previous, merge([update.change for update in updates], weights), eta)

        return step


def fedavg(previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
    """Return `w + Σ_k p_k Δ_k`."""
    return moved(previous, mean([update.change for update in updates], weights))


def moved(previous: Weights, change: Weights, eta: float = 1.0) -> dict[str, Tensor]:
    """Return `w + η Δ` in the types of `previous`, added up in float64."""
    return {name: (w.double() + eta * change[name].double()).to(w.dtype) for name, w in previous.items()}


def mean(changes: Iterable[Weights], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return `Σ_k p_k Δ_k`, tensor by tensor, in float64; of the changes one at a time is looked at."""
    summed: dict[str, Tensor] = {}
    for change, p in zip(changes, weights, strict=True):
        for name, d in change.items():
            part = d.double().mul(p)
            summed[name] = summed[name].add_(part) if name in summed else part
    return summed


def shares(examples: Sequence[int]) -> list[float]:
    """Return `p_k = n_k / Σ_j n_j`."""
    return [n / sum(examples) for n in examples]


def total(changes: Sequence[Weights], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return `Σ_k Δ_k`, whatever the weights (task arithmetic)."""
    return mean(changes, [1.0] * len(weights))


def ties(changes: Sequence[Weights], weights: Sequence[float], density: float) -> dict[str, Tensor]:
    """Return the trimmed, sign-elected, disjoint mean of the changes (TIES).

        Δ̃_k   the entries of Δ_k whose magnitude is among its `density` largest, else 0
        γ     = sign(Σ_k p_k Δ̃_k)
        τ     = Σ_{k: sign Δ̃_k = γ} p_k Δ̃_k / Σ_{k: sign Δ̃_k = γ} p_k           0 where no entry is left

    Differs: the paper's models count alike; p_k are FedAvg's here.
    """
    stacked = torch.stack([_flat(c) for c in changes])  # [K, W]
    kept = max(1, round(density * stacked.shape[1]))
    threshold = stacked.abs().topk(kept, dim=1).values[:, -1:]
    trimmed = torch.where(stacked.abs() >= threshold, stacked, 0.0)
    p = torch.tensor(weights, dtype=torch.float64)[:, None]
    elected = (p * trimmed).sum(0).sign()
    agree = (trimmed.sign() == elected) & (trimmed != 0)
    weight = (p * agree).sum(0)
    merged = torch.where(weight > 0, (p * trimmed * agree).sum(0) / weight.clamp(min=1e-30), 0.0)
    return _shaped(merged, changes[0])


def median(changes: Sequence[Weights]) -> dict[str, Tensor]:
    """Return the coordinate-wise median; of an even number of sites the mean of the middle two."""
    return {name: torch.stack([c[name].double() for c in changes]).quantile(0.5, dim=0) for name in changes[0]}


def trimmed_mean(changes: Sequence[Weights], trim: float) -> dict[str, Tensor]:
    """Return the coordinate-wise mean without the b largest and as many smallest entries.

        b = max(1, ⌊trim · K⌋) of K ≥ 3 sites, 0 of fewer, and 0 where trim = 0

    Yin et al. 2018, arXiv 1803.01498, definition 2, where b = trim · K. Differs: at least one is cut at either end as
    soon as something is left, for with few sites a rounded share would be none, and the rule a plain mean.
    """
    count = len(changes)
    cut = max(1, int(trim * count + 1e-9)) if trim and count > 2 else 0
    return {
        name: torch.stack([c[name].double() for c in changes]).sort(dim=0).values[cut : count - cut].mean(dim=0)
        for name in changes[0]
    }


def geometric_median(
    changes: Sequence[Weights], weights: Sequence[float], *, steps: int = 32, smoothing: float = 1e-6
) -> dict[str, Tensor]:
    """Return the point with the least weighted sum of distances to the changes, by smoothed Weiszfeld steps (RFA).

    z ← Σ_k β_k Δ_k / Σ_k β_k,    β_k = p_k / max(ν, ‖Δ_k − z‖)            from z = Σ_k p_k Δ_k
    """
    stacked = torch.stack([_flat(c) for c in changes])
    p = torch.tensor(weights, dtype=torch.float64)
    z = (p[:, None] * stacked).sum(0)
    for _ in range(steps):
        beta = p / (stacked - z).norm(dim=1).clamp(min=smoothing)
        z = (beta[:, None] * stacked).sum(0) / beta.sum()
    return _shaped(z, changes[0])


def bounded(updates: Sequence[Update], multiple: float, median: float | None = None) -> list[Update]:
    """Return the updates, shortened to `multiple` times the round's median length where they are longer.

        Δ_k ← Δ_k · min(1, multiple · median_j ‖Δ_j‖ / ‖Δ_k‖)

    With `median` given it is the measure, and not the length in the middle of these updates.

    Sun et al. 2019, arXiv 1911.07963 (norm thresholding). Differs: their threshold is fixed. Of an even number of
    sites the lower of the middle two is the median. One of two sites can so slow the other down, and can never drown
    it: which of two is right, no length says. An update that is alone in its round is as long as it is.
    """
    lengths = [length_of(update.change) for update in updates]
    return _shortened(updates, lengths, multiple * (lower_median(lengths) if median is None else median))


def _shortened(updates: Sequence[Update], lengths: Sequence[float], most: float) -> list[Update]:
    return [
        update._replace(change={name: (d.double() * (most / length)).to(d.dtype) for name, d in update.change.items()})
        if length > most
        else update
        for update, length in zip(updates, lengths, strict=True)
    ]


def too_long(lengths: Mapping[Key, float], multiple: float, median: float) -> dict[Key, float]:
    """Return ‖Δ_k‖ over the median for what `bounded` shortens; infinite where the median has no length."""
    return {k: length / median if median else math.inf for k, length in lengths.items() if length > multiple * median}


def length_of(change: Weights) -> float:
    """Return ‖Δ‖ over all parameters together."""
    return float(_flat(change).norm())


def lower_median(numbers: Sequence[float]) -> float:
    """Return the median; of an even number the lower of the middle two."""
    return sorted(numbers)[(len(numbers) - 1) // 2]


class Bounded:
    """A rule whose updates are shortened first, by `bounded`.

    Attributes:
        shortened: ‖Δ_k‖ over the median length, of every update of the last round that was shortened, by its place;
            infinite where the median update has no length.
    """

    def __init__(self, rule: Aggregate, multiple: float) -> None:
        self.rule, self.multiple = rule, multiple
        self.shortened: dict[int, float] = {}

    @property
    def diagnostics(self) -> list[Diagnosis]:
        """What the rule itself notes of its rounds, if it does."""
        return getattr(self.rule, "diagnostics", [])

    def __call__(self, previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
        """Return w^{t+1}."""
        lengths = [length_of(update.change) for update in updates]
        median = lower_median(lengths)
        self.shortened = too_long(dict(enumerate(lengths)), self.multiple, median)
        return self.rule(previous, _shortened(updates, lengths, self.multiple * median), weights)


class Momentum:
    """m ← β m + Δ;  w + η m (FedAvgM)."""

    def __init__(self, eta: float, beta: float) -> None:
        self.eta, self.beta = eta, beta
        self.m: dict[str, Tensor] = {}

    def __call__(self, previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
        """Return w^{t+1}."""
        change = mean([update.change for update in updates], weights)
        self.m = {name: self.beta * self.m[name] + d if self.m else d for name, d in change.items()}
        return moved(previous, self.m, self.eta)


class Adaptive:
    """FedAdam, FedYogi and FedAMSGrad: a step scaled by the second moment of the updates.

    Under AMSGrad each update is divided by its number of local steps first, so that sites may work unequally.
    """

    def __init__(
        self,
        rule: Literal["fedadam", "fedyogi", "fedamsgrad"],
        eta: float,
        beta1: float,
        beta2: float,
        tau: float,
    ) -> None:
        self.rule, self.eta, self.beta1, self.beta2, self.tau = rule, eta, beta1, beta2, tau
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.most: dict[str, Tensor] = {}  # v̂ of AMSGrad

    def __call__(self, previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
        """Return w^{t+1}."""
        if self.rule == "fedamsgrad":
            changes = ({name: d.double() / update.steps for name, d in update.change.items()} for update in updates)
            change = mean(changes, weights)
        else:
            change = mean([update.change for update in updates], weights)
        step = {}
        for name, d in change.items():
            m = self.m.get(name, torch.zeros_like(d))
            v = self.v.get(name, torch.full_like(d, self.tau**2))
            self.m[name] = m = self.beta1 * m + (1 - self.beta1) * d
            square = d.square()
            if self.rule == "fedyogi":
                v = v - (1 - self.beta2) * square * (v - square).sign()
            else:
                v = self.beta2 * v + (1 - self.beta2) * square
            self.v[name] = v
            if self.rule == "fedamsgrad":
                self.most[name] = v = torch.maximum(self.most.get(name, v), v)
            step[name] = m / (v.sqrt() + self.tau)
        return moved(previous, step, self.eta)


class Dare:
    """Drop entries of every update at random, rescale what is left, and average (DARE)."""

    def __init__(self, density: float, eta: float, seed: int) -> None:
        self.density, self.eta = density, eta
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, previous: Weights, updates: Sequence[Update], weights: Sequence[float], /) -> dict[str, Tensor]:
        """Return w^{t+1}."""
        changes = ({name: self._thin(d) for name, d in update.change.items()} for update in updates)
        return moved(previous, mean(changes, weights), self.eta)

    def _thin(self, change: Tensor) -> Tensor:
        kept = torch.rand(change.shape, generator=self.generator) < self.density
        return torch.where(kept, change.double() / self.density, 0.0)


def _flat(change: Weights) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in change.values()])


def _shaped(flat: Tensor, like: Weights) -> dict[str, Tensor]:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(like.items(), parts, strict=True)}

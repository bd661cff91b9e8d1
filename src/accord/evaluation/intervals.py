"""Say how far a mean over seeds can be trusted, and whether two methods differ by more than their seeds do.

With x_1..x_n the values of one method, one a seed, and s their sample standard deviation,

    mean ± t_{0.975, n-1} s / √n

(Student 1908, "The probable error of a mean", Biometrika 6:1, https://doi.org/10.1093/biomet/6.1.1). The interval is
over training seeds; those of `accord.evaluation.summary` are over the draw of the test questions.

Two methods are compared by the paired t-test over the n seeds that both have, at least five,

    d_s = x_s(one) - x_s(other),    t = mean(d) √n / sd(d),    p = P(|T_{n-1}| >= |t|)

two-sided: seeds share their sites' data and the router's start, which cancels in d. Where d is the same with every seed
the test says nothing: a difference of one question, a few times in a row, would pass for certain. Several tests at once
are corrected by Holm's step-down procedure (Holm 1979, "A simple sequentially rejective multiple test procedure",
Scandinavian Journal of Statistics 6:65): of m p-values in rising order, the i-th becomes max_{j<=i} min(1, (m - j + 1)
p_(j)). Then the chance that any true null hypothesis of the family is rejected at level α is α at most, however the
tests depend on one another.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Final, TypeVar

LEAST_SEEDS: Final = 5
"""In common, for a test: accuracies are counts, and few differences of counts are often alike by chance."""

LEAST_SPREAD: Final = 1e-9
"""Below which a standard deviation of differences of accuracies is rounding."""

Key = TypeVar("Key", bound=Hashable)


def half_width(values: Sequence[float]) -> float | None:
    """Return half the 95 % t-interval of a mean, t_{0.975, n-1} s / √n; None for fewer than two values."""
    n = len(values)
    return t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def paired_p(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Return the two-sided p of the paired t-test over the seeds that both have; None where there is no test.

    There is none over fewer than `LEAST_SEEDS` seeds, nor where the difference is the same with every seed and not 0.
    """
    differences = [one[seed] - other[seed] for seed in one if seed in other]
    n = len(differences)
    if n < LEAST_SEEDS:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread < LEAST_SPREAD:  # equal accuracies may differ in the last bit
        return 1.0 if abs(mean) < LEAST_SPREAD else None
    return max(0.0, 1 - t_probability(abs(mean) * math.sqrt(n) / spread, n - 1))


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """Return the adjusted p-values of one family of tests: those below α are significant at α for all together."""
    adjusted: dict[Key, float] = {}
    largest = 0.0
    for place, key in enumerate(sorted(p, key=lambda key: p[key])):
        largest = max(largest, min(1.0, (len(p) - place) * p[key]))
        adjusted[key] = largest
    return adjusted


def t_quantile(df: int) -> float:
    """Return t with P(|T| <= t) = 0.95 for Student's t of `df` degrees of freedom: 4.303 for 2, 1.960 for many."""
    low, high = 1.9, 12.8  # the limit for many degrees is 1.960, the value for one is 12.706
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < 0.95 else (low, middle)
    return (low + high) / 2


def t_probability(t: float, df: int) -> float:
    """Return P(|T| <= t) for Student's t of `df` degrees of freedom, t >= 0.

    By the finite series for whole `df` (Abramowitz and Stegun 1964, *Handbook of Mathematical Functions*, 26.7.3 and
    26.7.4): with tan θ = t/√df the probability is sin θ (1 + ½ cos²θ + (1·3)/(2·4) cos⁴θ + …) for even df, and
    2/π (θ + sin θ (cos θ + ⅔ cos³θ + …)) for odd, up to the power df - 2.
    """
    theta = math.atan(t / math.sqrt(df))
    odd = df % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for power in range(odd, df - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(theta) ** 2
    return (theta + math.sin(theta) * total) * 2 / math.pi if odd else math.sin(theta) * total

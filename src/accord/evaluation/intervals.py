"""Say how far a mean over seeds can be trusted, and whether one method is near another.

With x_1..x_n the values of one method, one a seed, and s their sample standard deviation,

    mean ± t_{0.975, n-1} s / √n

(Student 1908, "The probable error of a mean", Biometrika 6:1, https://doi.org/10.1093/biomet/6.1.1). The interval is
over training seeds; that of `accord.evaluation.summary` is over the draw of the test questions.

A method is *near* the best if, over the seeds that both have,

    d_s = x_s(best) - x_s(other),    mean(d) <= sd(d) / √n

one standard error of the paired difference: seeds share their sites' data and the router's start, which cancels in d.
With fewer than two seeds in common the standard error is √(s²/n + s²/n) of the two methods by themselves, and with
fewer than two seeds of either only an equal is near.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def half_width(values: Sequence[float]) -> float | None:
    """Return half the 95 % t-interval of a mean, t_{0.975, n-1} s / √n; None for fewer than two values."""
    n = len(values)
    return t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def is_near(best: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Return whether `other` is within one standard error of `best`, both by seed (rule above)."""
    differences = [best[seed] - other[seed] for seed in best if seed in other]
    if len(differences) > 1:
        behind = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    else:
        behind = statistics.fmean(best.values()) - statistics.fmean(other.values())
        samples = [list(best.values()), list(other.values())]
        known = all(len(sample) > 1 for sample in samples)
        error = math.sqrt(sum(statistics.variance(s) / len(s) for s in samples)) if known else 0.0
    return behind <= error + 1e-12  # equal accuracies may differ in the last bit


def t_quantile(df: int) -> float:
    """Return t with P(|T| <= t) = 0.95 for Student's t of `df` degrees of freedom: 4.303 for 2, 1.960 for many.

    By bisection of the finite series for whole `df` (Abramowitz and Stegun 1964, *Handbook of Mathematical Functions*,
    26.7.3 and 26.7.4): with tan θ = t/√df the probability is sin θ (1 + ½ cos²θ + (1·3)/(2·4) cos⁴θ + …) for even df,
    and 2/π (θ + sin θ (cos θ + ⅔ cos³θ + …)) for odd, up to the power df - 2.
    """

    def probability(t: float) -> float:
        theta = math.atan(t / math.sqrt(df))
        odd = df % 2
        term = math.cos(theta) if odd else 1.0
        total = 0.0
        for power in range(odd, df - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * math.cos(theta) ** 2
        return (theta + math.sin(theta) * total) * 2 / math.pi if odd else math.sin(theta) * total

    low, high = 1.9, 12.8  # the limit for many degrees is 1.960, the value for one is 12.706
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < 0.95 else (low, middle)
    return (low + high) / 2

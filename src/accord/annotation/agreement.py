"""How far annotators agree beyond chance, and whether they prefer a side of the page.

Cohen's kappa of two annotators, over the pairs that both judged (Cohen 1960, "A coefficient of agreement for nominal
scales", Educational and Psychological Measurement 20:37, https://doi.org/10.1177/001316446002000104):

    κ = (p_o − p_e) / (1 − p_e),    p_o the share on which they agree,  p_e = Σ_c p₁(c) p₂(c)

Krippendorff's alpha of any number, each of whom may have judged some of the pairs (Krippendorff 2011, "Computing
Krippendorff's Alpha-Reliability", section C, https://repository.upenn.edu/asc_papers/43/). With n_uc how often pair u
was given the value c, m_u = Σ_c n_uc at least 2, and n the sum of these m_u,

    α = 1 − D_o / D_e,    D_o = 1/n Σ_u Σ_{c≠k} n_uc n_uk / (m_u − 1),    D_e = 1/(n(n − 1)) Σ_{c≠k} n_c n_k

Both are 1 where all agree and about 0 where they agree as often as by chance. Values are names: the first answer, the
second, a tie, both bad. A skipped pair was not judged. Which answer stands on the left is drawn for each annotator, so
one who looks at nothing but the answers chooses the left one half of the time.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from accord.annotation.journal import Judgement
from accord.evaluation.summary import wilson_interval


def cohen_kappa(one: Sequence[str], other: Sequence[str]) -> float | None:
    """Return κ of two annotators' values of the same pairs, `[N]` each; None where it is 0/0 or there is no pair."""
    n = len(one)
    observed = sum(a == b for a, b in zip(one, other, strict=True))
    first, second = Counter(one), Counter(other)
    expected = sum(first[value] * second[value] for value in first)  # times n²
    return None if n * n == expected else (n * observed - expected) / (n * n - expected)


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float | None:
    """Return α of the values that each pair was given, by whom does not matter; None where it is 0/0.

    Pairs with one value or none count for nothing.
    """
    counts = [Counter(values) for values in units if len(values) > 1]
    total: Counter[str] = Counter()
    disagreement = 0.0  # n D_o
    for count in counts:
        m = count.total()
        disagreement += (m * m - sum(c * c for c in count.values())) / (m - 1)
        total += count
    n = total.total()
    expected = n * n - sum(c * c for c in total.values())  # n(n − 1) D_e
    return None if not expected else 1 - (n - 1) * disagreement / expected


@dataclass(frozen=True)
class Sides:
    """How often an annotator chose the answer on the left, of those times that one answer was better."""

    left: int
    right: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the share of left (Wilson 1927); None where neither was ever chosen."""
        n = self.left + self.right
        return wilson_interval(self.left, n) if n else None


@dataclass(frozen=True)
class Agreement:
    """What the second tab shows."""

    annotators: dict[str, dict[str, int]]  # by name: how often each choice
    sides: dict[str, Sides]
    everyone: Sides
    kappa: dict[tuple[str, str], tuple[int, float | None]]  # of two: pairs that both judged, κ
    alpha: float | None
    compared: int  # pairs that at least two judged


def value_of(judgement: Judgement) -> str | None:
    """Return what a judgement says of the pair, whichever answer was on the left; None for a skip."""
    if judgement.choice == "skip":
        return None
    preferred = judgement.preferred
    return judgement.choice if preferred is None else ("first", "second")[preferred]


def measure_agreement(judgements: Sequence[Judgement]) -> Agreement:
    """Compare the judgements that stand."""
    by_annotator: dict[str, dict[str, str]] = defaultdict(dict)
    by_pair: dict[str, list[str]] = defaultdict(list)
    choices: dict[str, Counter[str]] = defaultdict(Counter)
    for judgement in judgements:
        choices[judgement.annotator][judgement.choice] += 1
        if (value := value_of(judgement)) is not None:
            by_annotator[judgement.annotator][judgement.pair] = value
            by_pair[judgement.pair].append(value)
    names = sorted(choices)
    kappa = {}
    for one, other in itertools.combinations(names, 2):
        both = [pair for pair in by_annotator[one] if pair in by_annotator[other]]
        values = [[by_annotator[name][pair] for pair in both] for name in (one, other)]
        kappa[one, other] = len(both), cohen_kappa(*values)
    sides = {name: Sides(choices[name]["left"], choices[name]["right"]) for name in names}
    return Agreement(
        annotators={name: dict(choices[name]) for name in names},
        sides=sides,
        everyone=Sides(sum(each.left for each in sides.values()), sum(each.right for each in sides.values())),
        kappa=kappa,
        alpha=krippendorff_alpha(list(by_pair.values())),
        compared=sum(len(values) > 1 for values in by_pair.values()),
    )

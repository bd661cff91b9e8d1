"""Measure how often routed scores rank a public pair right, by question type (the paper's Table 4).

    accuracy = 1/N Σ_n 1[ R_mix(x_n, y_n⁺) > R_mix(x_n, y_n⁻) ],      R_mix(x, y) = Σ_k α_k(x, y) R̄_k(x, y)

of every single site, and of every router, once with its mixture ("soft") and once with its largest weight alone
("top1"). It needs no reinforcement learning, and takes seconds once `accord.routing.anchors` has asked the sites.

Under top-1 the two answers of a pair may be judged by different sites (`two_judges`): what is compared then are two
sites' scales, as within a GRPO group. Intervals are Wilson's over pairs; several pairs of one question are not
independent, so with many of them per question the intervals are too narrow.

Source: Lu et al. 2026, arXiv 2605.03426, Table 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from accord.errors import DataError
from accord.evaluation.summary import Accuracy, accuracy
from accord.routing.anchors import Anchors, pair_accuracy
from accord.routing.fusion import top1

__all__ = ["RankingRow", "count_right", "markdown", "pair_accuracy", "ranking_table"]

WeightsOf: TypeAlias = Callable[[Anchors], Tensor]
"""A router's weights `[N, 2, K]` for the two answers of every pair."""


@dataclass(frozen=True, slots=True)
class RankingRow:
    """How one site or router ranks the pairs; `two_judges`: share of pairs whose answers different sites judged."""

    name: str
    mode: Literal["single", "soft", "top1"]
    accuracy: Accuracy
    two_judges: float = 0.0


def ranking_table(
    anchors: Anchors, types: Sequence[str], sites: Sequence[str], routers: Mapping[str, WeightsOf]
) -> list[RankingRow]:
    """Rank the pairs by every single site, then by every router, soft and top-1.

    Args:
        anchors: held-out public pairs, `[N]`; no router may have been trained on pairs of their questions.
        types: question type of every pair, `[N]`.
        sites: their names, `[K]`.
        routers: by name, whose weights are asked for.

    Raises:
        DataError: the numbers of types, sites or weights do not fit the pairs.
    """
    n, _, k = anchors.scores.shape
    if (len(types), len(sites)) != (n, k):
        raise DataError(
            f"{len(types)} types and {len(sites)} site names for pairs of shape {(n, k)}; give one for each"
        )
    rows = []
    for number, site in enumerate(sites):
        alone = one_hot(torch.tensor(number), k).to(anchors.scores).expand(n, 2, k)
        rows.append(RankingRow(site, "single", count_right(pair_accuracy(anchors.scores, alone), types)))
    for name, weights_of in routers.items():
        weights = weights_of(anchors)
        if weights.shape != anchors.scores.shape:
            raise DataError(
                f"router {name!r} gives weights {tuple(weights.shape)}, expected {tuple(anchors.scores.shape)}; "
                "give one per pair, answer and site"
            )
        picked = top1(weights)
        judges = picked.argmax(dim=-1)
        differ = (judges[:, 0] != judges[:, 1]).double().mean().item()
        rows.append(RankingRow(name, "soft", count_right(pair_accuracy(anchors.scores, weights), types)))
        rows.append(RankingRow(name, "top1", count_right(pair_accuracy(anchors.scores, picked), types), differ))
    return rows


def count_right(right: Tensor, types: Sequence[str]) -> Accuracy:
    """Return the share of `right` `[N]` by question type with 95 % intervals, types in alphabetical order."""
    counts = {kind: [0, 0] for kind in sorted(set(types))}
    for kind, hit in zip(types, right.tolist(), strict=True):
        counts[kind][0] += hit
        counts[kind][1] += 1
    return accuracy({kind: (hits, n) for kind, (hits, n) in counts.items()})


def markdown(rows: Sequence[RankingRow]) -> str:
    """Return the table as Markdown: accuracies in per cent, with 95 % Wilson intervals, n in the heading."""
    kinds = rows[0].accuracy.by_type
    heading = [
        "router",
        "mode",
        *(f"{kind} (n = {of_type.n})" for kind, of_type in kinds.items()),
        "macro",
        "two judges",
    ]
    lines = [heading, ["---"] * len(heading)]
    for row in rows:
        of_types = row.accuracy.by_type.values()
        cells = [_percent(each.accuracy, each.low, each.high) for each in of_types]
        total = row.accuracy
        macro = _percent(total.macro, total.macro_low, total.macro_high)
        lines.append([row.name, row.mode, *cells, macro, f"{100 * row.two_judges:.1f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _percent(share: float, low: float, high: float) -> str:
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

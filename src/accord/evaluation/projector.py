"""Say how a projector was trained, and what came of it, as a Markdown table."""

from __future__ import annotations

from accord.evaluation.markdown import escaped, markdown_table
from accord.evaluation.summary import ProjectorMeasure, ProjectorSummary


def projector_table(summary: ProjectorSummary) -> str:
    """Return the rounds, a row each, and the measures before and after on held-out questions."""
    sites = list(dict.fromkeys(name for each in summary.rounds for name in each.sites))
    header = ["round", "loss", "β", "cosine", "lag", *(f"{escaped(name)}: weight, d" for name in sites)]
    rows = []
    for number, each in enumerate(summary.rounds, start=1):
        told = [
            f"{each.sites[name].weight:.2f}, {number_or_dash(each.sites[name].distance)}" if name in each.sites else "–"
            for name in sites
        ]
        rows.append(
            [f"{number}", f"{each.loss:.3f}", *(number_or_dash(x) for x in (each.beta, each.cosine, each.lag)), *told]
        )
    kinds = list(summary.after.accuracy.by_type)
    measured = [
        _row("before", summary.before, kinds),
        _row("after", summary.after, kinds),
    ]
    columns = ["", "NLL", "NLL, shuffled images", "CIDEr-D", "macro accuracy", *map(escaped, kinds)]
    return f"{markdown_table(header, rows)}\n\n{markdown_table(columns, measured)}"


def number_or_dash(value: float | None) -> str:
    """Return a number with three digits, a dash for none."""
    return "–" if value is None else f"{value:.3g}"


def _row(name: str, measured: ProjectorMeasure, kinds: list[str]) -> list[str]:
    right = measured.accuracy
    shares = [f"{right.by_type[kind].accuracy:.1%}" if kind in right.by_type else "–" for kind in kinds]
    return [
        name,
        f"{measured.nll:.3f}",
        f"{measured.shuffled_nll:.3f}",
        number_or_dash(measured.cider),
        f"{right.macro:.1%}",
        *shares,
    ]

"""Collect the summaries of several seeds of one recipe into one Markdown table.

    python benchmarks/quality/table.py runs/quality/easy-vqa-*

A cell is the mean over seeds ± half its 95 % t-interval, in percent, on test. "share of the bound" is
the gain in macro accuracy over the base, divided by that of the ground-truth reward where that gained in every seed.
"""

import statistics
import sys
from pathlib import Path

from accord.evaluation.intervals import half_width
from accord.evaluation.markdown import escaped, markdown_table
from accord.evaluation.summary import Accuracy, Summary, read_summary

CONTROLS = {"question_only": "control: question only", "shuffled_image": "control: aligned, shuffled images"}


def cell(values: list[float]) -> str:
    half = half_width(values)
    return f"{100 * statistics.mean(values):.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def rows(summaries: list[Summary]) -> dict[str, list[Accuracy]]:
    """Return the accuracies of every row, one per seed."""
    table: dict[str, list[Accuracy]] = {}
    for s in summaries:
        e = s.evaluation
        named = {"base": e.base, "**routed federation (MoR)**": e.aligned} | {
            f"reward: {arm}": accuracy for arm, accuracy in e.compare.items()
        }
        for name, label in CONTROLS.items():
            named[label] = getattr(e, name)
        for name, accuracy in named.items():
            if accuracy is not None:
                table.setdefault(name, []).append(accuracy)
    return table


def main(folders: list[str]) -> None:
    summaries = [read_summary(Path(folder) / "summary.json") for folder in sorted(folders)]
    table = rows(summaries)
    types = list(summaries[0].evaluation.aligned.by_type)
    n = {name: value.n for name, value in summaries[0].evaluation.aligned.by_type.items()}
    base = table["base"]
    bound = table.get("reward: ground-truth")
    print(f"seeds: {', '.join(str(s.seed) for s in summaries)}\n")
    header = ["", "seeds", "macro", *(f"{t} (n = {n[t]})" for t in types), "share of the bound"]
    lines = []
    for name, results in table.items():
        by_type = [cell([r.by_type[t].accuracy for r in results]) for t in types]
        share = ""
        gained = bound and all(g.macro > b.macro for g, b in zip(bound, base, strict=True))
        if bound and gained and name not in ("base", *CONTROLS.values()):
            gains = [(r.macro - b.macro) / (g.macro - b.macro) for r, b, g in zip(results, base, bound, strict=True)]
            share = cell(gains)
        lines.append([name, str(len(results)), cell([r.macro for r in results]), *by_type, share])
    print(markdown_table(header, lines))
    lines = []
    for k, site in enumerate(summaries[0].sites):
        macros = [macro for s in summaries if (macro := s.sites[k].ranking.macro) is not None]
        ranking = cell(macros) if macros else "–"
        routed = cell([s.router.accuracy for s in summaries if s.router]) if k == 0 else ""
        lines.append([escaped(f"{site.name} ({site.architecture})"), ranking, routed])
    print("\n" + markdown_table(["site", "ranking accuracy on its held-out questions", "router accuracy"], lines))


if __name__ == "__main__":
    main(sys.argv[1:])

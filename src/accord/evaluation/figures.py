"""Draw a run's figures as SVG text: pure functions from records to a string, the same bytes each time.

Colours are Okabe and Ito's ("Color universal design", https://jfly.uni-koeln.de/color/), told apart by people with any
common colour blindness; no figure relies on colour alone. In a page, the ink follows the text's colour and the series
follow the variables `--figure-…`, so that one drawing serves light and dark. `width` is in inches: draw a narrow figure
for a phone instead of shrinking a wide one, which would shrink its letters too. Where there is nothing to draw, the
result is "".
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from accord.evaluation.summary import Accuracy, CompetenceSummary, TrafficRow
from accord.evaluation.trace import MetricsRow

WIDE, NARROW = 7.6, 3.7
"""Inches across for a desk and for a phone."""

# Stand-ins: `svg` replaces each by the page's own colour, and keeps it as the fallback.
INK, RULE, BEFORE, AFTER, ACCENT, PAPER = "#1a1b1c", "#d4d5d6", "#a3a4a5", "#0072b2", "#d55e00", "#fefefd"
_VARIABLES = {
    INK: "currentColor",
    RULE: f"var(--figure-rule, {RULE})",
    BEFORE: f"var(--figure-before, {BEFORE})",
    AFTER: f"var(--figure-after, {AFTER})",
    ACCENT: f"var(--figure-accent, {ACCENT})",
    PAPER: f"var(--page, {PAPER})",
}
_TYPE_COLOURS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", ACCENT)
_TYPE_STYLES = ("-", "--", "-.", ":")
_CONTROL_MARKS = (("D", ACCENT, PAPER, -0.17), ("o", PAPER, INK, 0.17))  # shape, fill, edge, place in its row
_SILO_MARKS = ("o", "^", "s", "D", "v", "P", "X")

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # letters stay letters: small, searchable, in the page's own font
    "svg.hashsalt": "accord",  # without it every drawing has other ids
    "text.parse_math": False,  # a "$" in a question type is a dollar
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.borderaxespad": 0.0,
}


def accuracy_bars(
    before: Accuracy | None, after: Accuracy, controls: Mapping[str, Accuracy], *, width: float = WIDE
) -> str:
    """Draw accuracy before and after with 95 % intervals, macro mean first, then each type; controls are marks."""
    with matplotlib.rc_context(STYLE):
        series = ([("before", before, BEFORE)] if before else []) + [("after", after, AFTER)]
        names = [_MACRO, *after.by_type]
        figure, axes = canvas(width, 0.62 * len(names) + 0.75)
        height = 0.66 / len(series)
        for place, (label, result, colour) in enumerate(series):
            rows = [(row, _interval(result, name)) for row, name in enumerate(names)]
            drawn = [(row + (place - (len(series) - 1) / 2) * height, values) for row, values in rows if values]
            at = [y for y, _ in drawn]
            axes.barh(at, [100 * v[0] for _, v in drawn], height * 0.9, color=colour, label=label)
            axes.hlines(at, [100 * v[1] for _, v in drawn], [100 * v[2] for _, v in drawn], color=INK, linewidth=1.1)
        for (mark, fill, edge, lower), (label, result) in zip(_CONTROL_MARKS, controls.items(), strict=False):
            found = [(row + lower, values[0]) for row, name in enumerate(names) if (values := _interval(result, name))]
            axes.plot(
                [100 * value for _, value in found],
                [row for row, _ in found],
                linestyle="none",
                marker=mark,
                markersize=7,
                markerfacecolor=fill,
                markeredgecolor=edge,
                markeredgewidth=1.2,
                label=label,
            )
        for row, name in enumerate(names):
            _note_right(axes, row, _change(before, after, name), bold=name is _MACRO)
        axes.axhline(0.5, color=RULE, linewidth=0.8)
        _percent_axis(axes, names, width)
        handles, labels = axes.get_legend_handles_labels()  # lines come before bars, whatever was drawn first
        bars = len(controls)
        handles, labels = handles[bars:] + handles[:bars], labels[bars:] + labels[:bars]
        columns = 4 if width > 5 else 2
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.4, handletextpad=0.6)
        return svg(figure, "accuracy", "Accuracy by question type before and after alignment, with 95 % intervals")


def curves(rows: Sequence[MetricsRow], *, width: float = WIDE) -> str:
    """Draw reward, KL divergence and dev accuracy of the alignment against the step, one panel each, one shared axis.

    Beside every step's reward and KL (thin) runs their mean over a twentieth of the steps (thick).
    """
    rows = [row for row in rows if row.stage == "align"]
    panels = [
        ("Reward, standardised (thin: each step; thick: running mean)", _points(rows, "reward"), AFTER),
        ("KL divergence from the starting policy", _points(rows, "kl"), AFTER),
        ("Accuracy on development questions", _points(rows, "accuracy_macro"), AFTER),
    ]
    panels = [panel for panel in panels if len(panel[1])]
    if not panels:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, _ = canvas(width, 1.55 * len(panels) + 0.5, axes=False)
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, points, colour) in zip(grid, panels, strict=True):
            axes.set_title(title if width > 5 else title.split(" (")[0])
            axes.grid(axis="y")
            if title.startswith("Accuracy"):
                _accuracy_panel(axes, rows, points)
            else:
                _smoothed(axes, points, colour)
        grid[-1].set_xlabel("GRPO step")
        return svg(figure, "curves", "Reward, KL divergence and development accuracy against the GRPO step")


def judging_heatmap(routing: Mapping[str, Mapping[str, float]], *, width: float = WIDE) -> str:
    """Draw the share of weight that each site (column) had in judging each question type (row)."""
    return _heatmap(routing, "judging", "Share of weight of each site in judging each question type", width)


def competence_heatmap(competence: CompetenceSummary, *, width: float = WIDE) -> str:
    """Draw the share of the auxiliary questions of each type (column) that each site (row) answered right."""
    shares = {
        site: {
            kind: by_type[kind].correct / by_type[kind].n if kind in by_type else math.nan for kind in competence.items
        }
        for site, by_type in competence.sites.items()
    }
    return _heatmap(
        shares, "competence", "Share of the server's questions of each type that each site got right", width
    )


def competence_items(competence: CompetenceSummary, *, width: float = WIDE) -> str:
    """Draw every auxiliary question (column) that each site (row) answered right, type after type, easy ones first."""
    rows = competence.answers
    if not any(set(row) & set("01") for row in rows.values()):
        return ""
    gap = 1 + sum(competence.items.values()) // 80
    ends = list(itertools.accumulate(competence.items.values()))
    spans = [range(end - n, end) for end, n in zip(ends, competence.items.values(), strict=True)]
    starts = [span.start + gap * place for place, span in enumerate(spans)]
    with matplotlib.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = canvas(width, 0.22 * len(rows) + 0.6)
        for start, span in zip(starts, spans, strict=True):
            order = sorted(span, key=lambda a: -sum(row[a] == "1" for row in rows.values()))
            for y, row in enumerate(rows.values()):
                marks = "".join(row[a] for a in order)
                if not set(marks) & set("01"):
                    axes.text(start + len(span) / 2, y, "–", ha="center", va="center")
                    continue
                _bar(axes, [(start, start + len(span))], y, 0.12)
                _bar(axes, [(start + m.start(), start + m.end()) for m in re.finditer("1+", marks)], y, 1.0)
        axes.set(xlim=(0, ends[-1] + gap * (len(spans) - 1)), ylim=(len(rows) - 0.45, -0.55))
        middles = [start + len(span) / 2 for start, span in zip(starts, spans, strict=True)]
        _columns_on_top(axes, middles, list(competence.items), width)
        axes.set_yticks(range(len(rows)), [short(site, _letters(width)) for site in rows])
        axes.tick_params(length=0)
        return svg(figure, "answers", "Which of the server's questions each site got right, type after type")


def traffic_bars(traffic: Sequence[TrafficRow], *, width: float = WIDE) -> str:
    """Draw the bytes to (filled, ▶) and from (open, ◀) each site by message kind, on a logarithmic axis.

    Points, not bars: images outweigh scores a thousandfold, and a bar has no foot on a logarithmic axis.
    """
    rows = [row for row in traffic if row.bytes_to_site or row.bytes_from_site]
    if not rows:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(width, 0.34 * len(rows) + 0.85)
        for y, row in enumerate(rows):
            if row.bytes_to_site and row.bytes_from_site:
                axes.hlines(y, row.bytes_to_site, row.bytes_from_site, color=RULE, linewidth=1.5)
        # A little above and below the line, so that equal amounts do not hide each other.
        to = [(row.bytes_to_site, y - 0.13) for y, row in enumerate(rows) if row.bytes_to_site]
        back = [(row.bytes_from_site, y + 0.13) for y, row in enumerate(rows) if row.bytes_from_site]
        mark = {"linestyle": "none", "markersize": 7.5, "markeredgewidth": 1.4}
        axes.plot(*_columns(to), marker=">", color=AFTER, label="server to site", **mark)  # type: ignore[arg-type]
        axes.plot(*_columns(back), marker="<", color=ACCENT, markerfacecolor="none", label="site to server", **mark)  # type: ignore[arg-type]
        axes.set_xscale("log")
        letters = _letters(width)
        labels = [f"{short(row.site, letters)} · {short(row.kind, letters)}" for row in rows]
        low = min(size for size, _ in to + back)
        high = max(size for size, _ in to + back)
        bottom, top = math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)
        ticks = [10.0**power for power in range(bottom, top + 1, 1 if width > 5 else max(1, (top - bottom + 1) // 3))]
        axes.set_xlim(10.0**bottom / 1.3, 10.0**top * 1.3)
        axes.set_xticks(ticks, [human_bytes(round(tick)) for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="x")
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(length=0)
        axes.set_xlabel("bytes, logarithmic")
        figure.legend(loc="outside upper left", ncols=2, columnspacing=1.4)
        return svg(figure, "traffic", "Bytes to and from each site by kind of message")


def comparison_bars(compare: Mapping[str, Accuracy], *, highlight: str = "", width: float = WIDE) -> str:
    """Draw the macro accuracy of several methods with 95 % intervals, best first; `highlight` names the one to mark."""
    if not compare:
        return ""
    with matplotlib.rc_context(STYLE):
        ranked = sorted(compare.items(), key=lambda item: (-item[1].macro, item[0]))
        figure, axes = canvas(width, 0.36 * len(ranked) + 0.45)
        for y, (name, result) in enumerate(ranked):
            axes.barh(y, 100 * result.macro, 0.62, color=AFTER if name == highlight else BEFORE)
            axes.hlines(y, 100 * result.macro_low, 100 * result.macro_high, color=INK, linewidth=1.1)
            _note_right(axes, y, percent(result.macro), bold=name == highlight)
        _percent_axis(axes, [name for name, _ in ranked], width)
        return svg(figure, "comparison", "Macro accuracy of the methods compared, with 95 % intervals")


def breakdown_curves(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]], *, width: float = WIDE
) -> str:
    """Draw what is left of a measure as sites lie: a panel an attack, a line a method, the number of liars across.

    Args:
        panels: by attack and method, mean and half interval by the number of liars; 0 for no interval.
        width: in inches.
    """
    if not panels:
        return ""
    with matplotlib.rc_context(STYLE):
        across = max(1, round(width / 2.5))
        down = math.ceil(len(panels) / across)
        figure, _ = canvas(width, 2.1 * down + 0.5, axes=False)
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
        names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
        marks = zip(itertools.cycle((AFTER, *_TYPE_COLOURS)), itertools.cycle(_SILO_MARKS), strict=False)
        looks = dict(zip(names, marks, strict=False))
        for axes, (attack, lines) in zip(grid, panels.items(), strict=False):
            axes.set_title(short(attack))
            axes.grid(axis="y")
            for name, points in lines.items():
                (colour, mark), liars = looks[name], sorted(points)
                middle, half = ([points[n][place] for n in liars] for place in (0, 1))
                axes.errorbar(liars, middle, half, color=colour, marker=mark, markersize=4.5, linewidth=1.3, label=name)
            axes.set_xticks(sorted({n for points in lines.values() for n in points}))
            axes.set_xlabel("sites that lie")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        handles = {label: h for axes in grid for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4 if width > 5 else 2)
        return svg(figure, "breakdown", "Accuracy against the number of sites that lie, by attack and method")


def silo_scatter(silos: Mapping[str, Sequence[Sequence[float]]], *, width: float = WIDE) -> str:
    """Draw where each site's items lie on two axes (points), with how many there are; a site's colour has its mark.

    Of each site at most 300 points are drawn, evenly spread over the order in which they come.
    """
    if not any(map(len, silos.values())):
        return ""
    names = [short(site, _letters(width)) for site in silos]
    across = max(1, int(10 * width / (12 + max(map(len, names)))))  # names with their marks, beside each other
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(width, 0.55 * width + 0.2 * (1 + math.ceil(len(names) / across)))
        for name, points, mark, colour in zip(
            names, silos.values(), itertools.cycle(_SILO_MARKS), itertools.cycle((AFTER, *_TYPE_COLOURS)), strict=False
        ):
            shown = [(float(x), float(y)) for x, y in points[:: math.ceil(len(points) / 300) or 1]]
            axes.plot(
                *_columns(shown),
                linestyle="none",
                marker=mark,
                markersize=4,
                markeredgewidth=0,
                alpha=0.75,
                color=colour,
                label=f"{name}: {len(points):,}",
            )
        axes.set(xticks=(), yticks=(), xlabel="first principal axis", ylabel="second principal axis")
        figure.legend(loc="outside upper left", ncols=across, columnspacing=1.4, handletextpad=0.3)
        return svg(figure, "silos", "Items of each site on the two principal axes of their features, and how many")


def human_bytes(size: float) -> str:
    """Return a size in decimal units to three significant digits: `1234567` is `1.23 MB`."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = 0
    while size >= 999.5 and power < len(units) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.3g} {units[power]}"


_MACRO = "mean over types"


def _heatmap(shares: Mapping[str, Mapping[str, float]], name: str, label: str, width: float) -> str:
    """Draw shares in 0..1, row by row; a dash where there is none."""
    columns = list(dict.fromkeys(column for row in shares.values() for column in row))
    if not columns:
        return ""
    beside = 0.075 * min(_letters(width), max(map(len, shares)))  # inches that the rows' names take
    with matplotlib.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = canvas(width, (0.42 if len(shares) <= 10 else 0.26) * len(shares) + 0.7)
        for y, row in enumerate(shares.values()):
            for x, column in enumerate(columns):
                share = row.get(column, math.nan)
                known = math.isfinite(share)
                alpha = 0.05 + 0.95 * min(share, 1.0) if known else 0.0
                # Opacity over the page, not a palette from white: an empty cell is then empty in the dark too.
                axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=AFTER, alpha=alpha, linewidth=0))
                ink = "#ffffff" if alpha > 0.85 else INK
                if (width - beside) / len(columns) > 0.5:  # inches a number needs; below it only the shade is left
                    axes.text(x, y, percent(share) if known else "–", ha="center", va="center", color=ink)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(shares) - 0.5, -0.5))
        _columns_on_top(axes, range(len(columns)), columns, width)
        axes.set_yticks(range(len(shares)), [short(row, _letters(width)) for row in shares])
        axes.tick_params(length=0)
        return svg(figure, name, label)


def _bar(axes: Axes, spans: Sequence[tuple[float, float]], y: float, alpha: float) -> None:
    """Fill stretches of row `y`, all as one path: a rectangle for each would make a large page."""
    corners = [
        ((left, y - 0.4), (right, y - 0.4), (right, y + 0.4), (left, y + 0.4), (left, y)) for left, right in spans
    ]
    if corners:
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(corners)
        outline = Path([corner for each in corners for corner in each], codes)
        axes.add_patch(PathPatch(outline, facecolor=AFTER, alpha=alpha, linewidth=0))


def _columns_on_top(axes: Axes, at: Sequence[float], names: Sequence[str], width: float) -> None:
    """Name columns above them, slanted where the names would not fit beside each other."""
    names = [short(name, _letters(width)) for name in names]
    slanted = max(map(len, names)) * len(names) > 10 * width
    axes.set_xticks(at, names, rotation=35 if slanted else 0, ha="left" if slanted else "center")
    axes.xaxis.tick_top()


def canvas(width: float, height: float, *, axes: bool = True) -> tuple[Figure, Axes]:
    """Return an empty figure of a size in inches, and its axes; without `axes`, room for some of the caller's own."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    plot = figure.add_subplot() if axes else Axes(figure, (0, 0, 1, 1))
    return figure, plot


def _interval(result: Accuracy, name: str) -> tuple[float, float, float] | None:
    if name is _MACRO:
        return result.macro, result.macro_low, result.macro_high
    found = result.by_type.get(name)
    return (found.accuracy, found.low, found.high) if found else None


def _change(before: Accuracy | None, after: Accuracy, name: str) -> str:
    ends = [values for result in (before, after) if result and (values := _interval(result, name))]
    return " → ".join(percent(values[0]) for values in ends)


def percent(share: float) -> str:
    """Return a share in 0..1 as whole percent."""
    return f"{100 * share:.0f} %"


def short(name: str, limit: int = 22) -> str:
    """Return a name as one line of at most `limit` letters."""
    line = " ".join(name.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _letters(width: float) -> int:
    """Return how many letters of a name stand beside a figure of so many inches."""
    return 22 if width > 5 else 15


def _percent_axis(axes: Axes, names: Sequence[str], width: float) -> None:
    axes.set_xlim(0, 100)
    ticks = range(0, 101, 25 if width > 5 else 50)
    axes.set_xticks(ticks, [f"{tick} %" for tick in ticks])
    axes.set_yticks(range(len(names)), [short(name, _letters(width)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.tick_params(length=0)


def _note_right(axes: Axes, row: float, text: str, *, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    axes.annotate(
        text, (1, row), xytext=(6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        va="center", fontweight=weight, annotation_clip=False,
    )  # fmt: skip


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _points(rows: Sequence[MetricsRow], name: str) -> np.ndarray:  # [points, 2]: step, value
    values = [(row.step, value) for row in rows if (value := getattr(row, name)) is not None and math.isfinite(value)]
    return np.array(sorted(values), dtype=float).reshape(-1, 2)


def _smoothed(axes: Axes, points: np.ndarray, colour: str) -> None:
    steps, values = points.T
    window = len(values) // 20
    if window < 2:
        axes.plot(steps, values, color=colour, linewidth=1.8, marker="o" if len(values) == 1 else "")
        return
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.4)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    start = (window - 1) // 2
    axes.plot(steps[start : start + len(mean)], mean, color=colour, linewidth=2)


def _accuracy_panel(axes: Axes, rows: Sequence[MetricsRow], macro: np.ndarray) -> None:
    by_type: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.accuracy.items() if isinstance(row.accuracy, Mapping) else ():
            by_type.setdefault(name, []).append((row.step, math.nan if value is None else 100 * value))
    for place, (name, points) in enumerate(by_type.items()):
        colour = _TYPE_COLOURS[place % len(_TYPE_COLOURS)]
        style = _TYPE_STYLES[place % len(_TYPE_STYLES)]
        axes.plot(*_columns(points), color=colour, linestyle=style, linewidth=1.3, label=short(name))
    axes.plot(macro[:, 0], 100 * macro[:, 1], color=AFTER, linewidth=2.2, marker="o", markersize=3.5, label=_MACRO)
    axes.set_ylim(0, 100)
    axes.set_yticks((0, 50, 100), ("0 %", "50 %", "100 %"))
    if by_type:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.45), ncols=2 if axes.figure.get_figwidth() < 5 else 4)  # type: ignore[union-attr]


def svg(figure: Figure, name: str, label: str) -> str:
    """Return the figure as one `<svg>` element that can stand in a page beside others."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        # A figure with too many or too long names is drawn crowded; its table holds the same numbers.
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        # Letters are left to the reader's fonts, so it does not matter which ones matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = text.replace("*{stroke-linejoin", "svg *{stroke-linejoin", 1)
    for stand_in, colour in _VARIABLES.items():
        text = re.sub(rf"(fill|stroke): {stand_in}", rf"\1: {colour}", text)
    prefix = f"{name}-{round(figure.get_figwidth() * 10)}"
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view.group()} role="img"'
    )
    title = html.escape(label)
    return f'{head} aria-label="{title}"><title>{title}</title>{text[text.index(">") + 1 :]}'.strip()

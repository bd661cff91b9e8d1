"""Compare methods over seeds: mean, 95 % t-interval and n of each accuracy, and what is not distinguishable from best.

Intervals and the rule of what is near the best are those of `accord.evaluation.intervals`. *Best* is the competing
method with the highest mean; controls, chance and bounds do not compete. A method says itself what it is
(`accord.methods`), and the caller of `table` passes it on.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import matplotlib

from accord.evaluation.figures import AFTER, BEFORE, INK, STYLE, WIDE, canvas, percent, short, svg
from accord.evaluation.intervals import half_width, is_near
from accord.evaluation.markdown import escaped, markdown_table

CONTROLS = ("base", "question-only")
"""What no method has touched, and every table has: the untrained policy, and answers without the image."""

Unit: TypeAlias = Literal["%", "MB", "s"]
Mark: TypeAlias = Literal["best", "near", ""]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one method measured with one seed; `correct` is empty where it failed."""

    method: str
    seed: int
    correct: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # right answers and test questions by type
    bytes_to_sites: int = 0
    bytes_from_sites: int = 0
    seconds: float = 0.0
    failed: str = ""  # why
    role: str = "competes"  # its place in a table, as a method says it of itself


@dataclass(frozen=True, slots=True)
class Column:
    """What a column measures; accuracies (`%`) are shares in 0..1 until they are shown."""

    name: str
    unit: Unit = "%"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` seeds and half its 95 % interval, None for a single seed."""

    mean: float
    half: float | None
    n: int
    mark: Mark = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One method: how many seeds it finished and failed, and an estimate a column, None where there is nothing."""

    method: str
    n: int
    failed: int
    values: tuple[Estimate | None, ...]
    competes: bool = True  # it is neither control, nor chance, nor bound


@dataclass(frozen=True, slots=True)
class Table:
    """Methods by what was measured, controls first."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


IN_DOMAIN, HELD_OUT, OVERALL, GAIN = "in-domain", "held-out", "overall", "share of the ground truth's gain"

_BySeed: TypeAlias = dict[int, float]


def table(cells: Sequence[Cell], in_domain: Collection[str], roles: Mapping[str, str] | None = None) -> Table:
    """Estimate every column of every method.

    Columns: the mean over the types that a site holds, over those that none holds (left out if there are none) and
    over all types; each type; bytes and seconds. Where the method that is the ceiling was run and gained on the base
    with every seed, also (method - base) / (ceiling - base) of the mean over all types, seed by seed.

    Args:
        cells: at most one a method and seed; methods keep their order behind the controls.
        in_domain: the question types that a site holds.
        roles: of methods that do not compete, by name: "control", "chance", "bound", "ceiling".
    """
    roles = {**(roles or {}), **dict.fromkeys(CONTROLS, "control")}
    types = sorted({name for cell in cells for name in cell.correct})
    held_out = [name for name in types if name not in in_domain]
    measures: list[tuple[Column, Callable[[Cell], float | None]]] = []

    def over(name: str, chosen: Sequence[str]) -> None:
        measures.append((Column(name), lambda cell: macro(cell, chosen)))

    if types:
        if len(held_out) < len(types):
            over(IN_DOMAIN, [name for name in types if name in in_domain])
        if held_out:
            over(HELD_OUT, held_out)
        over(OVERALL, types)
        for name in types:
            over(name, [name])
        if gains := _gains(cells, types, roles):
            measures.append((Column(GAIN), lambda cell: gains.get((cell.method, cell.seed))))
        measures.append((Column("to sites", "MB"), lambda cell: cell.bytes_to_sites / 1e6))
        measures.append((Column("from sites", "MB"), lambda cell: cell.bytes_from_sites / 1e6))
        measures.append((Column("time", "s"), lambda cell: cell.seconds))
    methods = dict.fromkeys([*CONTROLS, *(cell.method for cell in cells)])
    columns = []
    for column, measure in measures:
        values: dict[str, _BySeed] = {name: {} for name in methods}
        for cell in cells:
            if not cell.failed and (value := measure(cell)) is not None:
                values[cell.method][cell.seed] = value
        columns.append(_estimates(values, roles, marked=column.unit == "%" and column.name != GAIN))
    rows = []
    for name in methods:
        own = [cell for cell in cells if cell.method == name]
        failed = sum(bool(cell.failed) for cell in own)
        if own:
            rows.append(
                Row(name, len(own) - failed, failed, tuple(column.get(name) for column in columns), name not in roles)
            )
    return Table(tuple(column for column, _ in measures), tuple(rows))


def macro(cell: Cell, types: Collection[str]) -> float | None:
    """Return the mean accuracy over those of `types` that the cell measured, in 0..1; None where it measured none."""
    shares = [cell.correct[name][0] / cell.correct[name][1] for name in types if name in cell.correct]
    return math.fsum(shares) / len(shares) if shares else None


def _gains(cells: Sequence[Cell], types: Sequence[str], roles: Mapping[str, str]) -> dict[tuple[str, int], float]:
    """Return each method's gain over the base as a share of the ground truth's; none if that gained nothing once."""
    overall = {(cell.method, cell.seed): value for cell in cells if (value := macro(cell, types)) is not None}
    ceiling = next((name for name, role in roles.items() if role == "ceiling"), "")
    seeds = [seed for method, seed in overall if method == ceiling and ("base", seed) in overall]
    base = {seed: overall["base", seed] for seed in seeds}
    bound = {seed: overall[ceiling, seed] - base[seed] for seed in seeds}
    if any(gain <= 0 for gain in bound.values()):
        return {}
    return {
        (method, seed): (value - base[seed]) / bound[seed]
        for (method, seed), value in overall.items()
        if seed in bound and method not in (*CONTROLS, ceiling)
    }


def _estimates(values: Mapping[str, _BySeed], roles: Mapping[str, str], *, marked: bool) -> dict[str, Estimate]:
    """Estimate one column, and mark the best of it and those near."""
    means = {name: statistics.fmean(found.values()) for name, found in values.items() if found}
    most = max((len(found) for found in values.values()), default=0)
    competing = [  # over equally many seeds: one lucky seed must not win
        name for name in means if marked and name not in roles and len(values[name]) == most
    ]
    best = max(competing, key=lambda name: means[name], default=None)

    def mark(name: str) -> Mark:
        if best is None or name not in competing:
            return ""
        return "best" if name == best else "near" if is_near(values[best], values[name]) else ""

    return {
        name: Estimate(mean, half_width(list(values[name].values())), len(values[name]), mark(name))
        for name, mean in means.items()
    }


def to_markdown(made: Table) -> str:
    """Write the table in Markdown, accuracies in percent, with a line that says how to read it."""
    names = [f"{column.name}, {column.unit}" for column in made.columns]
    rows = []
    for row in made.rows:
        cells = [_shown(value, column.unit) for value, column in zip(row.values, made.columns, strict=True)]
        if not row.n:
            cells = ["failed"] * len(cells)
        seeds = f"{row.n}" if not row.failed else f"{row.n} ({row.failed} failed)"
        rows.append([escaped(row.method), seeds, *cells])
    lines = [markdown_table(["method", "seeds", *names], rows)]
    apart = ", ".join(row.method for row in made.rows if not row.competes)
    note = (
        "Mean over seeds ± half its 95 % t-interval. Of each accuracy the best method is **bold**; \\* is within one "
        "standard error of it, paired over seeds."
    )
    return "\n".join([*lines, "", f"{note} Not competing: {apart}." if apart else note]) + "\n"


def to_csv(made: Table) -> str:
    """Write the table as CSV: `mean`, `half width`, `n` and `mark` of every column; shares in 0..1, MB and seconds."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [c.name if c.unit == "%" else f"{c.name} ({c.unit})" for c in made.columns]
    parts = ("mean", "half width", "n", "mark")
    writer.writerow(["method", "seeds", "failed", *(f"{name}: {part}" for name in names for part in parts)])
    for row in made.rows:
        numbers: list[object] = []
        for value in row.values:
            numbers += [value.mean, value.half, value.n, value.mark] if value else [None, None, 0, ""]
        writer.writerow([row.method, row.n, row.failed, *numbers])
    return stream.getvalue()


def to_figure(made: Table, *, width: float = WIDE) -> str:
    """Draw a dot with its interval per method, best overall on top: in-domain and held-out, or overall without these.

    Controls and bounds are open dots; the dotted line is the base. "" where nothing was measured.
    """
    place = {column.name: k for k, column in reversed([*enumerate(made.columns)])}  # a type may be named like a mean
    panels = [name for name in (IN_DOMAIN, HELD_OUT) if name in place] if HELD_OUT in place else [OVERALL]
    found = [(value.mean, row) for row in made.rows if OVERALL in place and (value := row.values[place[OVERALL]])]
    if not found:
        return ""
    rows = [row for _, row in sorted(found, key=lambda item: (-item[0], item[1].method))]
    with matplotlib.rc_context(STYLE):
        figure, _ = canvas(width, 0.3 * len(rows) + 0.75, axes=False)
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, name in zip(grid, panels, strict=True):
            drawn = [(y, row, value) for y, row in enumerate(rows) if (value := row.values[place[name]])]
            ends = [v.mean + sign * (v.half or 0) for _, _, v in drawn for sign in (-1, 1)]
            for y, row, value in drawn:
                half = value.half or 0.0
                low, high = max(value.mean - half, 0), min(value.mean + half, 1)
                axes.hlines(y, 100 * low, 100 * high, color=INK, linewidth=1.1)
                face = AFTER if row.competes else "#ffffff"
                edge = AFTER if row.competes else BEFORE
                axes.plot(100 * value.mean, y, "o", markersize=6, markerfacecolor=face, markeredgecolor=edge)
                if row.method == "base":
                    axes.axvline(100 * value.mean, color=BEFORE, linewidth=1.1, linestyle=":", zorder=1)
            # Dots, unlike bars, need no zero: a cut axis shows differences of a few points.
            bottom = max(0, 10 * math.floor(10 * min(ends)))
            top = max(min(100, 10 * math.ceil(10 * max(ends))), bottom + 10)
            step = max(10, 10 * round((top - bottom) / 40))
            ticks = range(bottom, top + 1, step)
            axes.set_xlim(bottom - 1, top + 1)
            axes.set_xticks(ticks, [percent(tick / 100) for tick in ticks])
            axes.grid(axis="x")
            axes.tick_params(length=0)
            axes.set_title(name)
        grid[0].set_yticks(range(len(rows)), [short(row.method) for row in rows])
        grid[0].set_ylim(len(rows) - 0.5, -0.5)
        return svg(figure, "table", f"Accuracy of the methods with 95 % intervals over seeds: {', '.join(panels)}")


def _shown(value: Estimate | None, unit: Unit) -> str:
    if value is None:
        return "–"
    scale = 100 if unit == "%" else 1
    digits = 1 if unit == "%" else _digits(value.mean)
    text = f"{scale * value.mean:.{digits}f}"
    if value.half is not None:
        text += f" ± {scale * value.half:.{digits}f}"
    return {"best": f"**{text}**", "near": f"{text} \\*", "": text}[value.mark]


def _digits(size: float) -> int:
    """Return the decimals that show three significant digits, at most four decimals."""
    return min(4, max(0, 2 - math.floor(math.log10(size)))) if size > 0 else 0

"""Compare methods over seeds: mean, 95 % t-interval and n of each accuracy, and which differences are significant.

Intervals and tests are those of `accord.evaluation.intervals`. *Best* is the competing method with the highest mean;
controls, chance and bounds do not compete. A method says itself what it is (`accord.methods`), and the caller of
`table` passes it on. In each column of accuracies two families of paired t-tests over seeds are corrected by Holm's
procedure and read at 5 %:

- all pairs of competing methods. The best is chosen by the same data: with a correction for its own comparisons alone,
  13 % of simulated tables of 14 equal methods and five seeds show a difference, with that for all pairs 5 %.
- every competing method with the control that is trained without any site, where it was run.

Shares of the bound are, of the overall accuracies x of a method, b of the base, q of answers from the question alone
and u of the ceiling, the reference answers as reward, seed by seed,

    (x - b) / (u - b)    and    (x - q) / (u - q)

The second counts nothing as gained that the wording of the questions gives away. A share is left out unless its
denominator is positive with every seed: to leave out single seeds would choose among them.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final, Literal, TypeAlias

import matplotlib
import numpy as np

from accord.evaluation.clusters import clustered_error
from accord.evaluation.figures import AFTER, BEFORE, INK, STYLE, WIDE, canvas, percent, short, svg
from accord.evaluation.intervals import half_width, holm, paired_p
from accord.evaluation.markdown import escaped, markdown_table
from accord.evaluation.summary import Z_95

CONTROLS = ("base", "question-only")
"""What no method has touched, and every table has: the untrained policy, and answers without the image."""

LEVEL: Final = 0.05
"""Below which a p-value, adjusted for its column, is significant."""

CIDER: Final = "CIDEr-D"
"""A measure of captions from 0 to 10, which is no share and has no unit."""

MATCHING: Final = "matching"
PREFERRED: Final = "preferred to base"
"""Shares of captions: those whose photograph a judge finds, and those that it prefers to the base's."""

Unit: TypeAlias = Literal["%", "MB", "s", ""]
Mark: TypeAlias = Literal["best", "level", "below", ""]
"""The highest mean of the competing, not significantly below it, significantly below it; nothing where no test was."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one method measured with one seed; `correct` is empty where it failed."""

    method: str
    seed: int
    correct: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # right answers and test questions by type
    bytes_to_sites: int = 0
    bytes_from_sites: int = 0
    seconds: float = 0.0
    failed: str = ""  # why
    role: str = "competes"  # its place in a table, as a method says it of itself
    shuffled: Mapping[str, tuple[float, int]] = field(default_factory=dict)  # as `correct`, with other images
    outcomes: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by type, of each test question
    asked: Mapping[str, Sequence[tuple[str, int]]] = field(default_factory=dict)  # their ids and images' numbers


@dataclass(frozen=True, slots=True)
class Column:
    """What a column measures; accuracies (`%`) are shares in 0..1 until they are shown."""

    name: str
    unit: Unit = "%"
    compared: bool = False  # the methods, by tests


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired t-test over seeds with another method: the mean difference from it, p, and p adjusted for the column."""

    difference: float
    p: float
    adjusted: float

    @property
    def significant(self) -> bool:
        """Whether the two differ at 5 %, all tests of the column together."""
        return self.adjusted < LEVEL


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `n` seeds and half its 95 % interval, None for a single seed; how it compares; and over images.

    `half_over_images` is half the 95 % interval of the mean of these very policies over the draw of test questions,
    clustered by image; None where images are not known, or the seeds were asked different questions.
    """

    mean: float
    half: float | None
    n: int
    mark: Mark = ""
    with_best: Comparison | None = None
    with_control: Comparison | None = None
    half_over_images: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One method: how many seeds it finished and failed, and an estimate a column, None where there is nothing."""

    method: str
    n: int
    failed: int
    values: tuple[Estimate | None, ...]
    competes: bool = True  # it is neither control, nor chance, nor bound
    tried: int | None = None  # settings, on dev; None where nobody has said


@dataclass(frozen=True, slots=True)
class Table:
    """Methods by what was measured, controls first; `control`: what competing methods are tested against, if any."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    control: str = ""


IN_DOMAIN, HELD_OUT, OVERALL, SHUFFLED = "in-domain", "held-out", "overall", "shuffled"
GAIN, BEYOND = "share of the ground truth's gain", "share of the ground truth's lead over the question alone"
CEILING = "ceiling"  # a role

_BySeed: TypeAlias = dict[int, float]


def table(
    cells: Sequence[Cell],
    in_domain: Collection[str] | None,
    roles: Mapping[str, str] | None = None,
    tried: Mapping[str, int] | None = None,
) -> Table:
    """Estimate every column of every method.

    Columns: the mean over the types that a site holds, over those that none holds (left out if there are none) and
    over all types; the last with other images, where that was measured; each type; the shares of the bound, where the
    method that is the ceiling was run (above); bytes and seconds.

    Args:
        cells: at most one a method and seed; methods keep their order behind the controls.
        in_domain: the question types that a site holds; None where the columns are no accuracies of question types but
            different measures, of which there is no mean.
        roles: of methods that do not compete, by name: "control", "chance", "bound", "ceiling".
        tried: how many settings of a method were tried on dev, by name, as far as that is known.
    """
    roles = {**(roles or {}), **dict.fromkeys(CONTROLS, "control")}
    types = sorted({name for cell in cells for name in cell.correct})
    methods = {
        name: own
        for name in dict.fromkeys([*CONTROLS, *(cell.method for cell in cells)])
        if (own := [cell for cell in cells if cell.method == name])
    }
    control = next((name for name in methods if roles.get(name) == "control" and name not in CONTROLS), "")
    asked = {name: _mean_outcomes([cell for cell in own if not cell.failed]) for name, own in methods.items()}
    columns, estimates = [], []
    for column, measure, chosen in _measures(cells, types, in_domain, roles):
        values: dict[str, _BySeed] = {name: {} for name in methods}
        for cell in cells:
            if not cell.failed and (value := measure(cell)) is not None:
                values[cell.method][cell.seed] = value
        found = {
            name: Estimate(statistics.fmean(own.values()), half_width(list(own.values())), len(own))
            for name, own in values.items()
            if own
        }
        if column.compared:
            found = _tested(found, values, roles, control)
            found = {name: replace(e, half_over_images=_over_images(asked[name], chosen)) for name, e in found.items()}
        columns.append(column)
        estimates.append(found)
    rows = []
    for name, own in methods.items():
        failed = sum(bool(cell.failed) for cell in own)
        values_of = tuple(found.get(name) for found in estimates)
        competes, settings = name not in roles, (tried or {}).get(name)
        rows.append(Row(name, len(own) - failed, failed, values_of, competes, settings))
    return Table(tuple(columns), tuple(rows), control)


_Measure: TypeAlias = tuple[Column, Callable[[Cell], float | None], Sequence[str]]


def _measures(
    cells: Sequence[Cell], types: Sequence[str], in_domain: Collection[str] | None, roles: Mapping[str, str]
) -> list[_Measure]:
    """Return the columns in order, each with its value of a cell and the types that it is a mean over."""
    if not types:
        return []
    held, held_out = ([name for name in types if (name in (in_domain or ())) is held] for held in (True, False))
    means = {**({IN_DOMAIN: held} if held else {}), **({HELD_OUT: held_out} if held_out else {}), OVERALL: types}
    if in_domain is None:
        means = {}
    accuracies: list[tuple[str, Sequence[str]]] = [*means.items(), *((name, [name]) for name in types)]
    measures: list[_Measure] = [
        (Column(name, "" if in_domain is None and name == CIDER else "%", compared=True), _macro_of(chosen), chosen)
        for name, chosen in accuracies
    ]
    if means and any(cell.shuffled for cell in cells):
        shuffled: _Measure = (Column(SHUFFLED), lambda cell: macro(replace(cell, correct=cell.shuffled), types), ())
        measures.insert(len(means), shuffled)
    overall = {(cell.method, cell.seed): value for cell in cells if (value := macro(cell, types)) is not None}
    ceiling = next((name for name, role in roles.items() if role == CEILING), "")
    for name, floor in ((GAIN, "base"), (BEYOND, "question-only")) if means else ():
        if shares := _shares(overall, floor, ceiling):
            measures.append((Column(name), _looked_up(shares), ()))
    measures.append((Column("to sites", "MB"), lambda cell: cell.bytes_to_sites / 1e6, ()))
    measures.append((Column("from sites", "MB"), lambda cell: cell.bytes_from_sites / 1e6, ()))
    measures.append((Column("time", "s"), lambda cell: cell.seconds, ()))
    return measures


def _macro_of(types: Sequence[str]) -> Callable[[Cell], float | None]:
    return lambda cell: macro(cell, types)


def _looked_up(known: Mapping[tuple[str, int], float]) -> Callable[[Cell], float | None]:
    return lambda cell: known.get((cell.method, cell.seed))


def macro(cell: Cell, types: Collection[str]) -> float | None:
    """Return the mean accuracy over those of `types` that the cell measured, in 0..1; None where it measured none."""
    shares = [cell.correct[name][0] / cell.correct[name][1] for name in types if name in cell.correct]
    return math.fsum(shares) / len(shares) if shares else None


def _shares(overall: Mapping[tuple[str, int], float], floor: str, ceiling: str) -> dict[tuple[str, int], float]:
    """Return (x - floor) / (ceiling - floor) by method and seed; none if the denominator is not positive once."""
    lows = {seed: overall[floor, seed] for method, seed in overall if method == ceiling and (floor, seed) in overall}
    leads = {seed: overall[ceiling, seed] - low for seed, low in lows.items()}
    if any(lead <= 0 for lead in leads.values()):
        return {}
    return {
        (method, seed): (value - lows[seed]) / leads[seed]
        for (method, seed), value in overall.items()
        if seed in leads and method not in (floor, ceiling)
    }


def _tested(
    found: Mapping[str, Estimate], values: Mapping[str, _BySeed], roles: Mapping[str, str], control: str
) -> dict[str, Estimate]:
    """Add to one column's estimates the tests of the competing methods, with the best and with the control."""
    most = max((len(values[name]) for name in found if name not in roles), default=0)
    competing = [  # over equally many seeds: one lucky seed must not win
        name for name in found if name not in roles and len(values[name]) == most
    ]
    if not competing:
        return dict(found)
    best = max(competing, key=lambda name: found[name].mean)
    others = [name for name in competing if name != best]
    with_best = {
        one: test for (one, other), test in _tests(combinations([*others, best], 2), values).items() if other == best
    }
    pairs = _tests(((name, control) for name in competing if control), values)
    with_control = {name: test for (name, _), test in pairs.items()}
    tested = dict(found)
    for name in competing:
        mark: Mark = ""
        if name == best:
            mark = "best" if with_best else ""
        elif name in with_best:
            test = with_best[name]
            mark = "below" if test.significant and test.difference < 0 else "level"
        tested[name] = replace(
            found[name], mark=mark, with_best=with_best.get(name), with_control=with_control.get(name)
        )
    return tested


def _tests(pairs: Iterable[tuple[str, str]], values: Mapping[str, _BySeed]) -> dict[tuple[str, str], Comparison]:
    """Test one family of pairs, as far as there is a test; `difference`: first less second."""
    p = {(a, b): found for a, b in pairs if (found := paired_p(values[a], values[b])) is not None}
    adjusted = holm(p)
    return {
        (a, b): Comparison(
            statistics.fmean(values[a][seed] - values[b][seed] for seed in values[a] if seed in values[b]),
            p[a, b],
            adjusted[a, b],
        )
        for a, b in p
    }


_Asked: TypeAlias = tuple[dict[str, list[float]], dict[str, list[int]]]


def _mean_outcomes(cells: Sequence[Cell]) -> _Asked | None:
    """Return each test question's mean outcome over seeds, and its image; None where seeds were asked differently."""
    if not cells or not cells[0].asked or any(not cell.outcomes or cell.asked != cells[0].asked for cell in cells):
        return None
    images = {name: [image for _, image in rows] for name, rows in cells[0].asked.items()}
    if any({name: len(rows) for name, rows in images.items()} != _lengths(cell.outcomes) for cell in cells):
        return None
    return {name: np.mean([cell.outcomes[name] for cell in cells], axis=0).tolist() for name in images}, images


def _lengths(outcomes: Mapping[str, Sequence[float]]) -> dict[str, int]:
    return {name: len(found) for name, found in outcomes.items()}


def _over_images(asked: _Asked | None, types: Sequence[str]) -> float | None:
    """Return half the 95 % interval over the draw of test questions, clustered by image."""
    if asked is None:
        return None
    outcomes, images = asked
    error = clustered_error({name: outcomes[name] for name in types if name in outcomes}, images)
    return None if error is None else Z_95 * error


def to_markdown(made: Table) -> str:
    """Write the table in Markdown, accuracies in percent, with lines that say how to read it."""
    names = [f"{column.name}, {column.unit}" if column.unit else column.name for column in made.columns]
    told = any(row.tried is not None for row in made.rows)
    rows = []
    for row in made.rows:
        cells = [_shown(value, column.unit) for value, column in zip(row.values, made.columns, strict=True)]
        if not row.n:
            cells = ["failed"] * len(cells)
        seeds = f"{row.n}" if not row.failed else f"{row.n} ({row.failed} failed)"
        tried = [f"{row.tried}" if row.tried is not None else "–"] if told else []
        rows.append([escaped(row.method), seeds, *tried, *cells])
    head = ["method", "seeds", *(["settings tried"] if told else []), *names]
    return "\n".join([markdown_table(head, rows), "", *_notes(made, told)]) + "\n"


def _notes(made: Table, told: bool) -> list[str]:
    """Say how each mark and column was made, as far as the table has it."""
    there = {column.name for column in made.columns if not column.compared}
    values = [value for row in made.rows for value in row.values if value is not None]
    lines = ["Mean ± half its 95 % t-interval, over training seeds."]
    if any(value.half_over_images is not None for value in values):
        lines[0] += " The CSV has beside it that over the draw of test questions, clustered by image."
    if any(value.with_best for value in values):
        lines.append(
            "**Bold** is, of the competing methods, the highest mean of a column and what is not significantly below "
            "it; † is significantly below it. The test is a two-sided paired t-test over seeds, at 5 % after Holm's "
            "correction for all pairs of competing methods of the column; no order is claimed between bold values. "
            "What has fewer seeds than others, or the same difference with every seed, is not tested."
        )
    elif any(row.competes for row in made.rows):
        lines.append(
            "Nothing is tested, and nothing bold: that takes two competing methods with five seeds in common, and a "
            "difference that is not the same with all of them."
        )
    if any(value.with_control for value in values):
        lines.append(
            f"‡ is significantly above {escaped(made.control)}, by the same test, corrected for the competing methods."
        )
    if SHUFFLED in there:
        lines.append("Shuffled: overall, where every question is asked with another image of its domain.")
    overall = "of overall accuracies, seed by seed; left out unless the denominator is positive with every seed"
    if GAIN in there:
        lines.append(f"Share of the gain: (method - base) / (ground truth - base), {overall}.")
    if BEYOND in there:
        lines.append(
            f"Share of the lead: (method - question-only) / (ground truth - question-only), {overall}. It counts "
            "nothing as gained that the wording of the questions gives away."
        )
    if told:
        lines.append("Settings tried: on dev, as the recipe says; – where it says nothing.")
    apart = ", ".join(escaped(row.method) for row in made.rows if not row.competes)
    return [" ".join([*lines, f"Not competing: {apart}."] if apart else lines)]


def to_csv(made: Table) -> str:
    """Write the table as CSV; shares in 0..1, MB and seconds.

    Of every column `mean`, `half width`, `n` and `mark` ("best", "level", "below"). Of every accuracy also the half
    width over images, and p and adjusted p against the best and, where it was run, against the control.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    others = ["the best", *([made.control] if made.control else [])]
    told = any(row.tried is not None for row in made.rows)
    head = ["method", "seeds", "failed", *(["settings tried"] if told else [])]
    for column in made.columns:
        parts = ["mean", "half width", "n", "mark"]
        if column.compared:
            parts += ["half width over images"]
            parts += [f"{p} against {other}" for other in others for p in ("p", "adjusted p")]
        name = column.name if column.unit in ("%", "") else f"{column.name} ({column.unit})"
        head += [f"{name}: {part}" for part in parts]
    writer.writerow(head)
    for row in made.rows:
        numbers: list[object] = [row.method, row.n, row.failed, *([row.tried] if told else [])]
        for column, value in zip(made.columns, row.values, strict=True):
            numbers += [value.mean, value.half, value.n, value.mark] if value else [None, None, 0, ""]
            if column.compared:
                numbers.append(value and value.half_over_images)
                for test in (value and value.with_best, value and value.with_control)[: len(others)]:
                    numbers += [test.p, test.adjusted] if test else [None, None]
        writer.writerow(numbers)
    return stream.getvalue()


def to_figure(made: Table, *, width: float = WIDE) -> str:
    """Draw a dot with its interval per method, best overall on top: in-domain and held-out, or overall without these.

    Of policies that describe, what a judge says of them: matching, and preference over the base, best on top.
    Controls and bounds are open dots; the dotted line is the base. "" where nothing was measured.
    """
    place = {column.name: k for k, column in reversed([*enumerate(made.columns)])}  # a type may be named like a mean
    panels = [name for name in (IN_DOMAIN, HELD_OUT) if name in place] if HELD_OUT in place else [OVERALL]
    first = OVERALL
    if CIDER in place:
        panels, first = [name for name in (MATCHING, PREFERRED) if name in place], PREFERRED
    found = [(value.mean, row) for row in made.rows if first in place and (value := row.values[place[first]])]
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
    if value.mark in ("best", "level"):
        text = f"**{text}**"
    above = value.with_control is not None and value.with_control.significant and value.with_control.difference > 0
    return text + " †" * (value.mark == "below") + " ‡" * above


def _digits(size: float) -> int:
    """Return the decimals that show three significant digits, at most four decimals."""
    return min(4, max(0, 2 - math.floor(math.log10(size)))) if size > 0 else 0

"""Make one self-contained page of a run, and one table of several runs.

The page needs no network: figures are inline SVG, images are data URIs, and its content-security policy forbids the
browser to load or run anything else. Every string from the run is hostile until escaped, for a site chooses its own
name and a question can be any text. The same run folder gives the same bytes.
"""

from __future__ import annotations

import base64
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from accord.errors import RunError
from accord.evaluation.account import macro_direction, percent, points, tell, tell_competence, type_direction
from accord.evaluation.figures import (
    NARROW,
    WIDE,
    accuracy_bars,
    comparison_bars,
    competence_heatmap,
    competence_items,
    curves,
    human_bytes,
    judging_heatmap,
    silo_scatter,
    traffic_bars,
)
from accord.evaluation.intervals import half_width
from accord.evaluation.markdown import escaped, markdown_table
from accord.evaluation.summary import Accuracy, EvaluationSummary, Summary, TrafficRow, read_summary
from accord.evaluation.trace import GalleryRow, MetricsRow, read_gallery, read_metrics, stages_begun
from accord.rewards.certificate import UNCOVERED
from accord.runs import refuse_foreign, stages_done, write_atomic
from accord.runs.failures import failures_of

_STAGES = ("projector", "site", "router", "align", "evaluation")
_IMAGE_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True, slots=True)
class _Example:
    """One card of the gallery, ready to show."""

    row: GalleryRow
    images: list[tuple[str, bool]]  # data URI, and whether it is small
    before_right: bool
    after_right: bool


def write_report(run: Path) -> Path:
    """Write `report.html` into the run's folder and return its path.

    Args:
        run: folder of a finished run: `summary.json`, and if present `metrics.jsonl`, `gallery.jsonl`, `recipe.toml`.

    Raises:
        RunError: the folder or its summary is absent (naming the stage that is missing), a line or a field is damaged,
            an entry is no file of the folder's own, or a gallery image is absent or neither PNG nor JPEG.
    """
    summary = _summary(run)
    metrics = read_metrics(run / "metrics.jsonl")
    gallery = [_example(run, row) for row in read_gallery(run / "gallery.jsonl")]
    recipe = run / "recipe.toml"
    page = _template().render(
        summary=summary,
        account=tell(summary, metrics),
        figures=_figures(summary, metrics),
        controls=_controls(summary.evaluation),
        compared=_compared(summary.evaluation),
        failed=failures_of(run),
        gallery=gallery,
        right=sum(example.after_right for example in gallery),
        types=list(summary.evaluation.aligned.by_type),
        uncovered=UNCOVERED,
        competence="" if summary.competence is None else tell_competence(summary.competence),
        ranked_types=list(dict.fromkeys(name for site in summary.sites for name in site.ranking.by_type)),
        traffic=summary.traffic,
        traffic_totals=_traffic_totals(summary.traffic),
        recipe=recipe.read_text("utf-8", "replace") if recipe.is_file() else "",
    )
    path = run / "report.html"
    write_atomic(path, page)
    return path


def compare_runs(runs: list[Path]) -> str:
    """Return a Markdown table of runs: accuracy before → after in per cent, macro and by type, one row a name.

    Runs that share a name are seeds of one experiment: their row gives the mean ± half its 95 % t-interval over seeds.

    Raises:
        RunError: no run is given, a run is not finished, or two folders hold the same name and seed.
    """
    if not runs:
        raise RunError("no run to compare; give the folder of at least one finished run")
    groups: dict[str, dict[int, Summary]] = {}
    for run in runs:
        summary = _summary(run)
        seeds = groups.setdefault(summary.name, {})
        if summary.seed in seeds:
            raise RunError(
                f"{run} is run {summary.name!r} with seed {summary.seed}, which another folder given already holds; "
                "leave one out, or run it with another seed"
            )
        seeds[summary.seed] = summary
    types = list(
        dict.fromkeys(
            name for group in groups.values() for s in group.values() for name in s.evaluation.aligned.by_type
        )
    )
    header = ["run", "seeds", "macro before → after", "change", *(f"{name} before → after" for name in types)]
    voted = any(summary.evaluation.vqa for group in groups.values() for summary in group.values())
    if voted:
        header.append("VQA accuracy before → after")
    rows = []
    for name, group in groups.items():
        evaluations = [summary.evaluation for summary in group.values()]
        columns = [
            _spread_pair(evaluations, lambda result: result.macro),
            _spread([100 * (e.aligned.macro - e.base.macro) for e in evaluations if e.base], signed=True),
            *(_spread_pair(evaluations, _of_type(question_type)) for question_type in types),
        ]
        if voted:
            votes = [[100 * e.vqa[when].macro for e in evaluations if when in e.vqa] for when in ("base", "aligned")]
            columns.append(" → ".join(map(_spread, votes)))
        rows.append([escaped(name), ", ".join(map(str, sorted(group))), *columns])
    note = "Accuracy in per cent; ± is half the 95 % t-interval over seeds, and stands only where there are several."
    return "\n".join([markdown_table(header, rows), "", note, ""])


def _summary(run: Path) -> Summary:
    if not run.is_dir():
        raise RunError(
            f"there is no run folder at {run}; check the path, or make one with `accord run recipe.toml --out {run}`"
        )
    refuse_foreign(run)
    if (run / "summary.json").is_file():
        return read_summary(run / "summary.json")
    begun, done = stages_begun(run), stages_done(run)
    if not begun:
        raise RunError(
            f"{run} holds no run: summary.json and metrics.jsonl are absent; "
            "give the folder of a finished run, one that `accord run` wrote"
        )
    last = max((place for place, stage in enumerate(_STAGES) if any(_is(stage, name) for name in begun)), default=0)
    broken_off = [name for name in begun if _is(_STAGES[last], name) and done and name not in done]
    missing = broken_off[0] if broken_off else _STAGES[min(last + 1, len(_STAGES) - 1)]
    raise RunError(
        f"the run in {run} is not finished: stage {missing!r} is missing (noted so far: {', '.join(begun)}) and "
        f"summary.json is absent; finish it with `accord run {run / 'recipe.toml'} --out {run} --resume`"
    )


def _is(kind: str, stage: str) -> bool:
    return stage.split(" ")[0] == kind


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "bytes": human_bytes,
        "count": _human_count,
        "duration": _human_seconds,
        "breakable": _breakable,
    }
    environment.globals |= {"macro_direction": macro_direction, "type_direction": type_direction, "shares": _shares}
    return environment.from_string(files("accord.evaluation").joinpath("report.html.j2").read_text("utf-8"))


def _figures(summary: Summary, metrics: Sequence[MetricsRow]) -> dict[str, tuple[Markup, Markup]]:
    """Draw each figure for a desk and for a phone; the style sheet shows the one that fits."""
    evaluation, compared = summary.evaluation, _compared(summary.evaluation)
    drawings: dict[str, Callable[[float], str]] = {
        "accuracy": lambda width: accuracy_bars(
            evaluation.base, evaluation.aligned, _controls(evaluation), width=width
        ),
        "comparison": lambda width: comparison_bars(compared, highlight=_THIS_RUN, width=width),
        "curves": lambda width: curves(metrics, width=width),
        "judging": lambda width: judging_heatmap(summary.routing, width=width),
        "traffic": lambda width: traffic_bars(summary.traffic, width=width),
    }
    if (competence := summary.competence) is not None:
        drawings["competence"] = lambda width: competence_heatmap(competence, width=width)
        drawings["answers"] = lambda width: competence_items(competence, width=width)
    if (projector := summary.projector) is not None:
        drawings["silos"] = lambda width: silo_scatter(projector.silos, width=width)
    # Safe: matplotlib escapes what it writes, and the title is escaped by the figure.
    return {name: (Markup(draw(WIDE)), Markup(draw(NARROW))) for name, draw in drawings.items()}


_THIS_RUN = "this run"


def _controls(evaluation: EvaluationSummary) -> dict[str, Accuracy]:
    found = {"question only": evaluation.question_only, "shuffled image": evaluation.shuffled_image}
    return {name: result for name, result in found.items() if result is not None}


def _compared(evaluation: EvaluationSummary) -> dict[str, Accuracy]:
    if not evaluation.compare:
        return {}
    before = {"before alignment": evaluation.base} if evaluation.base else {}
    return {**before, _THIS_RUN: evaluation.aligned, **evaluation.compare}


def _traffic_totals(traffic: Sequence[TrafficRow]) -> TrafficRow:
    return TrafficRow(
        site="all sites",
        kind="all kinds",
        messages=sum(row.messages for row in traffic),
        bytes_to_site=sum(row.bytes_to_site for row in traffic),
        bytes_from_site=sum(row.bytes_from_site for row in traffic),
        absences=sum(row.absences for row in traffic),
        refused=sum(row.refused for row in traffic),
    )


def _example(run: Path, row: GalleryRow) -> _Example:
    images = [_picture(run, name) for name in (row.image, *row.further) if name is not None]
    return _Example(row, images, _same(row.before, row.answer), _same(row.after, row.answer))


def _picture(run: Path, name: str) -> tuple[str, bool]:
    """Return a gallery image as a data URI, and whether it is small."""
    path = (run / name).resolve()
    if not path.is_relative_to(run.resolve()):
        raise RunError(f"gallery image {name!r} lies outside the run folder {run}; put it into {run / 'gallery'}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"cannot read gallery image {path}: {error.strerror}; restore it, or remove its line from gallery.jsonl"
        ) from error
    kind = next((kind for magic, kind in _IMAGE_TYPES.items() if data.startswith(magic)), None)
    if kind is None:
        raise RunError(f"gallery image {path} begins {data[:8]!r}, which is neither PNG nor JPEG; store it as PNG")
    # A PNG's header holds its width at byte 16; a thumbnail's pixels are shown as pixels, not smeared.
    small = kind == "image/png" and int.from_bytes(data[16:20]) < 128
    return f"data:{kind};base64,{base64.b64encode(data).decode()}", small


def _same(given: str, reference: str) -> bool:
    """Tell whether two answers agree but for case, spaces and a final full stop."""
    left, right = (" ".join(text.casefold().split()).rstrip(".") for text in (given, reference))
    return left == right


def _breakable(name: str) -> Markup:
    """Let a class name such as `LlavaForConditionalGeneration` break before a capital."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[a-z0-9])(?=[A-Z])", name))


def _human_count(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if number >= size:
            return f"{number / (1000 if unit == 'k' else size):.3g} {unit}"
    return f"{number:,}"


def _human_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _shares(names: Iterable[str]) -> list[str]:
    """Return the heads of columns with shares."""
    return [f"{name}, %" for name in names]


def _of_type(question_type: str) -> Callable[[Accuracy], float | None]:
    def value(result: Accuracy) -> float | None:
        found = result.by_type.get(question_type)
        return None if found is None else found.accuracy

    return value


def _spread_pair(evaluations: Sequence[EvaluationSummary], of: Callable[[Accuracy], float | None]) -> str:
    before = [of(evaluation.base) for evaluation in evaluations if evaluation.base]
    after = [of(evaluation.aligned) for evaluation in evaluations]
    return (
        f"{_spread([100 * v for v in before if v is not None])} → {_spread([100 * v for v in after if v is not None])}"
    )


def _spread(values: Sequence[float], *, signed: bool = False) -> str:
    if not values:
        return "–"
    mean, half = f"{statistics.fmean(values):{'+' if signed else ''}.1f}", half_width(values)
    return mean if half is None else f"{mean} ± {half:.1f}"

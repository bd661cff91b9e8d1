"""What `accord watch RUN` shows: how far a run is, the curves of the report, and with other organisations, their sites.

It reads files of the run folder and nothing else, so that it can neither stop a run nor hold it up:

    recipe.toml      the run's name
    stages.json      the stages, how many steps each takes, and which are done; timings.jsonl: how long they took
    metrics.jsonl    the steps of the others, their rewards, whom hidden questions trust, and accuracy on dev questions
                     as the report draws it; its time of change is that of the last step
    federation.json  the sites (`accord.flare.state`)

    time left = (steps − step) · (time of the last step − begin of the stage) / step
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from accord.errors import RecipeError, RunError, printable
from accord.evaluation.trace import MetricsRow, read_metrics
from accord.flare.state import Federation, SiteState, read_federation
from accord.runs import read_lines, refuse_foreign, stage_of, stages_done, stages_planned
from accord.toml import load_toml

SECONDS: Final = 1.0
"""Between two looks."""

TREND: Final = 32
"""Blocks of a trend's line."""

BLOCKS: Final = "▁▂▃▄▅▆▇█"

STYLES: Final = {"present": "green", "absent": "red", "waiting": "yellow", "given up": "red", "away": "red"}


class _Recipe(msgspec.Struct):
    """What of a run's own recipe is shown."""

    name: str


class _Started(msgspec.Struct):
    started: datetime


class _Manifest(_Started):
    resumed: list[_Started] = []


@dataclass(frozen=True)
class Glance:
    """What a look into a run folder showed."""

    folder: Path
    name: str
    holder: str  # of the folder: a running process, on this machine or another; empty when there is none
    finished: bool
    done: Mapping[str, float]  # the finished stages, with their seconds
    stage: str  # the first that is not done; empty when all are
    step: int
    steps: int  # of that stage; 0 where it is not known
    noted: float | None  # when the last record was noted, in seconds since 1970
    begun: float | None  # when the stage began; None where it went on from an unknown checkpoint
    trained: Sequence[MetricsRow]  # the records with rewards of the last stage that has any
    measured: Sequence[MetricsRow]  # those of the same stage with accuracy by question type
    federation: Federation | None

    def left(self, before: Glance | None = None) -> float | None:
        """Return the seconds that the stage still takes, by its pace since `before`, or else since it began."""
        since, step = self.begun, 0
        if before is not None and before.stage == self.stage and before.step < self.step:
            since, step = before.noted, before.step
        if since is None or self.noted is None or not step < self.step <= self.steps:
            return None
        return (self.steps - self.step) * max(self.noted - since, 0.0) / (self.step - step)


def look(folder: Path) -> Glance:
    """Look into a run folder.

    Raises:
        RunError: it is none, or a file in it is damaged or no file of its own.
    """
    refuse_foreign(folder)
    recipe = _recipe(folder)
    federation = read_federation(folder)
    metrics = folder / "metrics.jsonl"
    records = read_lines(metrics)
    finished = stages_done(folder)
    seconds = {stage: 0.0 for stage in finished}
    for record in read_lines(folder / "timings.jsonl"):
        stage, spent = record.get("stage"), record.get("seconds")
        if isinstance(stage, str) and stage in seconds and isinstance(spent, int | float):
            seconds[stage] += spent
    lengths = stages_planned(folder)
    begun = [stage_of(record) for record in records[-1:]]  # a stage run alone is in no plan
    current = next((stage for stage in [*lengths, *begun] if stage not in seconds), "")
    own = [record for record in records if stage_of(record) == current]
    reached = [record.get(name) for record in own for name in ("step", "round")]
    rows = read_metrics(metrics)
    trained = [row for row in rows if row.reward is not None]
    return Glance(
        folder,
        recipe.name,
        _holder(folder),
        bool(lengths or seconds) and not current,
        seconds,
        current,
        max((step for step in reached if isinstance(step, int)), default=0),
        lengths.get(current, 0),
        metrics.stat().st_mtime if metrics.is_file() else None,
        _begun(folder),
        [row for row in trained if row.stage == trained[-1].stage],
        [row for row in rows if trained and row.stage == trained[-1].stage and isinstance(row.accuracy, Mapping)],
        federation,
    )


def watch(folder: Path, console: Console, *, once: bool) -> None:
    """Show a run: on a terminal until it is finished or Ctrl-C, elsewhere and with `once` as it is now.

    Raises:
        RunError: as `look`.
    """
    first = look(folder)
    if once or not console.is_terminal or console.is_dumb_terminal:
        console.print(page(first, time.time()))
        return
    with Live(page(first, time.time()), console=console, auto_refresh=False) as live:
        while not (now := look(folder)).finished or now.holder:
            if now.stage != first.stage:
                first = now
            live.update(page(now, time.time(), first), refresh=True)
            time.sleep(SECONDS)
        live.update(page(now, time.time()), refresh=True)


def page(glance: Glance, now: float, before: Glance | None = None) -> Group:
    """Return what a look showed, as of `now`; `before` is an earlier look at the same stage."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(width=8)
    rows.add_column()
    for about, shown in _rows(glance, now, before):
        rows.add_row(about, shown)
    if glance.federation is None:
        return Group(rows)
    return Group(rows, Text(), _sites(glance.federation, now, running=bool(glance.holder)), *_said(glance.federation))


def blocks(values: Sequence[float], width: int = TREND) -> str:
    """Draw values as a line of at most `width` blocks, each the mean of its share, from the least to the greatest."""
    count = min(width, len(values))
    edges = [n * len(values) // count for n in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high == low:
        return BLOCKS[3] * count
    return "".join(BLOCKS[min(int(8 * (mean - low) / (high - low)), 7)] for mean in means)


def _state(glance: Glance) -> str:
    if glance.finished:
        return "finished"
    return f"running, {glance.holder}" if glance.holder else "not running"


def _rows(glance: Glance, now: float, before: Glance | None) -> Iterator[tuple[str, Text | Table]]:
    yield "run", Text(f"{glance.name}, {_state(glance)}", style="bold")
    if glance.done:
        spent = (f"{stage} {_clock(seconds)}" for stage, seconds in glance.done.items())
        yield "done", Text(", ".join(spent))
    if glance.stage and (glance.holder or glance.step):
        yield "stage", _stage(glance, now, before)
    if glance.trained:
        rewards = [row.reward for row in glance.trained if row.reward is not None]
        last = glance.trained[-1]
        kl = "" if last.kl is None else f", KL {last.kl:.3f}"
        yield "reward", Text(f"{rewards[-1]:.3f} {blocks(rewards)} {last.stage}, step {last.step}{kl}")
        if trusted := next((row.trust for row in reversed(glance.trained) if row.trust), None):
            shares = (f"{printable(site)} {share:.0%}" for site, share in trusted.items() if share is not None)
            yield "trust", Text(f"{', '.join(shares)} of all sites' trust, by hidden questions")
    if glance.measured:
        yield "accuracy", _accuracy(glance.measured)
    if glance.finished:
        yield "report", Text(str(glance.folder / "report.html"))


def _accuracy(measured: Sequence[MetricsRow]) -> Table:
    """Draw the curves of accuracy on dev questions: the mean over types, and each type, from the first point on."""
    curves: dict[str, list[float]] = {}
    for row in measured:
        by_type = row.accuracy if isinstance(row.accuracy, Mapping) else {}
        for name, share in [("mean over types", row.accuracy_macro), *by_type.items()]:
            if share is not None:
                curves.setdefault(name, []).append(share)
    table = Table.grid(padding=(0, 1))
    for name, shares in curves.items():
        since = f"{shares[0]:.0%} →" if len(shares) > 1 else ""
        table.add_row(
            Text(printable(name)),
            ProgressBar(1.0, shares[-1], width=20),
            Text(f"{since} {shares[-1]:.0%}".strip(), justify="right"),
            Text(blocks(shares)),
        )
    table.add_row(Text("on dev questions", style="dim"))
    return table


def _stage(glance: Glance, now: float, before: Glance | None) -> Table:
    line = Table.grid(padding=(0, 1))
    if not glance.steps:
        line.add_row(Text(glance.stage))
        return line
    words = f"{glance.stage} {glance.step}/{glance.steps}"
    left = glance.left(before) if glance.holder else None
    silent = now - glance.noted if glance.noted is not None and glance.step else 0.0
    more = ["" if left is None else f"about {_clock(left)} left"]
    more += [f"last step {_clock(silent)} ago"] if silent > 30 else []
    bar = ProgressBar(glance.steps, min(glance.step, glance.steps), width=30)
    line.add_row(Text(words), bar, Text(", ".join(filter(None, more))))
    return line


def _sites(federation: Federation, now: float, *, running: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("site", "state"):
        table.add_column(name)
    for name in ("messages", "absences", "MB to it", "MB from it", "last heard"):
        table.add_column(name, justify="right")
    for site in federation.sites:
        # What a run that was killed wrote last need no longer be so.
        known = "let go" if federation.ended else site.state if running else "unknown"
        table.add_row(
            Text(printable(site.name)),
            Text(known, style=STYLES.get(known, "dim")),
            f"{site.messages:,}",
            f"{site.absences:,}",
            f"{site.bytes_to_site / 1e6:,.2f}",
            f"{site.bytes_from_site / 1e6:,.2f}",
            _ago(site, now),
        )
    return table


def _ago(site: SiteState, now: float) -> str:
    if not site.heard:
        return "never"
    return f"{_clock(max(0.0, now - datetime.fromisoformat(site.heard).timestamp()))} ago"


def _said(federation: Federation) -> Iterator[Text]:
    for line in federation.said:
        yield Text(printable(line), style="dim")


def _recipe(folder: Path) -> _Recipe:
    file = folder / "recipe.toml"
    if not file.is_file():
        raise RunError(f"{folder} holds no run (no recipe.toml); name the folder of one, such as runs/demo")
    try:
        return msgspec.convert(load_toml(file), type=_Recipe)
    except (msgspec.ValidationError, RecipeError) as error:
        raise RunError(f"{file} is no run's recipe ({error}); name the folder of a run") from error


def _begun(folder: Path) -> float | None:
    """Return when the stage in progress began: when the one before ended, or this attempt of the run started."""
    try:
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=_Manifest)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None
    started = [each.started.replace(tzinfo=UTC).timestamp() for each in (manifest, *manifest.resumed)]
    timings = folder / "timings.jsonl"
    ended = timings.stat().st_mtime if timings.is_file() else 0.0
    if ended < started[-1] and manifest.resumed:
        return None
    return max(ended, started[-1])


def _holder(folder: Path) -> str:
    """Return who holds the folder, by its lock's text: trying the lock would stop a run that starts just then."""
    try:
        text = (folder / "run.lock").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    found = re.fullmatch(r"process (\d+) on (\S+)", text)
    if found is None or (found[2] == socket.gethostname() and not _alive(int(found[1]))):
        return ""
    return text


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

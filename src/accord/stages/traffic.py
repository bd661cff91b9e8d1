"""Keep the byte counts of a run across its stages and interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeAlias, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from accord.federation.engine import Engine, Traffic
from accord.runs import write_atomic
from accord.stages.job import Job

Row: TypeAlias = tuple[str, str, int, int, int, int] | tuple[str, str, int, int, int, int, int]
"""Site, kind, messages, bytes to the site, bytes from it, absences; refused questions where there are any."""


def traffic_rows(traffic: Traffic) -> list[Row]:
    """Return the counts as rows for a file."""
    rows: list[Row] = []
    for (site, kind), c in sorted(traffic.counts.items()):
        row = (site, kind, c.messages, c.bytes_to_site, c.bytes_from_site, c.absences)
        rows.append((*row, c.refused) if c.refused else row)
    return rows


def add_rows(traffic: Traffic, rows: Sequence[Row]) -> None:
    """Add the counts of `rows` to `traffic`."""
    for site, kind, messages, down, up, absences, *refused in rows:
        count = traffic.counts[site, kind]
        count.messages += messages
        count.bytes_to_site += down
        count.bytes_from_site += up
        count.absences += absences
        count.refused += sum(refused)


def add_stage(job: Job, stage: str) -> None:
    """Add what an earlier stage of the run has sent to the current counts."""
    sent = job.path / "traffic" / f"{stage}.json"
    if sent.is_file():
        add_rows(job.traffic, json.loads(sent.read_text()))


def asked_once(job: Job, engine: Engine, kept: Path, ask: Callable[[], object]) -> None:
    """Ask the sites unless what they said is kept already; either way its bytes count for the method that uses it now.

    Args:
        job: whose traffic it is.
        engine: carries the questions.
        kept: what `ask` leaves behind; what it sent is noted beside it, in `traffic.json`.
        ask: asks, and keeps the answers.
    """
    sent = kept.with_name("traffic.json")
    if not (kept.exists() and sent.is_file()):
        before, engine.traffic = engine.traffic, Traffic()
        try:
            ask()
            rows = traffic_rows(engine.traffic)
        finally:
            engine.traffic = before
        write_atomic(sent, json.dumps(rows) + "\n")
    add_rows(job.traffic, json.loads(sent.read_text()))


def write_traffic(job: Job, path: Path) -> None:
    """Write the current counts."""
    write_atomic(path, json.dumps(traffic_rows(job.traffic)) + "\n")


def load_traffic(job: Job, path: Path) -> None:
    """Replace the current counts by those of a file; without it they are zero."""
    job.traffic.counts.clear()
    if path.is_file():
        add_rows(job.traffic, cast(list[Row], json.loads(path.read_text())))


def save_traffic(job: Job, stage: str) -> None:
    """Write what a stage sent, and start counting afresh."""
    write_traffic(job, job.path / "traffic" / f"{stage}.json")
    job.traffic.counts.clear()


def load_all_traffic(job: Job, *, but: Collection[str] = ()) -> None:
    """Sum the counts of the stages, `but` for those of these names."""
    total = Traffic()
    for file in sorted((job.path / "traffic").glob("*.json")):
        if file.stem not in but:
            add_rows(total, json.loads(file.read_text()))
    job.traffic = total


class SaveTraffic(TrainerCallback):
    """Keep the byte counts with every checkpoint, so that a resumed run counts on."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the counts into the new checkpoint."""
        write_traffic(self.job, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "traffic.json")

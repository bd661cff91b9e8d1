"""What a site writes down: a line for every request, and what they add up to.

    {"time": "2026-11-21T20:15:02Z", "kind": "score", "id": "score-7-colour", "images": 3, "questions": 8,
     "candidates": 64, "bytes_in": 41873, "bytes_out": 655, "seconds": 0.81, "outcome": "answered", "queries": 64,
     "refused": 0, "by_image": {}}

A ledger of 16 MiB is put aside as `ledger-<the second of that>.jsonl`, and a new one begun; a site's budget is that of
all together. A ledger holds counts: no text of a prompt or an answer, no file's name; the server chooses the ids, of
which letters and digits are kept. `site.log` takes what Accord logs, as lines of JSON; an error's traceback in it may
name a file of the site, and so it is its owner's alone to read. Neither lets text from outside write a line of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast

import msgspec

from accord.errors import RunError
from accord.federation.limits import Budget, Spent
from accord.flare.frames import connect
from accord.runs import append_line, read_lines, write_atomic

LOG_BYTES: Final = 16 * 2**20
"""Of `site.log` before it is put aside; three older ones are kept."""

LEDGER_BYTES: Final = 16 * 2**20
"""Of `ledger.jsonl` before it is put aside: some fifty thousand requests."""

RUN: Final = re.compile(r"agreement-(.*)\.[0-9a-f]{16}")
"""The id of the request with which a run begins to ask a site, and its name there."""

By: TypeAlias = Literal["day", "run"]

Outcome: TypeAlias = Literal["answered", "missing images", "refused", "invalid", "error", "gone", "dropped"]
"""What became of a request. `gone`: the asker had left; `dropped`: what came never was a whole request."""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger: one request, in numbers."""

    time: str  # UTC
    kind: str  # score, answer, router, update, card; "" for what is no request
    id: str  # as the server named it, letters and digits of it
    images: int  # newly received
    questions: int
    candidates: int  # 0 where the site's own model is asked
    bytes_in: int
    bytes_out: int
    seconds: float
    outcome: Outcome
    queries: int = 0  # scores and answers that left
    refused: int = 0  # questions that were not answered, of a request whose others were
    by_image: dict[str, int] = field(default_factory=dict)  # queries, by the first digits of an image's name; where a
    # budget asks for it


def note(folder: Path, entry: Entry, *, most: int = LEDGER_BYTES) -> None:
    """Append a line to the folder's ledger; one of `most` bytes is put aside before.

    Raises:
        RunError: it cannot be written.
    """
    ledger = folder / "ledger.jsonl"
    try:
        if ledger.is_file() and ledger.stat().st_size >= most:
            aside = folder / f"ledger-{entry.time.replace(':', '').replace('-', '')}.jsonl"
            if not aside.exists():  # two in one second: the line goes where there is room next time
                ledger.rename(aside)
    except OSError as error:
        raise RunError(f"{ledger} cannot be put aside ({error.strerror}); let its owner write there") from error
    append_line(ledger, asdict(entry))


def ledgers(folder: Path) -> list[Path]:
    """Return the files of the folder's ledger, the oldest first."""
    return [*sorted(folder.glob("ledger-*.jsonl")), folder / "ledger.jsonl"]


def read_ledger(folder: Path) -> list[Entry]:
    """Return the lines of the folder's ledger, of the parts that were put aside, too.

    Raises:
        RunError: one is not the ledger's.
    """
    entries: list[Entry] = []
    for file in ledgers(folder):
        try:
            entries += msgspec.convert(read_lines(file), list[Entry])
        except msgspec.ValidationError as error:
            raise RunError(f"{file}: a line is not the ledger's ({error}); remove it") from error
    return entries


@dataclass
class Sum:
    """What the requests of a day, or of a run, add up to."""

    requests: int = 0
    answered: int = 0
    images: int = 0
    questions: int = 0
    refused: int = 0
    queries: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0

    def add(self, entry: Entry) -> None:
        """Count one more line."""
        self.requests += 1
        self.answered += entry.outcome == "answered"
        for name in ("images", "questions", "refused", "queries", "bytes_in", "bytes_out"):
            setattr(self, name, getattr(self, name) + getattr(entry, name))
        self.seconds = round(self.seconds + entry.seconds, 3)


def sums(entries: Iterable[Entry], by: By) -> dict[str, Sum]:
    """Return what was asked on each day by UTC, or in each run, in order.

    A run says its name when it begins to ask a site, and again when the site has come back; what came before the first
    of them is under "".
    """
    found: dict[str, Sum] = {}
    run = ""
    for entry in entries:
        if by == "run" and entry.kind == "card" and (begun := RUN.fullmatch(entry.id)):
            run = begun[1]
        found.setdefault(entry.time[:10] if by == "day" else run, Sum()).add(entry)
    return found


def mend(folder: Path) -> None:
    """Cut the line that a killed process left unfinished: the next one would be appended to it."""
    ledger = folder / "ledger.jsonl"
    if ledger.exists() and (content := ledger.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(ledger, content.rfind(b"\n") + 1)


def now() -> str:
    """Return the time, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Status:
    """What a site's ledger adds up to, and whether its service runs."""

    name: str = ""
    running: bool = False
    since: str = ""  # UTC; of the last start
    requests: Counter[str] = field(default_factory=Counter)  # by kind
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    images: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_in_today: int = 0  # today by UTC
    bytes_out_today: int = 0
    refused: int = 0  # questions
    budget: Budget = Budget()  # of the last start
    spent: Spent = field(default_factory=lambda: Spent(Budget()))
    last: Entry | None = None

    def add(self, entry: Entry) -> None:
        """Count one more line."""
        self.requests[entry.kind or "unreadable"] += 1
        self.outcomes[entry.outcome] += 1
        self.images += entry.images
        self.bytes_in += entry.bytes_in
        self.bytes_out += entry.bytes_out
        if entry.time[:10] == now()[:10]:
            self.bytes_in_today += entry.bytes_in
            self.bytes_out_today += entry.bytes_out
        self.refused += entry.refused
        self.spent.add(entry.time[:10], entry.queries, entry.by_image)
        self.last = entry

    @property
    def queries_today(self) -> int:
        """How many queries were answered today, by UTC."""
        return self.spent.today if self.spent.day == now()[:10] else 0

    @property
    def failed(self) -> int:
        """How many requests got no answer; images that were asked for again are none of them."""
        return sum(count for outcome, count in self.outcomes.items() if outcome not in ("answered", "missing images"))


@dataclass(frozen=True)
class Running:
    """`service.json`: where the service of a folder was last started."""

    name: str
    pid: int
    since: str
    socket: str
    flare: tuple[int, float] | None = (
        None  # FLARE's client: its process id, and when it began, which tells it from others
    )
    budget: Budget = Budget()

    def write(self, folder: Path) -> None:
        """Write it to the folder."""
        write_atomic(folder / "service.json", json.dumps(asdict(self), indent=2) + "\n")


def read_running(folder: Path) -> Running | None:
    """Return what is known of the folder's last start; None before the first."""
    try:
        return msgspec.json.decode((folder / "service.json").read_bytes(), type=Running)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise RunError(f"{folder / 'service.json'} is damaged ({error}); remove it") from error


def status(folder: Path) -> Status:
    """Return what a site has answered so far, whether its service runs or not.

    Raises:
        RunError: the folder is no site's, or its ledger is damaged.
    """
    if not (folder / "recipe.toml").is_file():
        raise RunError(f"{folder} is no site's folder (no recipe.toml); name the one that `accord site train` wrote")
    found = Status()
    if (started := read_running(folder)) is not None:
        found.name, found.since, found.budget = started.name, started.since, started.budget
        with contextlib.suppress(OSError):
            connect(Path(started.socket), timeout=5.0).close()
            found.running = True
    for entry in read_ledger(folder):
        found.add(entry)
    return found


class _JsonLines(logging.Formatter):
    """One line of JSON for a record, without a raw control character whatever the text holds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": now(), "level": record.levelname, "from": record.name, "message": record.getMessage()[:2000]}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)[-20_000:]
        return json.dumps(line).replace("\x7f", "\\u007f")  # JSON lets DEL stand


class _OwnersLog(logging.handlers.RotatingFileHandler):
    def _open(self) -> TextIOWrapper:
        opener = cast(Callable[[str, int], int], lambda path, flags: os.open(path, flags, 0o600))
        return open(self.baseFilename, "a", encoding="utf-8", opener=opener)


@contextlib.contextmanager
def site_log(folder: Path) -> Iterator[None]:
    """Send what Accord logs to `folder/site.log`, as lines of JSON, and nowhere else."""
    handler = _OwnersLog(folder / "site.log", maxBytes=LOG_BYTES, backupCount=3)
    handler.setFormatter(_JsonLines())
    ours = logging.getLogger("accord")
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.level, ours.propagate = before
        handler.close()

"""What can be told of the sites while a run goes on: `federation.json` in its folder, for its operator.

    {"updated": "2026-11-21T20:15:02Z", "ended": false, "said": ["2026-11-21T20:14:40Z a segment with colour"],
     "sites": [{"name": "colour", "state": "present", "heard": "2026-11-21T20:15:01Z", "messages": 24, "absences": 0,
                "bytes_to_site": 8412690, "bytes_from_site": 8238618}]}

It holds counts and times, nothing of what was asked or answered. A thread beside the run writes it whenever something
has changed; where it cannot be written, the run goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

import msgspec

from accord.errors import RunError
from accord.runs import read_record, write_atomic

if TYPE_CHECKING:
    from accord.federation.agreement import Agreeing
    from accord.federation.engine import Traffic  # with it comes torch, which `accord watch` has no use for

logger = logging.getLogger(__name__)

FILE: Final = "federation.json"

SECONDS: Final = 2.0
"""Between two looks at the engine."""

SAID: Final = 5
"""Lines that are kept of what a person should know."""

Presence: TypeAlias = Literal["present", "absent", "waiting", "given up", "away"]
"""`present`: it is asked; `absent`: it is asked, and gave no answer to the last question, or works by another recipe;
`waiting`: it is there, and the next segment takes it in; `given up`: it missed its deadlines and was not heard of
since; `away`: FLARE's server does not hear of it."""


class SiteState(msgspec.Struct, frozen=True):
    """One site: whether it is there, and what the run has exchanged with it."""

    name: str
    state: Presence = "away"
    heard: str = ""  # UTC; when FLARE's server last heard of it
    messages: int = 0
    absences: int = 0
    bytes_to_site: int = 0
    bytes_from_site: int = 0


class Federation(msgspec.Struct, frozen=True):
    """All sites, in the order of the recipe, and the last lines that were said about them."""

    updated: str  # UTC
    ended: bool  # whether the run has let go of the sites, and not merely fallen silent
    said: list[str]
    sites: list[SiteState]


class Reachable(Protocol):
    """What an engine knows of its sites, as `accord.flare.engine.FlareEngine` does."""

    @property
    def sites(self) -> Sequence[str]:
        """Their names."""
        ...

    @property
    def present(self) -> Collection[str]:
        """Those that are asked."""
        ...

    @property
    def absent(self) -> Collection[str]:
        """Those that gave no usable answer when they were last asked."""
        ...

    @property
    def given_up(self) -> Collection[str]:
        """Those that missed their deadlines, and have not been heard of since."""
        ...

    @property
    def heard(self) -> Mapping[str, float]:
        """Those that are there, and when each was last heard of, in seconds since 1970."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What the stage in progress has exchanged."""
        ...


class FederationFile:
    """Keep `federation.json` of a run folder.

    Args:
        folder: the run's.
        seconds: between two looks at the engine.
    """

    def __init__(self, folder: Path, *, seconds: float = SECONDS) -> None:
        self._folder, self._seconds = folder, seconds
        self._said: deque[str] = deque(maxlen=SAID)
        self._heard: dict[str, float] = {}
        self._written: tuple[bool, list[str], list[SiteState]] | None = None

    def tell(self, line: str) -> None:
        """Keep a line that a person should know, with its time."""
        self._said.append(f"{_utc(datetime.now(UTC))} {line}")

    @contextlib.contextmanager
    def follow(self, engine: Reachable, agreeing: Agreeing | None = None) -> Iterator[None]:
        """Write the file while the body runs, and once more at its end.

        Args:
            engine: what reaches the sites.
            agreeing: what asks through it, and asks nothing of a site that works by something else.
        """
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                self._write(engine, agreeing, ended=False)
                stop.wait(self._seconds)

        thread = threading.Thread(target=watch, name="accord-federation-file", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._write(engine, agreeing, ended=True)

    def _write(self, engine: Reachable, agreeing: Agreeing | None, *, ended: bool) -> None:
        try:
            self._heard |= engine.heard  # who falls silent is no longer among them, but was heard of
            current = (ended, list(self._said), self._states(engine, agreeing))
            if current != self._written:
                state = Federation(_utc(datetime.now(UTC)), *current)
                write_atomic(self._folder / FILE, msgspec.json.format(msgspec.json.encode(state)))
                self._written = current
        except (RunError, OSError, ValueError, RuntimeError) as error:  # a view must not end the run
            logger.warning("%s was not written: %s", FILE, error)

    def _states(self, engine: Reachable, agreeing: Agreeing | None) -> list[SiteState]:
        totals = self._totals(engine.traffic if agreeing is None else agreeing.traffic)
        present, given_up, there = set(engine.present), set(engine.given_up), set(engine.heard)
        absent = set(engine.absent) | (frozenset() if agreeing is None else agreeing.left_out)

        def presence(site: str) -> Presence:
            if site in present:
                return "absent" if site in absent else "present"
            if site in given_up:
                return "given up"
            return "waiting" if site in there else "away"

        return [
            SiteState(
                site,
                presence(site),
                _utc(datetime.fromtimestamp(self._heard[site], UTC)) if site in self._heard else "",
                *totals[site],
            )
            for site in engine.sites
        ]

    def _totals(self, traffic: Traffic) -> dict[str, list[int]]:
        """Return messages, absences, bytes to and from each site: of the stages that are done, and of this one."""
        totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])

        def add(site: str, messages: int, absences: int, down: int, up: int) -> None:
            totals[site] = [a + b for a, b in zip(totals[site], (messages, absences, down, up), strict=True)]

        for file in sorted((self._folder / "traffic").glob("*.json")):
            for site, _, messages, down, up, absences, *_ in json.loads(file.read_bytes()):
                add(site, messages, absences, down, up)
        for (site, _), count in list(traffic.counts.items()):  # the engine adds to it meanwhile
            add(site, count.messages, count.absences, count.bytes_to_site, count.bytes_from_site)
        return totals


def read_federation(folder: Path) -> Federation | None:
    """Return what is known of a run's sites; None for a run of one process.

    Raises:
        RunError: the file is damaged.
    """
    return read_record(folder / FILE, Federation, remedy="remove it")


def _utc(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")

"""Keep FLARE's client process as a child: started, started again when it ends, and ended with all it started.

A site that was revoked is refused at every heartbeat and every registration. FLARE's log says of a heartbeat only that
it failed, and of a registration why. So a client whose heartbeats fail at a server that is there is started again,
`revoked` reads the reason, and from then on it is tried every minute: a site that is let in again comes back by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

from accord.flare.kit import listens
from accord.flare.ledger import LOG_BYTES

logger = logging.getLogger(__name__)

REFUSED: Final = re.compile(rb"Client '[^'\n]*' is disabled")
ADMITTED: Final = b"Successfully registered client"
FAILED: Final = b"Failed to send heartbeat"
UNHEARD: Final = 3
"""Heartbeats that fail one after the other, five seconds each, before the client is started again."""

TAIL: Final = 64 * 2**10
"""Bytes of the end of FLARE's log in which its last word about this site is looked for."""

REVOKED: Final = "the server has revoked this site; ask the consortium's lead"

UNANSWERED: Final = "the server is there, but answers none of its heartbeats"

PAUSES: Final = (1.0, 60.0)
"""Seconds before it is started again: at first, and at most; they double while it ends early."""

LOOK: Final = 2.0
"""Seconds between two looks into its log."""


class FlareClient:
    """FLARE's client process.

    Args:
        command: its command line.
        environment: its environment.
        log: what it prints is appended there.
        tell: told in words when it starts or ends.
        server: the server's host and port.
        check: called before each start; raises where the server would not let this site in, as for its certificate.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        log: Path,
        tell: Callable[[str], None],
        server: tuple[str, int],
        *,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self._command, self._environment, self._log, self._tell = command, environment, log, tell
        self._server, self._check = server, check
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> None:
        """Do nothing yet; `keep` starts it."""

    def __exit__(self, *_: object) -> None:
        """End it."""
        if self._process is not None:
            time.sleep(0.5)  # the last reply is on its way through FLARE's processes
            self._end()

    def _tidy(self) -> None:
        """Keep what grows small: the log, and the folders of jobs that are over."""
        put_aside(self._log)
        remove_job_folders(self._log.parent)

    def keep(self, stop: threading.Event, note: Callable[[tuple[int, float]], None]) -> None:
        """Keep it running until `stop` is set; `note` is told each new process.

        Raises:
            AccordError: what `check` raises.
        """
        pause = PAUSES[0]
        while not stop.is_set():
            self._check()
            began = time.monotonic()
            self._tidy()
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._environment,
                    cwd=self._log.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in a terminal is for this process alone
                )
            note((self._process.pid, psutil.Process(self._process.pid).create_time()))
            self._tell("running")
            looked, start = time.monotonic(), self._log.stat().st_size
            lost = False
            while self._process.poll() is None:
                if stop.wait(0.2):
                    return
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    self._tidy()
                    lost = unheard(self._log, start) and listens(*self._server)
                    if lost or revoked(self._log, start):
                        break
            if stop.is_set():
                return
            ended = self._process.poll()
            self._end()
            if revoked(self._log, start):
                if pause < PAUSES[1]:  # once, and not with every try
                    logger.warning("%s", REVOKED)
                    self._tell(REVOKED)
                pause = PAUSES[1]
                stop.wait(pause)
                continue
            pause = PAUSES[0] if time.monotonic() - began > PAUSES[1] else min(2 * pause, PAUSES[1])
            why = UNANSWERED if lost else f"ended with status {ended}"
            logger.warning("FLARE's client: %s; it is started again in %.0f s", why, pause)
            self._tell(f"{why}, again in {pause:.0f} s")
            stop.wait(pause)

    def _end(self) -> None:
        if self._process is not None:
            end(self._process.pid)
            self._process.wait()
            self._process = None


def put_aside(log: Path, most: int = LOG_BYTES) -> None:
    """Begin a log anew that has grown, and keep the one before; whoever appends to it goes on at its new end."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > most:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def remove_job_folders(kit: Path, *, keep: int = 2) -> None:
    """Remove the folders that FLARE's jobs left in a kit, but for the newest: one of these may be at work."""
    jobs = [folder for folder in kit.glob("????????-????-????-????-????????????") if folder.is_dir()]
    for folder in sorted(jobs, key=lambda folder: folder.stat().st_ctime)[: -keep or None]:
        shutil.rmtree(folder, ignore_errors=True)


def revoked(log: Path, start: int = 0) -> bool:
    """Return whether a client's log last says, behind its byte `start`, that the server has disabled this site."""
    text = _tail(log, start)
    refused = max((found.start() for found in REFUSED.finditer(text)), default=-1)
    return refused > text.rfind(ADMITTED)


def unheard(log: Path, start: int = 0) -> bool:
    """Return whether the last that a client's log says, behind its byte `start`, is that heartbeats fail."""
    last = _tail(log, start).splitlines()[-UNHEARD:]
    return len(last) == UNHEARD and all(FAILED in line for line in last)


def _tail(log: Path, start: int = 0) -> bytes:
    """Return the end of a log, nothing before `start` if the log is that long."""
    try:
        with log.open("rb") as file:
            size = log.stat().st_size
            file.seek(max(0, size - TAIL, start if start <= size else 0))
            return file.read()
    except OSError:
        return b""


def end(pid: int, began: float | None = None) -> None:
    """End a process with all its descendants: FLARE's job processes are sessions of their own, no group holds them."""
    try:
        first = psutil.Process(pid)
        if began is not None and abs(first.create_time() - began) > 1.0:  # the id is another's by now
            return
        tree = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in tree:
        with contextlib.suppress(psutil.Error):
            each.terminate()
    _, alive = psutil.wait_procs(tree, timeout=10.0)
    for each in alive:
        with contextlib.suppress(psutil.Error):
            each.kill()

"""Start relay jobs through a consortium's FLARE server."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import msgspec

from accord.errors import RunError
from accord.flare.engine import FlareEngine
from accord.flare.frames import socket_folder
from accord.flare.kit import PRIVATE, Kit, require_flare, server_kit
from accord.runs import write_atomic

HEARTBEAT: Final = 45.0
"""Seconds since a site's last word to FLARE's server after which it counts as gone."""

T = TypeVar("T")


def open_engine(
    kit: Path, operator: Path | None, sites: Sequence[str], *, tell: Callable[[str], object]
) -> FlareEngine:
    """Open the engine of a consortium, on the machine where its server runs.

    Args:
        kit: the server's start-up kit.
        operator: the operator's kit; by default the folder `operator` beside the server's.
        sites: their names, as in the recipe.
        tell: called with what a person should know.

    Raises:
        RunError: a folder is not the kit that it should be, or another run uses this server.
    """
    require_flare()
    server_kit(kit)
    return FlareEngine(sites, Production(operator or kit.parent / "operator"), socket_folder(kit), tell=tell)


ANSWER: Final = 120.0
"""Seconds that a call to FLARE's server may take."""

PARTING: Final = 10.0
"""Seconds that logging out may take; a call that still waits then is left to itself."""


class Production:
    """Submit jobs as the consortium's operator.

    Args:
        operator: the operator's start-up kit.
    """

    def __init__(self, operator: Path) -> None:
        config = operator / "startup" / "fed_admin.json"
        if not config.is_file():
            raise RunError(f"{operator} is no operator's start-up kit (no startup/fed_admin.json); name that folder")
        self._user = str(json.loads(config.read_text())["admin"]["username"])
        self._kit = operator
        self._line = _Line(self._user, operator)
        self._closed = False

    def submit(self, job: Path) -> None:
        """Submit the job, and let FLARE's server forget those that are over: a run of weeks has hundreds."""
        self._call(lambda session: session.submit_job(str(job)))
        with contextlib.suppress(ConnectionError):  # the next one will
            self._call(_forget_finished)

    def connected(self) -> dict[str, float]:
        """Return the sites that FLARE's server has lately heard of, and when."""
        info = self._call(lambda session: session.get_system_info())
        heard = {str(client.name): float(client.last_connect_time) for client in info.client_info}
        return {site: last for site, last in heard.items() if time.time() - last < HEARTBEAT}

    def revoke(self, site: str) -> None:
        """Shut a site out: its connection ends, and FLARE's server refuses it from now on, restarts included."""
        self._call(lambda session: session.disable_client(site))

    def admit(self, site: str) -> None:
        """Let a site in that was shut out."""
        self._call(lambda session: session.enable_client(site))

    def close(self) -> None:
        """Log out."""
        self._closed = True
        self._line.hang_up().wait(PARTING)

    def _call(self, what: Callable[[Any], T]) -> T:
        if self._closed:
            raise ConnectionError("logged out")
        line = self._line
        try:
            return line.ask(what).result(ANSWER)
        except TimeoutError:  # a call to a server that was killed may wait for ever
            line.hang_up()
            if self._line is line:  # nobody else, whose call waited behind, has found it out before
                self._line = _Line(self._user, self._kit)
            raise ConnectionError(f"FLARE's server gave no answer within {ANSWER:.0f} s") from None


class _Line:
    """A session of FLARE's, opened when it is needed, and the one thread that uses it: a session is one connection.

    Not the main thread: a bare `except` of FLARE's swallows Ctrl-C. A daemon: a call that never ends must not hold up
    the end of the program.
    """

    def __init__(self, user: str, kit: Path) -> None:
        self._user, self._kit = user, kit
        self._asked: SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = SimpleQueue()
        self._over = threading.Event()
        threading.Thread(target=self._work, name="accord-session", daemon=True).start()

    def ask(self, what: Callable[[Any], T]) -> Future[T]:
        """Call `what` with the session, once all that was asked before is done."""
        future: Future[T] = Future()
        self._asked.put((what, future))
        return future

    def hang_up(self) -> threading.Event:
        """Log out, once all that was asked before is done; the event tells when."""
        self._asked.put(None)
        return self._over

    def _work(self) -> None:
        session: Any = None
        while (asked := self._asked.get()) is not None:
            what, future = asked
            try:
                if session is None:
                    session = self._open()
                future.set_result(what(session))
            except Exception as error:  # FLARE's own kinds are many, and say one thing: no use going on with it
                _log_out(session)
                session = None
                failure = ConnectionError(f"{type(error).__name__}: {error}")
                failure.__cause__ = error
                future.set_exception(failure)
        _log_out(session)
        self._over.set()

    def _open(self) -> object:
        from nvflare.fuel.flare_api.flare_api import new_secure_session
        from nvflare.tool import cli_output

        # FLARE prints what it does; a redirected `sys.stdout` would be one for all threads, and take the run's results.
        cli_output.print_human = lambda *_, **__: None
        # It logs each message that a dead server does not take; `tell` says so once.
        logging.getLogger("nvflare").setLevel(logging.CRITICAL)
        return new_secure_session(self._user, str(self._kit), timeout=10.0)


def _log_out(session: Any) -> None:
    with contextlib.suppress(Exception):  # there is none, or nobody to tell
        session.close()


def _forget_finished(session: Any) -> None:
    for job in session.list_jobs():
        if str(job.get("status", "")).startswith("FINISHED"):
            session.delete_job(job["job_id"])


def mark_revoked(server: Kit, site: str, *, undo: bool = False) -> None:
    """Write into a server's kit that a site is shut out, or is no longer; FLARE's server reads it when it starts.

    Raises:
        RunError: what is there cannot be read.
    """
    file = server.path / "disabled_clients.json"
    try:
        known = msgspec.json.decode(file.read_bytes(), type=_Disabled).disabled_clients if file.exists() else []
    except msgspec.MsgspecError as error:
        raise RunError(f"{file} cannot be read ({error}); FLARE would let everybody in: correct it") from error
    names = {*known} - {site} if undo else {*known, site}
    write_atomic(file, json.dumps({"disabled_clients": sorted(names)}), mode=PRIVATE)


class _Disabled(msgspec.Struct):
    disabled_clients: list[str]

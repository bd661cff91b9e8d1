"""Start relay jobs through a consortium's FLARE server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import msgspec

from accord.errors import RunError
from accord.flare.engine import FlareEngine
from accord.flare.frames import socket_folder
from accord.flare.kit import PRIVATE, Kit, check_certificate, operator_kit, require_flare, server_kit
from accord.runs import write_atomic
from accord.runs.lock import locked

HEARTBEAT: Final = 45.0
"""Seconds since a site's last word to FLARE's server after which it counts as gone."""

LIST: Final = "disabled_clients.json"
"""The sites that are shut out, in the server's kit; FLARE's own file."""

T = TypeVar("T")


def open_engine(
    kit: Path, operator: Path | None, sites: Sequence[str], *, tell: Callable[[str], object]
) -> FlareEngine:
    """Open the engine of a consortium, on the machine where its server runs.

    Args:
        kit: the server's start-up kit.
        operator: as `production`.
        sites: their names, as in the recipe.
        tell: called with what a person should know.

    Raises:
        RunError: as `production`, or another run uses this server.
    """
    require_flare()
    return FlareEngine(sites, production(server_kit(kit), operator), socket_folder(kit), tell=tell)


def production(server: Kit, operator: Path | None) -> Production:
    """Return the operator's access to a server.

    Args:
        server: its start-up kit.
        operator: the operator's kit; by default the folder `operator` beside the server's.

    Raises:
        RunError: a folder is not the kit that it should be, or its certificate is not valid.
    """
    kit = operator_kit(operator or server.path.parent / "operator")
    check_certificate(kit)
    return Production(kit.path)


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

    def revoke(self, site: str) -> bool:
        """Shut a site out; return whether it was there, or shut out already. FLARE's server refuses it from now on.

        FLARE ends neither the site's connection nor a job that it is in. So the jobs are ended here, and a run that
        goes on begins the next without it.
        """
        found = self._call(lambda session: _only(session.disable_client(site)))
        try:
            self._call(_end_jobs)
        except ConnectionError as error:
            raise ConnectionError(
                f"{site} is shut out, but the job that it may be in was not ended: {error}"
            ) from error
        return bool(found["active_session_removed"] or found["already_disabled"])

    def admit(self, site: str) -> bool:
        """Let a site in that was shut out, and return whether it was."""
        return bool(self._call(lambda session: _only(session.enable_client(site))["was_disabled"]))

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
        if _finished(job):
            session.delete_job(job["job_id"])


def _end_jobs(session: Any) -> None:
    for job in session.list_jobs():
        if not _finished(job):
            try:
                session.abort_job(job["job_id"])
            except Exception as error:
                if "is not running" not in str(error):  # it has ended meanwhile
                    raise


def _finished(job: Mapping[str, object]) -> bool:
    return str(job.get("status", "")).startswith("FINISHED")


def _only(reply: Mapping[str, Sequence[Mapping[str, object]]]) -> Mapping[str, object]:
    """Return what FLARE's reply says of the one client that was named."""
    (client,) = reply["clients"]
    return client


def revoked_sites(server: Kit) -> list[str]:
    """Return the sites that are shut out, by the list in the server's kit, which FLARE's server keeps while it runs.

    Raises:
        RunError: the list cannot be read.
    """
    file = server.path / LIST
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Disabled).disabled_clients if file.exists() else []
    except msgspec.MsgspecError as error:
        raise RunError(f"{file} cannot be read ({error}); FLARE would let everybody in: correct it") from error


def mark_revoked(server: Kit, site: str, *, undo: bool = False) -> bool:
    """Write into the kit of a server that does not run that a site is shut out, or no longer; return whether it was.

    FLARE's server reads the list when it starts, and never again: the kit is locked meanwhile, as by a server.

    Raises:
        RunError: the list cannot be read, or a server holds the kit.
    """
    lock = locked(
        server.path,
        "if a server starts there, try again in some seconds; if it runs in a container, run the command in the same: "
        f"docker compose exec server accord server revoke server {site}",
    )
    try:
        known = revoked_sites(server)
        names = {*known} - {site} if undo else {*known, site}
        write_atomic(server.path / LIST, json.dumps({"disabled_clients": sorted(names)}), mode=PRIVATE)
    finally:
        os.close(lock)
    return site in known


class _Disabled(msgspec.Struct):
    disabled_clients: list[str]

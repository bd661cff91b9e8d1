"""Start relay jobs through a consortium's FLARE server."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

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
        self._session: object = None
        # One thread, for the session is one connection; not the main one: a bare `except` of FLARE's swallows Ctrl-C.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="accord-session")

    def submit(self, job: Path) -> None:
        """Submit the job, and let FLARE's server forget those that are over: a run of weeks has hundreds."""
        self._call(lambda session: session.submit_job(str(job)))  # type: ignore[attr-defined]
        with contextlib.suppress(ConnectionError):  # the next one will
            self._call(_forget_finished)

    def connected(self) -> dict[str, float]:
        """Return the sites that FLARE's server has lately heard of, and when."""
        info = self._call(lambda session: session.get_system_info())  # type: ignore[attr-defined]
        heard = {str(client.name): float(client.last_connect_time) for client in info.client_info}
        return {site: last for site, last in heard.items() if time.time() - last < HEARTBEAT}

    def revoke(self, site: str) -> None:
        """Shut a site out: its connection ends, and FLARE's server refuses it from now on, restarts included."""
        self._call(lambda session: session.disable_client(site))  # type: ignore[attr-defined]

    def admit(self, site: str) -> None:
        """Let a site in that was shut out."""
        self._call(lambda session: session.enable_client(site))  # type: ignore[attr-defined]

    def close(self) -> None:
        """Log out."""
        with contextlib.suppress(RuntimeError):  # it is done
            self._thread.submit(self._drop).result()
        self._thread.shutdown()

    def _call(self, what: Callable[[object], T]) -> T:
        try:
            return self._thread.submit(self._called, what).result(ANSWER)
        except TimeoutError:  # a call to a server that was killed may wait for ever; its thread is left to itself
            self._thread.shutdown(wait=False)
            self._thread, self._session = ThreadPoolExecutor(1, thread_name_prefix="accord-session"), None
            raise ConnectionError(f"FLARE's server gave no answer within {ANSWER:.0f} s") from None

    def _called(self, what: Callable[[object], T]) -> T:
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        with contextlib.redirect_stdout(io.StringIO()):  # FLARE prints what it does
            try:
                if self._session is None:
                    # It prints about each message that a dead server does not take; `tell` says so once.
                    logging.getLogger("nvflare").setLevel(logging.CRITICAL)
                    self._session = new_secure_session(self._user, str(self._kit), timeout=10.0)
                return what(self._session)
            except (
                Exception
            ) as error:  # FLARE's own kinds are many, and say one thing: no use going on with this session
                self._drop()
                raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()  # type: ignore[attr-defined]


def _forget_finished(session: object) -> None:
    for job in session.list_jobs():  # type: ignore[attr-defined]
        if str(job.get("status", "")).startswith("FINISHED"):
            session.delete_job(job["job_id"])  # type: ignore[attr-defined]


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

"""The engine between organisations: the same questions, carried by NVIDIA FLARE.

    ask → a message per site → server.sock → relay job → mutual TLS → site's relay → site's service, and back

A FLARE job cannot take in a site that comes late or was restarted. So the jobs are segments: while a run goes on, a
relay job ends and the next begins with the sites that are there, as soon as a site waits that the present job cannot
reach. It takes some seconds, and no person has to act. A site that has missed its deadline twice in a row is not asked
again in the same segment.

Absences are what `accord.federation.engine` says they are; nothing here decides what follows from one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import secrets
import socket
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import msgspec

from accord.errors import RunError
from accord.federation.engine import Outbox, Traffic, kind_of
from accord.federation.messages import Absence, Reply, Request, reply_limit
from accord.flare.frames import MAX_FRAME, listen, receive_frame, send_frame
from accord.flare.kit import CLASSES
from accord.flare.relay import SERVER_SOCKET, WRAPPING, Answer, Ask, Hello, decode_from_relay, encode_frame
from accord.runs import write_atomic

logger = logging.getLogger(__name__)

DEADLINE: Final = 600.0
"""Seconds for an answer where none are named: a wire may be silent for ever."""

MISSES: Final = 2
"""Deadlines missed in a row, after which a site is left alone until the next segment."""

MAX_HELLO: Final = 2**20
"""Bytes of a relay's first word, the names of its sites."""

RETRY: Final = (5.0, 600.0)
"""Seconds between two segments for the same waiting sites: at first, and at most; they double while that is no help."""

SERVER_CLASSES, SITE_CLASSES = CLASSES["server"], CLASSES["site"]


class Launcher(Protocol):
    """How relay jobs come to run: through FLARE's server."""

    def submit(self, job: Path) -> None:
        """Start the job in that folder; raises `ConnectionError` where FLARE's server cannot be reached."""
        ...

    def connected(self) -> dict[str, float]:
        """Return the sites that are there, and when each was last heard of; raises `ConnectionError` like `submit`."""
        ...

    def close(self) -> None:
        """Let go."""
        ...


def write_job(folder: Path, sites: Sequence[str]) -> None:
    """Write a job for these sites: configuration alone, no code (FLARE's `custom` folder is absent)."""
    meta = {
        "name": "accord",
        "resource_spec": {},
        "min_clients": 1,
        "deploy_map": {"app": ["server", *sites]},
    }
    server = {
        "format_version": 2,
        "workflows": [{"id": "controller", "path": SERVER_CLASSES[0], "args": {"server_obj_id": "_server"}}],
        "components": [{"id": "_server", "path": SERVER_CLASSES[1], "args": {}}],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    site = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": {"path": SITE_CLASSES[0], "args": {"client_obj_id": "_client"}}}],
        "components": [{"id": "_client", "path": SITE_CLASSES[1], "args": {}}],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    write_atomic(folder / "meta.json", json.dumps(meta))
    write_atomic(folder / "app" / "config" / "config_fed_server.json", json.dumps(server))
    write_atomic(folder / "app" / "config" / "config_fed_client.json", json.dumps(site))


class Segment:
    """One relay job, from its first word until either side closes."""

    def __init__(self, connection: socket.socket, sites: Sequence[str]) -> None:
        self.sites = frozenset(sites)
        self.misses: dict[str, int] = defaultdict(int)
        self.ended = threading.Event()
        self._connection = connection
        self._writing = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Answer]] = {}
        threading.Thread(target=self._read, name="accord-relay", daemon=True).start()

    def reaches(self, site: str) -> bool:
        """Tell whether it makes sense to ask the site."""
        return site in self.sites and self.misses[site] < MISSES and not self.ended.is_set()

    def call(self, site: str, message: bytes, seconds: float, limit: int = MAX_FRAME) -> bytes:
        """Carry a message to a site and return its reply, empty where it is longer than `limit` bytes.

        Raises:
            TimeoutError: it did not answer in time.
            ConnectionError: it cannot be reached, or the job has ended.
            RunError: the message is too long for any site.
        """
        if len(message) > MAX_FRAME:
            raise RunError(
                f"a request of {len(message):,} bytes, at most {MAX_FRAME:,} cross at once; lower prompts_per_step, "
                "or share a smaller model"
            )
        end = time.monotonic() + seconds
        number = next(self._numbers)
        future = self._waiting[number] = Future()
        try:
            self._send(encode_frame(Ask(number, site, seconds, min(limit, MAX_FRAME), message)), end)
            try:
                answer = future.result(max(0.0, end - time.monotonic()))
            except TimeoutError:
                self.misses[site] += 1
                raise
        finally:
            self._waiting.pop(number, None)
        if answer.problem:
            self.misses[site] += 1
            raise TimeoutError if answer.problem == "late" else ConnectionError(f"site {site} cannot be reached")
        self.misses[site] = 0
        return answer.message

    def close(self) -> None:
        """End the job."""
        self.ended.set()
        with contextlib.suppress(OSError):  # closing alone would not wake the thread that reads, nor tell the relay
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, frame: bytes, end: float) -> None:
        if not self._writing.acquire(timeout=max(0.0, end - time.monotonic())):
            raise TimeoutError
        # A socket's own timeout would hold for the thread that reads, too; closing wakes both.
        alarm = threading.Timer(max(0.0, end - time.monotonic()), self.close)
        alarm.start()
        try:
            if self.ended.is_set():
                raise ConnectionError("the job has ended")
            send_frame(self._connection, frame)
        except OSError as error:
            self.close()  # nothing makes sense after half a message
            raise ConnectionError("the relay is gone") from error
        finally:
            alarm.cancel()
            self._writing.release()

    def _read(self) -> None:
        try:
            while True:
                message = decode_from_relay(receive_frame(self._connection, limit=MAX_FRAME + WRAPPING))
                # An answer that comes twice, or late, finds nobody waiting under its number.
                if isinstance(message, Answer) and (future := self._waiting.pop(message.number, None)):
                    future.set_result(message)
        except Exception as error:  # however the connection ends, nobody may go on waiting for it
            logger.info("the relay's connection ended: %s", type(error).__name__)
        self.close()
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(ConnectionError("the relay is gone"))


class FlareEngine:
    """Carry requests to sites of other organisations.

    Args:
        sites: their names, in the order of the router's outputs, `[K]`.
        launcher: starts relay jobs, and knows which sites are there.
        folder: of the sockets that FLARE's processes know (`accord.flare.frames.socket_folder`).
        wait: seconds to wait for all sites before the first segment, and for a segment to begin.
        give_up: seconds without any site or server after which an error is raised.
        poll: seconds between two looks at the sites that are there.
        tell: called with what a person should know.
    """

    def __init__(
        self,
        sites: Sequence[str],
        launcher: Launcher,
        folder: Path,
        *,
        wait: float = 60.0,
        give_up: float = 3600.0,
        poll: float = 2.0,
        tell: Callable[[str], object] = logger.info,
    ) -> None:
        self.traffic = Traffic()
        self._sites = tuple(sites)
        self._launcher = launcher
        self._wait, self._give_up, self._poll, self._tell = wait, give_up, poll, tell
        self._outbox = Outbox()
        self._listener = listen(folder / SERVER_SOCKET)
        self._segment: Segment | None = None
        self._connected: dict[str, float] = {}
        self._missed: dict[str, float] = {}  # by site that was given up, when it had last been heard of then
        self._absent: set[str] = set()
        self._hoped: set[str] = set()  # sites for which the present segment began, and that have not answered yet
        self._pause, self._next_renewal = RETRY[0], 0.0
        self._closed = threading.Event()
        self._asking = threading.Lock()
        threading.Thread(target=self._watch, name="accord-sites", daemon=True).start()

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names, `[K]`."""
        return self._sites

    @property
    def present(self) -> set[str]:
        """The sites that the present segment reaches."""
        return {site for site in self._sites if self._segment is not None and self._segment.reaches(site)}

    @property
    def heard(self) -> dict[str, float]:
        """The sites that FLARE's server knows to be there, and when each was last heard of."""
        return dict(self._connected)

    @property
    def absent(self) -> set[str]:
        """The sites that gave no answer when they were last asked."""
        return set(self._absent)

    @property
    def given_up(self) -> set[str]:
        """The sites that missed their deadlines, and have not been heard of since."""
        return {site for site, heard in list(self._missed.items()) if self._connected.get(site, heard) == heard}

    @property
    def processes(self) -> int:
        """One."""
        return 1

    def total(self, values: Sequence[float]) -> Sequence[float]:
        """Return the values themselves."""
        return values

    def ask(self, requests: Mapping[str, Request], *, deadline: float | None = None) -> dict[str, Reply | Absence]:
        """Ask all sites at once; a request without a deadline gets `DEADLINE` seconds.

        Raises:
            RunError: there was no site, or no FLARE server, for `give_up` seconds.
        """
        with self._asking, ThreadPoolExecutor(max(1, len(requests))) as pool:
            segment = self._settled()
            seconds = DEADLINE if deadline is None else deadline
            asked = {
                site: pool.submit(self._exchange, segment, site, request, seconds) for site, request in requests.items()
            }
            try:
                replies = {site: future.result() for site, future in asked.items()}
                silent = {site for site, reply in replies.items() if isinstance(reply, Absence)}
                self._absent = (self._absent - replies.keys()) | silent
                return replies
            except BaseException:  # Ctrl-C, above all: let nobody wait for the rest
                segment.close()
                raise

    def close(self) -> None:
        """End the present segment."""
        self._closed.set()
        if self._segment is not None:
            self._segment.close()
        self._listener.close()
        self._launcher.close()

    def __enter__(self) -> FlareEngine:
        """Return the engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _exchange(self, segment: Segment, site: str, request: Request, seconds: float) -> Reply | Absence:
        if not segment.reaches(site):
            self.traffic.add(site, kind_of(request), 0, 0, absent=True)
            return Absence(site, "gone")
        end, limit = time.monotonic() + seconds, reply_limit(request)
        # Never used before, so that an earlier reply, whoever sends it again, answers nothing.
        stamped = msgspec.structs.replace(request, id=f"{request.id}.{secrets.token_hex(8)}")
        reply = self._outbox.exchange(
            site,
            stamped,
            lambda data: segment.call(site, data, max(0.001, end - time.monotonic()), limit),
            self.traffic,
        )
        if isinstance(reply, Absence):
            if segment.misses[site] >= MISSES:
                self._missed[site] = self._connected.get(site, 0.0)
            return reply
        self._missed.pop(site, None)
        self._hoped.discard(site)
        if reply.id != stamped.id:
            self.traffic.counts[site, kind_of(request)].absences += 1
            return Absence(site, "invalid")
        return msgspec.structs.replace(reply, id=request.id)

    def _settled(self) -> Segment:
        """Return a segment that reaches every site that is there, a new one if need be."""
        segment = self._segment
        waiting = self._waiting(segment)
        if segment is None or segment.ended.is_set():
            return self._renew()
        if waiting and time.monotonic() >= self._next_renewal:
            self._tell(f"{', '.join(sorted(waiting))} came back; a new segment begins")
            self._hoped |= waiting
            return self._renew()
        if not waiting and not self._hoped:
            self._pause, self._next_renewal = RETRY[0], 0.0
        return segment

    def _waiting(self, segment: Segment | None) -> set[str]:
        if segment is None:
            return set()
        lost = {site: heard for site, heard in self._connected.items() if not segment.reaches(site)}
        # FLARE goes on listing a site that was killed: only one that has been heard of since is there.
        return {site for site, heard in lost.items() if site in self._sites and heard != self._missed.get(site)}

    def _renew(self) -> Segment:
        first = self._segment is None
        if self._segment is not None:
            self._segment.close()
        began, told = time.monotonic(), ""
        while time.monotonic() - began < self._give_up and not self._closed.is_set():
            try:
                self._connected = heard = self._launcher.connected()
                there = {s for s in self._sites if s in heard and heard[s] != self._missed.get(s)}
                missing = set(self._sites) - there
                patient = first and time.monotonic() - began < self._wait
                if there and not (missing and patient):
                    self._segment = self._begin(sorted(there, key=self._sites.index))
                    self._pause = min(self._pause * 2, RETRY[1])
                    self._next_renewal = time.monotonic() + self._pause
                    return self._segment
                said = f"waiting for {', '.join(sorted(missing))}"
            except (ConnectionError, TimeoutError) as error:
                said = f"waiting for FLARE's server ({error})"
            if said != told:
                self._tell(said)
                told = said
            self._closed.wait(self._poll)
        raise RunError(
            f"no site could be reached through FLARE for {self._give_up:g} s; see that the server and the sites run, "
            "and start again with --resume"
        )

    def _begin(self, sites: Sequence[str]) -> Segment:
        with tempfile.TemporaryDirectory(prefix="accord-job-") as folder:
            job = Path(folder) / "accord"
            write_job(job, sites)
            self._listener.settimeout(0.0)
            with contextlib.suppress(OSError):
                while True:  # jobs that were given up and began after all
                    self._listener.accept()[0].close()
            self._launcher.submit(job)
        connection = self._accept()
        try:
            hello = decode_from_relay(receive_frame(connection, limit=MAX_HELLO, seconds=self._wait))
            if not isinstance(hello, Hello):
                raise ConnectionError
            connection.settimeout(None)
        except Exception as error:  # it closed, said nothing, or said what makes no sense
            connection.close()
            raise ConnectionError("the relay did not introduce itself") from error
        self._tell(f"a segment with {', '.join(hello.sites)}")
        return Segment(connection, hello.sites)

    def _accept(self) -> socket.socket:
        """Return the connection of the job that was submitted; closing a listener would wake nobody who waits in it."""
        end = time.monotonic() + self._wait
        self._listener.settimeout(0.2)
        while time.monotonic() < end and not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                return self._listener.accept()[0]
        raise ConnectionError(f"no job began in {self._wait:g} s")

    def _watch(self) -> None:
        while not self._closed.wait(self._poll):
            try:
                self._connected = self._launcher.connected()
            except Exception as error:  # the next question meets it, and says so
                logger.info("cannot see which sites are there: %s", type(error).__name__)
                self._connected = {}

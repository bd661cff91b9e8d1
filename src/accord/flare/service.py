"""What a site runs between organisations: a service that keeps its model warm and writes down whatever is asked of it.

    server ⇄ mutual TLS ⇄ FLARE client, job process ⇄ a socket ⇄ this process: reward model, pairs, ledger

This process never talks to a network: bytes come and go over a Unix socket that this user alone may enter, and FLARE's
client is its child. One request is answered at a time, in one thread, and the result is the in-process engine's, bit
by bit. A line of the ledger (`accord.flare.ledger`) is written before a reply leaves; where it cannot be, none leaves.
So what was spent of a budget is never less than what left, however the process ends: a query of which the line is
written and the reply is lost counts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from accord.data.decoder import Decoder
from accord.errors import RunError
from accord.federation.batches import Opening
from accord.federation.endpoint import Endpoint, ImageCache, image_library
from accord.federation.engine import kind_of
from accord.federation.limits import Budget, Limits, Rate, Spent, queries, short_names
from accord.federation.messages import (
    AnswerItem,
    AnswerReply,
    Declined,
    MissingImages,
    Refusal,
    Reply,
    Request,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    Task,
    UpdateReply,
    UpdateRequest,
    WithImages,
    decode_reply,
    encode,
)
from accord.federation.site import LocalUpdate, Site
from accord.flare.client import FlareClient, end
from accord.flare.frames import MAX_FRAME, listen, receive_frame, send_frame, site_socket, socket_folder
from accord.flare.ledger import Entry, Outcome, Running, mend, note, now, read_ledger, read_running, site_log
from accord.recipe import Recipe
from accord.recipe_file import load_recipe
from accord.runs import Run, stages_done
from accord.stages.job import Job
from accord.stages.private import has_certificate
from accord.stages.process import prepare
from accord.stages.projector import projector_training
from accord.stages.sites import open_site, prompt_sums, router_training, site_pairs

if TYPE_CHECKING:
    from accord.flare.kit import Kit

logger = logging.getLogger(__name__)

PATIENCE: Final = 30.0
"""Seconds in which a connection must bring its request, or take its reply."""


CONNECTIONS: Final = 16
"""Connections at once; a further one is closed before it is read."""

HELD: Final = 2 * MAX_FRAME
"""Bytes of all requests that are being read, wait or are in hand; one that does not fit is dropped unread."""


class WhenAsked:
    """A site's half of a training, made ready when it is first asked for.

    Most of a service's life is alignment, which needs neither pairs nor the encoder.
    """

    def __init__(self, make: Callable[[], LocalUpdate]) -> None:
        self._make = make

    @cached_property
    def _local(self) -> LocalUpdate:
        return self._make()

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return what local steps on the site's data change in the model of `request`."""
        return self._local(request)


def read_site_folder(folder: Path, name: str) -> Recipe:
    """Return the recipe of a site's run folder, in which `accord site train` has left a reward model.

    Raises:
        RunError: the folder is no run folder, the recipe has no such site, or its reward model is not there or was
            broken off.
        RecipeError: the recipe is wrong.
    """
    if not (folder / "recipe.toml").is_file():
        raise RunError(f"{folder} holds no run (no recipe.toml); make one with `accord site train RECIPE {name} --out`")
    recipe = load_recipe(folder / "recipe.toml")
    alone(recipe, name, folder).site(name)
    if f"site {name}" not in stages_done(folder) or not (folder / "sites" / name / "reward").is_dir():
        raise RunError(
            f"{folder} has no finished reward model of site {name}; "
            f"make it with `accord site train {folder / 'recipe.toml'} {name} --out {folder}`"
        )
    return recipe


def alone(recipe: Recipe, name: str, folder: Path) -> Job:
    """Return the job of one site, with nothing to write: no run is opened."""
    return Job(recipe, cast(Run, None), quiet=True, alone=name, folder=folder)


def open_site_folder(folder: Path, name: str, *, opening: Opening | None = None) -> Site:
    """Open the site that `accord site train RECIPE NAME --out FOLDER` made, ready to answer as the in-process engine's.

    Pairs of its own are read at once, so that a fault in them shows now; constructed ones when the router is trained.
    It answers questions with its own model only where its recipe says so, `answers = true` in its table, and sends sums
    of its prompts' features only with `sums = true`.

    Raises:
        RunError, RecipeError: as `read_site_folder`.
        CheckpointError: the reward model, the model that answers, or the reference answers are not there or damaged.
        DataError: its pairs cannot be read.
    """
    recipe = read_site_folder(folder, name)
    prepare(recipe)
    job = alone(recipe, name, folder)
    if job.site(name).preferences:
        site_pairs(job, name)
    updates: dict[Task, LocalUpdate] = {"router": WhenAsked(partial(router_training, job, name))}
    if job.site(name).sums:
        if has_certificate(job, name):
            raise RunError(
                f"site {name!r} has a reward model with a certificate, and sums carry no noise; take sums = true out "
                "of its table, or train the site again without privacy"
            )
        updates["means"] = WhenAsked(partial(prompt_sums, job, name))
    if recipe.projector is not None:
        updates["projector"] = WhenAsked(partial(projector_training, job, name))
    return open_site(recipe, folder, name, scores=recipe.scores, updates=updates, opening=opening)


class SiteService:
    """Answer requests that come over a Unix socket.

    Args:
        site: with its model.
        folder: gets the ledger.
        path: of the socket.
        limit: bytes of a request at most.
        patience: seconds in which a connection must bring its request, or take its reply.
        cache: of images.
        limits: of a request; None for none.
        budget: of queries, by the ledger.
        on_entry: told every line of the ledger.
    """

    def __init__(
        self,
        site: Site,
        folder: Path,
        path: Path,
        *,
        limit: int = MAX_FRAME,
        patience: float = PATIENCE,
        cache: ImageCache | None = None,
        limits: Limits | None = None,
        budget: Budget | None = None,
        on_entry: Callable[[Entry], None] = lambda _: None,
    ) -> None:
        self.folder, self.path, self.limit, self.patience = folder, path, limit, patience
        self.limits = limits
        self.spent = Spent(budget or Budget())
        self._rate = None if limits is None else Rate(limits.requests_per_minute)
        self._busy = False  # of the request in hand
        site.declined = self._declined
        self.endpoint = Endpoint(site.name, site.answer, cache, text=None if limits is None else limits.message_text)
        self._on_entry = on_entry
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._reading: dict[threading.Thread, socket.socket | None] = {}  # None once the request is whole
        self._held: dict[threading.Thread, int] = {}  # bytes of its request
        # One thread for the model: a new one for every connection would build a new pool of OpenMP threads each time.
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")

    def __enter__(self) -> SiteService:
        """Begin to listen.

        Raises:
            RunError: another process listens there.
        """
        mend(self.folder)
        for entry in read_ledger(self.folder):
            self.spent.add(entry.time[:10], entry.queries, entry.by_image)
        self._listener = listen(self.path)
        self._listener.settimeout(0.2)  # closing a socket wakes no thread that waits in accept
        self._accepting = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the request in hand, drop the others, and remove the socket."""
        self._closing.set()
        self._accepting.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        with self._lock:
            for connection in self._reading.values():
                if connection is not None:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
            threads = list(self._reading)
        self._model.shutdown(wait=True, cancel_futures=True)
        for thread in threads:
            thread.join(self.patience)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
                self._open(connection)
            except TimeoutError:
                continue
            except (OSError, RuntimeError):  # no file descriptors or no threads are left, for now
                logger.exception("a connection could not be accepted")
                self._closing.wait(1.0)

    def _open(self, connection: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(connection,), name="connection", daemon=True)
        with self._lock:
            full = len(self._reading) >= CONNECTIONS
            if not full:
                self._reading[thread] = connection
        if full:
            logger.warning("a connection was closed: %d are open already", CONNECTIONS)
            connection.close()
            return
        try:
            thread.start()
        except RuntimeError:  # no threads are left
            with self._lock:
                del self._reading[thread]
            connection.close()
            raise

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(CancelledError):
                connection.settimeout(self.patience)
                if (data := self._receive(connection)) is not None:
                    reply = self._model.submit(self._answer, data, connection).result()
                    send_frame(connection, reply)
        except OSError as error:
            logger.warning("a reply could not be delivered: %s", type(error).__name__)
        except RuntimeError:  # no request is taken on any more
            logger.warning("a request came while the service closed")
        finally:
            with self._lock:
                del self._reading[threading.current_thread()]
                self._held.pop(threading.current_thread(), None)

    def _receive(self, connection: socket.socket) -> bytes | None:
        """Return a request's bytes; None for a connection that brought none, as when somebody looks who listens."""
        try:
            if not connection.recv(1, socket.MSG_PEEK):
                return None
            data = receive_frame(connection, limit=self.limit, seconds=self.patience, admit=self._admit)
            connection.settimeout(self.patience)  # to take the reply
        except (OSError, EOFError, ValueError) as error:
            if not self._closing.is_set():
                logger.warning("a connection was dropped: %s", error if isinstance(error, ValueError) else type(error))
                with contextlib.suppress(RunError):
                    self._note(Entry(now(), "", "", 0, 0, 0, 0, 0, 0.0, "dropped"))
            return None
        with self._lock:
            self._reading[threading.current_thread()] = None
        return data

    def _admit(self, length: int) -> None:
        """Keep room for a request.

        Raises:
            ValueError: there is none.
        """
        with self._lock:
            held = sum(self._held.values())
            if held + length > HELD:
                raise ValueError(f"a message of {length} bytes beside {held} that wait, at most {HELD} are held")
            self._held[threading.current_thread()] = length

    def _answer(self, data: bytes, connection: socket.socket) -> bytes:
        """Return the reply's bytes, once the ledger has its line; without a line nothing leaves but a refusal."""
        start = time.monotonic()
        request = self.endpoint.read(data)
        kind, name, images, questions, candidates = _describe(request, self.endpoint)
        reply = b"" if _gone(connection) else self._reply(request)
        said = decode_reply(reply) if reply else None
        count, by_image, refused = _answered(request, said)
        entry = Entry(
            now(),
            kind,
            re.sub(r"[^A-Za-z0-9._:-]", "?", name[:48]),
            images,
            questions,
            candidates,
            len(data),
            len(reply),
            round(time.monotonic() - start, 3),
            _outcome(said),
            queries=count,
            refused=refused,
            by_image=dict(by_image) if self.spent.budget.per_image else {},
        )
        try:
            self._note(entry)
        except RunError:
            logger.exception("the ledger cannot be written, and so nothing is answered")
            return encode(Refusal(name, "error"))
        self.spent.add(entry.time[:10], entry.queries, entry.by_image)
        return reply

    def _reply(self, request: Request | None) -> bytes:
        self._busy = self._rate is not None and self._rate.over()
        if self._busy and request is not None and not isinstance(request, WithImages):
            return encode(Refusal(request.id, "refused"))
        return self.endpoint.reply(request)

    def _declined(self, request: WithImages) -> dict[int, Declined]:
        """Return which questions of a request are refused before anything is computed."""
        if self._busy:
            return dict.fromkeys(range(len(request.items)), Declined.LIMIT)
        over = {} if self.limits is None else self.limits.declined(request)
        return over | self.spent.declined(request, now()[:10], over)

    def _note(self, entry: Entry) -> None:
        with self._lock:
            note(self.folder, entry)
            self._on_entry(entry)


def _describe(request: Request | None, endpoint: Endpoint) -> tuple[str, str, int, int, int]:
    """Return a request's kind and id, and its numbers of new images, questions and candidates."""
    if request is None:
        return "", "", 0, 0, 0
    kind = kind_of(request)
    if not isinstance(request, WithImages):
        return kind, request.id, 0, 0, 0
    new = sum(endpoint.cache.get(name) is None for name in request.images)
    candidates = sum(len(item.candidates) for item in request.items) if isinstance(request, ScoreRequest) else 0
    return kind, request.id, new, len(request.items), candidates


def _answered(request: Request | None, reply: Reply | None) -> tuple[int, Counter[str], int]:
    """Return how many queries a reply answers, those about each image by its first digits, and how many it refuses."""
    if not isinstance(request, WithImages) or not isinstance(reply, ScoreReply | AnswerReply):
        return 0, Counter(), 0
    count, by_image = 0, Counter[str]()
    items: Sequence[ScoreItem | AnswerItem] = request.items
    for n, item in enumerate(items):
        if n not in reply.refused:
            count += queries(item)
            by_image.update(dict.fromkeys(short_names(item), queries(item)))
    return count, by_image, len(reply.refused)


def _outcome(reply: Reply | None) -> Outcome:
    if reply is None:
        return "gone"
    if isinstance(reply, Refusal):
        return reply.reason
    return "missing images" if isinstance(reply, MissingImages) else "answered"


def _gone(connection: socket.socket) -> bool:
    """Tell whether the other side has closed: FLARE ends its jobs' processes while their requests still wait here."""
    poll = select.poll()
    poll.register(connection, 0)  # a hang-up is told always
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def join(
    kit: Path,
    folder: Path,
    name: str | None = None,
    *,
    images: Path | None = None,
    stop: threading.Event | None = None,
    on_start: Callable[[Kit], None] = lambda _: None,
    on_entry: Callable[[Entry], None] = lambda _: None,
    on_flare: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve a consortium's requests until `stop` is set, or by SIGINT or SIGTERM; a second one ends at once.

    Args:
        kit: the site's start-up kit.
        folder: what `open_site_folder` opens; locked meanwhile.
        name: of the site, by default the kit's; no other is asked by the server.
        images: a folder of images, below which the server's may be found: those need not be sent.
        stop: set it to leave.
        on_start: told the kit once the model is loaded and the socket is there.
        on_entry: told every line of the ledger.
        on_flare: told when FLARE's client starts or ends.

    Raises:
        RunError: the kit is no site's, or not valid or no longer, the folder is not this site's or is in use, or FLARE
            is missing.
        AccordError: as `open_site_folder`.
    """
    from accord.flare.kit import check_certificate, site_kit, start_command, start_environment

    found = site_kit(kit)
    if name not in (None, found.name):
        raise RunError(f"{kit} is the kit of site {found.name}, and the server asks no site {name}; leave the name out")
    check_certificate(found)
    config = alone(read_site_folder(folder, found.name), found.name, folder).site(found.name)
    stop = stop or threading.Event()
    path = site_socket(socket_folder(found.path), found.name)
    with Run.resume(folder, (folder / "recipe.toml").read_text(encoding="utf-8")), site_log(folder):
        if (before := read_running(folder)) is not None and before.flare is not None:
            end(*before.flare)  # a service that was killed left it behind
        limits, budget = config.limits, config.budget
        running = Running(found.name, os.getpid(), now(), str(path), budget=budget)
        cache = ImageCache(library=image_library(images)) if images is not None else None
        decoder = Decoder(memory=limits.image_memory, pixels=limits.image_pixels)
        site = open_site_folder(folder, found.name, opening=Opening(decoder, limits.pixels))
        service = SiteService(site, folder, path, cache=cache, limits=limits, budget=budget, on_entry=on_entry)
        command, environment = start_command(found), start_environment(found)
        address = (found.host, found.port)
        flare = FlareClient(
            command, environment, found.path / "flare.log", on_flare, address, check=lambda: check_certificate(found)
        )
        # FLARE goes last: it carries the reply in hand.
        with decoder, _leaving(stop), flare, service:
            on_start(found)
            flare.keep(stop, lambda each: replace(running, flare=each).write(folder))
        running.write(folder)


@contextlib.contextmanager
def _leaving(stop: threading.Event) -> Iterator[None]:
    """Set `stop` on the first SIGINT, SIGTERM or SIGHUP; the second does what it does by default."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set handlers
        yield
        return

    def leave(*_: object) -> None:
        stop.set()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

"""How a question reaches the sites: one Protocol, and the engine that runs every site in this process.

An algorithm hands over one request per site and gets, for each, a reply or an absence. It never knows which engine
carried them. The in-process engine encodes and decodes every message exactly as a wire would, so that its byte counts
are the real ones and a reply that would fail on the wire fails here. `Outbox` is the server's half of an exchange on
every engine.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeVar

import msgspec

from accord.errors import ReplyError, RunError
from accord.federation.endpoint import Endpoint
from accord.federation.messages import (
    Absence,
    MissingImages,
    Refusal,
    Reply,
    Request,
    UpdateRequest,
    WithImages,
    decode_reply,
    encode,
    reply_limit,
)

_KINDS = {"ScoreRequest": "score", "AnswerRequest": "answer", "CardRequest": "card"}


def kind_of(request: Request) -> str:
    """Return under what name a message is counted: what is trained, or the kind of question."""
    return request.task if isinstance(request, UpdateRequest) else _KINDS[type(request).__name__]


ASK_FIRST: Final = 64 * 2**10
"""Bytes of images: with fewer, asking whether a site has them costs more than it spares."""


@dataclass
class Count:
    """Messages and bytes of one kind between the server and one site."""

    messages: int = 0
    bytes_to_site: int = 0
    bytes_from_site: int = 0
    absences: int = 0
    refused: int = 0  # questions of requests whose others were answered


@dataclass
class Traffic:
    """What crossed the border, per site and message kind, both ways, images included."""

    counts: dict[tuple[str, str], Count] = field(default_factory=lambda: defaultdict(Count))

    def add(self, site: str, kind: str, to_site: int, from_site: int, *, absent: bool) -> None:
        """Count one exchange."""
        count = self.counts[site, kind]
        count.messages += 1
        count.bytes_to_site += to_site
        count.bytes_from_site += from_site
        count.absences += absent


class Engine(Protocol):
    """Carries requests to sites."""

    traffic: Traffic

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names, in the order of the router's outputs, `[K]`."""
        ...

    @property
    def processes(self) -> int:
        """How many processes ask together, each for its own completions; one question of theirs is one message."""
        ...

    def ask(self, requests: Mapping[str, Request], *, deadline: float | None = None) -> dict[str, Reply | Absence]:
        """Send each site its request and wait for all replies, at most `deadline` seconds; never raises for a site."""
        ...

    def total(self, values: Sequence[float]) -> Sequence[float]:
        """Return the sum of each value over the processes that ask together."""
        ...


Done = TypeVar("Done")


class ElsewhereError(RunError):
    """Another process of the run failed at what each does by itself."""


def agree(total: Callable[[Sequence[float]], Sequence[float]], work: Callable[[], Done]) -> Done:
    """Return `work()`, which each process does by itself; where it fails in one, it fails in all, and nobody waits.

    Args:
        total: adds values up over the processes, as `Engine.total`.
        work: what is done; it speaks to no other process.

    Raises:
        ElsewhereError: it failed in another process alone.
    """
    failed: Exception | None = None
    try:
        done = work()
    except Exception as error:
        failed = error
    try:
        if total([float(failed is not None)])[0]:
            raise in_all(failed or ElsewhereError("another process of this run failed; its own log says why"))
        return done
    finally:
        del failed  # else it and this frame would keep each other, and all that the work held


def in_all(error: Exception) -> Exception:
    """Return an error that every process raises in this place, marked as such."""
    error.in_all = True  # type: ignore[attr-defined]
    return error


def is_in_all(error: Exception) -> bool:
    """Return whether all processes have failed where this one has; else the others go on, or wait for it."""
    return getattr(error, "in_all", False)


class Outbox:
    """Exchange messages with sites: send an image only to a site that need not have it, and count every byte.

    A site may have an image that was never sent to it: one of a public set that it has got for itself, or one sent
    before the server was started again. So a request with much to send goes out with names alone at first, and the
    images that the site misses follow: a round trip more, and `ASK_FIRST` bytes or more spared where it has them.
    """

    def __init__(self) -> None:
        self._sent: dict[str, set[str]] = defaultdict(set)  # names of images, by site

    def exchange(
        self, site: str, request: Request, send: Callable[[bytes], bytes], traffic: Traffic
    ) -> Reply | Absence:
        """Send a request and return what came back.

        Args:
            site: the site to ask.
            request: what to ask, with all images.
            send: carries a message to the site and returns its reply; raises `TimeoutError` for one that is late and
                `ConnectionError` for a site that cannot be reached.
            traffic: where to count.
        """
        if not isinstance(request, WithImages):
            return self._once(site, request, send, traffic)
        new = {name: data for name, data in request.images.items() if name not in self._sent[site]}
        if sum(map(len, new.values())) >= ASK_FIRST:
            new = {}
        reply = self._once(site, _with_images(request, new), send, traffic)
        if isinstance(reply, MissingImages):
            missing = {name: request.images[name] for name in reply.images if name in request.images}
            reply = self._once(site, _with_images(request, missing), send, traffic)
        if isinstance(reply, MissingImages):  # its cache is too small for all at once, or it was started anew just now
            reply = self._once(site, request, send, traffic)
        if isinstance(reply, MissingImages):
            traffic.counts[site, kind_of(request)].absences += 1
            return Absence(site, "invalid")
        if not isinstance(reply, Absence):
            self._sent[site].update(request.images)
        return reply

    @staticmethod
    def _once(site: str, request: Request, send: Callable[[bytes], bytes], traffic: Traffic) -> Reply | Absence:
        sent, returned = encode(request), b""
        try:
            returned = send(sent)
            if len(returned) > reply_limit(request):
                raise ReplyError(f"a reply of {len(returned)} bytes, at most {reply_limit(request)} were expected")
            reply: Reply | Absence = decode_reply(returned)
        except TimeoutError:
            reply = Absence(site, "late")
        except ConnectionError:
            reply = Absence(site, "gone")
        except ReplyError:
            reply = Absence(site, "invalid")
        if isinstance(reply, Refusal):
            reply = Absence(site, reply.reason)
        kind = kind_of(request)
        traffic.add(site, kind, len(sent), len(returned), absent=isinstance(reply, Absence))
        return reply


def _with_images(request: WithImages, images: Mapping[str, bytes]) -> WithImages:
    return msgspec.structs.replace(request, images=dict(images))


class InProcessEngine:
    """Run every site here, one after the other, in a fixed order: deterministic, for research and tests.

    Args:
        handlers: site name → the function that answers its requests (`Site.answer`).
    """

    def __init__(self, handlers: Mapping[str, Callable[[Request], Reply]]) -> None:
        self._endpoints = {site: Endpoint(site, handler) for site, handler in handlers.items()}
        self._outbox = Outbox()
        self.traffic = Traffic()

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names, `[K]`."""
        return tuple(self._endpoints)

    @property
    def processes(self) -> int:
        """One."""
        return 1

    def total(self, values: Sequence[float]) -> Sequence[float]:
        """Return the values themselves."""
        return values

    def ask(self, requests: Mapping[str, Request], *, deadline: float | None = None) -> dict[str, Reply | Absence]:
        """Answer each request in turn; a handler that raises or is late is an absence; its error stays at the site."""
        replies: dict[str, Reply | Absence] = {}
        for site, request in requests.items():
            start = time.monotonic()
            replies[site] = self._outbox.exchange(site, request, partial(self._send, site), self.traffic)
            if deadline is not None and time.monotonic() - start > deadline:
                if not isinstance(replies[site], Absence):
                    self.traffic.counts[site, kind_of(request)].absences += 1
                replies[site] = Absence(site, "late")
        return replies

    def _send(self, site: str, data: bytes) -> bytes:
        if site not in self._endpoints:
            raise ConnectionError(f"there is no site {site!r}")
        return self._endpoints[site](data)

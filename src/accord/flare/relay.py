"""What FLARE's job processes run: relays that pass bytes on, and nothing else.

    server's job:  frames from `accord run`  →  collab call to each site, all at once  →  frames back
    site's job:    bytes of a collab call    →  one frame to `accord site join`        →  its reply

These two classes are all that a job of Accord's names, and all that a participant's `class_allow_list` lets it name.
They import neither torch nor a model: a job process starts in the time that FLARE itself needs, and takes half the
memory (`without_tensors`). A failure's text stays
where it arose; over the wire goes a `Refusal`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast

import msgspec
from nvflare.collab import CollabCallError, collab

from accord.federation.messages import Refusal, encode
from accord.flare.frames import MAX_FRAME, SOCKETS_VARIABLE, connect, receive_frame, send_frame, site_socket

logger = logging.getLogger(__name__)

SERVER_SOCKET: Final = "server.sock"

WRAPPING: Final = 1024
"""Bytes by which a frame may be longer than the message in it."""


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """To the server's relay: carry a message to a site."""

    number: int
    site: str
    seconds: float
    limit: int  # bytes of a reply at most
    message: bytes


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """From the server's relay, first of all: the sites of its job."""

    sites: list[str]


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """From the server's relay: what came back for the message of that number."""

    number: int
    message: bytes
    problem: Literal["", "late", "gone"] = ""


FromRelay: TypeAlias = Hello | Answer

encode_frame = msgspec.msgpack.Encoder().encode
decode_ask = msgspec.msgpack.Decoder(Ask).decode
decode_from_relay = cast(Callable[[bytes], FromRelay], msgspec.msgpack.Decoder(FromRelay).decode)


def _sockets() -> Path:
    folder = os.environ.get(SOCKETS_VARIABLE)
    if not folder:
        raise RuntimeError(f"{SOCKETS_VARIABLE} is not set; start FLARE by `accord server start` or `accord site join`")
    return Path(folder)


def without_tensors() -> None:
    """Let FLARE find no PyTorch in this process: it would import it to send tensors, and relays send bytes."""
    sys.modules.setdefault("nvflare.app_opt.pt.decomposers", None)  # type: ignore[arg-type]


class ServerRelay:
    """The server's half of a job: lives as long as `accord run` keeps its connection open."""

    def __init__(self) -> None:
        without_tensors()

    @collab.main  # type: ignore[untyped-decorator]
    def run(self) -> None:
        """Carry messages until the other side closes."""
        sites = {proxy.name: proxy for proxy in collab.clients}
        writing = threading.Lock()
        with connect(_sockets() / SERVER_SOCKET) as connection, ThreadPoolExecutor(max(1, 4 * len(sites))) as calls:

            def tell(message: FromRelay) -> None:
                with writing, contextlib.suppress(OSError):  # whoever asked is gone; the loop below notices
                    send_frame(connection, encode_frame(message))

            def call(ask: Ask) -> None:
                proxy = sites.get(ask.site)
                if proxy is None:
                    return tell(Answer(ask.number, b"", "gone"))
                try:
                    reply = proxy(timeout=ask.seconds).answer(ask.message, ask.seconds)
                except CollabCallError as error:
                    late = error.cause_type == TimeoutError.__name__
                    logger.warning("site %s: %s", ask.site, "late" if late else "gone")
                    return tell(Answer(ask.number, b"", "late" if late else "gone"))
                # Of a site's own making: what is longer than any honest reply goes no further.
                usable = isinstance(reply, bytes) and len(reply) <= ask.limit
                tell(Answer(ask.number, reply if usable else b""))

            tell(Hello(list(sites)))
            with contextlib.suppress(EOFError, OSError):
                while True:
                    calls.submit(call, decode_ask(receive_frame(connection, limit=MAX_FRAME + WRAPPING)))
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class SiteRelay:
    """A site's half of a job: one request, one connection to the site's own service."""

    def __init__(self) -> None:
        without_tensors()

    @collab.publish  # type: ignore[untyped-decorator]
    def answer(self, message: bytes, seconds: float) -> bytes:
        """Return the service's reply, or a refusal; never raises, since FLARE would send an exception's text.

        After `seconds` the server has given up; the service then sees that nobody waits, and does not compute.
        """
        if collab.caller != "server":  # FLARE lets every participant of a job call every other
            logger.warning("another site asked this one; only the server may")
            return encode(Refusal("", "refused"))
        try:
            with connect(site_socket(_sockets(), collab.site_name), timeout=seconds) as connection:
                send_frame(connection, message)
                return receive_frame(connection)
        except (OSError, EOFError):
            logger.warning("the site's service does not answer; start it with `accord site join`")
            return encode(Refusal("", "gone"))
        except Exception:
            logger.exception("a request could not be passed on")
            return encode(Refusal("", "error"))

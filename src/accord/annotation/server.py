"""Serve the annotation page on 127.0.0.1, to browsers that were given its address.

    GET  /?token=…           the token is taken once: a cookie comes back, and the page
    GET  /                   the page
    POST /api/next           {"annotator"}                              the pair to show, and progress
    POST /api/judge          {"annotator", "pair", "choice", "reason"}  the same, of the next pair
    POST /api/undo           {"annotator"}                              the same, of the pair that was taken back
    POST /api/agreement      {}                                         what the second tab shows
    GET  /image/PAIR/N       an image of a pair, as PNG

A judgement is on disk before its reply is sent. An image's bytes never reach the browser: they are decoded in a process
of their own (`accord.data.decoder`), and the pixels are sent, those that a model sees.

Other pages in the same browser, and other programs of the machine, can send requests here, too. A request is refused
without the cookie, which is for this site alone and no script reads; under another host's name (one that a stranger's
DNS lets point to this machine); from another origin, as the browser says in `Origin` and `Sec-Fetch-Site`; and in any
other form than JSON. Nothing on the page comes from elsewhere, and the policy in the headers lets the browser run, show
and send nothing else, and no page put this one into a frame.
"""

from __future__ import annotations

import io
import json
import secrets
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit

import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from accord.annotation.agreement import Agreement, Sides
from accord.annotation.desk import LONGEST_NAME, LONGEST_REASON, Desk, Handed, Refused
from accord.data.decoder import Decoder
from accord.data.images import image_bytes
from accord.errors import DataError, ImageError, RunError
from accord.types import texts_of

ADDRESS: Final = "127.0.0.1"
NAMES: Final = (ADDRESS, "localhost")
MAX_BODY: Final = 64 * 2**10
KEPT_IMAGES: Final = 8
"""PNGs that are kept, those of the pairs that were shown last."""

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_FILES: Final = {"page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
_OPEN: Final = ("/", "/page.css", "/icon.svg")
"""What tells nothing, so that a browser without a session gets it: a link may lead here."""


class Entrance:
    """Let in whoever was given the address: a token that counts once, then a cookie.

    Args:
        port: tells this server's cookie from those of others on the same machine.
        used: told the next token when one was taken, since it counts no more.
    """

    def __init__(self, port: int, used: Callable[[str], None] = lambda token: None) -> None:
        self.cookie = f"accord-annotate-{port}"
        self.token = secrets.token_urlsafe(24)
        self._used = used
        self._sessions: set[str] = set()

    def exchange(self, token: str) -> str | None:
        """Return a new session for the token, which counts no more; None for any other text."""
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            return None
        session = secrets.token_urlsafe(32)
        self._sessions.add(session)
        self.token = secrets.token_urlsafe(24)
        self._used(self.token)
        return session

    def knows(self, session: str | None) -> bool:
        """Return whether a session was given out here."""
        return session is not None and any(secrets.compare_digest(session.encode(), s.encode()) for s in self._sessions)


class Pictures:
    """PNGs of the pairs' images, decoded in a process of their own; the last few are kept."""

    def __init__(self, decode: Decoder) -> None:
        self._decode = decode
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def png(self, key: str, source: Path | bytes) -> bytes:
        """Return an image as PNG without anything but its pixels.

        Raises:
            ImageError: it cannot be decoded.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        buffer = io.BytesIO()
        self._decode(image_bytes(source)).save(buffer, "PNG", compress_level=1)
        with self._lock:
            self._kept[key] = buffer.getvalue()
            while len(self._kept) > KEPT_IMAGES:
                self._kept.popitem(last=False)
        return buffer.getvalue()


class _Guard:
    """Refuse what is not from this site's own page, and put the headers on every reply."""

    def __init__(self, app: ASGIApp, entrance: Entrance) -> None:
        self.app, self.entrance = app, entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: MutableMapping[str, Any]) -> Response | None:
        request, headers = Request(scope), Headers(scope=scope)
        host = headers.get("host", "")
        origin, fetched = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if len(headers.getlist("host")) != 1 or host_name(host) not in NAMES:
            return _error(403, "this page is for browsers of this machine")
        if origin is not None and origin != f"http://{host}":
            return _error(403, "this request comes from another page")
        if scope["path"] in _OPEN:
            return None
        if fetched not in ("same-origin", "none"):
            return _error(403, "this request comes from another page")
        if not self.entrance.knows(request.cookies.get(self.entrance.cookie)):
            return _error(401, "this browser has no session; open the address that accord annotate printed last")
        return None


def host_name(host: str) -> str | None:
    """Return the name in a `Host` header, None where it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        return None if parts.port == 0 or parts.netloc != host or "@" in host else parts.hostname
    except ValueError:
        return None


def build_app(desk: Desk, entrance: Entrance, decode: Decoder, *, title: str) -> ASGIApp:
    """Return the page and what is behind it as an ASGI application."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    package = files("accord.annotation")
    template = environment.from_string(package.joinpath("page.html.j2").read_text("utf-8"))
    contents = {name: package.joinpath(name).read_bytes() for name in _FILES}
    pictures = Pictures(decode)

    async def page(request: Request) -> Response:
        if (token := request.query_params.get("token")) is not None:
            if (session := entrance.exchange(token)) is not None:
                reply = RedirectResponse("/", status_code=303)
                reply.set_cookie(entrance.cookie, session, httponly=True, samesite="strict", path="/")
                return reply
            if not entrance.knows(request.cookies.get(entrance.cookie)):
                return _closed(template, title)
            return RedirectResponse("/", status_code=303)
        if not entrance.knows(request.cookies.get(entrance.cookie)):
            return _closed(template, title)
        text = template.render(
            title=title, names=desk.names(), longest_name=LONGEST_NAME, longest_reason=LONGEST_REASON, let_in=True
        )
        return Response(text, media_type="text/html")

    async def asset(request: Request) -> Response:
        name = request.scope["path"].lstrip("/")
        return Response(contents[name], media_type=_FILES[name])

    def picture(request: Request) -> Response:
        pair = desk.candidates.get(request.path_params["pair"])
        number = request.path_params["number"]
        if pair is None or number >= len(pair.images):
            return _error(404, "there is no such image")
        try:
            return Response(pictures.png(f"{pair.id}/{number}", pair.images[number]), media_type="image/png")
        except ImageError as error:
            return _error(422, str(error))

    def api(answer: Callable[[Mapping[str, object]], dict[str, object]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                return JSONResponse(await run_in_threadpool(answer, await _body(request)))
            except Refused as error:
                return _error(409, str(error))
            except DataError as error:
                return _error(400, str(error))
            except RunError as error:
                return _error(507, str(error))

        return endpoint

    def shown(annotator: str, handed: Handed | None) -> dict[str, object]:
        pair = None if handed is None else _shown(handed)
        return {"annotator": annotator, "pair": pair, "progress": asdict(desk.progress(annotator))}

    def following(given: Mapping[str, object]) -> dict[str, object]:
        annotator = desk.name(given.get("annotator"))
        return shown(annotator, desk.next(annotator))

    def judge(given: Mapping[str, object]) -> dict[str, object]:
        annotator = desk.name(given.get("annotator"))
        pair, choice, reason = (_text(given, name) for name in ("pair", "choice", "reason"))
        desk.judge(annotator, pair, choice, reason)
        return shown(annotator, desk.next(annotator))

    def undo(given: Mapping[str, object]) -> dict[str, object]:
        annotator = desk.name(given.get("annotator"))
        handed = desk.undo(annotator)
        if handed is None:
            raise Refused("there is nothing to take back")
        return shown(annotator, handed)

    routes = [
        Route("/", page),
        *(Route(f"/{name}", asset) for name in _FILES),
        Route("/image/{pair:str}/{number:int}", picture),
        Route("/api/next", api(following), methods=["POST"]),
        Route("/api/judge", api(judge), methods=["POST"]),
        Route("/api/undo", api(undo), methods=["POST"]),
        Route("/api/agreement", api(lambda _: agreement_table(desk.agreement())), methods=["POST"]),
    ]
    return _Guard(Starlette(routes=routes), entrance)


def agreement_table(found: Agreement) -> dict[str, object]:
    """Return what the second tab shows, as JSON holds it."""

    def sides(each: Sides) -> dict[str, object]:
        return {"left": each.left, "right": each.right, "interval": each.interval}

    return {
        "annotators": [{"name": name, "choices": found.annotators[name]} for name in found.annotators],
        "sides": [{"name": name, **sides(each)} for name, each in found.sides.items()],
        "everyone": sides(found.everyone),
        "kappa": [{"names": list(names), "pairs": n, "kappa": value} for names, (n, value) in found.kappa.items()],
        "alpha": found.alpha,
        "compared": found.compared,
    }


class Page:
    """The page on a socket of 127.0.0.1, until Ctrl-C.

    Args:
        desk: the state behind it.
        title: of the page.
        port: 0 for any that is free.
        tell: told the page's address whenever there is a new one, since each lets in one browser.

    Raises:
        RunError: the port is taken.
    """

    def __init__(self, desk: Desk, *, title: str, port: int, tell: Callable[[str], None]) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((ADDRESS, port))
            self._socket.listen()  # a browser that is quicker than the server waits
        except OSError as error:
            self._socket.close()
            raise RunError(f"cannot listen on {ADDRESS}:{port} ({error.strerror}); choose another --port") from error
        self.port: int = self._socket.getsockname()[1]
        self._entrance = Entrance(self.port, lambda token: tell(self.address))
        self._desk, self._title = desk, title

    def __enter__(self) -> Page:
        """Return the page."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self._socket.close()

    @property
    def address(self) -> str:
        """What lets one browser in."""
        return f"http://{ADDRESS}:{self.port}/?token={self._entrance.token}"

    def serve(self) -> None:
        """Answer browsers until Ctrl-C."""
        with Decoder() as decode:
            app = build_app(self._desk, self._entrance, decode, title=self._title)
            uvicorn.Server(settings(app)).run(sockets=[self._socket])


def settings(app: ASGIApp) -> uvicorn.Config:
    """Return how uvicorn serves the page: plain HTTP, and no line about any request."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,  # a line would quote the token
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )


def _shown(handed: Handed) -> dict[str, object]:
    """Return a pair for the page: what must be ranked, and nothing of where it came from."""
    pair, left = handed.pair, handed.left
    return {
        "id": pair.id,
        "turns": [{"role": turn["role"], "text": "\n".join(texts_of(turn))} for turn in pair.prompt],
        "images": [f"/image/{pair.id}/{n}" for n in range(len(pair.images))],
        "left": pair.answers[left],
        "right": pair.answers[1 - left],
    }


def _text(given: Mapping[str, object], name: str) -> str:
    value = given.get(name, "")
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, got {value!r:.40}")
    return value


async def _body(request: Request) -> Mapping[str, object]:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise DataError("send JSON, with Content-Type: application/json")
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise DataError(f"send at most {MAX_BODY} bytes")
    try:
        given = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"this is no JSON ({error!s:.80})") from error
    if not isinstance(given, dict):
        raise DataError(f"send one JSON object, got {given!r:.40}")
    return given


def _closed(template: jinja2.Template, title: str) -> Response:
    text = template.render(title=title, names=[], longest_name=0, longest_reason=0, let_in=False)
    return Response(text, status_code=401, media_type="text/html")


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)

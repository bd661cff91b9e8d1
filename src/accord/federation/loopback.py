"""Serve one reward model to programs of this machine: JSON over HTTP on 127.0.0.1, answered by a site's own code.

    POST /score    {"prompt": "what colour?", "image": "<base64 or data URI>", "answers": ["red", "blue"]}
                   {"scores": [1.31, -0.87]}                       standardised, in the order of the answers

`prompt` may be a conversation, too, as in a file of preference pairs, and `images` is a list in the place of `image`. A
request becomes an `accord.federation.messages.ScoreRequest`, and `accord.federation.site.Site` answers it, so that a
score here is the score in a federation, to the bit. Images come in the request; no path is read and nothing is fetched.

The server listens on the loopback address alone. A page in a browser of this machine can send requests there, so
another `Host` than the loopback's and another content type than JSON are refused, and no answer allows a foreign page
to read it.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from accord.data.cells import ImageCell
from accord.data.conversation import read_prompt
from accord.data.images import image_bytes
from accord.data.rows import Row
from accord.errors import AccordError, DataError, RunError
from accord.federation.messages import MAX_IMAGES, ScoreItem, ScoreReply, ScoreRequest, image_name, to_turns
from accord.federation.site import Site

logger = logging.getLogger(__name__)

ADDRESS: Final = "127.0.0.1"
MAX_BODY: Final = 64 * 2**20
MAX_ANSWERS: Final = 1024
PATIENCE: Final = 30.0
"""Seconds in which a connection must bring its request."""


def score_request(row: Row) -> ScoreRequest:
    """Return the federation's request for one question about answers.

    Raises:
        DataError: a field is missing or of another kind, or the image is no image in the request.
    """
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"answers must be a list of at least one text, got {answers!r:.60}")
    if len(answers) > MAX_ANSWERS:
        raise DataError(f"at most {MAX_ANSWERS} answers are scored at once, got {len(answers)}; send several requests")
    if unknown := sorted(row.keys() - {"prompt", "image", "images", "answers"}):
        raise DataError(f"unknown field {unknown[0]!r}; send prompt, image (or images, a list) and answers")
    cells = row.get("images") if row.get("images") is not None else [row["image"]] if row.get("image") else []
    if not isinstance(cells, list) or not all(isinstance(cell, str) and ImageCell.embedded(cell) for cell in cells):
        raise DataError("images must be base64 or data URIs: paths are not read and URLs are not fetched")
    if len(cells) > MAX_IMAGES:
        raise DataError(f"a question has at most {MAX_IMAGES} images, got {len(cells)}; send fewer")
    stored = [image_bytes(ImageCell(None).source(cell)) for cell in cells]
    names = [image_name(data) for data in stored]
    prompt = read_prompt(row.get("prompt"), len(names))
    return ScoreRequest("1", dict(zip(names, stored, strict=True)), [ScoreItem(names, to_turns(prompt), answers)])


class LoopbackServer(ThreadingHTTPServer):
    """Answer score requests for a site on 127.0.0.1.

    Args:
        site: with its reward model.
        port: 0 for any that is free; `server_port` says which.

    Raises:
        RunError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, site: Site, port: int = 0) -> None:
        self.site = site
        self.one_at_a_time = threading.Lock()  # the model is not for several threads
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise RunError(f"cannot listen on {ADDRESS}:{port} ({error.strerror}); choose another --port") from error

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://{ADDRESS}:{self.server_port}"

    def scores(self, row: Row) -> list[float]:
        """Return the site's scores of a question's answers.

        Raises:
            AccordError: the request is wrong, or the model cannot score it.
        """
        request = score_request(row)
        with self.one_at_a_time:
            reply = self.site.answer(request)
        if not isinstance(reply, ScoreReply) or reply.refused:
            raise DataError("the model could not score this; see what the server says")
        if not all(map(math.isfinite, reply.scores[0])):
            raise DataError("the model's scores are not finite; train it again with a lower learning rate")
        return reply.scores[0]


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackServer
    timeout = PATIENCE
    server_version = "accord"
    sys_version = ""

    def do_POST(self) -> None:
        """Score answers."""
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        kind = (self.headers.get("Content-Type") or "").partition(";")[0].strip()
        length = self.headers.get("Content-Length") or ""
        if host not in (ADDRESS, "localhost"):
            self._say(HTTPStatus.FORBIDDEN, {"error": "this server is for programs of this machine"})
        elif self.path != "/score":
            self._say(HTTPStatus.NOT_FOUND, {"error": f"no such address {self.path[:60]!r}; POST to /score"})
        elif kind != "application/json":
            self._say(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "send JSON, with Content-Type: application/json"})
        elif not (length.isascii() and length.isdigit() and int(length) <= MAX_BODY):
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": f"send at most {MAX_BODY} bytes"})
        else:
            self._score(self.rfile.read(int(length)))

    def _score(self, body: bytes) -> None:
        try:
            row = json.loads(body)
            if not isinstance(row, dict):
                raise DataError(f"send one JSON object, got {row!r:.60}")
            self._say(HTTPStatus.OK, {"scores": self.server.scores(row)})
        except (AccordError, ValueError, RecursionError) as error:
            self._say(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except Exception:
            logger.exception("a request could not be answered")
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "the model failed on this; see what the server says"})

    def _say(self, status: HTTPStatus, reply: dict[str, object]) -> None:
        body = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.close_connection = status is not HTTPStatus.OK  # a body that was not read is no next request
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a log line would quote what a client sends."""

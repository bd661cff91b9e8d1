"""A file of pairs of answers, and the page over it in a thread or in a process of its own."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from accord.annotation import server
from accord.annotation.desk import Desk
from accord.annotation.folder import open_journal, read_pairs, write_pairs
from accord.annotation.pairs import read_candidates
from processes import end


@pytest.fixture
def answers_file(tmp_path, square):
    """Return a function that writes a file of questions about squares with two answers each."""

    def make(count=8, name="brought", **fields):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rows = []
        for n in range(count):
            (folder / "images" / f"{n}.png").write_bytes(square("red", (40 + n, 30)))
            given = {"prompt": f"what is picture {n}?", "answers": [f"good {n}", f"bad {n}"]}
            rows.append({**given, "image": f"images/{n}.png", **fields})
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "pairs.jsonl"

    return make


@pytest.fixture
def desk(tmp_path, answers_file):
    """Return a function that opens a desk over the pairs of a file, in a folder of its own or again."""
    folder = tmp_path / "annotation"

    def make(count=8, overlap=0.0, seed=0, **more):
        if not folder.exists():
            write_pairs(folder, read_candidates(answers_file(count)))
        return Desk(read_pairs(folder), open_journal(folder), overlap=overlap, seed=seed, **more)

    return make


class Client:
    """Speak to the page as its script does."""

    def __init__(self, address):
        self.place, _, self.token = address.removeprefix("http://").partition("/?token=")
        self.cookie = ""

    def ask(self, method, path, body=None, **headers):
        """Return status, headers and body; a header that is None is left out."""
        connection = http.client.HTTPConnection(self.place, timeout=30)
        given = {"Host": self.place, "Cookie": self.cookie, "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.putrequest(method, path, skip_host=True)
            for name, value in given.items():
                if value is not None:
                    connection.putheader(name, value)
            data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
            connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data)
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    def enter(self):
        """Exchange the token for the cookie."""
        status, headers, _ = self.ask("GET", f"/?token={self.token}")
        assert status == 303
        self.cookie = headers["Set-Cookie"].partition(";")[0]
        return self

    def post(self, path, **body):
        """Return the reply, which must be a good one."""
        status, _, data = self.ask("POST", path, body)
        assert status == 200, data
        return json.loads(data)


@contextmanager
def serving(desk, told=None):
    """Serve a desk in a thread; yields the page."""
    told = [] if told is None else told
    with server.Page(desk, title="a <title>", port=0, tell=told.append) as page, server.Decoder() as decode:
        app = server.build_app(desk, page._entrance, decode, title="a <title>")
        running = uvicorn.Server(server.settings(app))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [page._socket]})
        thread.start()
        try:
            yield page
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(name="serving")
def _serving():
    return serving


@pytest.fixture
def client():
    return Client


class Running:
    """`accord annotate` in a process of its own."""

    def __init__(self, words, log):
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "accord.cli", "annotate", *map(str, words)],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    def said(self):
        return self.log.read_text()

    def addresses(self):
        return [word for word in self.said().split() if "/?token=" in word]

    def address(self, after=0):
        """Wait until there are more than so many addresses, and return the newest."""
        until = time.monotonic() + 120
        while len(self.addresses()) <= after:
            assert self.process.poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.1)
        return self.addresses()[-1]

    def kill(self):
        end(self.process)


@pytest.fixture
def running(tmp_path):
    """Return a function that starts `accord annotate` in a process of its own."""
    started = []

    def start(*words):
        started.append(Running(words, tmp_path / f"said-{len(started)}.txt"))
        return started[-1]

    yield start
    for each in started:
        each.kill()

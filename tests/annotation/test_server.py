"""The page is for browsers that were given its address, and shows hostile things as what they are."""

import io
import json
import socket

import pytest
from PIL import Image

from accord.annotation import server
from accord.annotation.journal import read_judgements
from accord.annotation.server import MAX_BODY, Page, host_name
from accord.data.images import load_image
from accord.errors import RunError


def test_the_token_counts_once(desk, serving, client):
    """It is exchanged for a cookie of this site alone that no script reads; the next token is told."""
    told = []
    with serving(desk(), told) as page:
        first = client(page.address)
        status, headers, _ = first.ask("GET", f"/?token={first.token}")
        assert status == 303 and headers["Location"] == "/"
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and f"accord-annotate-{page.port}=" in cookie
        assert first.token not in cookie and told == [page.address] and first.token not in page.address
        status, headers, body = client(page.address).ask("GET", f"/?token={first.token}")
        assert status == 401 and "Set-Cookie" not in headers and b"This address was used before" in body
        assert client(told[0]).enter().post("/api/next", annotator="B")["pair"]


def test_without_the_cookie_there_is_nothing(desk, serving, client):
    open_desk = desk()
    pair = next(iter(open_desk.candidates))
    with serving(open_desk) as page:
        stranger = client(page.address)
        for cookie in (None, "accord-annotate-0=x", f"accord-annotate-{page.port}={'x' * 43}"):
            for method, path in (
                ("POST", "/api/next"),
                ("GET", f"/image/{pair}/0"),
                ("GET", "/page.js"),
                ("GET", "/x"),
            ):
                assert stranger.ask(method, path, {"annotator": "A"}, Cookie=cookie)[0] == 401
        status, _, body = stranger.ask("GET", "/?token=nonsense")
        assert status == 401 and b"picture" not in body and b"page.js" not in body


def test_other_hosts_and_other_pages_are_refused(desk, serving, client):
    """A name that a stranger's DNS lets point here, another origin on this machine, a frame of another page."""
    with serving(desk()) as page:
        own = client(page.address).enter()
        port = page.port
        body = {"annotator": "A"}
        assert own.ask("POST", "/api/next", body, Origin=f"http://127.0.0.1:{port}")[0] == 200
        assert own.ask("POST", "/api/next", body, Host="localhost:1", Origin="http://localhost:1")[0] == 200  # a tunnel
        for host in (
            "attacker.example",
            f"attacker.example:{port}",
            "127.0.0.1.attacker.example",
            "",
            "127.0.0.1@x",
            None,
        ):
            assert own.ask("POST", "/api/next", body, Host=host)[0] in (400, 403)
            assert own.ask("GET", "/", Host=host)[0] in (400, 403)
        for origin in ("null", "http://127.0.0.1:1", f"https://127.0.0.1:{port}", "http://attacker.example"):
            assert own.ask("POST", "/api/judge", body, Origin=origin)[0] == 403
        for site in ("cross-site", "same-site"):
            assert own.ask("POST", "/api/next", body, Sec_Fetch_Site=site)[0] == 403
            assert own.ask("GET", "/page.js", Sec_Fetch_Site=site)[0] == 403
        assert own.ask("POST", "/api/next", body, Content_Type="text/plain")[0] == 400
        assert own.ask("GET", "/api/next")[0] == 405


@pytest.mark.parametrize(
    ("host", "name"),
    [("127.0.0.1:80", "127.0.0.1"), ("localhost", "localhost"), ("[::1]:80", "::1"), ("a:b", None), ("a/b", None)],
)
def test_names_of_hosts(host, name):
    assert host_name(host) == name


def test_every_reply_has_the_headers(desk, serving, client):
    """Also refusals and what is not there; nothing but the page's own files may run, show or be asked."""
    with serving(desk()) as page:
        own = client(page.address).enter()
        for path in ("/", "/page.js", "/page.css", "/nothing", "/image/x/0", "/?token=x"):
            _, headers, _ = own.ask("GET", path)
            assert {name: headers[name] for name in server.HEADERS} == server.HEADERS
        _, headers, _ = own.ask("GET", "/", Host="attacker.example")
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy and "data:" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and "Server" not in headers


WRONG = {
    "no name": ("/api/next", {"annotator": " "}, 400, "an annotator needs a name"),
    "no name at all": ("/api/judge", {"pair": "x", "choice": "left"}, 400, "an annotator needs a name"),
    "no JSON": ("/api/next", b"{", 400, "no JSON"),
    "a list": ("/api/next", b"[]", 400, "one JSON object"),
    "deep": ("/api/next", b"[" * 60_000, 400, "no JSON"),
    "too much": ("/api/next", b" " * (MAX_BODY + 1), 400, "send at most"),
    "a number": ("/api/judge", {"annotator": "A", "pair": 1}, 400, "pair must be text"),
    "no choice": ("/api/judge", {"annotator": "A", "pair": "x"}, 400, "a choice is one of"),
    "not handed out": ("/api/judge", {"annotator": "A", "pair": "x", "choice": "left"}, 409, "is not the one"),
    "a skip without a reason": ("/api/judge", {"annotator": "A", "pair": "x", "choice": "skip"}, 400, "needs a reason"),
    "nothing to undo": ("/api/undo", {"annotator": "A"}, 409, "nothing to take back"),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory, square, request):
    """One page for all that is wrong."""
    from accord.annotation.desk import Desk
    from accord.annotation.folder import open_journal, read_pairs, write_pairs
    from accord.annotation.pairs import Candidate
    from accord.types import vqa_prompt

    from .conftest import Client, serving

    folder = tmp_path_factory.mktemp("wrong")
    write_pairs(folder, [Candidate("x1", vqa_prompt("?"), ("a", "b"), (square("red"),), "q")])
    with serving(Desk(read_pairs(folder), open_journal(folder), overlap=0, seed=0)) as page:
        yield Client(page.address).enter(), folder


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_with_the_reason(opened, name):
    own, folder = opened
    path, body, expected, reason = WRONG[name]
    status, _, said = own.ask("POST", path, body)
    assert status == expected and reason in json.loads(said)["error"]
    assert read_judgements(folder / "judgements.jsonl") == ([], 0)


def test_the_page_shows_what_must_be_ranked_and_nothing_of_its_origin(desk, serving, client):
    with serving(desk()) as page:
        shown = client(page.address).enter().post("/api/next", annotator="A")
    assert shown["pair"].keys() == {"id", "turns", "images", "left", "right"}
    assert {shown["pair"]["left"], shown["pair"]["right"]} == {"good 0", "bad 0"}
    assert shown["pair"]["turns"] == [{"role": "user", "text": "what is picture 0?"}]


def test_a_judgement_is_on_disk_when_the_next_pair_comes(desk, serving, client, tmp_path):
    open_desk = desk()
    with serving(open_desk) as page:
        own = client(page.address).enter()
        first = own.post("/api/next", annotator="A")["pair"]
        after = own.post("/api/judge", annotator="A", pair=first["id"], choice="skip", reason="dark")
        ((said,), torn) = read_judgements(tmp_path / "annotation" / "judgements.jsonl")
        assert (said.pair, said.reason, torn) == (first["id"], "dark", 0)
        assert after["pair"]["id"] != first["id"] and after["progress"]["done"] == 1
        back = own.post("/api/undo", annotator="A")
        assert back["pair"] == first and back["progress"]["done"] == 0


def test_a_full_disk_is_told_and_nothing_counts(desk, serving, client, monkeypatch):
    def full(*_):
        raise RunError("cannot be written: the disk is full")

    open_desk = desk()
    with serving(open_desk) as page:
        own = client(page.address).enter()
        pair = own.post("/api/next", annotator="A")["pair"]
        with monkeypatch.context() as patched:
            patched.setattr("accord.annotation.journal.append_line", full)
            status, _, said = own.ask("POST", "/api/judge", {"annotator": "A", "pair": pair["id"], "choice": "tie"})
        assert status == 507 and "the disk is full" in json.loads(said)["error"]
        assert own.post("/api/judge", annotator="A", pair=pair["id"], choice="tie")["progress"]["done"] == 1


def test_a_picture_is_its_pixels_and_no_more(desk, serving, client, tmp_path):
    """PNG with the pixels that a model sees; what is written beside them in the file does not reach the browser."""
    open_desk = desk(1)
    (pair,) = open_desk.candidates.values()
    stored = pair.images[0]
    stored.write_bytes(stored.read_bytes() + b"<script>alert(1)</script>")
    with serving(open_desk) as page:
        own = client(page.address).enter()
        for _ in range(2):
            status, headers, data = own.ask("GET", f"/image/{pair.id}/0")
            assert status == 200 and headers["Content-Type"] == "image/png" and b"script" not in data
            assert Image.open(io.BytesIO(data)).tobytes() == load_image(stored).tobytes()
        assert [own.ask("GET", f"/image/{path}")[0] for path in (f"{pair.id}/1", "x/0", f"{pair.id}/-1")] == [404] * 3


def test_a_picture_that_cannot_be_shown_is_told(desk, serving, client):
    """A header that declares more than the decoder's limit, and no picture at all; the next pair's is shown."""
    open_desk = desk(3)
    bomb, broken, good = open_desk.candidates.values()
    buffer = io.BytesIO()
    Image.new("1", (5000, 5000)).save(buffer, "PNG")
    bomb.images[0].write_bytes(buffer.getvalue())
    broken.images[0].write_bytes(b"hello")
    with serving(open_desk) as page:
        own = client(page.address).enter()
        for pair, reason in ((bomb, "5000 x 5000"), (broken, "not a readable PNG")):
            status, _, said = own.ask("GET", f"/image/{pair.id}/0")
            assert status == 422 and reason in json.loads(said)["error"]
        assert own.ask("GET", f"/image/{good.id}/0")[0] == 200


def test_names_and_titles_are_text(desk, serving, client):
    open_desk = desk(2)
    name = '"><script>alert(1)</script>'
    open_desk.judge(name, open_desk.next(name).pair.id, "tie")
    with serving(open_desk) as page:
        _, _, body = client(page.address).enter().ask("GET", "/")
    assert b"<script>alert" not in body and b"&lt;script&gt;alert(1)" in body and b"a &lt;title&gt;" in body
    assert b" style=" not in body and b"<style" not in body and b" onclick" not in body


def test_agreement_as_the_page_gets_it(desk, serving, client):
    """Both call each of two pairs otherwise: κ = (0 − 1/2)/(1 − 1/2) = −1, D_o = 1, D_e = 8/12, α = −1/2."""
    open_desk = desk(2, overlap=1.0)
    first, second = open_desk.candidates.values()
    with serving(open_desk) as page:
        own = client(page.address).enter()
        for name, wanted in (("A", (0, 1)), ("B", (1, 0))):
            for pair, answer in zip((first, second), wanted, strict=True):
                shown = own.post("/api/next", annotator=name)["pair"]
                choice = "left" if shown["left"] == pair.answers[answer] else "right"
                own.post("/api/judge", annotator=name, pair=pair.id, choice=choice)
        found = own.post("/api/agreement")
    assert found["kappa"] == [{"names": ["A", "B"], "pairs": 2, "kappa": -1.0}]
    assert found["alpha"] == pytest.approx(-0.5) and found["compared"] == 2
    assert found["everyone"]["left"] + found["everyone"]["right"] == 4


def test_a_port_that_is_taken(desk):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RunError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*choose another --port"):
            Page(desk(), title="x", port=taken.getsockname()[1], tell=print)

"""The engine on a real Unix socket, its relay jobs threads of this process that answer as each test wants."""

import itertools
import json
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch

from accord.alignment.reward import FederatedReward, Waiting
from accord.errors import DataWarning, QuorumError, RunError
from accord.federation.messages import (
    Absence,
    Card,
    CardRequest,
    Declined,
    Refusal,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    UpdateRequest,
    decode_request,
    encode,
    image_name,
)
from accord.flare import engine as module
from accord.flare import frames
from accord.flare.engine import FlareEngine
from accord.flare.frames import connect, receive_frame, send_frame
from accord.flare.relay import SERVER_SOCKET, Answer, Hello, decode_ask, encode_frame

pytestmark = pytest.mark.timeout(60)

SITES = ("colour", "shape", "yes-no")


def tell(connection, message):
    send_frame(connection, encode_frame(message))


def reply_to(ask):
    """What an honest site says; the number of questions tells whose card it is."""
    request = decode_request(ask.message)
    if isinstance(request, ScoreRequest):
        return encode(ScoreReply(request.id, [[0.5] * len(item.candidates) for item in request.items]))
    return encode(Card(request.id, ask.site, 1, SITES.index(ask.site), 3, True, {}))


def honest(connection, ask):
    tell(connection, Answer(ask.number, reply_to(ask)))


def silent(connection, ask):
    pass


class Jobs:
    """A launcher whose relay jobs are threads: each says hello and leaves the rest to `script(connection, ask)`."""

    def __init__(self, folder, sites=SITES, script=honest):
        self.folder, self.script = folder, script
        self.heard = dict.fromkeys(sites, 1.0)
        self.down = self.closed = False
        self.hello = lambda connection, sites: tell(connection, Hello(sites))
        self.delay = 0.0
        self.started, self.ended, self.asked, self.threads = [], [], [], []

    def submit(self, job):
        if self.down:
            raise ConnectionError("refused")
        _, *sites = json.loads((job / "meta.json").read_text())["deploy_map"]["app"]
        self.started.append((time.monotonic(), sites))
        thread = threading.Thread(target=self.run, args=(sites, self.delay))
        self.threads.append(thread)
        thread.start()

    def connected(self):
        if self.down:
            raise ConnectionError("refused")
        return dict(self.heard)

    def close(self):
        self.closed = True

    def run(self, sites, delay):
        time.sleep(delay)
        try:
            with connect(self.folder / SERVER_SOCKET) as connection:
                self.hello(connection, sites)
                while True:
                    ask = decode_ask(receive_frame(connection))
                    self.asked.append(ask)
                    self.script(connection, ask)
        except (EOFError, OSError):
            self.ended.append(sites)


@pytest.fixture
def sockets():
    """A folder whose name is short, as the path of a socket must be."""
    with tempfile.TemporaryDirectory(prefix="accord-") as folder:
        yield Path(folder)


@pytest.fixture
def jobs(sockets):
    return Jobs(sockets)


@pytest.fixture
def start(jobs, sockets):
    """Start an engine; in the end it is closed, and so is every job that it began."""
    made = []

    def begin(**settings):
        given = {"wait": 5.0, "give_up": 10.0, "poll": 0.02, **settings}
        made.append(FlareEngine(SITES, jobs, sockets, **given))
        return made[-1]

    yield begin
    for engine in made:
        engine.close()
    for thread in jobs.threads:
        thread.join(5)
        assert not thread.is_alive(), "a relay job outlived its engine"


def cards(*sites):
    return {site: CardRequest(f"card-{site}") for site in sites or SITES}


def said(replies):
    """Whose card came from each site, or why none."""
    return {site: r.reason if isinstance(r, Absence) else r.architecture for site, r in replies.items()}


ALL = {site: site for site in SITES}


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_bytes_are_counted_both_ways(start, jobs):
    """Twenty asks of one segment; what is counted are the messages' own bytes, a stamp of 17 characters among them."""
    engine = start()
    for _ in range(20):
        assert said(engine.ask(cards(), deadline=5)) == ALL
    assert [sites for _, sites in jobs.started] == [list(SITES)] and engine.present == set(SITES)
    assert len({decode_request(ask.message).id for ask in jobs.asked}) == 60
    for site in SITES:
        stamp = "." + "0" * 16
        request, reply = CardRequest(f"card-{site}{stamp}"), Card(f"card-{site}{stamp}", site, 1, 0, 3, True, {})
        count = engine.traffic.counts[site, "card"]
        assert (count.messages, count.absences) == (20, 0)
        assert (count.bytes_to_site, count.bytes_from_site) == (20 * len(encode(request)), 20 * len(encode(reply)))


def test_a_reply_carries_the_id_that_was_asked_under(start):
    assert {reply.id for reply in start().ask(cards(), deadline=5).values()} == {f"card-{site}" for site in SITES}


def test_an_image_goes_to_a_site_once(start, jobs):
    engine, image = start(), b"x" * 1000
    for _ in range(3):
        request = ScoreRequest("s", {image_name(image): image}, [ScoreItem([image_name(image)], [], ["a", "b"])])
        assert engine.ask({"shape": request}, deadline=5)["shape"].scores == [[0.5, 0.5]]
    assert [len(decode_request(ask.message).images) for ask in jobs.asked] == [1, 0, 0]


def test_answers_out_of_order(start, jobs):
    held = []

    def backwards(connection, ask):
        held.append(ask)
        if len(held) == len(SITES):
            for each in reversed(held):
                honest(connection, each)

    jobs.script = backwards
    assert said(start().ask(cards(), deadline=5)) == ALL


def test_answers_twice_and_under_numbers_that_nobody_asked(start, jobs):
    def noisy(connection, ask):
        for number in (-1, 2**62, ask.number + 1, ask.number, ask.number, ask.number - 1):
            tell(connection, Answer(number, reply_to(ask)))

    jobs.script = noisy
    engine = start()
    for n in range(10):
        assert said(engine.ask(cards("shape"), deadline=5)) == {"shape": "shape"}
        assert engine.traffic.counts["shape", "card"].messages == n + 1
    assert len(jobs.started) == 1


def test_a_late_answer_is_nobodys(start, jobs):
    """The first question's answer comes while the second is open; its card, made for the first, is not taken."""
    first = []

    def belated(connection, ask):
        if not first:
            first.append(ask)
            return
        tell(connection, Answer(first[0].number, reply_to(first[0])))
        honest(connection, ask)

    jobs.script = belated
    engine = start()
    assert said(engine.ask(cards("shape"), deadline=0.2)) == {"shape": "late"}
    reply = engine.ask({"shape": CardRequest("second")}, deadline=5)["shape"]
    assert reply.id == "second"
    count = engine.traffic.counts["shape", "card"]
    assert (count.messages, count.absences) == (2, 1)


def test_an_earlier_reply_answers_nothing(start, jobs):
    """Sent again under the new question's number, by the same site and by another."""
    kept = []

    def replaying(connection, ask):
        kept.append(reply_to(ask))
        tell(connection, Answer(ask.number, kept[0]))

    jobs.script = replaying
    engine = start()
    assert said(engine.ask(cards("shape"), deadline=5)) == {"shape": "shape"}
    assert said(engine.ask(cards("shape"), deadline=5)) == {"shape": "invalid"}
    assert said(engine.ask(cards("colour"), deadline=5)) == {"colour": "invalid"}
    assert [engine.traffic.counts[site, "card"].absences for site in SITES] == [1, 1, 0]


def test_what_cannot_be_read_is_invalid(start, jobs):
    def rubbish(connection, ask):
        if ask.site == "shape":
            return tell(connection, Answer(ask.number, b"\xc1rubbish"))
        honest(connection, ask)

    jobs.script = rubbish
    engine = start()
    for _ in range(5):  # a site that talks nonsense is asked again, it may have been a fault
        assert said(engine.ask(cards(), deadline=5)) == {**ALL, "shape": "invalid"}
    assert len(jobs.started) == 1


def short(connection):
    connection.sendall((100).to_bytes(8, "big") + b"half of it")
    connection.close()


BREAKS = {
    "closes": lambda connection: connection.close(),
    "closes within a frame": short,
    "garbage": lambda connection: send_frame(connection, b"\xc1garbage"),
    "another type": lambda connection: send_frame(
        connection, msgspec.msgpack.encode({"type": "answer", "number": "x"})
    ),
    "oversize": lambda connection: connection.sendall((2**63).to_bytes(8, "big")),
}


@pytest.mark.parametrize("way", BREAKS)
def test_a_relay_that_breaks_off_ends_its_segment(start, jobs, way):
    """Whoever waits is told at once, and the next question begins another segment, whoever has been heard of since."""

    def breaking(connection, ask):
        if len(jobs.asked) == len(SITES):
            honest(connection, jobs.asked[0])
            BREAKS[way](connection)

    jobs.script = breaking
    engine = start()
    began = time.monotonic()
    replies = said(engine.ask(cards(), deadline=30))
    assert time.monotonic() - began < 5
    answered = jobs.asked[0].site
    assert replies == {site: site if site == answered else "gone" for site in SITES}
    assert engine.present == set()
    jobs.script = honest
    assert said(engine.ask(cards(), deadline=5)) == ALL
    assert [sites for _, sites in jobs.started] == [list(SITES)] * 2
    until(lambda: len(jobs.ended) == 1)


def test_the_largest_reply_that_a_site_may_send(start, jobs, monkeypatch):
    """The wrapping of an answer must not make it too long: one site could end every segment."""
    monkeypatch.setattr(module, "MAX_FRAME", 1000)
    jobs.script = lambda connection, ask: tell(connection, Answer(ask.number, b"\xc1" * 1000))
    engine = start()
    assert said(engine.ask(cards(), deadline=5)) == dict.fromkeys(SITES, "invalid")
    assert engine.present == set(SITES)


def drop(connection, sites):
    connection.close()


def answer_first(connection, sites):
    tell(connection, Answer(0, b""))


def babble(connection, sites):
    send_frame(connection, b"\xc1")


def too_long(connection, sites):
    connection.sendall(b"\xff" * 8)


def nothing(connection, sites):
    pass


@pytest.mark.parametrize("hello", [drop, answer_first, babble, too_long, nothing])
def test_a_relay_that_does_not_introduce_itself(start, jobs, hello):
    """Its connection is closed, and another job begins."""
    proper, tries = jobs.hello, itertools.count()

    def first_wrong(connection, sites):
        (hello if next(tries) == 0 else proper)(connection, sites)

    jobs.hello = first_wrong
    engine = start(wait=0.5)
    assert said(engine.ask(cards(), deadline=5)) == ALL
    assert len(jobs.started) == 2
    until(lambda: len(jobs.ended) == 1)


def test_a_job_that_begins_too_late_is_not_taken_for_the_next(start, jobs):
    """The first relay connects when the engine has given it up, with a job that lacks a site."""
    jobs.heard.pop("yes-no")
    jobs.delay = 0.6
    words = []
    engine = start(wait=0.3, poll=0.5, tell=words.append)

    def later():
        until(lambda: jobs.started)
        jobs.heard["yes-no"], jobs.delay = 2.0, 0.0

    thread = threading.Thread(target=later)
    thread.start()
    assert said(engine.ask(cards(), deadline=5)) == ALL
    thread.join()
    assert [sites for _, sites in jobs.started] == [["colour", "shape"], list(SITES)]
    until(lambda: jobs.ended == [["colour", "shape"]])
    assert words[-1] == "a segment with colour, shape, yes-no"


def test_a_server_that_cannot_be_reached_and_comes_back(start, jobs):
    jobs.down, words = True, []
    engine = start(tell=words.append)
    threading.Timer(0.5, lambda: setattr(jobs, "down", False)).start()
    assert said(engine.ask(cards(), deadline=5)) == ALL
    assert words == ["waiting for FLARE's server (refused)", "a segment with colour, shape, yes-no"]


def test_nobody_for_too_long(start, jobs):
    jobs.down = True
    engine = start(give_up=0.3)
    with pytest.raises(RunError, match=r"through FLARE for 0\.3 s; see that the server and the sites run"):
        engine.ask(cards(), deadline=5)
    jobs.down, jobs.heard = False, {}
    with pytest.raises(RunError):
        engine.ask(cards(), deadline=5)
    jobs.heard = dict.fromkeys(SITES, 1.0)  # nothing is broken for good
    assert said(engine.ask(cards(), deadline=5)) == ALL


def test_a_site_that_comes_later(start, jobs):
    """After `wait` the others begin without it; when it is there, the old segment ends and one with it begins."""
    del jobs.heard["shape"]
    words = []
    engine = start(wait=0.3, tell=words.append)
    began = time.monotonic()
    assert said(engine.ask(cards(), deadline=5)) == {**ALL, "shape": "gone"}
    assert 0.3 <= time.monotonic() - began < 3
    assert engine.traffic.counts["shape", "card"].bytes_to_site == 0
    jobs.heard["shape"] = 1.0
    until(lambda: engine._connected.get("shape"))
    engine._next_renewal = 0.0
    assert said(engine.ask(cards(), deadline=5)) == ALL
    assert [sites for _, sites in jobs.started] == [["colour", "yes-no"], list(SITES)]
    until(lambda: jobs.ended == [["colour", "yes-no"]])
    assert words == [
        "waiting for shape",
        "a segment with colour, yes-no",
        "shape came back; a new segment begins",
        "a segment with colour, shape, yes-no",
    ]


def without_shape(connection, ask):
    if ask.site != "shape":
        honest(connection, ask)


def late_shape(connection, ask):
    if ask.site == "shape":
        return tell(connection, Answer(ask.number, b"", "late"))
    honest(connection, ask)


def gone_shape(connection, ask):
    if ask.site == "shape":
        return tell(connection, Answer(ask.number, b"", "gone"))
    honest(connection, ask)


@pytest.mark.parametrize(
    "script, reason",
    [(without_shape, "late"), (late_shape, "late"), (gone_shape, "gone")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_site_is_given_up_after_two_misses(start, jobs, script, reason):
    """It is not asked a third time, costs no more time, and takes part again once it has been heard of since."""
    jobs.script = script
    engine = start()
    for _ in range(2):
        assert said(engine.ask(cards(), deadline=0.3)) == {**ALL, "shape": reason}
    began = time.monotonic()
    for _ in range(5):
        assert said(engine.ask(cards(), deadline=30)) == {**ALL, "shape": "gone"}
    assert time.monotonic() - began < 5
    assert [ask.site for ask in jobs.asked].count("shape") == 2 and len(jobs.started) == 1
    assert engine.present == {"colour", "yes-no"}
    assert engine.traffic.counts["shape", "card"].absences == 7
    jobs.script = honest
    jobs.heard["shape"] = 2.0
    until(lambda: engine._connected["shape"] == 2.0)
    engine._next_renewal = 0.0
    assert said(engine.ask(cards(), deadline=5)) == ALL
    assert len(jobs.started) == 2


def test_one_answer_forgives_a_miss(start, jobs):
    """Late, in time, late, in time: never two in a row."""
    turn = itertools.count()

    def every_other(connection, ask):
        tell(connection, Answer(ask.number, reply_to(ask), "" if next(turn) % 2 else "late"))

    jobs.script = every_other
    engine = start()
    found = [said(engine.ask(cards("shape"), deadline=5))["shape"] for _ in range(6)]
    assert found == ["late", "shape"] * 3 and len(jobs.started) == 1


def test_renewals_for_the_same_site_back_off(start, jobs, monkeypatch):
    """A site that FLARE hears of all the time and that never answers.

    It gets another segment at once the first time, and then after pauses of 0.2, 0.4, 0.8 s.
    """
    monkeypatch.setattr(module, "RETRY", (0.1, 0.8))
    jobs.script = gone_shape
    engine = start()
    end = time.monotonic() + 30
    while len(jobs.started) < 5 and time.monotonic() < end:
        jobs.heard["shape"] += 1.0
        assert said(engine.ask(cards(), deadline=5)) == {**ALL, "shape": "gone"}
    times = [began for began, _ in jobs.started]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(gap >= least - 0.01 for gap, least in zip(gaps, (0.0, 0.2, 0.4, 0.8), strict=True)), gaps
    assert sum(gaps) < 6
    jobs.script = honest
    until(lambda: (engine.ask(cards(), deadline=5), engine.present == set(SITES))[1])
    engine.ask(cards(), deadline=5)
    assert engine._pause == 0.1  # all is well, and the next who comes back need not wait


def test_close_while_an_answer_is_awaited(start, jobs):
    """The job ends, whoever waits is told, and nothing is left behind."""
    jobs.script = silent
    engine, got = start(), []
    thread = threading.Thread(target=lambda: got.append(said(engine.ask(cards(), deadline=60))))
    thread.start()
    until(lambda: len(jobs.asked) == len(SITES))
    before = time.monotonic()
    engine.close()
    thread.join(5)
    assert time.monotonic() - before < 2
    assert got == [dict.fromkeys(SITES, "gone")]
    until(lambda: jobs.ended == [list(SITES)])
    assert jobs.closed
    with pytest.raises(RunError):
        engine.ask(cards(), deadline=5)
    assert len(jobs.started) == 1


def test_close_while_a_segment_is_awaited(start, jobs):
    jobs.heard = {}
    engine, got = start(give_up=60), []

    def ask():
        with pytest.raises(RunError):
            engine.ask(cards(), deadline=5)
        got.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    engine.close()
    thread.join(5)
    assert got


@pytest.mark.parametrize("seconds", [1.0, 4.0])
def test_a_deadline_holds_whatever_the_relay_does(start, jobs, seconds):
    """Nothing comes back of one site: within a tenth of the deadline, and the others' answers are there."""
    jobs.script = without_shape
    engine = start()
    engine.ask(cards("colour"), deadline=5)
    began = time.monotonic()
    assert said(engine.ask(cards(), deadline=seconds)) == {**ALL, "shape": "late"}
    assert seconds <= time.monotonic() - began < 1.1 * seconds + 0.2  # for a busy machine


def test_a_deadline_holds_where_the_relay_reads_nothing(start, jobs):
    """A message that fills the socket's buffer is cut off, which ends the segment."""
    stop = threading.Event()
    engine = start()
    engine.ask(cards(), deadline=5)
    jobs.script = lambda connection, ask: stop.wait(30)
    request = UpdateRequest("u", "reward", 0, b"x" * 20_000_000, 0)
    engine.ask(cards("colour"), deadline=0.2)  # which keeps the relay busy
    began = time.monotonic()
    try:
        replies = engine.ask(dict.fromkeys(SITES, request), deadline=1.0)
        assert time.monotonic() - began < 2.0  # three messages of 20 MB are encoded besides
    finally:
        stop.set()
    assert all(isinstance(reply, Absence) for reply in replies.values())
    jobs.script = honest
    assert said(engine.ask(cards(), deadline=5)) == ALL


def test_where_all_sites_refuse_a_step_fails_and_says_why(start, jobs):
    """They are there and answer at once, with a refusal or with none of the questions: nobody is waited for."""

    def refusing(connection, ask):
        request = decode_request(ask.message)
        none = ScoreReply(request.id, [[] for _ in request.items], dict.fromkeys(range(1), Declined.BUDGET))
        tell(connection, Answer(ask.number, encode(Refusal(request.id, "refused") if ask.site == "shape" else none)))

    jobs.script = refusing
    pauses = []
    reward = FederatedReward(
        start(),
        lambda prompts, images, completions: torch.full((sum(map(len, completions)), 3), 1 / 3),
        mode="soft",
        waiting=Waiting(quorum=0.9, pause=pauses.append),
    )
    with (
        pytest.warns(DataWarning, match="(refused 1 of 1 questions|gave no answer)"),
        pytest.raises(QuorumError, match=r"0% of what was asked .* quorum of 90%.* refused all: colour, shape, yes-no"),
    ):
        reward([[{"role": "user", "content": "Which?"}]] * 2, ["a", "b"])
    assert pauses == [] and len(jobs.asked) == 3


def test_connections_that_wait_at_the_servers_socket_are_bounded(start, jobs, sockets):
    """Nobody accepts while no segment begins: some are held by the system, and no further one gets in."""
    engine, waiting = start(), []
    with pytest.raises((BlockingIOError, TimeoutError)):
        for _ in range(1000):
            waiting.append(connect(sockets / SERVER_SOCKET, timeout=0.2))
    assert len(waiting) <= frames.WAITING + 1
    assert said(engine.ask(cards())) == ALL  # they are cleared away where a segment begins
    for each in waiting:
        each.close()


def test_a_relays_first_word_is_short(start, jobs, monkeypatch):
    """One that announces 200 MB is let go before a byte is kept of it."""
    jobs.hello = lambda connection, sites: connection.sendall((200 * 10**6).to_bytes(8, "big"))
    with pytest.raises(RunError, match="no site could be reached"):
        start(give_up=0.5).ask(cards())


def test_questions_from_two_threads(start, jobs):
    """They take turns, and each gets its own answers."""
    engine, wrong = start(), []

    def ask(name):
        for n in range(50):
            replies = engine.ask({site: CardRequest(f"{name}-{n}-{site}") for site in SITES}, deadline=5)
            if {site: reply.id for site, reply in replies.items()} != {site: f"{name}-{n}-{site}" for site in SITES}:
                wrong.append(replies)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(jobs.started) == 1
    assert all(engine.traffic.counts[site, "card"].messages == 100 for site in SITES)


def test_one_run_at_a_time(start, jobs, sockets):
    start()
    with pytest.raises(RunError, match=r"another process listens on .*server\.sock"):
        FlareEngine(SITES, jobs, sockets)


def test_a_job_holds_no_code(start, jobs, monkeypatch):
    """Two JSON configurations and their list, which name four classes; what else lay there would be code."""
    found = {}
    submit = jobs.submit

    def look(job):
        found.update({str(p.relative_to(job)): p.read_text() for p in job.rglob("*") if p.is_file()})
        submit(job)

    monkeypatch.setattr(jobs, "submit", look)
    start().ask(cards(), deadline=5)
    assert sorted(found) == ["app/config/config_fed_client.json", "app/config/config_fed_server.json", "meta.json"]
    paths = {part.split('"')[1] for text in found.values() for part in text.split('"path": ')[1:]}
    assert paths == {*module.SERVER_CLASSES, *module.SITE_CLASSES}


def test_frames_up_to_the_limit(monkeypatch):
    """The engine reads what a relay may send: the longest message of a site, and its wrapping."""
    longest = len(encode_frame(Answer(2**63 - 1, b"", "late"))) + frames.MAX_FRAME + 4
    assert longest < frames.MAX_FRAME + module.WRAPPING


def test_a_request_that_is_too_long_for_any_site(start, monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAME", 1000)
    with pytest.raises(RunError, match=r"a request of 1,\d\d\d bytes, at most 1,000 cross at once; lower"):
        start().ask({"shape": UpdateRequest("u", "reward", 0, b"x" * 1000, 0)}, deadline=5)

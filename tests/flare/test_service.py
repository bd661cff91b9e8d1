"""A site's service, asked over its real socket: the answers, the ledger, and what never leaves (threats T17, T22)."""

import base64
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load

from accord.data.decoder import Decoder
from accord.errors import DataError, RunError
from accord.federation.answering import key_of, question_key, write_truth
from accord.federation.batches import Opening
from accord.federation.engine import Outbox, Traffic
from accord.federation.limits import Budget, Limits
from accord.federation.messages import (
    AnswerItem,
    AnswerReply,
    AnswerRequest,
    Card,
    CardRequest,
    Declined,
    MissingImages,
    Refusal,
    ScoreItem,
    ScoreRange,
    ScoreReply,
    ScoreRequest,
    UpdateReply,
    UpdateRequest,
    check_answers,
    decode_reply,
    encode,
    image_name,
    to_turns,
)
from accord.federation.site import Site
from accord.federation.weights import to_bytes
from accord.flare import service as module
from accord.flare.frames import connect, receive_frame, send_frame, site_socket
from accord.flare.kit import Kit
from accord.flare.ledger import Entry, read_ledger, read_running, site_log, status
from accord.flare.service import SiteService, join, open_site_folder
from accord.flare.site_cli import _sentence, _spent
from accord.pipeline import Job, train_site
from accord.recipe_file import dump_recipe, load_recipe
from accord.rewards.private import Privacy
from accord.rewards.spending import read_entries
from accord.routing.means import blank
from accord.routing.router import RouterNetwork
from accord.runs import Run, read_lines
from accord.stages.sites import open_federation, open_site, prompt_sums
from accord.types import vqa_prompt

COLOURS = ("red", "blue", "green", "yellow")

RECIPE = """
name = "consortium"
seed = 3
threads = 1
policy.checkpoint = "{llava}"
preferences = {{ rejected_per_question = 3, policy_samples = 1 }}
alignment = {{ steps = 1, group_size = 2, max_completion_length = 4 }}
router = {{ layers = 1, width = 8, heads = 2, rounds = 1, local_steps = 2, pairs_per_batch = 4, pairs_per_site = 8 }}

[[questions]]
kind = "folder"
path = "{data}"

[[sites]]
name = "colour"
checkpoint = "{siglip}"
question_types = ["colour"]
finetune = false
answers = true
owns = 0.5
reward_model.steps = 2
reward_model.prompts_per_batch = 2
reward_model.evaluate_every = 2

[[sites]]
name = "shape"
checkpoint = "{llava}"
question_types = ["shape"]
finetune = false
reward_model.steps = 2
reward_model.prompts_per_batch = 2
reward_model.evaluate_every = 2
"""


def write_questions(folder, square, *, splits, kinds):
    """Four questions of every split and type, each about a picture of its own size."""
    folder.mkdir(parents=True)
    lines = []
    for split in splits:
        for kind in kinds:
            for n, colour in enumerate(COLOURS):
                name = f"{split}-{kind}-{n}"
                size = (
                    32 + n,
                    32 + 10 * ["private", "public", "dev", "test"].index(split) + ["colour", "shape"].index(kind),
                )
                (folder / f"{name}.png").write_bytes(square(colour, size))
                row = {"id": name, "image": f"{name}.png", "question": "what colour is it?", "answer": colour}
                lines.append(json.dumps({**row, "question_type": kind, "split": split}) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def write_recipe(checkpoints):
    def write(path, data):
        llava, siglip = checkpoints["llava-clip-llama"], checkpoints["llava-siglip-qwen2"]
        path.write_text(RECIPE.format(llava=llava, siglip=siglip, data=data))
        return load_recipe(path)

    return write


def train(recipe, folder, name, alone):
    with (
        Run.create(folder, dump_recipe(recipe), seed=recipe.seed)
        if not folder.exists()
        else Run.resume(folder, dump_recipe(recipe)) as run
    ):
        job = Job(recipe, run, quiet=True, alone=alone)
        train_site(job, name)
        if "board" in vars(job):
            job.board.close()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, square, write_recipe):
    """The folder of a run with both sites, and one of site `colour` alone; all the data are at hand for both."""
    place = tmp_path_factory.mktemp("trained")
    data = write_questions(
        place / "shapes", square, splits=("private", "public", "dev", "test"), kinds=("colour", "shape")
    )
    recipe = write_recipe(place / "recipe.toml", data)
    for name in ("colour", "shape"):
        train(recipe, place / "run", name, "")
    return place / "run", train(recipe, place / "site", "colour", "colour")


@pytest.fixture(scope="module")
def site(trained):
    """As `join` opens it: images are decoded in a child."""
    with Decoder() as decoder:
        yield open_site_folder(trained[1], "colour", opening=Opening(decoder))


@pytest.fixture
def sockets():
    """A folder whose name is short, as the path of a socket must be."""
    with tempfile.TemporaryDirectory(prefix="accord-") as folder:
        yield Path(folder)


@pytest.fixture
def serve(tmp_path, sockets):
    """Return a function that starts a service of an answering function or a site."""
    started = []

    def start(site, **settings):
        if callable(site):
            answer, site = site, Site("colour", None)
            site.answer = answer
        service = SiteService(site, tmp_path, sockets / "colour.sock", **settings)
        service.__enter__()
        started.append(service)
        return service

    yield start
    for service in started:
        if not service._closing.is_set():
            service.__exit__(None, None, None)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(service, message):
    with connect(service.path, timeout=20) as connection:
        send_frame(connection, message if isinstance(message, bytes) else encode(message))
        return receive_frame(connection)


def score_request(square, name="s", colours=("red", "blue"), text="what colour is it?"):
    images = {image_name(square(colour)): square(colour) for colour in colours}
    return ScoreRequest(
        name, images, [ScoreItem([each], to_turns(vqa_prompt(text)), ["red", "blue"]) for each in images]
    )


def answer_request(square, name="a", colours=("red", "blue")):
    scored = score_request(square, colours=colours)
    return AnswerRequest(name, scored.images, [AnswerItem(item.images, item.prompt) for item in scored.items])


def echo(request):
    return ScoreReply(request.id, [[0.5] * len(item.candidates) for item in request.items])


def requests(square, job):
    weights = RouterNetwork(job.encoder.features, 2, job.recipe.router).to_bytes()
    scored = score_request(square)
    return [
        scored,
        msgspec.structs.replace(scored, judge="answer"),
        msgspec.structs.replace(scored, judge="answer", truth=True),
        answer_request(square),
        UpdateRequest("router-0-0-colour", "router", 0, weights, 77),
        UpdateRequest("router-0-1-colour", "router", 1, weights, 78),
        CardRequest("card"),
    ]


def test_the_answers_are_those_of_the_engine_in_one_process(trained, site, serve, square):
    """Bit by bit, of the same recipe and seed: each site trained in a process of its own, served over a socket."""
    run, _ = trained
    recipe = load_recipe(run / "recipe.toml")
    service = serve(site)
    with Run.resume(run, (run / "recipe.toml").read_text()) as open_run:
        job = Job(recipe, open_run, quiet=True)
        engine = open_federation(job, training=True)
        for request in requests(square, job):
            expected = engine.ask({"colour": request})["colour"]
            assert isinstance(expected, ScoreReply | AnswerReply | UpdateReply | Card)
            assert encode(expected) == ask(service, request)


def test_sums_of_prompts_leave_where_the_sites_own_recipe_says_so(trained, tmp_path, site, serve):
    """The same as in one process; another site refuses."""
    request = UpdateRequest("means-colour", "means", 0, to_bytes(blank(32)), 0)
    refusing = serve(site)
    assert isinstance(decode_reply(ask(refusing, request)), Refusal)
    refusing.__exit__(None, None, None)
    folder = shutil.copytree(trained[1], tmp_path / "agreeing")
    recipe = load_recipe(folder / "recipe.toml")
    first, second = recipe.sites
    (folder / "recipe.toml").write_text(dump_recipe(replace(recipe, sites=(replace(first, sums=True), second))))
    told = ask(serve(open_site_folder(folder, "colour")), request)
    assert told == encode(prompt_sums(Job(recipe, None, quiet=True, alone="colour"), "colour")(request))


def test_the_model_runs_with_as_many_threads_as_the_recipe_says(trained, serve):
    """In the thread that answers, not only in the one that loaded the model."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    opened, seen = open_site_folder(trained[1], "colour"), []
    inside = opened.answer
    opened.answer = lambda request: (seen.append(torch.get_num_threads()), inside(request))[1]
    ask(serve(opened), CardRequest("c"))
    torch.set_num_threads(before)
    assert seen == [1]


def test_a_site_with_only_its_private_questions(tmp_path, square, write_recipe, serve):
    """It trains, is opened, and trains the router, while the other site's and the server's data are elsewhere."""
    data = write_questions(tmp_path / "mine", square, splits=("private",), kinds=("colour",))
    recipe = write_recipe(tmp_path / "recipe.toml", data)
    folder = train(recipe, tmp_path / "site", "colour", "colour")
    service = serve(open_site_folder(folder, "colour"))
    weights = RouterNetwork(32, 2, recipe.router).to_bytes()
    reply = decode_reply(ask(service, UpdateRequest("r", "router", 0, weights, 1)))
    assert isinstance(reply, UpdateReply) and (reply.examples, reply.steps) == (8, 2)
    assert any(change.any() for change in load(reply.change).values())
    card = decode_reply(ask(service, CardRequest("c")))
    assert (card.questions, card.ranking) == (4, {})
    with pytest.raises(DataError, match="no question has the split 'public'"):
        _ = Job(recipe, None, quiet=True).questions


def test_a_share_is_the_same_alone_and_together(tmp_path, square, write_recipe):
    """Another site that wants the same questions gets its part of them, whether or not its own are there."""
    data = write_questions(
        tmp_path / "d", square, splits=("private", "public", "dev", "test"), kinds=("colour", "shape")
    )
    recipe = write_recipe(tmp_path / "recipe.toml", data)
    rival = replace(recipe.sites[0], name="rival")
    recipe = replace(recipe, sites=(*recipe.sites, rival), seed=1)
    together = Job(recipe, None, quiet=True).private
    for name in ("colour", "shape", "rival"):
        assert Job(recipe, None, quiet=True, alone=name).private[name] == together[name]
    assert 0 < len(together["colour"]) < 4 and len(together["colour"]) + len(together["rival"]) == 4


def test_a_folder_that_is_not_ready(trained, tmp_path):
    with pytest.raises(RunError, match=r"holds no run .*; make one with `accord site train"):
        open_site_folder(tmp_path, "colour")
    with pytest.raises(RunError, match="no finished reward model of site shape; make it with"):
        open_site_folder(trained[1], "shape")
    with pytest.raises(RunError, match="the recipe has no site 'nobody'; it has colour, shape"):
        open_site_folder(trained[1], "nobody")


def test_an_image_travels_once(site, serve, square):
    """The second request holds none; a third names one that nobody sent, and is asked for it. Two, none and one new."""
    service = serve(site)
    request = score_request(square)
    whole = ask(service, request)
    assert ask(service, ScoreRequest("s", {}, request.items)) == whole
    unknown = score_request(square, colours=("green",))
    asked = decode_reply(ask(service, ScoreRequest("s", {}, unknown.items)))
    assert asked == MissingImages("s", list(unknown.images))
    assert isinstance(decode_reply(ask(service, unknown)), ScoreReply)
    lines = read_lines(service.folder / "ledger.jsonl")
    assert [line["images"] for line in lines] == [2, 0, 0, 1]
    assert [line["outcome"] for line in lines] == ["answered", "answered", "missing images", "answered"]


def test_an_outbox_finds_what_it_knows(site, serve, square):
    """The server's half on the other end: of three requests about the same two pictures, the first one carries them."""
    service, traffic, outbox = serve(site), Traffic(), Outbox()
    for number in range(3):
        reply = outbox.exchange("colour", score_request(square, f"s{number}"), lambda data: ask(service, data), traffic)
        assert isinstance(reply, ScoreReply)
    lines = read_lines(service.folder / "ledger.jsonl")
    assert [line["images"] for line in lines] == [2, 0, 0]
    count = traffic.counts["colour", "score"]
    assert count.bytes_to_site == sum(line["bytes_in"] for line in lines)
    assert count.bytes_from_site == sum(line["bytes_out"] for line in lines)


def test_a_question_to_the_sites_own_model_is_written_down(site, serve, square):
    """Two questions, no candidates, and no new image: both came with the request for scores."""
    service = serve(site)
    ask(service, score_request(square))
    said = decode_reply(ask(service, answer_request(square)))
    assert check_answers(answer_request(square), said) == said.answers and len(said.answers) == 2
    lines = read_lines(service.folder / "ledger.jsonl")
    assert [(line["kind"], line["images"], line["questions"], line["candidates"]) for line in lines] == [
        ("score", 2, 2, 4),
        ("answer", 0, 2, 0),
    ]
    assert lines[1]["bytes_out"] == len(encode(said)) and lines[1]["outcome"] == "answered"
    assert _sentence(msgspec.convert(lines[1], Entry)).partition(": ")[2].startswith("answered; ")
    assert "answer a by its own model, 2 questions, 0 new images" in _sentence(msgspec.convert(lines[1], Entry))


def test_a_site_that_does_not_say_so_answers_no_question(trained, serve, square):
    """Its recipe's table has no `answers = true`; with a model of its own missing, it does not even start."""
    run, _ = trained
    service = serve(open_site(load_recipe(run / "recipe.toml"), run, "shape", scores=ScoreRange()))
    assert decode_reply(ask(service, answer_request(square))) == Refusal("a", "invalid")
    judged = msgspec.structs.replace(score_request(square), judge="answer")
    assert decode_reply(ask(service, judged)) == Refusal("s", "invalid")
    assert [line["outcome"] for line in read_lines(service.folder / "ledger.jsonl")] == ["invalid", "invalid"]


def test_an_answer_holds_no_planted_secret(trained, serve, square, tmp_path, caplog):
    """Of the site's reference answers not one byte leaves: what its model says, and whether a candidate is equal."""
    _, folder = trained
    shutil.copytree(folder, tmp_path / "planted")
    truth = tmp_path / "planted" / "sites" / "colour" / "truth.json"
    asked = answer_request(square)
    write_truth(
        truth, {key_of(i): ("Marple ward 7",) for i in asked.items} | {question_key([], vqa_prompt("x")): ("Ward 9",)}
    )
    service = serve(open_site_folder(tmp_path / "planted", "colour"))
    judged = msgspec.structs.replace(score_request(square), judge="answer", truth=True)
    left = [ask(service, each) for each in (asked, judged)]
    assert set(msgspec.msgpack.decode(left[0])) == {"type", "id", "answers"}
    assert decode_reply(left[1]).scores == [[0.0, 0.0], [0.0, 0.0]]
    everything = b"".join(left) + (service.folder / "ledger.jsonl").read_bytes() + caplog.text.encode()
    assert b"arple" not in everything and b"ard " not in everything


def test_rubbish_is_refused_and_the_others_are_answered(serve, square):
    service = serve(echo, limit=10_000, patience=0.5)
    assert decode_reply(ask(service, b"GET / HTTP/1.1\r\n\r\n")) == Refusal("", "invalid")
    stalled, oversize, torn = (connect(service.path, timeout=20) for _ in range(3))
    stalled.sendall(b"\0\0")
    oversize.sendall((10_001).to_bytes(8, "big"))
    torn.sendall((100).to_bytes(8, "big") + b"half of it")
    torn.close()
    assert isinstance(decode_reply(ask(service, score_request(square))), ScoreReply)
    for each in (stalled, oversize):
        assert each.recv(1) == b""  # dropped
        each.close()
    connect(service.path).close()  # somebody looks who listens: no event
    deadline = time.monotonic() + 5
    while len(lines := read_lines(service.folder / "ledger.jsonl")) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(line["outcome"] for line in lines) == ["answered", "dropped", "dropped", "dropped", "invalid"]
    assert isinstance(decode_reply(ask(service, score_request(square))), ScoreReply)


def test_requests_are_answered_one_at_a_time(serve, square):
    """Ten at once: never two in hand."""
    inside, most = [], []

    def answer(request):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return echo(request)

    service = serve(answer)
    threads = [threading.Thread(target=ask, args=(service, score_request(square, f"s{n}"))) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 10


def test_who_has_left_is_not_worked_for(serve, square):
    """The second asks while the first is in hand, and closes: its turn comes, and nothing is computed."""
    free, worked = threading.Event(), []

    def answer(request):
        worked.append(request.id)
        assert free.wait(10)
        return echo(request)

    service = serve(answer)
    first = threading.Thread(target=ask, args=(service, score_request(square, "first")))
    first.start()
    while not worked:
        time.sleep(0.01)
    with connect(service.path) as second:
        send_frame(second, encode(score_request(square, "second")))
    time.sleep(0.1)
    free.set()
    first.join()
    service.__exit__(None, None, None)
    assert worked == ["first"]
    outcomes = {
        line["id"]: (line["outcome"], line["bytes_out"]) for line in read_lines(service.folder / "ledger.jsonl")
    }
    assert outcomes["second"] == ("gone", 0) and outcomes["first"][0] == "answered"


def test_connections_are_bounded(serve, square, monkeypatch):
    """Three that say nothing are open: the fourth is closed at once. When one has gone, the next is answered."""
    monkeypatch.setattr(module, "CONNECTIONS", 3)
    service = serve(echo)
    idle = [connect(service.path, timeout=5) for _ in range(3)]
    until(lambda: len(service._reading) == 3)
    for _ in range(5):
        with connect(service.path, timeout=5) as further:
            assert further.recv(1) == b""
    assert len(service._reading) == 3
    idle.pop().close()
    until(lambda: len(service._reading) == 2)
    assert isinstance(decode_reply(ask(service, score_request(square))), ScoreReply)
    for each in idle:
        each.close()


def test_requests_that_wait_are_bounded_by_their_bytes(serve, square, monkeypatch):
    """One is in hand and one waits; a third would be more than is held, and is dropped before it comes."""
    free, begun = threading.Event(), threading.Event()

    def answer(request):
        begun.set()
        assert free.wait(10)
        return echo(request)

    message = encode(score_request(square))
    monkeypatch.setattr(module, "HELD", 2 * len(message))
    service, replies = serve(answer), []
    asking = [threading.Thread(target=lambda: replies.append(ask(service, message))) for _ in range(2)]
    for thread in asking:
        thread.start()
    until(lambda: begun.is_set() and len(service._held) == 2)
    with connect(service.path, timeout=5) as third:
        third.sendall(len(message).to_bytes(8, "big"))
        assert third.recv(1) == b""
    assert sum(service._held.values()) == 2 * len(message)
    free.set()
    for thread in asking:
        thread.join()
    assert len(replies) == 2
    until(lambda: not service._held)
    assert isinstance(decode_reply(ask(service, message)), ScoreReply)


def test_a_request_that_trickles_is_dropped_when_its_time_is_over(serve):
    """A byte every 50 ms never lets a single wait pass 300 ms; the whole must come in that time."""
    service = serve(echo, patience=0.3)
    start = time.monotonic()
    with connect(service.path, timeout=5) as slow:
        slow.sendall((100).to_bytes(8, "big"))
        with contextlib.suppress(OSError):
            for _ in range(100):
                slow.sendall(b"x")
                time.sleep(0.05)
    assert time.monotonic() - start < 3
    until(lambda: not service._reading)


def test_closing_finishes_the_request_in_hand(serve, square):
    """The one in hand is answered, a connection that has said nothing is dropped at once, the socket is gone."""
    begun, replies = threading.Event(), []

    def answer(request):
        begun.set()
        time.sleep(0.4)
        return echo(request)

    service = serve(answer)
    idle = connect(service.path, timeout=5)
    asking = threading.Thread(target=lambda: replies.append(ask(service, score_request(square))))
    asking.start()
    assert begun.wait(5)
    start = time.monotonic()
    service.__exit__(None, None, None)
    asking.join()
    assert isinstance(decode_reply(replies[0]), ScoreReply)
    assert time.monotonic() - start < 5 and idle.recv(1) == b"" and not service.path.exists()
    idle.close()
    with pytest.raises(OSError):
        connect(service.path)


def test_nothing_is_answered_that_is_not_written_down(serve, square, caplog):
    service = serve(echo)
    (service.folder / "ledger.jsonl").mkdir()
    with caplog.at_level(logging.CRITICAL, "accord"):
        assert decode_reply(ask(service, score_request(square, "s"))) == Refusal("s", "error")


def test_a_line_that_a_crash_left_is_cut(serve, square, tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"time": "2026-11-21T20:')
    ask(serve(echo), score_request(square))
    (line,) = read_lines(tmp_path / "ledger.jsonl")
    assert line["kind"] == "score"


def test_a_limit_refuses_the_question_and_a_budget_too(serve, square, site):
    """Two candidates a question: five queries are two questions, and one is left; the status tells."""
    service = serve(site, limits=Limits(characters=100), budget=Budget(per_run=5, per_image=3))
    long = score_request(square, colours=("red",), text="x" * 100)
    assert decode_reply(ask(service, long)) == ScoreReply("s", [[]], {0: Declined.LIMIT})
    first = decode_reply(ask(service, score_request(square, colours=("red", "blue", "green"))))
    assert [len(group) for group in first.scores] == [2, 2, 0] and first.refused == {2: Declined.BUDGET}
    again = decode_reply(ask(service, answer_request(square, colours=("red", "blue"))))
    assert again.refused == {1: Declined.BUDGET} and len(again.answers) == 2
    lines = read_lines(service.folder / "ledger.jsonl")
    assert [(line["queries"], line["refused"]) for line in lines] == [(0, 1), (4, 1), (1, 1)]
    assert lines[1]["by_image"] == {image_name(square(colour))[:16]: 2 for colour in ("red", "blue")}
    (service.folder / "recipe.toml").write_text("")
    module.Running("colour", 1, "", str(service.path), budget=service.spent.budget).write(service.folder)
    found = status(service.folder)
    assert (found.spent.run, found.queries_today, found.refused) == (5, 5, 3)
    assert _spent(found) == "5 of 5, today 5, about one image at most 3 of 3"
    assert ", 1 refused: answered" in _sentence(found.last)


def test_a_budget_survives_a_restart(serve, square):
    """Four of six are spent; the next service knows it, and the day's budget begins anew where the lines are old."""
    first = serve(echo_site(), budget=Budget(per_run=6))
    ask(first, score_request(square))
    first.__exit__(None, None, None)
    second = serve(echo_site(), budget=Budget(per_run=6))
    assert decode_reply(ask(second, score_request(square, "t"))).refused == {1: Declined.BUDGET}
    second.__exit__(None, None, None)
    ledger = second.folder / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"time": "20', '"time": "19'))
    third = serve(echo_site(), budget=Budget(per_day=3))
    assert third.spent.run == 6 and decode_reply(ask(third, score_request(square, "u"))).refused == {1: Declined.BUDGET}


def echo_site():
    """A site that scores every candidate by one half, and keeps to what its service refuses."""

    class Half:
        rows_at_once = 512

        def score(self, prompts, images, completions):
            return [torch.full((len(group),), 0.5) for group in completions]

    return Site("colour", Half())


def test_requests_that_come_too_fast(serve, square):
    """Two a minute: of the third every question is refused, and a card is."""
    service = serve(echo_site(), limits=Limits(requests_per_minute=2))
    for name in ("a", "b"):
        assert decode_reply(ask(service, score_request(square, name))).refused == {}
    refused = {0: Declined.LIMIT, 1: Declined.LIMIT}
    assert decode_reply(ask(service, score_request(square, "c"))) == ScoreReply("c", [[], []], refused)
    assert decode_reply(ask(service, CardRequest("d"))) == Refusal("d", "refused")


def test_a_request_with_too_much_text_is_not_read(serve, square):
    service = serve(echo_site(), limits=Limits(message_text=2000))
    long = score_request(square, text="x" * 2000)
    assert decode_reply(ask(service, long)) == Refusal("", "invalid")
    images = {**score_request(square).images, "0" * 64: b"x" * 5000}
    many = msgspec.structs.replace(score_request(square), images=images)
    assert decode_reply(ask(service, many)) == Refusal("s", "invalid")  # read, and one image is not what its name says
    assert decode_reply(ask(service, score_request(square))).refused == {}


def test_a_budget_holds_to_the_unit_when_many_ask_at_once(serve, square):
    """T21: eight threads ask 160 questions of one candidate; 100 queries are answered, not one more or less."""
    service, answered = serve(echo_site(), budget=Budget(per_day=100)), []
    whole = score_request(square)
    one = [msgspec.structs.replace(item, candidates=["red"]) for item in whole.items]

    def drive(n):
        for m in range(10):
            reply = decode_reply(ask(service, msgspec.structs.replace(whole, id=f"{n}-{m}", items=one)))
            answered.append(sum(map(len, reply.scores)))

    threads = [threading.Thread(target=drive, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = read_lines(service.folder / "ledger.jsonl")
    assert sum(answered) == sum(line["queries"] for line in lines) == service.spent.run == 100
    assert sum(line["refused"] for line in lines) == 60


SERVE = """
import sys, threading
from pathlib import Path
import torch
from accord.federation.limits import Budget
from accord.federation.site import Site
from accord.flare.service import SiteService

class Half:
    rows_at_once = 512
    def score(self, prompts, images, completions):
        return [torch.full((len(group),), 0.5) for group in completions]

with SiteService(Site("colour", Half()), Path(sys.argv[1]), Path(sys.argv[2]), budget=Budget(per_run=int(sys.argv[3]))):
    print("ready", flush=True)
    threading.Event().wait()
"""


@pytest.mark.slow
def test_a_budget_holds_when_the_service_is_killed(square, tmp_path, sockets):
    """Four times killed -9 while it answers: what came back is never more than the ledger says, and that than 200."""
    whole = score_request(square, colours=("red",))
    one = [ScoreItem([], whole.items[0].prompt, ["red"])]
    came, path = [], sockets / "colour.sock"
    for death in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(tmp_path), str(path), "200"], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        killer = threading.Timer(0.3, process.kill)
        if death < 4:
            killer.start()
        with contextlib.suppress(OSError, EOFError):
            for n in range(300):
                with connect(path, timeout=20) as connection:
                    send_frame(connection, encode(ScoreRequest(f"{death}-{n}", {}, one)))
                    came.append(sum(map(len, decode_reply(receive_frame(connection)).scores)))
        killer.cancel()
        process.kill()
        process.communicate()
        spent = sum(entry.queries for entry in read_ledger(tmp_path))
        assert sum(came) <= spent <= 200
    assert spent == 200 and sum(came) >= 200 - 4


HOSTILE = ("\r\n", "\x1b[31m", "\u202e", "\0", '}{"level"', "\u2028", "\x7f", "\x9b2J", "\ud7ff\ufeff")


def test_hostile_prompts_forge_no_line(serve, square, tmp_path):
    """T17: as many lines as requests, every one parses, no raw control byte, and no text of a prompt.

    Ids and prompts hold what is hostile, one of them a megabyte of it; every tenth request fails with its prompt in the
    error's text.
    """

    def answer(request):
        if int(request.id.split("-")[1]) % 10 == 0:
            raise ValueError(request.items[0].prompt[0].content[1].text)
        return echo(request)

    with site_log(tmp_path):
        service = serve(answer)
        for n in range(1000):
            text = f"patient{n} {HOSTILE[n % len(HOSTILE)]} " * (40_000 if n == 500 else 3)
            reply = decode_reply(ask(service, score_request(square, f"score-{n}-{HOSTILE[n % 9]}", text=text)))
            assert isinstance(reply, Refusal if n % 10 == 0 else ScoreReply)
    ledger = (tmp_path / "ledger.jsonl").read_bytes()
    log = (tmp_path / "site.log").read_bytes()
    for written, lines in ((ledger, 1000), (log, 100)):
        assert written.count(b"\n") == lines == len([json.loads(line) for line in written.splitlines()])
        assert not any((byte < 32 and byte != 10) or byte >= 127 for byte in written)
    assert b"patient" not in ledger and all(len(line) < 400 for line in ledger.splitlines())
    assert all(entry["id"].startswith(f"score-{n}-") for n, entry in enumerate(read_lines(tmp_path / "ledger.jsonl")))
    assert {json.loads(line)["level"] for line in log.splitlines()} == {"ERROR"}
    assert max(map(len, log.splitlines())) < 200_000  # of the megabyte, its end
    assert (tmp_path / "site.log").stat().st_mode & 0o077 == 0


def test_prompts_are_not_logged_where_all_is_well(site, serve, square, tmp_path):
    with site_log(tmp_path):
        service = serve(site)
        ask(service, score_request(square, text="is patient Marple in it?"))
        ask(service, b"is patient Marple in it?")
    assert b"Marple" not in (tmp_path / "site.log").read_bytes() + (tmp_path / "ledger.jsonl").read_bytes()


def planted(tmp_path, square, write_recipe):
    """A site with 200 pairs and 5 secrets in each: prompt, both answers, the image's file, an annotator's note."""
    data = write_questions(
        tmp_path / "shapes", square, splits=("private", "public", "dev", "test"), kinds=("colour", "shape")
    )
    recipe = write_recipe(tmp_path / "recipe.toml", data)
    secrets = [
        f"{word}{n:03}q{(n * 7919) % 997:03}" for n in range(200) for word in ("Ward", "Yes", "No", "File", "Note")
    ]
    lines = []
    for n in range(200):
        ward, yes, no, file, note = secrets[5 * n : 5 * n + 5]
        (tmp_path / f"{file}.png").write_bytes(square("white", (40, 70 + n)))
        pair = {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ward}]}],
            "chosen": [{"role": "assistant", "content": yes}],
            "rejected": [{"role": "assistant", "content": no}],
            "images": [f"{file}.png"],
            "note": note,
        }
        lines.append(json.dumps(pair) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    mine = replace(recipe.sites[0], preferences=str(tmp_path / "pairs.jsonl"))
    recipe = replace(recipe, sites=(mine, recipe.sites[1]))
    assert len(set(secrets)) == 1000
    return secrets, train(recipe, tmp_path / "site", "colour", "colour")


def disguises(secret):
    """The secret's bytes in plain, UTF-16, hexadecimal digits, and base64 wherever in three bytes it begins."""
    raw = secret.encode()
    yield from (raw, secret.encode("utf-16-le"), secret.encode("utf-16-be"), raw.hex().encode())
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + raw + b"\0" * (-(shift + len(raw)) % 3))
        yield coded[(0, 2, 3)[shift] : len(coded) - 4]


def test_no_planted_secret_leaves(tmp_path, square, write_recipe, serve, monkeypatch):
    """T22 in short: a thousand secrets in prompts, answers, file names and notes; every byte that leaves is kept.

    The failing requests fail with a secret in their error's text: in the model, in an image that is gone.
    """
    secrets, folder = planted(tmp_path, square, write_recipe)
    site = open_site_folder(folder, "colour")
    log = tmp_path / "log"
    log.mkdir()
    with site_log(log):
        service = serve(site)
        weights = RouterNetwork(32, 2, load_recipe(folder / "recipe.toml").router).to_bytes()
        router = UpdateRequest("r", "router", 0, weights, 5)
        score = site.reward_model.score

        def failing(*_):
            raise ValueError(f"cannot score {secrets[0]} of {secrets[3]}")

        hidden = tmp_path / f"{secrets[3]}.png"
        left = []
        (tmp_path / "gone").mkdir()
        for path in tmp_path.glob("File*.png"):
            path.rename(tmp_path / "gone" / path.name)
        left.append(ask(service, router))  # its images are not there
        for path in (tmp_path / "gone").glob("*.png"):
            path.rename(tmp_path / path.name)
        assert hidden.is_file()
        monkeypatch.setattr(site.reward_model, "score", failing)
        left.append(ask(service, score_request(square)))
        monkeypatch.setattr(site.reward_model, "score", score)
        bad = ScoreRequest("b", {image_name(b"GIF89a"): b"GIF89a"}, [ScoreItem([image_name(b"GIF89a")], [], ["x"])])
        left += [ask(service, message) for message in (UpdateRequest("u", "reward", 0, b"", 0), b"rubbish")]
        assert all(isinstance(decode_reply(reply), Refusal) for reply in left)
        left.append(ask(service, bad))
        assert decode_reply(left[-1]) == ScoreReply("b", [[]], {0: Declined.IMAGE})
        whole = score_request(square)
        left += [ask(service, message) for message in (whole, router, CardRequest("c"))]
        left.append(ask(service, ScoreRequest("m", {}, score_request(square, colours=("pink",)).items)))
    kinds = [type(decode_reply(reply)) for reply in left]
    assert kinds[5:] == [ScoreReply, UpdateReply, Card, MissingImages]
    assert len(left[5]) < 64 + 9 * 4  # four scores
    everything = b"".join(left)
    ledger = (service.folder / "ledger.jsonl").read_bytes()
    assert ledger.count(b"\n") == len(left) == 9
    for secret in secrets:
        for disguise in disguises(secret):
            assert disguise not in everything and disguise not in ledger
    found = (log / "site.log").read_bytes()
    assert secrets[0].encode() in found  # the search can find one: here the errors' texts stay


def test_the_status_adds_up(serve, square, tmp_path, trained):
    """Two score requests about two pictures and then none new, a card, rubbish; then it ends."""
    (tmp_path / "recipe.toml").write_text("")
    service = serve(lambda r: Card(r.id, "Llava", 1, 2, 3, True, {}) if isinstance(r, CardRequest) else echo(r))
    before = status(tmp_path)
    assert (before.running, before.requests, before.last) == (False, {}, None)
    module.Running("colour", 1, "2026-11-21T20:00:00Z", str(service.path)).write(tmp_path)
    messages = [encode(score_request(square)), encode(score_request(square)), encode(CardRequest("c")), b"x" * 9]
    out = sum(len(ask(service, message)) for message in messages)
    found = status(tmp_path)
    assert found.running and (found.name, found.since) == ("colour", "2026-11-21T20:00:00Z")
    assert found.requests == {"score": 2, "card": 1, "unreadable": 1}
    assert found.outcomes == {"answered": 3, "invalid": 1} and found.failed == 1
    assert (found.images, found.bytes_in, found.bytes_out) == (2, sum(map(len, messages)), out)
    assert (found.bytes_in_today, found.bytes_out_today) == (found.bytes_in, found.bytes_out)
    assert found.last.outcome == "invalid"
    service.__exit__(None, None, None)
    old = (tmp_path / "ledger.jsonl").read_text().replace('"time": "20', '"time": "19')
    (tmp_path / "ledger.jsonl").write_text(old)
    found = status(tmp_path)
    assert not found.running and found.bytes_in == sum(map(len, messages)) and found.bytes_in_today == 0
    with pytest.raises(RunError, match="is no site's folder"):
        status(tmp_path / "nowhere")


FLARE = """
import subprocess, sys, time
from pathlib import Path
starts = Path({starts!r})
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
print("said by FLARE", flush=True)
if len(starts.read_text()) == 1:
    sys.exit(7)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
Path({child!r}).write_text(str(child.pid))
time.sleep(600)
"""


@pytest.fixture
def joined(trained, tmp_path, sockets, monkeypatch):
    """A kit whose FLARE client ends at once the first time, and later starts a child in a session of its own."""
    kit = Kit(tmp_path, "site", "colour", "consortium", "localhost", 8002)
    script = FLARE.format(starts=str(tmp_path / "starts"), child=str(tmp_path / "child"))
    monkeypatch.setattr("accord.flare.kit.kit_of", lambda _: kit)
    monkeypatch.setattr("accord.flare.kit.check_certificate", lambda _: None)
    monkeypatch.setattr("accord.flare.kit.start_command", lambda _: [sys.executable, "-c", script])
    monkeypatch.setattr("accord.flare.kit.start_environment", lambda _: dict(os.environ))
    monkeypatch.setattr("accord.flare.service.socket_folder", lambda _: sockets)
    monkeypatch.setattr("accord.flare.client.PAUSES", (0.05, 1.0))
    return kit


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_join_and_leave(joined, trained, sockets, square, monkeypatch):
    """FLARE's client is started again after it ended; SIGINT lets the request in hand be answered, then all end."""
    folder, begun, replies, told = trained[1], threading.Event(), [], []

    def slow(request):
        begun.set()
        time.sleep(0.5)
        return echo(request)

    def open_slow(*_, **__):
        site = Site("colour", None)
        site.answer = slow
        return site

    monkeypatch.setattr(module, "open_site_folder", open_slow)
    child = joined.path / "child"

    def drive():
        wait(lambda: child.exists() and child.read_text())
        assert status(folder).running
        with pytest.raises(RunError, match=r"in use|another"):
            join(joined.path, folder)
        with connect(site_socket(sockets, "colour")) as connection:
            send_frame(connection, encode(score_request(square)))
            assert begun.wait(5)
            os.kill(os.getpid(), signal.SIGINT)
            replies.append(receive_frame(connection))

    driver = threading.Thread(target=drive)
    driver.start()
    before = signal.getsignal(signal.SIGINT)
    join(joined.path, folder, on_flare=told.append)
    driver.join()
    assert isinstance(decode_reply(replies[0]), ScoreReply)
    assert told == ["running", "ended with status 7, again in 0 s", "running"]
    assert "said by FLARE" in (joined.path / "flare.log").read_text()
    assert not psutil.pid_exists(int(child.read_text())) and not site_socket(sockets, "colour").exists()
    assert signal.getsignal(signal.SIGINT) is before and logging.getLogger("accord").propagate
    found = status(folder)
    assert not found.running and found.outcomes["answered"] == 1 and read_running(folder).flare is None


def test_a_site_leaves_when_its_certificate_has_ended(joined, trained, monkeypatch):
    """It is looked at before the model is opened, and whenever FLARE's client is started: here the second time."""
    looks = []

    def check(_):
        looks.append(True)
        if len(looks) == 3:
            raise RunError("client.crt expired on 2027-11-16; ask the consortium's lead for a new kit")

    monkeypatch.setattr("accord.flare.kit.check_certificate", check)
    told = []
    with pytest.raises(RunError, match="expired on 2027-11-16"):
        join(joined.path, trained[1], on_flare=told.append)
    assert told == ["running", "ended with status 7, again in 0 s"] and not status(trained[1]).running


def test_what_a_killed_service_left_is_ended(joined, trained, sockets):
    """Its FLARE client goes on alone; the next start ends it, but no process that only got its number."""
    stop = threading.Event()
    stop.set()
    left, other = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    try:
        for process, late in ((left, 0), (other, 1000)):
            began = psutil.Process(process.pid).create_time()
            module.Running("colour", 1, "", "", (process.pid, began - late)).write(trained[1])
            join(joined.path, trained[1], stop=stop)
        assert left.poll() is not None and other.poll() is None
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


def test_a_kit_that_is_not_this_sites(joined, trained, monkeypatch):
    with pytest.raises(RunError, match="is the kit of site colour, and the server asks no site shape"):
        join(joined.path, trained[1], "shape")
    monkeypatch.setattr("accord.flare.kit.kit_of", lambda _: replace(joined, role="server"))
    with pytest.raises(RunError, match="is the kit of the consortium's server; pass the one"):
        join(joined.path, trained[1])


def test_steps_of_a_router_are_paid_from_the_site_s_own_ledger(tmp_path, square, write_recipe, serve):
    """T18: over the socket, too, one round of two steps is answered whenever it is asked for, and no other one."""
    pytest.importorskip("dp_accounting")
    data = write_questions(tmp_path / "shapes", square, splits=("private",), kinds=("colour",))
    recipe = write_recipe(tmp_path / "recipe.toml", data)
    privacy = Privacy(steps=5, dimensions=4, router=0.3)
    private = replace(recipe.sites[0], privacy=privacy, answers=False, owns=0.0)
    folder = train(replace(recipe, sites=(private, recipe.sites[1])), tmp_path / "site", "colour", "colour")
    weights = RouterNetwork(32, 2, recipe.router).to_bytes()
    service = serve(open_site_folder(folder, "colour"))
    paid, another = (UpdateRequest("r", "router", 0, weights, seed) for seed in (5, 6))
    first = decode_reply(ask(service, paid))
    assert isinstance(first, UpdateReply) and first.loss == 0
    assert decode_reply(ask(service, another)) == Refusal("r", "error")
    assert decode_reply(ask(service, paid)) == open_site_folder(folder, "colour").answer(paid) == first
    (entry,) = read_entries(folder / "privacy" / "colour.json")
    assert entry.mechanisms[-1].releases == 2 and entry.router_taken == 2

import logging
import time

import pytest

from accord.errors import ReplyError
from accord.federation.engine import Count, InProcessEngine, kind_of
from accord.federation.messages import (
    Absence,
    AnswerItem,
    AnswerReply,
    AnswerRequest,
    Card,
    CardRequest,
    Refusal,
    ScoreReply,
    ScoreRequest,
    UpdateReply,
    UpdateRequest,
    encode,
    image_name,
)

SECRET = "patient 4711"


def echo(request):
    """Answer any request with the smallest reply of its kind."""
    if isinstance(request, ScoreRequest):
        return ScoreReply(request.id, [[1.0] * len(item.candidates) for item in request.items])
    if isinstance(request, AnswerRequest):
        return AnswerReply(request.id, ["left"] * len(request.items))
    if isinstance(request, UpdateRequest):
        return UpdateReply(request.id, request.weights, 1, 0.5)
    return Card(request.id, "Llava", 1, 2, 3, True, {})


def failing(request):
    raise RuntimeError(f"cannot open the file of {SECRET}")


REQUESTS = [
    ScoreRequest("s", {image_name(b"png"): b"png"}, []),
    UpdateRequest("r", "router", 0, b"w" * 100, 1),
    CardRequest("c"),
    AnswerRequest("a", {image_name(b"png"): b"png"}, [AnswerItem([], [])]),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_bytes_are_those_of_the_encodings(request_):
    """An image travels once: the second score request is shorter by its name, its bytes and their headers."""
    engine = InProcessEngine({"colour": echo, "shape": echo})
    replies = engine.ask({"colour": request_})
    assert replies == {"colour": echo(request_)}
    assert engine.ask({"colour": request_, "shape": request_}) == dict.fromkeys(("colour", "shape"), echo(request_))
    sent, returned = len(encode(request_)), len(encode(echo(request_)))
    again = sent - (2 + 64 + 2 + 3 if isinstance(request_, ScoreRequest | AnswerRequest) else 0)
    kind = kind_of(request_)
    assert dict(engine.traffic.counts) == {
        ("colour", kind): Count(2, sent + again, 2 * returned, 0),
        ("shape", kind): Count(1, sent, returned, 0),
    }


def test_sites_keep_their_order():
    assert InProcessEngine({"b": echo, "a": echo}).sites == ("b", "a")


def test_what_a_site_sees_has_crossed_the_wire():
    """It gets an equal message, never the server's own object."""
    seen = []
    engine = InProcessEngine({"colour": lambda request: seen.append(request) or echo(request)})
    engine.ask({"colour": REQUESTS[0]})
    assert seen == [REQUESTS[0]] and seen[0] is not REQUESTS[0] and seen[0].images is not REQUESTS[0].images


def test_an_error_stays_at_the_site(caplog):
    """The log is the site's own; the reply holds a word of ours."""
    engine = InProcessEngine({"colour": failing, "shape": echo})
    with caplog.at_level(logging.ERROR):
        replies = engine.ask({"colour": REQUESTS[2], "shape": REQUESTS[2]})
    assert replies == {"colour": Absence("colour", "error"), "shape": echo(REQUESTS[2])}
    assert SECRET not in repr(replies)
    assert SECRET in caplog.text
    count = engine.traffic.counts["colour", "card"]
    assert (count.messages, count.bytes_from_site, count.absences) == (1, len(encode(Refusal("c", "error"))), 1)


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), RecursionError(), AssertionError(SECRET)])
def test_whatever_a_site_raises_is_an_absence(error, caplog):
    def handler(request):
        raise error

    assert InProcessEngine({"colour": handler}).ask({"colour": REQUESTS[2]}) == {"colour": Absence("colour", "error")}


def test_an_interrupt_is_no_absence():
    def handler(request):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InProcessEngine({"colour": handler}).ask({"colour": REQUESTS[2]})


def test_a_refusal_and_an_unreadable_reply_are_invalid():
    def refusing(request):
        raise ReplyError(f"no router for {SECRET}")

    engine = InProcessEngine({"colour": refusing, "shape": lambda request: ScoreReply("s", [["not a number"]])})
    replies = engine.ask({"colour": REQUESTS[1], "shape": REQUESTS[0]})
    assert replies == {"colour": Absence("colour", "invalid"), "shape": Absence("shape", "invalid")}


@pytest.mark.parametrize("returned", [None, b"bytes", {"a": 1}, CardRequest("c"), object()])
def test_a_reply_outside_the_closed_set_is_an_absence(returned, caplog):
    replies = InProcessEngine({"colour": lambda request: returned}).ask({"colour": REQUESTS[2]})
    assert isinstance(replies["colour"], Absence)


def test_a_late_reply_is_not_used():
    """0.05 s of work against a deadline of 0.01 s; without a deadline, or with a later one, it counts."""

    def slow(request):
        time.sleep(0.05)
        return echo(request)

    engine = InProcessEngine({"colour": slow, "shape": echo})
    requests = dict.fromkeys(("colour", "shape"), REQUESTS[2])
    assert engine.ask(requests, deadline=0.01) == {"colour": Absence("colour", "late"), "shape": echo(REQUESTS[2])}
    assert engine.traffic.counts["colour", "card"].bytes_from_site == len(encode(echo(REQUESTS[2])))
    assert engine.ask(requests, deadline=60)["colour"] == engine.ask(requests)["colour"] == echo(REQUESTS[2])


def test_a_site_that_does_not_exist_is_an_absence(caplog):
    engine = InProcessEngine({"colour": echo})
    assert engine.ask({"sound": REQUESTS[2]}) == {"sound": Absence("sound", "gone")}

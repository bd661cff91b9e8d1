import logging

import pytest

from accord.federation.endpoint import Endpoint, ImageCache, image_library
from accord.federation.engine import ASK_FIRST, Outbox, Traffic
from accord.federation.messages import (
    Absence,
    AnswerItem,
    AnswerReply,
    AnswerRequest,
    CardRequest,
    MissingImages,
    Refusal,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    decode_reply,
    encode,
    image_name,
)

RED, BLUE = b"red picture", b"blue picture!"


def ask(*images, sent=None, name="s"):
    items = [ScoreItem([image_name(image)], [], ["x"]) for image in images]
    return ScoreRequest(name, {image_name(image): image for image in (images if sent is None else sent)}, items)


class Judge:
    """Score an item by the length of its image, and remember what was asked."""

    def __init__(self):
        self.seen = []

    def __call__(self, request):
        self.seen.append(request)
        return ScoreReply(request.id, [[float(len(request.images[item.images[0]]))] for item in request.items])


def test_an_image_that_was_kept_need_not_come_again():
    judge = Judge()
    endpoint = Endpoint("colour", judge)
    assert decode_reply(endpoint(encode(ask(RED)))) == ScoreReply("s", [[11.0]])
    assert decode_reply(endpoint(encode(ask(RED, BLUE, sent=[BLUE])))) == ScoreReply("s", [[11.0], [13.0]])
    assert judge.seen[1].images == {image_name(RED): RED, image_name(BLUE): BLUE}


def question(*images, name="a"):
    """A question about each image, and one about none."""
    items = [*(AnswerItem([image_name(image)], []) for image in images), AnswerItem([], [])]
    return AnswerRequest(name, {image_name(image): image for image in images}, items)


def test_an_image_is_sent_once_for_scores_and_answers():
    """11 bytes with the first request, none with the other two; what the site sees has them all."""
    seen = []

    def answer(request):
        seen.append(dict(request.images))
        if isinstance(request, AnswerRequest):
            return AnswerReply(request.id, ["red"] * len(request.items))
        return ScoreReply(request.id, [[0.0]] * len(request.items))

    endpoint, sent, traffic, outbox = Endpoint("colour", answer), [], Traffic(), Outbox()

    def send(data):
        sent.append(RED in data)
        return endpoint(data)

    for request in (question(RED), ask(RED), question(RED, name="again")):
        assert not isinstance(outbox.exchange("colour", request, send, traffic), Absence)
    assert sent == [True, False, False]
    assert seen == [{image_name(RED): RED}] * 3
    assert {kind: count.messages for (_, kind), count in traffic.counts.items()} == {"answer": 2, "score": 1}


def test_a_question_about_an_image_that_is_gone_brings_it_again():
    """The site was started anew: it asks for the image, and gets it. One without an image needs none."""
    said = AnswerReply("a", ["red", "4"])
    outbox, traffic = Outbox(), Traffic()
    outbox.exchange("colour", question(RED), Endpoint("colour", lambda _: said), traffic)
    anew = Endpoint("colour", lambda _: said)
    assert outbox.exchange("colour", question(RED), anew, traffic) == said
    assert traffic.counts["colour", "answer"].messages == 3
    words = question()
    assert decode_reply(anew(encode(words))) == said and words.images == {}


def test_images_that_never_arrive_are_an_absence():
    """Of the answers, which were asked for three times."""
    traffic = Traffic()
    missing = encode(MissingImages("a", [image_name(RED)]))
    assert Outbox().exchange("colour", question(RED), lambda _: missing, traffic) == Absence("colour", "invalid")
    assert (traffic.counts["colour", "answer"].messages, traffic.counts["colour", "answer"].absences) == (3, 1)


def test_an_image_that_is_not_there_is_asked_for():
    judge = Judge()
    endpoint = Endpoint("colour", judge)
    reply = decode_reply(endpoint(encode(ask(RED, BLUE, sent=[BLUE]))))
    assert reply == MissingImages("s", [image_name(RED)]) and judge.seen == []


def test_an_image_under_a_wrong_name_is_neither_used_nor_kept(caplog):
    judge = Judge()
    endpoint = Endpoint("colour", judge)
    wrong = ScoreRequest("s", {image_name(RED): BLUE}, [ScoreItem([image_name(RED)], [], ["x"])])
    assert decode_reply(endpoint(encode(wrong))) == Refusal("s", "invalid")
    assert judge.seen == [] and len(endpoint.cache) == 0


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81" * 5000, encode(ScoreReply("s", []))], ids=len)
def test_bytes_that_are_no_request(data, caplog):
    assert decode_reply(Endpoint("colour", Judge())(data)) == Refusal("", "invalid")


def test_the_text_of_an_error_stays(caplog):
    def failing(request):
        raise OSError("/scans/patient-4711.png")

    with caplog.at_level(logging.ERROR):
        reply = Endpoint("colour", failing)(encode(CardRequest("c")))
    assert decode_reply(reply) == Refusal("c", "error")
    assert "4711" in caplog.text and b"4711" not in reply


def test_the_least_recently_used_image_goes_first():
    """Room for 25 bytes: 11 + 13 fit; another 11 drop the older of the two that were not asked for."""
    cache = ImageCache(25)
    cache.put("red", RED)
    cache.put("blue", BLUE)
    assert cache.get("red") == RED and cache.size == 24
    cache.put("rad", RED)
    assert cache.get("blue") is None and cache.get("red") == cache.get("rad") == RED and cache.size == 22
    cache.put("large", b"x" * 26)
    assert cache.get("large") is None and len(cache) == 2
    cache.put("red", BLUE)
    assert cache.size == 24


class Wire:
    def __init__(self, endpoint):
        self.endpoint, self.sent = endpoint, []

    def __call__(self, data):
        self.sent.append(data)
        return self.endpoint(data)


def test_the_outbox_sends_an_image_once_and_again_where_it_was_dropped():
    """A site with room for one image of 13 bytes, asked about two in turn."""
    wire, outbox, traffic = Wire(Endpoint("colour", Judge(), ImageCache(13))), Outbox(), Traffic()
    for image, score in ((RED, 11.0), (RED, 11.0), (BLUE, 13.0), (RED, 11.0)):
        assert outbox.exchange("colour", ask(image), wire, traffic) == ScoreReply("s", [[score]])
    assert [RED in data for data in wire.sent] == [True, False, False, False, True]
    assert [BLUE in data for data in wire.sent] == [False, False, True, False, False]
    count = traffic.counts["colour", "score"]
    assert (count.messages, count.bytes_to_site, count.absences) == (5, sum(map(len, wire.sent)), 0)


def test_a_site_that_was_started_anew_gets_its_images_again():
    outbox, traffic, judge = Outbox(), Traffic(), Judge()
    first, second = Wire(Endpoint("colour", judge)), Wire(Endpoint("colour", judge))
    outbox.exchange("colour", ask(RED), first, traffic)
    assert outbox.exchange("colour", ask(RED), second, traffic) == ScoreReply("s", [[11.0]])
    assert [RED in data for data in second.sent] == [False, True]


def test_a_site_that_never_has_the_image_is_absent():
    wire = Wire(lambda data: encode(MissingImages("s", [image_name(RED)])))
    traffic = Traffic()
    assert Outbox().exchange("colour", ask(RED), wire, traffic) == Absence("colour", "invalid")
    assert len(wire.sent) == 3 and traffic.counts["colour", "score"].absences == 1


@pytest.mark.parametrize(
    ("raised", "reason"), [(TimeoutError(), "late"), (ConnectionRefusedError(), "gone"), (BrokenPipeError(), "gone")]
)
def test_what_the_carrier_raises_is_an_absence(raised, reason):
    def send(data):
        raise raised

    outbox, traffic = Outbox(), Traffic()
    assert outbox.exchange("colour", ask(RED), send, traffic) == Absence("colour", reason)
    assert traffic.counts["colour", "score"].absences == 1
    wire = Wire(Endpoint("colour", Judge()))
    outbox.exchange("colour", ask(RED), wire, traffic)
    assert RED in wire.sent[0]  # what was not answered may not have arrived


def test_an_image_that_a_site_has_for_itself_need_not_be_sent(tmp_path):
    """64 KiB and more are asked for by name first; a file that was changed since is no longer that image."""
    large, other = b"a" * ASK_FIRST, b"b" * ASK_FIRST
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(large)
    library = image_library(tmp_path)
    assert library == {image_name(large): tmp_path / "deep" / "a.png"}
    wire = Wire(Endpoint("colour", Judge(), ImageCache(library=library)))
    outbox, traffic = Outbox(), Traffic()
    assert outbox.exchange("colour", ask(large), wire, traffic) == ScoreReply("s", [[float(ASK_FIRST)]])
    assert len(wire.sent) == 1 and len(wire.sent[0]) < 200
    outbox.exchange("colour", ask(large, other), wire, traffic)
    assert [(large in data, other in data) for data in wire.sent[1:]] == [(False, False), (False, True)]
    (tmp_path / "deep" / "a.png").write_bytes(b"another")
    outbox.exchange("colour", ask(large), wire, traffic)
    assert large in wire.sent[-1]


def test_a_cache_without_room_for_a_request_gets_the_whole_of_it():
    """Room for one of the two images: the one that it names as missing is not enough."""
    wire = Wire(Endpoint("colour", Judge(), ImageCache(13)))
    outbox, traffic = Outbox(), Traffic()
    outbox.exchange("colour", ask(RED), wire, traffic)
    outbox.exchange("colour", ask(BLUE), wire, traffic)
    assert outbox.exchange("colour", ask(RED, BLUE), wire, traffic) == ScoreReply("s", [[11.0], [13.0]])
    assert [(RED in data, BLUE in data) for data in wire.sent[2:]] == [(False, False), (True, False)]


def test_a_reply_longer_than_any_honest_one_is_not_even_decoded():
    """Empty lists take seventy times their bytes in memory: a reply of 100,000 of them is dropped unread."""
    bomb = encode(ScoreReply("s", [[]] * 100_000))
    outbox, traffic = Outbox(), Traffic()
    assert outbox.exchange("colour", ask(RED), lambda data: bomb, traffic) == Absence("colour", "invalid")
    assert traffic.counts["colour", "score"].bytes_from_site == len(bomb)

"""A site that sends rubbish, extreme scores, or old replies, through real FLARE (threats T12, T13, T14)."""

import gc
import random
import re
import warnings
from collections import Counter

import msgspec
import psutil
import pytest
import torch
from PIL import Image

from accord.alignment.reward import FederatedReward, Waiting
from accord.errors import DataWarning
from accord.federation.asking import ask_scores
from accord.federation.messages import (
    AnswerReply,
    Card,
    Refusal,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    UpdateReply,
    decode_request,
    encode,
    image_name,
)
from accord.flare.frames import send_frame
from accord.types import vqa_prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IMAGE = b"any bytes"
ABSENT = r"site hostile (gave no answer \((error|refused|invalid)\)|sent scores that cannot be used \(.*\)); so be it"
pack = msgspec.msgpack.encode


def scores_of(message):
    """A candidate's score is its number."""
    return [[float(c) for c in item.candidates] for item in decode_request(message).items]


def honest(message):
    return encode(ScoreReply(decode_request(message).id, scores_of(message)))


REPLIES = {"honest": honest, "hostile": honest}


@pytest.fixture(autouse=True)
def behave(wire):
    """Every test begins with sites that answer as they should."""
    for service in wire.services.values():
        service.reply, service.send = honest, send_frame
    yield


def question(n, site, groups=3):
    """Three questions about four candidates each, whose scores nobody has given before."""
    items = [ScoreItem([image_name(IMAGE)], [], [f"{n}.{g}{c}" for c in range(4)]) for g in range(groups)]
    return ScoreRequest(f"score-{n}-{site}", {image_name(IMAGE): IMAGE}, items)


def asked(engine, n, deadline=60):
    """Ask both sites; return the scores that may be used, and the warnings."""
    requests = {site: question(n, site) for site in engine.sites}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DataWarning)
        given = ask_scores(engine, requests, consequence="so be it", deadline=deadline)
    return given, [str(each.message) for each in told if each.category is DataWarning]


def right(n):
    return [[float(f"{n}.{g}{c}") for c in range(4)] for g in range(3)]


def raw(message, **changes):
    """The reply as a plain mapping, changed."""
    good = {"type": "scores", "id": decode_request(message).id, "scores": scores_of(message)}
    return {key: value for key, value in {**good, **changes}.items() if value is not Ellipsis}


def joined(*pairs):
    """A mapping whose keys may come twice, encoded by hand: fixmap, then keys and values in turn."""
    return bytes([0x80 + len(pairs)]) + b"".join(pack(part) for pair in pairs for part in pair)


WRONG = (
    None,
    True,
    -1,
    2**64 - 1,
    1.5,
    "text",
    b"bytes",
    [],
    {},
    [[]],
    [None],
    {"0": [0.1]},
    [["NaN"]],
    [[True]],
    [{}],
)


def wrong_type(chance, message):
    field = chance.choice(["type", "id", "scores"])
    # A list of lists is the scores' own type, and text the others'; those are wrong by their values.
    return pack(raw(message, **{field: chance.choice(WRONG)}))


def wrong_shape(chance, message):
    scores = scores_of(message)
    row = chance.randrange(3)
    return pack(
        raw(
            message,
            scores=chance.choice(
                [
                    scores[:row],
                    [*scores, scores[row]],
                    [*scores[:row], [], *scores[row + 1 :]],
                    [*scores[:row], scores[row][:3], *scores[row + 1 :]],
                    [*scores[:row], [*scores[row], 0.5], *scores[row + 1 :]],
                    [[0.5] * 4] * 10_000,
                    [[score for each in scores for score in each]],
                ]
            ),
        )
    )


def wrong_fields(chance, message):
    field = chance.choice(["type", "id", "scores"])
    return pack(chance.choice([raw(message, **{field: ...}), raw(message, **{f"x{chance.random()}": 1})]))


def truncated(chance, message):
    whole = honest(message)
    return whole[: chance.randrange(len(whole))]


def longer(chance, message):
    return honest(message) + chance.randbytes(chance.randint(1, 2000))


def random_bytes(chance, message):
    return b"\xc1" + chance.randbytes(chance.randint(0, 5000))


def deep(chance, message):
    shell = chance.choice([b"\x91", b"\x81\xa1a", b"\xdc\x00\x01"]) * 10_000
    return shell if chance.random() < 0.5 else pack(raw(message, scores=...))[:-1] + shell


def false_length(chance, message):
    """Announces up to four thousand million elements or bytes, and brings few."""
    head = chance.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6"]) + chance.choice(
        [b"\xff\xff\xff\xff", b"\x10\x00\x00\x00"]
    )
    return joined(("type", "scores"), ("id", "s"))[:1] + pack("scores") + head + chance.randbytes(50)


def keys_twice(chance, message):
    good = raw(message)
    again = chance.choice([("scores", [[0.5]]), ("id", "another"), ("type", "card_reply"), ("scores", None)])
    return joined(*good.items(), again)


def bad_text(chance, message):
    bad = chance.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80"])
    at = chance.choice([b"scores", b"id", decode_request(message).id.encode()])
    whole = honest(message)
    assert at in whole
    return whole.replace(at, (bad * len(at))[: len(at)])


def another_message(chance, message):
    name = decode_request(message).id
    return encode(
        chance.choice(
            [
                Card(name, "Llava", 1, 2, 3, True, {}),
                AnswerReply(name, ["red"] * 3),
                UpdateReply(name, b"change", 1, 0.5),
                Refusal(name, "error"),
                Refusal(name, "refused"),
            ]
        )
    )


def another_id(chance, message):
    name = decode_request(message).id
    wrong = chance.choice([name[:-1], name + "0", name.rpartition(".")[0], name.upper(), "", "\0", "score-0"])
    return pack(raw(message, id=wrong))


def too_large(chance, message):
    scores = scores_of(message)
    scores[chance.randrange(3)][chance.randrange(4)] = chance.choice([1e308, -1e308, 10_001.0, 2**63, -(2**63)])
    return pack(raw(message, scores=scores))


GRAMMAR = (
    *(wrong_type, wrong_shape, wrong_fields, truncated, longer, random_bytes, deep, false_length, keys_twice),
    *(bad_text, another_message, another_id, too_large),
)


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def test_a_thousand_malformed_replies(wire):
    """T12: each is an absence of a closed set, of that site alone; the engine, its segment and its memory hold."""
    engine, chance = wire.engine(), random.Random(12)
    hostile, kinds = wire.services["hostile"], Counter()
    for n in range(20):
        assert asked(engine, n) == ({"honest": right(n), "hostile": right(n)}, [])
    before, segments = resident(), len(wire.said)
    for n in range(1000, 2000):
        way = GRAMMAR[n % len(GRAMMAR)]
        hostile.reply = lambda message, way=way: way(chance, message)
        if n == 1500:
            hostile.reply = lambda _: b"\xdb" + (64 * 2**20).to_bytes(4, "big") + b"x" * 64 * 2**20
        given, told = asked(engine, n)
        assert given == {"honest": right(n)}, way.__name__
        assert len(told) == 1 and re.fullmatch(ABSENT, told[0], re.DOTALL), (way.__name__, told)
        kinds[told[0][:40]] += 1
    grown = resident() - before
    assert grown < 50 * 2**20, f"{grown / 2**20:.0f} MB"
    assert len(kinds) == 4 and len(wire.said) == segments  # unusable, invalid, error, refused; one segment for all
    assert engine.traffic.counts["hostile", "score"].absences == 1000
    assert engine.traffic.counts["honest", "score"].absences == 0
    hostile.reply = honest
    assert asked(engine, 3000) == ({"honest": right(3000), "hostile": right(3000)}, [])


PROMPTS = [vqa_prompt(f"question {g}?") for g in range(4)]


def rewards(engine, hostile, asks_hostile_alone=3):
    """Rewards of four prompts with two completions each, `[4][2]`.

    Weights are 1/2 and 1/2, but of the last prompt the hostile site is asked alone.
    """

    def router(prompts, images, candidates):
        weights = torch.full((8, 2), 0.5)
        weights[2 * asks_hostile_alone :] = torch.tensor([0.0, 1.0])
        return weights

    reward = FederatedReward(engine, router, mode="soft", waiting=Waiting(deadline=60))
    images = [Image.new("RGB", (8, 8), (g, 0, 0)) for g in range(4)]
    rows = range(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        found = reward([PROMPTS[r // 2] for r in rows], [f"{r}.0" for r in rows], image=[images[r // 2] for r in rows])
    return [found[2 * g : 2 * g + 2] for g in range(4)]


BOTH = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
"""Both sites say the completion's number."""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_absent_for_its_group(wire, bad):
    """T13: of the second question the honest site's word counts alone; of the last nobody's, and that is no 0.

    The hostile site says 10 more than the honest one, so a mean of both is 5 more: its word counts elsewhere.
    """

    def reply(message):
        scores = [[score + 10 for score in row] for row in scores_of(message)]
        scores[1][0] = scores[3][1] = bad
        return encode(ScoreReply(decode_request(message).id, scores))

    wire.services["hostile"].reply = reply
    assert rewards(wire.engine(), reply) == [[5.0, 6.0], [2.0, 3.0], [9.0, 10.0], [None, None]]


@pytest.mark.parametrize("bad", [1e308, -1e308, 10_001.0, "NaN", "Infinity", "1.0", 2**64 - 1, True, None])
def test_what_is_no_standardised_score_spoils_the_reply(wire, bad):
    """T13: the site is absent for this request, and the honest one's word counts for all that it was asked."""

    def reply(message):
        scores = [list(row) for row in scores_of(message)]
        scores[1][0] = bad
        return pack(raw(message, scores=scores))

    wire.services["hostile"].reply = reply
    assert rewards(wire.engine(), reply) == [*BOTH[:3], [None, None]]


@pytest.mark.parametrize("odd", [-0.0, 5e-324, -2.2e-308, 1e4, -1e4])
def test_a_finite_score_counts_as_it_is(wire, odd):
    """Negative zero, denormals and the largest that is allowed."""

    def reply(message):
        scores = [list(row) for row in scores_of(message)]
        scores[1][0] = odd
        return encode(ScoreReply(decode_request(message).id, scores))

    wire.services["hostile"].reply = reply
    expected = [list(row) for row in BOTH]
    expected[1][0] = (2.0 + odd) / 2
    assert rewards(wire.engine(), reply) == expected


def test_old_replies_count_nowhere(wire):
    """T14: replies of this site and of the other one, of this step's kind, of an earlier step, of an earlier run."""
    engine, chance, kept = wire.engine(), random.Random(14), []

    def keeping(message):
        kept.append(honest(message))
        return kept[-1]

    for service in wire.services.values():
        service.reply = keeping
    for n in range(50):
        assert asked(engine, n) == ({"honest": right(n), "hostile": right(n)}, [])
    assert len(kept) == 100 == len(set(kept))
    wire.services["honest"].reply = honest
    hostile = wire.services["hostile"]
    for run in range(2):
        if run:
            engine = wire.engine(new=True)
        counted = engine.traffic.counts["hostile", "score"].absences
        for n in range(50):  # the same questions again, word by word
            hostile.reply = lambda message: chance.choice(kept)
            given, told = asked(engine, n)
            assert given == {"honest": right(n)}
            assert told == ["site hostile gave no answer (invalid); so be it"]
        assert engine.traffic.counts["hostile", "score"].absences == counted + 50
    hostile.reply = honest
    assert asked(engine, 7) == ({"honest": right(7), "hostile": right(7)}, [])


def test_a_reply_that_comes_twice_counts_once(wire):
    def twice(connection, data):
        send_frame(connection, data)
        send_frame(connection, data)

    wire.services["hostile"].send = twice
    engine = wire.engine()
    messages = engine.traffic.counts["hostile", "score"].messages
    for n in range(20):
        assert asked(engine, n) == ({"honest": right(n), "hostile": right(n)}, [])
    assert engine.traffic.counts["hostile", "score"].messages == messages + 20

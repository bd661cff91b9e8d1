import contextlib
import math
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accord.errors import ReplyError
from accord.federation import messages
from accord.federation.messages import (
    MAX_ANSWER,
    MAX_SCORE,
    Agreement,
    AnswerItem,
    AnswerReply,
    AnswerRequest,
    Card,
    CardRequest,
    Declined,
    ImageBlock,
    MissingImages,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    TextBlock,
    Turn,
    UpdateReply,
    UpdateRequest,
    check_answers,
    check_card,
    check_images,
    check_scores,
    decode_reply,
    decode_request,
    encode,
    from_turns,
    image_name,
    reply_limit,
    text_bytes,
    to_turns,
)
from accord.rewards.certificate import Certificate, Uncovered, Unit, Way
from accord.types import vqa_prompt
from certificates import PROOF

TURNS = [Turn("system", "Be brief."), Turn("user", [ImageBlock(), TextBlock("où? 🙂")])]
ITEM = ScoreItem([image_name(b"png")], TURNS, ["left", ""])
REQUEST = ScoreRequest("s1", {image_name(b"png"): b"png"}, [ITEM, ITEM])
JUDGED = ScoreRequest("s2", {}, [ScoreItem([], [Turn("user", "2 + 2?")], ["4"])], judge="answer", truth=True)
ANSWER = AnswerRequest(
    "a1", {image_name(b"png"): b"png"}, [AnswerItem([image_name(b"png")], TURNS), AnswerItem([], TURNS[:1])]
)
ROUTER = UpdateRequest("r1", "router", 2, b"weights", 7)
NARROW = UpdateRequest("u1", "preference", 2, b"weights", 7, b"beside", 1, 16)
REQUESTS = [REQUEST, JUDGED, ANSWER, ROUTER, NARROW, CardRequest("c1")]
CARD = Card("c1", "LlavaForConditionalGeneration", 9, 5, 20, True, {"colour": 0.75})
PRIVATE = msgspec.structs.replace(CARD, privacy=PROOF)
REPLIES = [
    ScoreReply("s1", [[0.1, -2.0], [0.0, 1e-300]]),
    AnswerReply("a1", ["links 🙂", ""]),
    UpdateReply("r1", b"change", 20, 0.5, b"beside", 3),
    UpdateReply("r2", b"change", 20, 0.5, distance=14.5),
    CARD,
    ScoreReply("s1", [[0.1, -2.0], []], {1: Declined.BUDGET}),
    AnswerReply("a1", ["", ""], {0: Declined.IMAGE, 1: Declined.ERROR}),
    PRIVATE,
]

FIELDS = {
    "ScoreRequest": {
        "id": str,
        "images": dict[str, bytes],
        "items": list[ScoreItem],
        "judge": typing.Literal["reward", "answer"],
        "truth": bool,
    },
    "ScoreItem": {"images": list[str], "prompt": list[Turn], "candidates": list[str]},
    "AnswerRequest": {"id": str, "images": dict[str, bytes], "items": list[AnswerItem]},
    "AnswerItem": {"images": list[str], "prompt": list[Turn]},
    "AnswerReply": {"id": str, "answers": list[str], "refused": dict[int, Declined]},
    "Turn": {"role": typing.Literal["system", "user", "assistant"], "content": str | list[ImageBlock | TextBlock]},
    "ImageBlock": {},
    "TextBlock": {"text": str},
    "ScoreReply": {"id": str, "scores": list[list[float]], "refused": dict[int, Declined]},
    "MissingImages": {"id": str, "images": list[str]},
    "Refusal": {"id": str, "reason": typing.Literal["error", "refused", "invalid", "gone"]},
    "UpdateRequest": {
        "id": str,
        "task": typing.Literal["router", "means", "reward", "supervised", "preference", "selector", "projector"],
        "round": int,
        "weights": bytes,
        "seed": int,
        "state": bytes,
        "group": int,
        "bits": typing.Literal[16, 32],
    },
    "UpdateReply": {
        "id": str,
        "change": bytes,
        "examples": int,
        "loss": float,
        "state": bytes,
        "steps": int,
        "distance": float | None,
    },
    "CardRequest": {"id": str},
    "Card": {
        "id": str,
        "architecture": str,
        "parameters": int,
        "questions": int,
        "pairs": int,
        "constructed": bool,
        "ranking": dict[str, float],
        "privacy": Certificate | None,
        "agreement": Agreement | None,
    },
    "Agreement": {"messages": int, "accord": str, "sites": str, "router": str, "scores": str, "policy": str},
    "Certificate": {
        "id": str,
        "epsilon": float,
        "total": float,
        "delta": float,
        "unit": Unit,
        "way": Way,
        "sampling": float,
        "steps": int,
        "clip": float,
        "sigma": float,
        "projection": float,
        "standardisation": float,
        "flip": float,
        "noise": typing.Literal["SHAKE-256"],
        "version": str,
        "uncovered": tuple[Uncovered, ...],
        "router": float,
        "router_steps": int,
    },
}
"""Everything that can cross the border. Whoever adds a field here has read the threat model."""


def reachable(kind, found):
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = typing.get_type_hints(kind)
        if kind.__name__ not in found:
            found[kind.__name__] = fields
            for inner in fields.values():
                reachable(inner, found)
    for inner in typing.get_args(kind):
        reachable(inner, found)
    return found


def raw(message, **changes):
    """Return the message as a MessagePack mapping with some fields changed."""
    return msgspec.msgpack.encode({**msgspec.to_builtins(message, builtin_types=(bytes,)), **changes})


@pytest.mark.parametrize("message", REQUESTS, ids=lambda m: type(m).__name__)
def test_a_request_survives_the_wire(message):
    assert decode_request(encode(message)) == message


@pytest.mark.parametrize("message", REPLIES, ids=lambda m: type(m).__name__)
def test_a_reply_survives_the_wire(message):
    assert decode_reply(encode(message)) == message


def test_the_set_is_closed():
    assert reachable(messages.Request | messages.Reply, {}) == FIELDS


def test_no_reply_can_hold_a_pair_or_an_image():
    """Text that leaves a site: a request's id, names of images it was asked about, what its model says to the server's
    questions, an architecture, names of question types,
    a certificate's random id and version. Bytes: what changed in shared weights."""
    fields = reachable(messages.Reply, {})
    texts = {(kind, name) for kind, named in fields.items() for name, hint in named.items() if "str" in str(hint)}
    assert texts == {
        ("ScoreReply", "id"),
        ("MissingImages", "id"),
        ("MissingImages", "images"),
        ("AnswerReply", "id"),
        ("AnswerReply", "answers"),
        ("UpdateReply", "id"),
        ("Card", "id"),
        ("Card", "architecture"),
        ("Card", "ranking"),
        ("Certificate", "id"),
        ("Certificate", "version"),
        *(("Agreement", name) for name in ("accord", "sites", "router", "scores", "policy")),
        ("Refusal", "id"),
    }
    assert [(kind, name) for kind, named in fields.items() for name, hint in named.items() if "bytes" in str(hint)] == [
        ("UpdateReply", "change"),
        ("UpdateReply", "state"),
    ]


def test_a_card_without_a_certificate_has_not_a_byte_for_it():
    assert b"privacy" not in encode(CARD)
    assert check_card(CardRequest("c1"), PRIVATE) == PRIVATE


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "\x1b[2J"},
        {"id": "0" * 17},
        {"version": "<b>"},
        {"noise": "Mersenne Twister"},
        {"unit": "hospital"},
        {"way": "prayer"},
        {"sigma": 0.0},
        {"delta": 0.0},
        {"unit": "label"},
        {"unit": "label", "way": "labels", "flip": 0.0, "uncovered": ["inputs"]},
        {"unit": "label", "way": "labels", "flip": 0.1},
        {"unit": "label", "way": "labels", "flip": 0.5, "uncovered": ["inputs"]},
        {"uncovered": ["nothing at all"]},
        {"epsilon": -1.0},
        {"epsilon": math.nan},
        {"sigma": math.inf},
        {"more": 1},
    ],
)
def test_a_certificate_that_must_not_be_shown(wrong):
    """Its texts are of a closed form, its numbers are numbers: nothing else in it could reach the report."""
    forged = raw(PRIVATE, type="card_reply", privacy={**msgspec.to_builtins(PROOF), **wrong})
    with pytest.raises(ReplyError):
        check_card(CardRequest("c1"), decode_reply(forged))


@pytest.mark.parametrize("union", [messages.Request, messages.Reply])
def test_no_message_says_which_answer_was_preferred(union):
    names = {name for named in reachable(union, {}).values() for name in named}
    assert not names & {"chosen", "rejected", "pairs_data", "preferred", "answer", "question"}


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_reply_error(data):
    for decode in (decode_request, decode_reply):
        try:
            message = decode(data)
        except ReplyError as error:
            assert f"a message of {len(data)} bytes" in str(error)
        else:
            assert isinstance(message, typing.get_args(messages.Request | messages.Reply))


@given(st.sampled_from(REQUESTS + REPLIES), st.data())
def test_a_damaged_message_is_a_message_or_a_reply_error(message, data):
    sent = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    for decode in (decode_request, decode_reply):
        with contextlib.suppress(ReplyError):
            decode(bytes(sent))


@pytest.mark.parametrize("message", REQUESTS + REPLIES, ids=lambda m: type(m).__name__)
def test_a_truncated_message(message):
    sent = encode(message)
    for decode in (decode_request, decode_reply):
        for length in range(len(sent)):
            with pytest.raises(ReplyError, match=f"of {length} bytes"):
                decode(sent[:length])
        with pytest.raises(ReplyError):
            decode(sent + b"\x00")


@pytest.mark.parametrize("byte", [b"\x91", b"\x81", b"\xdc\x00\x01"], ids=["list", "map key", "long list"])
def test_a_deeply_nested_message(byte):
    for decode in (decode_request, decode_reply):
        with pytest.raises(ReplyError):
            decode(byte * 100_000)


def test_deep_nesting_inside_a_good_message():
    head = raw(REPLIES[0])
    assert head.endswith(b"\xcb" + msgspec.msgpack.encode(1e-300)[1:])
    with pytest.raises(ReplyError):
        decode_reply(head[:-9] + b"\x91" * 100_000)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "updated"},
        {"type": "no such"},
        {"type": 1},
        {"id": 7},
        {"id": None},
        {"scores": None},
        {"scores": [0.1]},
        {"scores": [["0.1"]]},
        {"scores": [[True]]},
        {"scores": {"0": [0.1]}},
        {"chosen": "red"},
    ],
    ids=str,
)
def test_a_score_reply_of_another_form(changes):
    with pytest.raises(ReplyError):
        decode_reply(raw(REPLIES[0], **changes))


@pytest.mark.parametrize("message", [REQUESTS[0], ITEM, TURNS[1]], ids=lambda m: type(m).__name__)
def test_an_unknown_field_is_refused_wherever_it_is(message):
    changed = msgspec.to_builtins(REQUEST, builtin_types=(bytes,))
    place = {ScoreRequest: changed, ScoreItem: changed["items"][0], Turn: changed["items"][0]["prompt"][1]}
    place[type(message)]["rejected"] = "blue"
    with pytest.raises(ReplyError, match="rejected"):
        decode_request(msgspec.msgpack.encode(changed))


def test_a_reply_is_no_request_and_the_other_way_round():
    for message in REPLIES:
        with pytest.raises(ReplyError):
            decode_request(encode(message))
    for message in REQUESTS:
        with pytest.raises(ReplyError):
            decode_reply(encode(message))


def test_a_prompt_survives_and_loses_its_image():
    """TRL puts the picture itself into the block; only its place travels."""
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "where?"}]},
    ]
    expected = [prompt[0], *vqa_prompt("where?")]
    assert from_turns(to_turns(prompt)) == expected
    assert decode_request(encode(ScoreRequest("s", {}, [ScoreItem([], to_turns(prompt), [])]))).items[0].prompt == [
        Turn("system", "Be brief."),
        Turn("user", [ImageBlock(), TextBlock("where?")]),
    ]


def test_the_name_of_an_image():
    """SHA-256 of the empty text, from FIPS 180-2's test vectors."""
    assert image_name(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_an_image_that_is_not_what_its_name_says():
    check_images(REQUEST.images)
    with pytest.raises(ReplyError, match="does not match its SHA-256"):
        check_images({ITEM.images[0]: b"png!"})


def test_a_request_of_mor_has_not_a_byte_more_than_its_three_fields():
    """A mapping of four: the type and the three fields, as it was before there were other judges than reward models."""
    as_before = {
        "type": "score",
        "id": "s1",
        "images": REQUEST.images,
        "items": msgspec.to_builtins(REQUEST.items),
    }
    assert encode(REQUEST) == msgspec.msgpack.encode(as_before)
    assert set(msgspec.msgpack.decode(encode(JUDGED))) == {"type", "id", "images", "items", "judge", "truth"}


def test_a_judge_that_does_not_exist():
    with pytest.raises(ReplyError, match="judge"):
        decode_request(raw(REQUEST, judge="oracle"))


@pytest.mark.parametrize("bits", [8, 0, "16", True])
def test_numbers_travel_in_16_or_32_bits(bits):
    assert decode_request(raw(ROUTER, bits=16)).bits == 16 and decode_request(encode(ROUTER)).bits == 32
    with pytest.raises(ReplyError, match="bits"):
        decode_request(raw(ROUTER, bits=bits))


def test_good_answers_pass():
    """An answer is compared, never printed: it may hold any character, and be as long as the limit."""
    said = ["\x1b[2J\u202e", "x" * MAX_ANSWER]
    assert check_answers(ANSWER, decode_reply(encode(AnswerReply("a1", said)))) == said


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (AnswerReply("a2", ["", ""]), "reply to request 'a2', expected 'a1'"),
        (AnswerReply("a1", [""]), "answers to 1 questions, expected 2"),
        (AnswerReply("a1", [""] * 3), "answers to 3 questions, expected 2"),
        (AnswerReply("a1", ["", "x" * (MAX_ANSWER + 1)]), "an answer of 257 characters, at most 256"),
        (ScoreReply("a1", [[0.0], [0.0]]), "expected answers, got a ScoreReply"),
        (AnswerReply("a1", ["", "x"], {1: Declined.IMAGE}), "question 1 of 2 is refused, and .* answered"),
        (AnswerReply("a1", ["", ""], {2: Declined.IMAGE}), "question 2 of 2 is refused, and is none"),
    ],
    ids=["id", "too few", "too many", "long", "type", "refused and answered", "beyond the end"],
)
def test_answers_that_must_not_be_used(reply, message):
    with pytest.raises(ReplyError, match=message):
        check_answers(ANSWER, reply)


@pytest.mark.parametrize(
    "changes",
    [
        {"answers": None},
        {"answers": "left"},
        {"answers": [1]},
        {"answers": [None]},
        {"answers": [b"left"]},
        {"answers": [["left"]]},
        {"answers": {"0": "left"}},
        {"labels": ["left"]},
        {"images": {"x": b"png"}},
    ],
    ids=str,
)
def test_an_answer_reply_holds_nothing_but_answers(changes):
    with pytest.raises(ReplyError):
        decode_reply(raw(REPLIES[1], **changes))


def test_good_scores_pass():
    scores = [[0.1, -2.0], [MAX_SCORE, -MAX_SCORE]]
    assert check_scores(REQUEST, ScoreReply("s1", scores)) == scores


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_makes_the_site_absent_for_its_group_alone(bad):
    sent = decode_reply(encode(ScoreReply("s1", [[0.5, bad], [1.0, 2.0]])))
    assert check_scores(REQUEST, sent) == [None, [1.0, 2.0]]


def test_a_question_that_is_refused_is_absent_alone():
    sent = decode_reply(encode(ScoreReply("s1", [[], [1.0, 2.0]], {0: Declined.IMAGE})))
    assert check_scores(REQUEST, sent) == [None, [1.0, 2.0]]
    said = decode_reply(encode(AnswerReply("a1", ["left", ""], {1: Declined.BUDGET})))
    assert check_answers(ANSWER, said) == ["left", None]


def test_where_nothing_is_refused_the_reply_has_not_a_byte_more():
    plain = {"type": "scores", "id": "s1", "scores": [[0.0, 1.0]]}
    assert encode(ScoreReply("s1", [[0.0, 1.0]])) == msgspec.msgpack.encode(plain)


def test_a_request_of_a_million_images_is_not_read():
    """Each entry is eight bytes, and 200 in memory; the rest of a request counts without its images and weights."""
    many = raw(REQUEST, images={f"{n:x}": b"" for n in range(100_000)})
    with pytest.raises(ReplyError, match="length <= 65536"):
        decode_request(many)
    twice = raw(REQUEST, images={"a": b"x" * 1000, "b": b"y" * 1000})
    assert text_bytes(twice) == len(raw(REQUEST, images={})) - 1
    assert text_bytes(raw(ROUTER, weights=b"w" * 1000)) == len(raw(ROUTER, weights=b"")) - 4
    pack = msgspec.msgpack.encode  # a key that comes twice, of which a reader sees the last: both count
    doubled = b"\x82" + pack("items") + pack(["x" * 900]) + pack("items") + pack([])
    assert text_bytes(doubled) == len(doubled)
    with pytest.raises(ReplyError, match="cannot read a message"):
        text_bytes(pack([1]))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (ScoreReply("s2", [[0.0, 0.0]] * 2), "reply to request 's2', expected 's1'"),
        (ScoreReply("s1", [[0.0, 0.0]]), "scores for 1 questions, expected 2"),
        (ScoreReply("s1", [[0.0, 0.0]] * 3), "scores for 3 questions, expected 2"),
        (ScoreReply("s1", [[0.0, 0.0], [0.0]]), "1 scores for 2 candidates"),
        (ScoreReply("s1", [[0.0, 0.0], [0.0] * 3]), "3 scores for 2 candidates"),
        (ScoreReply("s1", [[0.0, -10_001.0], [0.0, 0.0]]), "of -1e.04, beyond the limits of -10000 and 10000"),
        (CARD, "expected scores, got a Card"),
        (
            ScoreReply("s1", [[0.0, 0.0], [0.0, 0.0]], {1: Declined.LIMIT}),
            "question 1 of 2 is refused, and .* answered",
        ),
        (ScoreReply("s1", [[0.0, 0.0], [0.0, 0.0]], {2: Declined.LIMIT}), "question 2 of 2 is refused, and is none"),
        (ScoreReply("s1", [[0.0, 0.0], []], {-1: Declined.LIMIT}), "question -1 of 2 is refused, and is none"),
        (ScoreReply("s1", [[0.0, 0.0], []], {0: Declined.LIMIT}), "question 0 of 2 is refused"),
    ],
    ids=[
        *("id", "too few", "too many", "short group", "long group", "range", "type"),
        *("refused and scored", "beyond the end", "before the start", "another"),
    ],
)
def test_scores_that_must_not_be_used(reply, message):
    with pytest.raises(ReplyError, match=message):
        check_scores(REQUEST, reply)


def test_messages_are_immutable():
    with pytest.raises(AttributeError):
        REQUEST.id = "other"


def test_scores_outside_the_agreed_range():
    """A site whose scores are to be clipped to 0..2 may not send a 3; rounding by a millionth is no offence."""
    assert check_scores(REQUEST, ScoreReply("s1", [[0.0, 2.0], [1.0, 2.0000005]]), 0.0, 2.0)
    for bad in (3.0, -0.5):
        with pytest.raises(ReplyError, match=f"score of {bad:g}, beyond the limits of 0 and 2"):
            check_scores(REQUEST, ScoreReply("s1", [[0.0, bad], [1.0, 2.0]]), 0.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "other"}, "expected 'c'"),
        ({"pairs": -1}, "a count of -1"),
        ({"ranking": {"colour": math.nan}}, "a ranking of nan"),
        ({"ranking": {"colour": 1.5}}, "a ranking of 1.5"),
        ({"architecture": "x" * 101}, "100 characters at most"),
        ({"ranking": {"a\x1b[2J": 0.5}}, "must be printable"),
    ],
    ids=str,
)
def test_a_card_that_is_not_shown(changes, message):
    card = Card("c", "Llava", 1, 2, 3, True, {"colour": 0.5})
    assert check_card(CardRequest("c"), card) == card
    with pytest.raises(ReplyError, match=message):
        check_card(CardRequest("c"), msgspec.structs.replace(card, **changes))


def test_an_honest_reply_is_within_its_limit():
    scores = ScoreReply("s1", [[math.pi] * len(item.candidates) for item in REQUEST.items])
    missing = MissingImages("s1", [name for item in REQUEST.items for name in item.images])
    assert max(len(encode(scores)), len(encode(missing))) <= reply_limit(REQUEST)
    answers = AnswerReply("a1", ["🙂" * MAX_ANSWER] * len(ANSWER.items))
    none_kept = MissingImages("a1", [image_name(b"")] * len(ANSWER.items))
    assert max(len(encode(answers)), len(encode(none_kept))) <= reply_limit(ANSWER)
    many = ScoreRequest("s1", {}, [ScoreItem([], [], ["x"])] * 70_000)
    refused = ScoreReply("s1", [[]] * 70_000, dict.fromkeys(range(70_000), Declined.BUDGET))
    assert len(encode(refused)) <= reply_limit(many)
    many = AnswerRequest("a1", {}, ANSWER.items * 500)
    assert len(encode(AnswerReply("a1", ["🙂" * MAX_ANSWER] * 1000))) <= reply_limit(many) < 1_100_000
    update = UpdateRequest("r", "router", 0, b"w" * 10_000, 1, b"s" * 10_000)
    assert len(encode(UpdateReply("r", b"w" * 10_000, 1, 0.5, b"s" * 10_000))) <= reply_limit(update)


def test_a_question_about_several_images_arrives_as_it_was_sent():
    """In order, one of them twice; the reply may name each as missing."""
    item = AnswerItem([image_name(b"a"), image_name(b"b"), image_name(b"a")], TURNS)
    asked = AnswerRequest("a", {image_name(b"a"): b"a"}, [item])
    assert decode_request(encode(asked)) == asked
    missing = MissingImages("a", [image_name(bytes([n])) for n in range(200)])
    several = AnswerRequest("a", {}, [AnswerItem(missing.images, [])])
    assert len(encode(missing)) < reply_limit(several)


def test_a_question_of_the_form_with_one_image_is_refused():
    """`image` in the place of `images`, as messages of version 2 had it; and more images than anybody means."""
    item = {"image": image_name(b"a"), "prompt": [], "candidates": ["x"]}
    old = {"type": "score", "id": "s", "images": {}, "items": [item]}
    with pytest.raises(ReplyError, match=r"unknown field `image`"):
        decode_request(msgspec.msgpack.encode(old))
    with pytest.raises(ReplyError, match="length <= 1024"):
        decode_request(encode(AnswerRequest("a", {}, [AnswerItem([""] * 1025, [])])))
    assert messages.MESSAGES == 3

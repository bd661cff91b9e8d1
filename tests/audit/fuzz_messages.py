"""Feed the decoders of messages for a time: any bytes are a message or a `ReplyError`, and nothing else.

    python tests/audit/fuzz_messages.py SECONDS

With atheris the inputs are guided to ever new branches of `accord.federation.messages`; without it they are good
messages, cut, joined and changed at random. The last line says how many were tried. An input that raises something else
ends it with a traceback, and is printed.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from accord.errors import ReplyError

try:
    import atheris
except ImportError:
    atheris = None

with atheris.instrument_imports(include=["accord.federation.messages"]) if atheris else contextlib.nullcontext():
    from accord.federation import messages
    from accord.federation.messages import (
        AnswerItem,
        AnswerReply,
        AnswerRequest,
        CardRequest,
        ImageBlock,
        ScoreItem,
        ScoreReply,
        ScoreRequest,
        TextBlock,
        Turn,
        UpdateReply,
        UpdateRequest,
        encode,
        image_name,
    )

TURNS = [Turn("user", [ImageBlock(), TextBlock("où? 🙂")])]
ITEM = ScoreItem([image_name(b"png")], TURNS, ["left", ""])
SCORE = ScoreRequest("s", {image_name(b"png"): b"png"}, [ITEM, ITEM])
ANSWER = AnswerRequest("a", {}, 2 * [AnswerItem([], TURNS)])
SEEDS = [
    encode(message)
    for message in (
        SCORE,
        ANSWER,
        UpdateRequest("u", "router", 2, b"weights", 7),
        CardRequest("c"),
        ScoreReply("s", [[0.1, -2.0], [0.0, 1e-300]]),
        AnswerReply("a", ["links 🙂", ""]),
        UpdateReply("u", b"change", 20, 0.5),
    )
]


def one(data: bytes) -> None:
    """Decode `data` as a request and as a reply, and check what was decoded as its receiver does."""
    for decode in (messages.decode_request, messages.decode_reply):
        try:
            message = decode(data)
            if isinstance(message, ScoreReply):
                messages.check_scores(SCORE, message)
            elif isinstance(message, AnswerReply):
                messages.check_answers(ANSWER, message)
        except ReplyError:
            continue
        assert same(decode(encode(message)), message)


def same(one: object, other: object) -> bool:
    """Return whether two messages are equal, where NaN is equal to NaN."""
    if isinstance(one, msgspec.Struct):
        return type(one) is type(other) and same(msgspec.structs.astuple(one), msgspec.structs.astuple(other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return one == other or (one != one and other != other)  # NaN alone is unlike itself


def mutated(generator: random.Random) -> bytes:
    data = bytearray(generator.choice(SEEDS))
    for _ in range(generator.randint(1, 6)):
        at, other = generator.randint(0, len(data)), generator.choice(SEEDS)
        match generator.randrange(4):
            case 0:
                data[at : at + generator.randint(0, 8)] = generator.randbytes(generator.randint(0, 8))
            case 1:
                data[at:] = other[generator.randint(0, len(other)) :]
            case 2:
                data[at:at] = data[: generator.randint(0, 40)]
            case 3:
                data[at:at] = generator.choice([b"\x91", b"\xdc\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xc0"]) * 50
    return bytes(data)


def main(seconds: float) -> None:
    if atheris:
        corpus = tempfile.mkdtemp()
        for number, seed in enumerate(SEEDS):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds:.0f}", "-timeout=5", "-max_len=4096", corpus], one)
        atheris.Fuzz()
    generator, end, tried = random.Random(0), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = mutated(generator)
        try:
            one(data)
        except BaseException:
            print(repr(data))
            raise
        tried += 1
    print(f"Done {tried} runs, without atheris")


if __name__ == "__main__":
    main(float(sys.argv[1]))

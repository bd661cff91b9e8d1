"""What a request takes of a site's memory: images are opened batch by batch, and a bad question costs no other."""

import io
import json
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image

from accord.errors import ImageError
from accord.federation import batches
from accord.federation.batches import Opening, in_batches
from accord.federation.messages import (
    AnswerItem,
    Declined,
    ScoreItem,
    ScoreRequest,
    Turn,
    encode,
    image_name,
    to_turns,
)
from accord.types import vqa_prompt

LARGE = """
import json, resource, sys
import accord.federation.batches as batches
from accord.data.decoder import Decoder
from accord.federation.batches import Opening
from accord.federation.endpoint import Endpoint
from accord.federation.messages import ScoreReply, decode_reply
from accord.federation.site import Site
from accord.rewards.model import RewardModel

model, small, large, budget, at_once = sys.argv[1], *sys.argv[2:4], *map(int, sys.argv[4:6])
if at_once:
    batches.PIXELS_AT_ONCE = at_once

def megabytes(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

with Decoder() as decoder:
    endpoint = Endpoint("a", Site("a", RewardModel.from_checkpoint(model).eval(), opening=Opening(decoder)).answer)
    endpoint(open(small, "rb").read())
    before, size = megabytes("VmRSS"), int(megabytes("VmSize") * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (size + budget * 2**20,) * 2)
    reply = decode_reply(endpoint(open(large, "rb").read()))
    answered = len(reply.scores) - len(reply.refused) if isinstance(reply, ScoreReply) else 0
    print(json.dumps({"answered": answered, "grown": megabytes("VmHWM") - before}))
"""


def pictures(side, count):
    """Plain PNGs; a number in each makes it another image without encoding it again."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "teal").save(buffer, "PNG")
    whole, made = buffer.getvalue(), []
    for number in range(count):
        text = b"tEXtn\0" + str(number).encode()
        made.append(
            whole[:-12] + struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text)) + whole[-12:]
        )
    return made


def asked(images):
    turns = to_turns(vqa_prompt("what colour is it?"))
    items = [ScoreItem([image_name(data)], turns, ["red"]) for data in images]
    return ScoreRequest("s", {image_name(data): data for data in images}, items)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [0, 10**12], ids=["in batches", "all at once"])
def test_a_request_of_two_gigabytes_of_pixels(llava, tmp_path, at_once):
    """Thirty PNGs of 4,096 squared, 1.8 MB on the wire and 2.0 GB decoded; the process may take 700 MB more.

    In batches all are scored; where the batches are switched off, none is.
    """
    for name, images in (("small", pictures(32, 1)), ("large", pictures(4096, 30))):
        (tmp_path / name).write_bytes(encode(asked(images)))
    words = [llava, str(tmp_path / "small"), str(tmp_path / "large"), "700", str(at_once)]
    done = subprocess.run([sys.executable, "-c", LARGE, *words], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "large").stat().st_size < 2_000_000
    if at_once:
        assert found["answered"] == 0 and "MemoryError" in done.stderr
    else:
        assert found["answered"] == 30 and found["grown"] < 600


def open_named(data):
    """An image that is as wide as its bytes say; `bad` is none."""
    if data == b"bad":
        raise ImageError("bad")
    return Image.new("1", (int(data), 1000))


def run(names, *, sizes=None, rows=512, opening=None, texts=None, fails=()):
    """Return the results, and the batches' places as `compute` was asked; a result is the place and the width."""
    items = [
        AnswerItem([name] if name else [], [Turn("user", f"{n:03}" + (texts[n] if texts else ""))])
        for n, name in enumerate(names)
    ]
    taken = []

    def compute(batch, images):
        places = [int(item.prompt[0].content[:3]) for item in batch]
        taken.append(places)
        if set(places) & set(fails):
            raise ValueError("no")
        return [(n, own[0].width if own else None) for n, own in zip(places, images, strict=True)]

    images = {name: name.encode() for name in names if name is not None}
    opening = opening or Opening(open_named)
    return in_batches(compute, items, images, opening=opening, sizes=sizes or [1] * len(items), rows=rows), taken


def test_the_rows_of_a_batch():
    """Rows 2 + 3 fit into 5; a question of 9 is a batch by itself; one without an image needs none."""
    results, taken = run(["1", None, "3", "4", "5"], sizes=[2, 3, 1, 9, 1], rows=5)
    assert results == [(0, 1), (1, None), (2, 3), (3, 4), (4, 5)] and taken == [[0, 1], [2], [3], [4]]


def test_the_pixels_of_a_batch(monkeypatch):
    """Each is its width times a thousand; 6,000 at once. An image that two questions share counts once."""
    monkeypatch.setattr(batches, "PIXELS_AT_ONCE", 6000)
    results, taken = run(["3", "3", "2", "4", "9", "1"])
    assert [width for _, width in results] == [3, 3, 2, 4, 9, 1] and taken == [[0, 1, 2], [3], [4], [5]]


def test_questions_that_ask_for_nothing_do_not_pile_their_images_up(monkeypatch):
    """Their size is 0: without rows a batch is full by its pixels all the same."""
    monkeypatch.setattr(batches, "PIXELS_AT_ONCE", 6000)
    _, taken = run(["3", "4", "5"], sizes=[0, 0, 0])
    assert taken == [[0], [1], [2]]


def test_the_text_of_a_batch(monkeypatch):
    """Padded to the longest: 3 + 7 characters in two rows are 20."""
    monkeypatch.setattr(batches, "CHARACTERS_AT_ONCE", 20)
    assert run([None] * 4, texts=["", "x" * 7, "", "x" * 20])[1] == [[0, 1], [2], [3]]


def test_an_image_that_is_bad_is_opened_once_and_refuses_its_questions():
    opened = []

    def opening(data):
        opened.append(data)
        return open_named(data)

    results, taken = run(["bad", "2", "bad", "2", None], opening=Opening(opening))
    assert results == [Declined.IMAGE, (1, 2), Declined.IMAGE, (3, 2), (4, None)]
    assert opened == [b"bad", b"2"] and taken == [[1, 3, 4]]


def test_the_pixels_of_a_request():
    """5,000 in all: what comes after they are passed is refused; what is open already is not opened again."""
    results, _ = run(["3", "2", "1", "4", "1", None], opening=Opening(open_named, 5000))
    assert results == [(0, 3), (1, 2), (2, 1), Declined.LIMIT, (4, 1), (5, None)]


def test_a_question_on_which_the_model_fails_is_asked_alone():
    results, taken = run([None] * 4, rows=2, fails=(2,))
    assert results == [(0, None), (1, None), Declined.ERROR, (3, None)]
    assert taken == [[0, 1], [2, 3], [2], [3]]

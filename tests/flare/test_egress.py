"""What a site with a thousand secrets lets out, and what FLARE writes down about it (threats T17, T22)."""

import base64
import io
import json
import shutil
import tomllib

import pytest
import tomli_w
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from accord.federation.answering import key_of, question_key, write_truth
from accord.federation.messages import (
    Absence,
    AnswerItem,
    AnswerReply,
    AnswerRequest,
    Card,
    CardRequest,
    Declined,
    Refusal,
    ScoreItem,
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
from accord.flare.frames import site_socket, socket_folder
from accord.flare.ledger import site_log
from accord.flare.service import SiteService, open_site_folder
from accord.types import vqa_prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPLIES = {"colour": lambda message: encode(Refusal("", "gone"))}  # until the site's own service is there
KINDS = ("Ward", "Yes", "No", "File", "Pixel", "Note")
HOSTILE = 'Marple\r\n2026-01-01 ERROR forged\x1b[2J\u202e\x00\u2028}{"level": "INFO"}'
"""What the server asks about; it is no secret of the site, and in no log of it."""


def secrets_of(n):
    return [f"{word}{n:03}q{(n * 7919) % 997:03}" for word in KINDS]


def disguises(secret):
    """The secret's bytes in plain, UTF-16, hexadecimal digits, and base64 wherever in three bytes it begins."""
    raw = secret.encode()
    yield from (raw, secret.encode("utf-16-le"), secret.encode("utf-16-be"), raw.hex().encode())
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + raw + b"\0" * (-(shift + len(raw)) % 3))
        yield coded[(0, 2, 3)[shift] : len(coded) - 4]


def png(text, size):
    """A picture whose file holds the text."""
    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("Comment", text)
    Image.new("RGB", size, "white").save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def plant(folder, count=200):
    """Write pairs with a secret in the question, both answers, the image's path and bytes, and the annotator's name."""
    folder.mkdir()
    lines = []
    for n in range(count):
        ward, yes, no, file, pixel, note = secrets_of(n)
        (folder / f"{file}.png").write_bytes(png(pixel, (40, 70 + n)))
        pair = {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ward}]}],
            "chosen": [{"role": "assistant", "content": yes}],
            "rejected": [{"role": "assistant", "content": no}],
            "images": [f"{file}.png"],
            "annotator": note,
        }
        lines.append(json.dumps(pair) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return [secret for n in range(count) for secret in secrets_of(n)]


@pytest.fixture(scope="module")
def planted(site_folders, tmp_path_factory):
    """The folder of site `colour`, whose own pairs are the planted ones, and the secrets."""
    root = tmp_path_factory.mktemp("planted")
    secrets = plant(root / "data")
    shutil.copytree(site_folders["colour"], root / "site")
    table = tomllib.loads((root / "site" / "recipe.toml").read_text())
    table["sites"][0]["preferences"] = str(root / "data" / "pairs.jsonl")
    table["sites"][0] |= {"finetune": False, "answers": True}
    book = {question_key([], vqa_prompt(secret)): (secret,) for secret in secrets}
    write_truth(root / "site" / "sites" / "colour" / "truth.json", {**book, key_of(HELD): (secrets[0],)})
    (root / "site" / "recipe.toml").write_text(tomli_w.dumps(table))
    assert len(set(secrets)) == 1200
    return root, secrets


HELD = AnswerItem([], to_turns([{"role": "user", "content": "which ward?"}]))
"""A question whose answer the site holds: a secret."""


def score_request(name, picture):
    item = ScoreItem([image_name(picture)], to_turns(vqa_prompt(HOSTILE)), ["red", "Marple"])
    return ScoreRequest(name, {image_name(picture): picture}, [item])


@pytest.fixture(scope="module")
def conversation(wire, planted, in_process, square):
    """Card, router and scores; then requests that fail, with secrets in their errors: what came back, and the logs."""
    root, secrets = planted
    wire.services["colour"].stop()
    folder = root / "site"
    site = open_site_folder(folder, "colour")
    weights = (in_process / "router" / "router.safetensors").read_bytes()
    router = UpdateRequest("router", "router", 0, weights, 5)
    engine, came, log = wire.engine(), {}, root / "log"
    log.mkdir()

    def ask(name, request):
        came[name] = engine.ask({"colour": request}, deadline=120)["colour"]

    path = site_socket(socket_folder(wire.kits / "colour"), "colour")
    left, answer = [], SiteService._answer
    blue, asked = square("blue"), to_turns(vqa_prompt("what colour is it?"))

    class Listening(SiteService):
        def _answer(self, data, connection):
            left.append(answer(self, data, connection))
            return left[-1]

    with site_log(log), Listening(site, folder, path):
        (root / "data").rename(root / "away")
        ask("router without its images", router)
        (root / "away").rename(root / "data")
        ask("card", CardRequest("card"))
        ask("router", router)
        ask("scores", score_request("scores", square("red")))
        ask(
            "answers", AnswerRequest("answers", {image_name(blue): blue}, [AnswerItem([image_name(blue)], asked), HELD])
        )
        held = ScoreItem([], HELD.prompt, ["ward 1", secrets[0], "ward 3"])
        ask("truth", ScoreRequest("truth", {}, [held], judge="answer", truth=True))
        score = site.reward_model.score

        def failing(*_):
            raise ValueError(f"cannot score {secrets[0]} of {secrets[3]}, annotated by {secrets[5]}")

        site.reward_model.score = failing
        ask("model fails", score_request("fails", square("blue")))
        site.reward_model.score = score
        ask("no image", score_request("bad", b"GIF89a"))
    ask("service gone", CardRequest("late"))
    engine.close()
    wire.open = None
    for name in ("colour", "server"):  # what is written at the end is written
        wire.kill(name)
    return came, left


def files(*folders):
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def found(secrets, blob):
    return [(secret, disguise) for secret in secrets for disguise in disguises(secret) if disguise in blob]


def test_each_request_came_to_its_end(conversation):
    came, _ = conversation
    assert {name: r.reason if isinstance(r, Absence) else type(r) for name, r in came.items()} == {
        "router without its images": "error",
        "card": Card,
        "router": UpdateReply,
        "scores": ScoreReply,
        "answers": AnswerReply,
        "truth": ScoreReply,
        "model fails": "error",
        "no image": ScoreReply,  # its one question is refused
        "service gone": "gone",
    }
    assert came["no image"].refused == {0: Declined.IMAGE}


def test_no_secret_leaves(conversation, planted, wire):
    """T22: replies, and every file of the server's and the operator's kits, jobs and logs among them."""
    came, left = conversation
    root, secrets = planted
    assert [type(decode_reply(reply)) for reply in left] == [
        *(Refusal, Card, UpdateReply, ScoreReply, AnswerReply, ScoreReply, Refusal, ScoreReply)
    ]
    assert check_answers(AnswerRequest("answers", {}, [HELD, HELD]), came["answers"]) == came["answers"].answers
    assert came["truth"].scores == [[0.0, 1.0, 0.0]]  # the secret was guessed by the server: that much is told
    scores = next(reply for reply in left if isinstance(decode_reply(reply), ScoreReply))
    assert len(scores) < 80 + 9 * 2  # two scores, and the message around them
    written = files(wire.kits / "server", wire.kits / "operator")
    names = {path.name for path in written}
    assert {"log.txt", "log.json", "audit.log"} <= names and any("storage" in path.parts for path in written)
    everything = b"\n".join([*left, *written.values(), *map(bytes, written), (wire.root / "server.log").read_bytes()])
    assert len(everything) > 10_000
    assert found(secrets, everything) == []
    inside = b"".join(files(root / "log").values())
    assert len(found(secrets, inside)) >= 3  # the search finds what is there: the errors' texts stay at the site


def test_flare_knows_neither_questions_nor_secrets(conversation, planted, wire):
    """A site's own FLARE, and the server's, only pass bytes on: their logs do not hold what was asked."""
    _, secrets = planted
    logs = files(wire.kits / "colour", wire.kits / "server")
    written = b"\n".join([*logs.values(), *((wire.root / f"{name}.log").read_bytes() for name in ("colour", "server"))])
    assert found(["Marple", "GIF89a"], written) == [] and found(secrets, written) == []
    assert any(path.name == "log.txt" and path.stat().st_size > 1000 for path in logs)


def test_every_line_of_a_log_parses(conversation, wire):
    """T17: FLARE's JSON logs, of processes and jobs at the server and at the site, and no control byte in any."""
    logs = {path: data for path, data in files(wire.kits).items() if path.name == "log.json"}
    assert {path.relative_to(wire.kits).parts[0] for path in logs} == {"server", "colour"}
    for path, data in logs.items():
        lines = data.splitlines()
        assert lines and all(isinstance(json.loads(line), dict) for line in lines), path
        assert not any(byte < 32 and byte != 10 for byte in data), path
        assert b"forged" not in data

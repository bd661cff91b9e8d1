"""A reward model from a file of pairs and nothing else: the command line, the same in Python, and the server."""

import http.client
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from accord.cli import main
from accord.data.images import load_image
from accord.data.preferences import read_preferences, write_preferences
from accord.errors import CheckpointError, DataError, RunError
from accord.federation.loopback import MAX_ANSWERS, LoopbackServer, score_request
from accord.federation.messages import ImageBlock, TextBlock, to_turns
from accord.federation.site import Site
from accord.rewards.alone import ALONE, train_on_pairs
from accord.rewards.model import RewardModel
from accord.rewards.train import pair_margins, rank_pairs, train_reward_model
from accord.types import vqa_prompt

COLOURS = ("red", "blue", "green", "yellow")
SHORT = replace(ALONE, steps=2, prompts_per_batch=4, evaluate_every=1)


@pytest.fixture(scope="module")
def pairs(prefer):
    return [
        prefer(4 * n + k, right, wrong)
        for n, right in enumerate(COLOURS)
        for k, wrong in enumerate(COLOURS)
        if right != wrong
    ]


@pytest.fixture(scope="module")
def trained(pairs):
    return train_on_pairs("accord/idefics3", pairs, SHORT, seed=3)


def test_it_is_the_sites_training(pairs, trained, tmp_path):
    """The same weights, to the bit, as the site's function gives from the same seed."""
    from transformers import set_seed

    set_seed(3)
    model = RewardModel.from_checkpoint("accord/idefics3")
    ranking = train_reward_model(model, pairs, [], [], SHORT, seed=3, out=tmp_path)
    assert ranking == trained[1] and len(ranking.by_type) == 1
    ours, theirs = trained[0].state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert trained[0].standardisation == model.standardisation


def test_margins_are_differences_of_scores(pairs, trained):
    """In the order of the pairs; the share above 0 is the pair accuracy."""
    model, _ = trained
    margins = pair_margins(model, pairs, prompts_at_once=3)
    for pair, margin in zip(pairs, margins, strict=True):
        (scores,) = model.score([pair.prompt], [load_image(pair.image)], [[pair.chosen, pair.rejected]])
        assert margin == pytest.approx(float(scores[0] - scores[1]), abs=1e-5)
    assert rank_pairs(model, pairs).macro == sum(margin > 0 for margin in margins) / len(pairs)


def test_what_it_refuses_it_refuses_before_it_loads_anything(pairs, monkeypatch):
    monkeypatch.setattr(RewardModel, "from_checkpoint", None)
    two = replace(pairs[0], images=pairs[0].images * 2)

    def single(checkpoint, *, several):
        raise CheckpointError(f"{checkpoint} takes one image, several is {several}")

    monkeypatch.setattr("accord.rewards.alone.try_checkpoint", single)
    with pytest.raises(CheckpointError, match="accord/idefics3 takes one image, several is True"):
        train_on_pairs("accord/idefics3", [two, *pairs])
    monkeypatch.setattr("accord.rewards.alone.reads_images", lambda _: False)
    with pytest.raises(DataError, match=r"pairs are about images, and accord/idefics3 is a text-only model; name a"):
        train_on_pairs("accord/idefics3", pairs)


def run(monkeypatch, capsys, *words):
    """Return the status, and what was said on either stream."""
    monkeypatch.setattr("sys.argv", ["accord", "reward", *map(str, words)])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


def test_train_and_evaluate_from_the_command_line(pairs, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "pairs.jsonl", tmp_path / "reward"
    write_preferences(file, pairs)
    train = ("train", file, "--model", "accord/idefics3", "--out", out, "--steps", 2, "--batch", 4, "--quiet")
    status, said, _ = run(monkeypatch, capsys, *train, "--head", "mlp", "--centring", 0)
    assert (
        status == 0
        and f"12 pairs: {out}" in said
        and re.search(r"% of [1-9]\d* pairs kept back are judged as people did", said)
    )
    model = RewardModel.load(out)
    assert model.kind == "mlp" and model.lora is None
    page = tmp_path / "page.html"
    status, said, _ = run(monkeypatch, capsys, "evaluate", out, file, "--report", page)
    margins = pair_margins(model, read_preferences(file))
    assert status == 0 and said.startswith(f"{sum(m > 0 for m in margins) / 12:.1%} of 12 pairs are judged as people")
    assert "calibration error" in said and page.is_file()
    status, said, told = run(monkeypatch, capsys, *train, "--lora-rank", 2)
    assert f"{out} holds a reward model, which the new one will replace" in told
    assert status == 0 and RewardModel.load(out).lora is not None


def test_no_other_folder_is_replaced(pairs, tmp_path, monkeypatch, capsys):
    write_preferences(tmp_path / "pairs.jsonl", pairs)
    train = ("train", tmp_path / "pairs.jsonl", "--model", "accord/idefics3", "--out", tmp_path)
    status, _, said = run(monkeypatch, capsys, *train)
    assert status == 2 and "exists and is no reward model" in said and (tmp_path / "pairs.jsonl").is_file()
    (tmp_path / "reward.json").write_text("{}")
    status, _, said = run(monkeypatch, capsys, *train)
    assert status == 2 and "holds images, pairs.jsonl beside a reward model" in said
    assert (tmp_path / "pairs.jsonl").is_file()
    train = (*train[:-1], tmp_path / "new", "--head", "deep")
    status, _, said = run(monkeypatch, capsys, *train)
    assert status == 2 and "head must be" in said and not (tmp_path / "new").exists()


@contextmanager
def serving(model):
    with LoopbackServer(Site("alone", model)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, body, *, path="/score", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, sent, {"Content-Type": "application/json", **headers})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def in_text(data):
    import base64

    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_the_server_gives_the_models_scores(pairs, trained):
    """To the bit, for words and for a conversation; two clients at once get their own."""
    model, pair = trained[0], pairs[0]
    answers = ["red", "blue", ""]
    (expected,) = model.score([pair.prompt], [load_image(pair.image)], [answers])
    question = {"prompt": "what colour is it?", "image": in_text(pair.image), "answers": answers}
    with serving(model) as server:
        assert server.address == f"http://127.0.0.1:{server.server_port}"
        assert ask(server, question) == (200, {"scores": expected.tolist()})
        assert ask(server, {**question, "prompt": vqa_prompt("what colour is it?")})[1]["scores"] == expected.tolist()
        found = {}
        asking = [
            threading.Thread(target=lambda n=n: found.update({n: ask(server, {**question, "answers": answers[n:]})}))
            for n in range(2)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert [len(found[n][1]["scores"]) for n in range(2)] == [3, 2]


WRONG = {
    "no answers": ({"prompt": "?"}, "answers must be a list of at least one text, got None"),
    "a number": ({"prompt": "?", "answers": [1]}, "answers must be a list of at least one text"),
    "too many": ({"prompt": "?", "answers": [""] * (MAX_ANSWERS + 1)}, "at most 1024 answers"),
    "a path": ({"prompt": "?", "answers": ["a"], "image": "/etc/hostname"}, "paths are not read and URLs are not"),
    "a URL": ({"prompt": "?", "answers": ["a"], "image": "http://localhost/x.png"}, "paths are not read"),
    "no image": ({"prompt": "?", "answers": ["a"], "image": in_text(b"hello")}, "not a readable PNG, JPEG or WEBP"),
    "no prompt": ({"answers": ["a"]}, "the prompt must be text or a list of messages"),
    "a typing error": ({"prompt": "?", "answers": ["a"], "pictures": []}, "unknown field 'pictures'"),
    "one of several": ({"prompt": "?", "answers": ["a"], "images": [in_text(b"hello"), "x"]}, "paths are not read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_question_is_refused_with_the_remedy(name):
    body, reason = WRONG[name]
    with pytest.raises(DataError, match=reason):
        score_request(body)


def test_a_request_is_the_federations(pairs):
    request = score_request({"prompt": "?", "answers": ["a"], "image": in_text(pairs[0].image)})
    assert list(request.images.values()) == [pairs[0].image]
    (item,) = request.items
    assert item.images == list(request.images) and item.prompt == to_turns(vqa_prompt("?"))
    one, other = in_text(pairs[0].image), in_text(pairs[1].image)
    several = score_request({"prompt": "<image> or <image>?", "answers": ["a"], "images": [one, other, one]})
    assert [several.images[name] for name in several.items[0].images] == [pairs[n].image for n in (0, 1, 0)]
    assert [type(block) for block in several.items[0].prompt[0].content] == [
        *[ImageBlock] * 2,
        TextBlock,
        ImageBlock,
        TextBlock,
    ]


def test_the_server_is_for_this_machine_alone(trained):
    """No other host's name, no form of a web page, no other address; and what fails costs nobody else."""
    with serving(trained[0]) as server:
        good = {"prompt": "?", "answers": ["a"]}
        assert server.server_address[0] == "127.0.0.1"
        assert ask(server, good, Host="attacker.example")[0] == 403
        assert ask(server, good, Host="attacker.example:80")[0] == 403
        assert ask(server, good, **{"Content-Type": "text/plain"})[0] == 415
        assert ask(server, good, path="/")[0] == 404
        assert ask(server, b"", **{"Content-Length": "99999999999"})[0] == 413
        assert ask(server, b"{")[0] == 400 and ask(server, b"[1]")[0] == 400
        assert ask(server, b"[" * 100_000)[0] == 400
        status, said = ask(server, good)
        assert status == 200 and len(said["scores"]) == 1
        with pytest.raises(RunError, match=r"cannot listen on 127\.0\.0\.1:\d+ .*choose another --port"):
            LoopbackServer(server.site, server.server_port)


def test_scores_that_are_not_finite_are_an_error(trained, monkeypatch):
    with serving(trained[0]) as server:
        monkeypatch.setattr(server.site, "scores", lambda request: [[float("nan")]])
        status, said = ask(server, {"prompt": "?", "answers": ["a"]})
    assert status == 400 and "not finite" in said["error"]

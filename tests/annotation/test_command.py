"""`accord annotate` from a shell: start, SIGKILL in the middle, go on, export, train."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from accord.annotation.journal import read_judgements
from accord.cli import main
from accord.data.captions import Judgements, judged_pairs
from accord.data.captions import read_judgements as read_crowd
from accord.data.preferences import read_preferences, write_preferences
from accord.rewards.model import RewardModel

FLICKR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "flickr8k"
"""Photographs with people's judgements of captions; not part of the repository."""


def run(monkeypatch, capsys, *words):
    """Return the status of a command, and what it said on either stream."""
    monkeypatch.setattr("sys.argv", ["accord", *map(str, words)])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    return status, said.out, said.err


def prefer(own, name, wanted):
    """Judge all pairs over HTTP: what `wanted` says of the two answers shown, 0 or 1, or another choice."""
    shown = own.post("/api/next", annotator=name)
    while (pair := shown["pair"]) is not None:
        found = wanted(pair)
        choice = found if isinstance(found, str) else ("left", "right")[found]
        shown = own.post("/api/judge", annotator=name, pair=pair["id"], choice=choice)
    return shown["progress"]


def good(pair):
    """Prefer the answers that begin with `good`."""
    return int(pair["right"].startswith("good"))


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(running, client, answers_file, tmp_path):
    """SIGKILL after four judgements, in the middle of writing a fifth: four stand, and the fifth is asked again."""
    folder, journal = tmp_path / "annotation", tmp_path / "annotation" / "judgements.jsonl"
    words = (folder, "--pairs", answers_file(9), "--overlap", 0, "--no-open")
    first = running(*words)
    own = client(first.address()).enter()
    shown = own.post("/api/next", annotator="A")
    for _ in range(4):
        shown = own.post(
            "/api/judge", annotator="A", pair=shown["pair"]["id"], choice=("left", "right")[good(shown["pair"])]
        )
    waiting = shown["pair"]["id"]
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    with journal.open("ab") as file:
        file.write(b'{"type": "judgement", "id": "0123", "pai')
    again = running(*words)
    own = client(again.address()).enter()
    assert "half a line at the end" in again.said() and "9 pairs, 4 judgements" in again.said()
    shown = own.post("/api/next", annotator="A")
    assert shown["pair"]["id"] == waiting and shown["progress"]["done"] == 4
    assert prefer(own, "A", good)["done"] == 9
    standing, torn = read_judgements(journal)
    assert torn == 0 and len({each.pair for each in standing}) == 9
    os.kill(again.process.pid, signal.SIGINT)
    assert again.process.wait(60) == 0


def test_what_does_not_go_together_is_refused(monkeypatch, capsys, tmp_path, answers_file):
    out = tmp_path / "out.jsonl"
    both = run(monkeypatch, capsys, "annotate", tmp_path / "a", "--export", out, "--pairs", answers_file())
    assert both[0] == 2 and "--export writes what was judged" in both[2]
    nothing = run(monkeypatch, capsys, "annotate", tmp_path / "a")
    assert nothing[0] == 2 and "has no pairs yet" in nothing[2]
    none = run(monkeypatch, capsys, "annotate", tmp_path / "b", "--questions", tmp_path)
    assert none[0] == 2 and "give --questions and --policy together" in none[2]


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys, tmp_path, missing):
    for name in [
        name for name in sys.modules if name.partition(".")[0] == missing or name == "accord.annotation.server"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, said = run(monkeypatch, capsys, "annotate", tmp_path / "a")
    assert status == 2 and f"needs {missing}" in said and "pip install 'accord[annotate]'" in said
    assert not (tmp_path / "a").exists()


def test_policies_from_the_command_line(monkeypatch, capsys, tmp_path, vqa_folder, llava):
    """Samples of one policy on questions, at most six; the page itself is not waited for."""
    from accord.annotation.folder import read_pairs
    from accord.annotation.server import Page

    monkeypatch.setattr(Page, "serve", lambda page: None)
    folder = tmp_path / "annotation"
    words = ("annotate", folder, "--questions", vqa_folder, "--split", "public", "--policy", llava, "--quiet")
    status, said, _ = run(monkeypatch, capsys, *words, "--max-new-tokens", 4, "--samples", 3, "--limit", 6)
    assert status == 0 and said.startswith("http://127.0.0.1:") and 0 < len(read_pairs(folder)) <= 6
    status, _, said = run(monkeypatch, capsys, *words[:4], "--split", "nothing", *words[6:], "--seed", 0)
    assert status == 2 and "has no question of split 'nothing'; it has base" in said


def photographs(count):
    """Return pairs of captions of one photograph of which the crowd gave one a larger share of yes."""
    import random

    rows = read_crowd(FLICKR, split="private")
    pairs = judged_pairs(rows, Judgements(experts=(), crowd=True, rejected_per_caption=1), random.Random(0))
    unordered = {(p.question_id, *sorted((p.chosen, p.rejected))): p for p in pairs}  # each pair of captions once
    return list(unordered.values())[:count]


@pytest.mark.slow
@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"{FLICKR} is not there")
def test_judgements_through_the_page_train_the_model_that_the_file_trains(
    monkeypatch, capsys, tmp_path, desk, serving, client
):
    """300 human judgements, once as a file of preferences and once replayed over HTTP: the same weights, to the bit."""
    from accord.annotation.collect import Source, collect, settle
    from accord.annotation.desk import Desk
    from accord.annotation.folder import open_journal

    pairs = photographs(300)
    assert len(pairs) == 300 and len({pair.question_id for pair in pairs}) > 20
    file, folder, out = tmp_path / "human" / "pairs.jsonl", tmp_path / "annotation", tmp_path / "out" / "pairs.jsonl"
    write_preferences(file, pairs)
    better = {(p.question_id, *sorted((p.chosen, p.rejected))): p.chosen for p in pairs}

    settle(folder, overlap=0.0, seed=0)
    candidates = {c.id: c for c in collect(folder, Source(file=file), tell=print)}
    assert len(candidates) == 300
    with serving(Desk(list(candidates.values()), open_journal(folder), overlap=0.0, seed=0)) as page:
        own = client(page.address).enter()

        def human(shown):
            key = candidates[shown["id"]].question_id, *sorted((shown["left"], shown["right"]))
            return int(better[key] == shown["right"])

        assert prefer(own, "crowd", human)["done"] == 300
        sides = own.post("/api/agreement")["everyone"]
    assert sides["left"] + sides["right"] == 300 and 110 < sides["left"] < 190
    status, said, _ = run(monkeypatch, capsys, "annotate", folder, "--export", out)
    assert status == 0 and said.startswith("300 preferences: ")

    exported = read_preferences(out)
    assert [(p.chosen, p.rejected, p.question_id) for p in exported] == [
        (p.chosen, p.rejected, p.question_id) for p in pairs
    ]
    words = ("--model", "accord/idefics3", "--steps", 2, "--batch", 4, "--quiet")
    weights = []
    for name, given in (("of-file", file), ("of-page", out)):
        status, said, _ = run(monkeypatch, capsys, "reward", "train", given, *words, "--out", tmp_path / name)
        assert status == 0 and "300 pairs" in said
        model = RewardModel.load(tmp_path / name)
        weights.append(({**model.state_dict()}, model.standardisation))
    (one, scale), (other, other_scale) = weights
    assert scale == other_scale and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    untrained = RewardModel.from_checkpoint("accord/idefics3").state_dict()
    assert not all(torch.equal(one[name], untrained[name]) for name in one if "head" not in name)


def test_rows_of_an_export_hold_their_time(monkeypatch, capsys, tmp_path, desk, serving, client):
    """What the command writes after judging over HTTP: annotator, time, seconds and tie of each row."""
    from accord.annotation.folder import Settings, write_settings

    open_desk = desk(9)
    write_settings(tmp_path / "annotation", Settings(0.0, 0))
    with serving(open_desk) as page:
        prefer(client(page.address).enter(), "A", lambda pair: "tie" if pair["left"].endswith("8") else good(pair))
    status, said, _ = run(monkeypatch, capsys, "annotate", tmp_path / "annotation", "--export", tmp_path / "p.jsonl")
    assert status == 0 and said.splitlines()[0].startswith("8 preferences") and "1 ties, 0 both bad" in said
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(read_preferences(tmp_path / "p.jsonl")) == 8
    assert {(row["annotator"], row["tie"], row["seconds"] < 60, row["time"][:2]) for row in rows} == {
        ("A", False, True, "20")
    }

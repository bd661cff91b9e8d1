"""What was judged survives whatever happens to the process, and a torn line is no judgement."""

import json

import pytest

from accord.annotation.journal import Journal, Judgement, read_judgements
from accord.errors import RunError


def said(number, annotator="A", pair=None, choice="left"):
    return Judgement(str(number), pair or f"pair{number}", annotator, choice, 0, "", 1.5, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "judgements.jsonl"


def test_what_is_added_is_read(file):
    journal = Journal(file)
    for n in range(3):
        journal.add(said(n))
    assert read_judgements(file) == ([said(0), said(1), said(2)], 0) and journal.standing == [said(n) for n in range(3)]
    assert Journal(file).standing == journal.standing
    assert json.loads(file.read_text().splitlines()[0])["type"] == "judgement"


def test_it_is_on_disk_when_add_returns(file, monkeypatch):
    """The file is synced after the line is written, and before it counts."""
    synced = []
    journal = Journal(file)
    monkeypatch.setattr("accord.annotation.journal.sync", lambda path: synced.append(path.read_bytes()))
    journal.add(said(1))
    assert synced == [file.read_bytes()] and b'"pair1"' in synced[0]


def test_a_withdrawal_takes_back_and_a_second_judgement_replaces(file):
    journal = Journal(file)
    journal.add(said(1))
    journal.add(said(2))
    journal.withdraw(said(1), "2026-01-01T00:00:01+00:00")
    journal.add(said(3, pair="pair2", choice="tie"))
    assert [each.id for each in journal.standing] == ["3"] == [each.id for each in read_judgements(file)[0]]
    assert len(file.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("kept", [1, 20, 60])
def test_a_torn_last_line_is_cut_off(file, kept):
    """It was never called saved; what comes after it begins a line of its own."""
    journal = Journal(file)
    journal.add(said(1))
    whole = file.read_bytes()
    journal.add(said(2))
    file.write_bytes(file.read_bytes()[: len(whole) + kept])
    assert read_judgements(file) == ([said(1)], kept)
    again = Journal(file)
    assert (again.torn, again.standing) == (kept, [said(1)]) and file.read_bytes() == whole
    again.add(said(3))
    assert read_judgements(file) == ([said(1), said(3)], 0)


def test_a_whole_last_line_without_its_end_stands(file):
    journal = Journal(file)
    journal.add(said(1))
    file.write_bytes(file.read_bytes()[:-1])
    again = Journal(file)
    assert (again.torn, again.standing) == (0, [said(1)])
    again.add(said(2))
    assert read_judgements(file) == ([said(1), said(2)], 0)


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'{"type": "judgement"}', b"\xff", b"", b'{"type": "withdrawal", "id": 1, "annotator": ""}'],
)
def test_a_damaged_line_in_the_middle_is_named(file, line):
    Journal(file).add(said(1))
    file.write_bytes(line + b"\n" + file.read_bytes())
    with pytest.raises(RunError, match=r"judgements\.jsonl, line 1, is damaged .*correct that line or remove it"):
        Journal(file)


def test_a_judgement_that_cannot_be_written_does_not_count(file, monkeypatch):
    journal = Journal(file)

    def full(*_):
        raise RunError("the disk is full")

    monkeypatch.setattr("accord.annotation.journal.append_line", full)
    with pytest.raises(RunError, match="full"):
        journal.add(said(1))
    assert journal.standing == [] == read_judgements(file)[0]


def test_preferred_is_the_answer_on_the_chosen_side():
    """Answer 1 stood on the left: left prefers it, right prefers answer 0."""
    left = Judgement("x", "p", "A", "left", 1, "", 1.0, "")
    right = Judgement("x", "p", "A", "right", 1, "", 1.0, "")
    assert (left.preferred, right.preferred, said(1).preferred) == (1, 0, 0)
    assert said(1, choice="tie").preferred is None and said(1, choice="skip").preferred is None

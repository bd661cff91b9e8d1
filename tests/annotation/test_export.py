"""What is written is what was said, and nothing is silently called better."""

import json

import pytest

from accord.annotation.export import export, export_lines, not_ranked_file
from accord.annotation.folder import Settings, read_pairs, write_pairs, write_settings
from accord.data.preferences import read_preferences
from accord.errors import RunError


@pytest.fixture
def judged(desk, tmp_path):
    """Twelve pairs: nine preferences for the good answer, a tie, two bad answers and a skip, all by one annotator."""
    open_desk = desk(12)
    folder = tmp_path / "annotation"
    write_settings(folder, Settings(0.0, 0))
    for n, pair in enumerate(open_desk.candidates.values()):
        handed = open_desk.next("A. B.")
        side = "left" if handed.left == 0 else "right"
        choice = {9: "tie", 10: "both bad", 11: "skip"}.get(n, side)
        open_desk.judge("A. B.", pair.id, choice, "too dark" if choice == "skip" else "")
    return folder


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_preferences_are_trls_form_with_who_and_when(judged, tmp_path):
    out = tmp_path / "out" / "pairs.jsonl"
    found = export(judged, out)
    assert (found.preferences, found.not_ranked, found.unjudged) == (9, {"tie": 1, "both bad": 1, "skip": 1}, 0)
    rows = lines(out)
    assert [row["chosen"][0]["content"] for row in rows] == [f"good {n}" for n in range(9)]
    assert all(row["annotator"] == "A. B." and row["tie"] is False and row["seconds"] >= 0 for row in rows)
    assert all((row["time"].endswith("+00:00") and row["left"] in ("good", "bad")) or row["left"] for row in rows)
    pairs = read_preferences(out)
    assert [(p.chosen, p.rejected) for p in pairs] == [(f"good {n}", f"bad {n}") for n in range(9)]
    assert not any(p.constructed for p in pairs)
    stored = {p.images[0].read_bytes() for p in pairs}
    assert stored == {c.images[0].read_bytes() for c in read_pairs(judged)[:9]}


def test_what_is_no_preference_is_apart(judged, tmp_path):
    """With its choice, its reason and both answers; there is nothing in it that a reader could take for better."""
    found = export(judged, tmp_path / "out" / "pairs.jsonl")
    rows = lines(found.beside)
    assert [(row["choice"], row["tie"], row["reason"]) for row in rows] == [
        ("tie", True, ""),
        ("both bad", False, ""),
        ("skip", False, "too dark"),
    ]
    assert rows[0]["answers"] == ["good 9", "bad 9"]
    assert not any({"chosen", "rejected"} & row.keys() for row in rows)
    assert all((found.beside.parent / row["images"][0]).is_file() for row in rows)
    assert export_lines(found, tmp_path / "p.jsonl")[1] == f"1 ties, 1 both bad, 1 skipped: {found.beside}"


def test_what_nobody_judged_is_counted(desk, tmp_path):
    desk(3)
    write_settings(tmp_path / "annotation", Settings(0.0, 0))
    out = tmp_path / "pairs.jsonl"
    found = export(tmp_path / "annotation", out)
    assert (found.preferences, found.unjudged) == (0, 3) and out.read_text() == ""
    assert export_lines(found, out)[-1] == "3 pairs that nobody has judged yet are in neither"


def test_each_judgement_is_a_row(judged, desk, tmp_path):
    """A second annotator who was handed pair 0 prefers the other answer: both rows are there, with their names."""
    open_desk = desk(12, overlap=1.0)
    handed = open_desk.next("C")
    open_desk.judge("C", handed.pair.id, "left" if handed.left == 1 else "right")
    export(judged, tmp_path / "pairs.jsonl")
    first, second = lines(tmp_path / "pairs.jsonl")[:2]
    assert (first["annotator"], second["annotator"]) == ("A. B.", "C")
    assert first["chosen"] == second["rejected"] and first["rejected"] == second["chosen"]


def test_two_policies_are_named_and_counted(judged, tmp_path):
    from dataclasses import replace

    write_pairs(judged, [replace(each, origins=("old", "new")) for each in read_pairs(judged)])
    out = tmp_path / "pairs.jsonl"
    found = export(judged, out)
    assert found.wins == {"old": 9} and "old was preferred 9 of 9 times" in export_lines(found, out)
    assert (lines(out)[0]["chosen_from"], lines(out)[0]["rejected_from"]) == ("old", "new")
    assert lines(not_ranked_file(out))[0]["answers_from"] == ["old", "new"]


def test_an_export_is_replaced_and_nothing_else(judged, tmp_path, answers_file):
    out = tmp_path / "out.jsonl"
    export(judged, out)
    before = out.read_bytes()
    export(judged, out)
    assert out.read_bytes() == before
    brought = answers_file()
    for file in (brought, judged / "to-judge.jsonl", judged / "judgements.jsonl", tmp_path):
        content = file.read_bytes() if file.is_file() else None
        with pytest.raises(RunError, match="name another file"):
            export(judged, file)
        assert content is None or file.read_bytes() == content


def test_a_folder_that_is_no_annotation(tmp_path):
    with pytest.raises(RunError, match=r"no annotation\.json, so this is no annotation; start one with"):
        export(tmp_path, tmp_path / "x.jsonl")

"""How pairs come into a folder, and that the same command a second time changes nothing."""

import json

import pytest

from accord.annotation import sampling
from accord.annotation.collect import Source, collect, settle
from accord.annotation.desk import Desk
from accord.annotation.folder import held, open_journal, read_pairs, read_settings, write_pairs
from accord.annotation.pairs import read_candidates
from accord.errors import DataError, RecipeError, RunError
from accord.rewards.model import RewardModel


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "annotation"


def quiet(_):
    pass


def test_a_file_twice_is_once(folder, answers_file):
    settle(folder, overlap=0.5, seed=3)
    source = Source(file=answers_file(8))
    first = collect(folder, source, tell=quiet)
    content = (folder / "to-judge.jsonl").read_bytes()
    assert len(first) == 8 and {each.parent.name for c in first for each in c.images} == {"images"}
    assert [c.id for c in collect(folder, source, tell=quiet)] == [c.id for c in first]
    assert (folder / "to-judge.jsonl").read_bytes() == content
    more = collect(folder, Source(file=answers_file(10)), tell=quiet)
    assert [c.id for c in more[:8]] == [c.id for c in first] and len(more) == 10
    assert [c.id for c in collect(folder, Source(), tell=quiet)] == [c.id for c in more]


def test_the_folder_needs_nothing_else(folder, answers_file, tmp_path):
    """Moved, and without the file that the pairs came from, it has its pairs and pictures; the bytes are the same."""
    file = answers_file(3)
    settle(folder, overlap=None, seed=None)
    collect(folder, Source(file=file), tell=quiet)
    expected = [(file.parent / "images" / f"{n}.png").read_bytes() for n in range(3)]
    moved = folder.rename(tmp_path / "elsewhere")
    file.unlink()
    assert [c.images[0].read_bytes() for c in read_pairs(moved)] == expected


def test_a_limit_is_of_the_folder(folder, answers_file):
    settle(folder, overlap=None, seed=None)
    source = Source(file=answers_file(8), limit=5)
    assert len(collect(folder, source, tell=quiet)) == 5 == len(collect(folder, source, tell=quiet))


def test_policies_are_sampled_once(folder, ask, monkeypatch, answers_file):
    asked = []
    candidates = read_candidates(answers_file(2))
    monkeypatch.setattr(sampling, "sample_candidates", lambda questions, *_, **how: asked.append(how) or candidates)
    settle(folder, overlap=None, seed=None)
    source = Source(questions=lambda: [ask(0)], data="x", policies=("a",))
    told = []
    assert len(collect(folder, source, tell=told.append)) == 2
    assert told == ["1 questions gave 2 pairs of answers that differ"]
    assert len(collect(folder, source, tell=told.append)) == 2 and len(asked) == 1
    assert asked[0]["every"] is False and read_settings(folder).sampled == ["a: 4 samples of x, seed 0"]


def test_what_is_uncertain_comes_first_and_what_is_judged_stays(folder, answers_file, monkeypatch):
    """The doubts of the model: pair 7 first. Of eight, four are taken; later the waiting ones are put in order anew."""
    monkeypatch.setattr(RewardModel, "load", lambda path: path)
    order = {"best": [7, 2, 5, 0], "other": [0, 5, 2, 7]}

    def doubts(model, candidates):
        rank = order[str(model)]
        number = {c.id: int(c.answers[0].split()[1]) for c in candidates}
        return sorted(candidates, key=lambda c: (rank.index(number[c.id]) if number[c.id] in rank else 9, number[c.id]))

    monkeypatch.setattr(sampling, "least_certain", doubts)
    settle(folder, overlap=0.0, seed=0)
    found = collect(folder, Source(file=answers_file(8), limit=4, uncertain="best"), tell=quiet)
    assert [c.answers[0] for c in found] == ["good 7", "good 2", "good 5", "good 0"]
    desk = Desk(found, open_journal(folder), overlap=0.0, seed=0)
    desk.judge("A", desk.next("A").pair.id, "left")
    again = collect(folder, Source(uncertain="other"), tell=quiet)
    assert [c.answers[0] for c in again] == ["good 7", "good 0", "good 5", "good 2"]
    assert [c.id for c in read_pairs(folder)] == [c.id for c in again]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policies": ("a",)}, "give --questions and --policy together"),
        ({"questions": list}, "give --questions and --policy together"),
        ({"policies": ("a", "b", "c"), "questions": list}, "two policies at most"),
        ({"policies": ("a",), "questions": list, "samples": 1}, "needs 2 samples at least"),
    ],
)
def test_what_is_no_source_is_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        Source(**given)


def test_a_folder_without_pairs(folder):
    settle(folder, overlap=None, seed=None)
    with pytest.raises(RunError, match=r"has no pairs yet; add --pairs FILE, or --questions DATA with --policy"):
        collect(folder, Source(), tell=quiet)


def test_settings_hold_from_the_start(folder):
    settle(folder, overlap=0.25, seed=None)
    assert settle(folder, overlap=None, seed=None).overlap == 0.25
    with pytest.raises(RunError, match=r"was started with overlap 0\.25, got 0\.5; leave --overlap out"):
        settle(folder, overlap=0.5, seed=None)
    with pytest.raises(RunError, match="started with seed 0, got 1"):
        settle(folder, overlap=None, seed=1)
    with pytest.raises(RecipeError, match=r"overlap must be a share from 0 to 1, got 1\.5"):
        settle(folder, overlap=1.5, seed=None)


def test_another_folder_is_not_taken_over(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"exists and is no annotation: it has no annotation\.json; name another folder"):
        settle(tmp_path, overlap=None, seed=None)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["letter.txt"]


def test_a_folder_is_served_once(folder):
    with held(folder), pytest.raises(RunError, match=r"is served already, by process \d+ on "), held(folder):
        pass
    with held(folder):
        pass


def test_one_id_for_two_questions_is_refused(folder, answers_file):
    """A reader of the export would refuse them; so does the folder, before anybody has judged them."""
    settle(folder, overlap=None, seed=None)
    collect(folder, Source(file=answers_file(1, "one", question_id="q")), tell=quiet)
    rows = [{"prompt": "another?", "answers": ["a", "b"], "image": "images/0.png", "question_id": "q"}]
    other = answers_file(1, "two")
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="question_id 'q' stands for two prompts or images"):
        collect(folder, Source(file=other), tell=quiet)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop("answers"),
        lambda row: row.update(images=["../secret.png"]),
        lambda row: row.update(images=["/etc/passwd"]),
        lambda row: row.update(prompt=[]),
        lambda row: row.update(unknown=1),
    ],
)
def test_a_damaged_list_of_pairs_is_named(folder, answers_file, change):
    write_pairs(folder, read_candidates(answers_file(1)))
    row = json.loads((folder / "to-judge.jsonl").read_text())
    change(row)
    (folder / "to-judge.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RunError, match=r"to-judge\.jsonl, line 1, is damaged"):
        read_pairs(folder)

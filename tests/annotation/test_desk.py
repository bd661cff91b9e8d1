"""Who is handed what; nothing is asked twice, and nothing is lost."""

import threading
from collections import Counter

import pytest

from accord.annotation.desk import PATIENCE, Refused
from accord.annotation.folder import read_pairs, write_pairs
from accord.errors import DataError, RunError


def judge_all(desk, name, choice="left"):
    done = []
    while (handed := desk.next(name)) is not None:
        desk.judge(name, handed.pair.id, choice)
        done.append(handed.pair.id)
    return done


def test_one_annotator_sees_each_pair_once_in_order(desk):
    open_desk = desk(8, overlap=0.5)
    assert judge_all(open_desk, "A") == list(open_desk.candidates)


def test_a_page_that_is_loaded_again_shows_the_same(desk):
    open_desk = desk()
    first = open_desk.next("A")
    assert open_desk.next("A") == first == desk().next("A")


def test_the_sides_are_drawn(desk):
    """Of 64 pairs about half have the first answer on the left, and not the same ones for two annotators."""
    open_desk = desk(64, overlap=1.0)
    sides = {}
    for name in "AB":
        judge_all(open_desk, name)
    for each in open_desk._journal.standing:
        sides.setdefault(each.annotator, {})[each.pair] = each.left
    assert all(16 < sum(of.values()) < 48 for of in sides.values()) and sides["A"] != sides["B"]


def test_two_annotators_share_the_work(desk):
    """What both judge is the overlap; the rest is judged once, by one of them."""
    open_desk = desk(40, overlap=0.3)
    turns = ["A", "B"] * 60
    for name in turns:
        if (handed := open_desk.next(name)) is not None:
            open_desk.judge(name, handed.pair.id, "tie")
    times = Counter(each.pair for each in open_desk._journal.standing)
    assert {pair for pair, n in times.items() if n == 2} == open_desk.shared and 4 < len(open_desk.shared) < 20
    assert len(times) == 40 and open_desk.next("A") is None


def test_nobody_gets_what_lies_before_another(desk):
    open_desk = desk(2)
    assert open_desk.next("A").pair.id != open_desk.next("B").pair.id
    assert open_desk.next("C") is None


def test_what_lies_too_long_goes_to_another(desk):
    """And if the first one comes back, both judgements count."""
    now = [0.0]
    open_desk = desk(1, clock=lambda: now[0])
    pair = open_desk.next("A").pair.id
    now[0] = PATIENCE - 1
    assert open_desk.next("B") is None
    now[0] = PATIENCE
    assert open_desk.next("B").pair.id == pair
    open_desk.judge("B", pair, "left")
    open_desk.judge("A", pair, "right")
    assert len(open_desk._journal.standing) == 2 and open_desk.next("A") is None


def test_undo_goes_back_one_by_one(desk):
    """The pair comes back to the one who judged it, also after a crash; a withdrawn judgement is no judgement."""
    open_desk = desk(3)
    order = list(open_desk.candidates)
    for _ in range(2):
        open_desk.judge("A", open_desk.next("A").pair.id, "left")
    assert open_desk.undo("A").pair.id == order[1] == open_desk.next("A").pair.id
    assert open_desk.undo("A").pair.id == order[0] and open_desk.undo("A") is None and open_desk.undo("B") is None
    assert open_desk.next("B").pair.id == order[1]
    open_desk.judge("A", order[0], "right")
    again = desk(3)
    assert [(each.pair, each.choice) for each in again._journal.standing] == [(order[0], "right")]


def test_what_was_not_handed_out_is_refused(desk):
    open_desk = desk(3)
    order = list(open_desk.candidates)
    with pytest.raises(Refused, match="is not the one that A was handed"):
        open_desk.judge("A", order[0], "left")
    open_desk.next("A")
    for pair in (order[1], "", "nonsense"):
        with pytest.raises(Refused):
            open_desk.judge("A", pair, "left")
    open_desk.judge("A", order[0], "left")
    with pytest.raises(Refused):  # sent twice
        open_desk.judge("A", order[0], "left")
    assert len(open_desk._journal.standing) == 1


@pytest.mark.parametrize(
    ("choice", "reason", "message"),
    [
        ("skip", "", "a skip needs a reason"),
        ("skip", " \t", "a skip needs a reason"),
        ("skip", "x" * 501, "a reason has at most 500 letters, got 501"),
        ("left", "because", "only a skip has a reason, got one with 'left'"),
        ("better", "", "a choice is one of left, right, tie, both bad, skip, got 'better'"),
    ],
)
def test_what_is_required_is_required(desk, choice, reason, message):
    open_desk = desk(1)
    pair = open_desk.next("A").pair.id
    with pytest.raises(DataError, match=message):
        open_desk.judge("A", pair, choice, reason)
    assert open_desk._journal.standing == []


def test_a_reason_is_one_line_of_text(desk):
    open_desk = desk(1)
    said = open_desk.judge("A", open_desk.next("A").pair.id, "skip", " too\n dark \ud800\x1b ")
    assert said.reason == "too dark ??"


def test_names(desk):
    """One person is one name, however it is typed; what is no name is refused."""
    open_desk = desk(2)
    name = open_desk.name("  Jose\u0301   M. ")
    assert name == "José M."
    open_desk.judge(name, open_desk.next(name).pair.id, "tie")
    assert open_desk.name("josé m.") == "José M." and open_desk.names() == ["José M."]
    for wrong in ("", "  ", None, 3, "x" * 81, "a\x1bb", "a\u202eb", "\ud800"):
        with pytest.raises(DataError, match="an annotator needs a name of 1 to 80 letters"):
            open_desk.name(wrong)


def test_progress_and_the_time_left(desk):
    """Judgements of 10, 20 and 60 s: the median, 20 s, times the 5 that are left; two at work share what is alone."""
    now = [0.0]
    open_desk = desk(8, clock=lambda: now[0])
    for seconds in (10, 20, 60):
        assert open_desk.progress("A").seconds_left is None
        pair = open_desk.next("A").pair.id
        now[0] += seconds
        assert open_desk.judge("A", pair, "left").seconds == seconds
    found = open_desk.progress("A")
    assert (found.done, found.left, found.total, found.everyone, found.seconds_left) == (3, 5, 8, 0, 100.0)
    open_desk.next("B")
    assert open_desk.progress("A").left == 4 and open_desk.progress("A").seconds_left == 40.0


def test_threads_share_one_desk(desk):
    open_desk = desk(30)
    threads = [threading.Thread(target=judge_all, args=(open_desk, name)) for name in "ABCD"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.pair for each in open_desk._journal.standing) == sorted(open_desk.candidates)
    assert desk(30)._journal.standing == open_desk._journal.standing


def test_a_judgement_of_a_pair_that_is_gone(desk, tmp_path):
    open_desk = desk(2)
    open_desk.judge("A", open_desk.next("A").pair.id, "left")
    write_pairs(tmp_path / "annotation", read_pairs(tmp_path / "annotation")[1:])
    with pytest.raises(RunError, match=r"a judgement of the pair .* which is not in the folder"):
        desk()

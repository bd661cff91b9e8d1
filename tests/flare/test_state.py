"""`federation.json`: who is there and what was exchanged, written beside a run and never in its way."""

import json
import time
from dataclasses import dataclass, field

import msgspec
import pytest

from accord.errors import RunError
from accord.federation.agreement import Agreeing
from accord.federation.engine import InProcessEngine, Traffic
from accord.federation.messages import Agreement
from accord.flare.state import FederationFile, SiteState, read_federation


@dataclass
class Reached:
    """What an engine knows of its sites."""

    sites: tuple[str, ...] = ("colour", "shape", "yes-no", "late")
    present: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    given_up: set[str] = field(default_factory=set)
    heard: dict[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)


@pytest.fixture
def engine():
    return Reached(present={"colour"}, given_up={"yes-no"}, heard={"colour": 60.0, "shape": 61.0, "yes-no": 30.0})


def sites(folder):
    found = read_federation(folder)
    assert found is not None
    return {site.name: site for site in found.sites}


def await_that(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_state_for_each_site(engine, tmp_path):
    """Present: asked; waiting: there, not asked yet; given up: silent since its deadlines; away: never heard of."""
    with FederationFile(tmp_path).follow(engine):
        await_that((tmp_path / "federation.json").exists)
        found = read_federation(tmp_path)
    assert found is not None and not found.ended
    assert [(site.name, site.state, site.heard) for site in found.sites] == [
        ("colour", "present", "1970-01-01T00:01:00Z"),
        ("shape", "waiting", "1970-01-01T00:01:01Z"),
        ("yes-no", "given up", "1970-01-01T00:00:30Z"),
        ("late", "away", ""),
    ]


def test_a_site_that_gave_no_answer_is_absent(engine, tmp_path):
    """As long as it is asked; one that is given up stays so."""
    engine.present, engine.absent = {"colour", "shape"}, {"shape", "yes-no"}
    with FederationFile(tmp_path).follow(engine):
        await_that((tmp_path / "federation.json").exists)
    states = {name: site.state for name, site in sites(tmp_path).items()}
    assert states == {"colour": "present", "shape": "absent", "yes-no": "given up", "late": "away"}


def test_a_site_that_does_not_agree_is_absent(engine, tmp_path):
    """It answers with its card, and is asked nothing else; what the comparison takes is not the run's."""
    engine.present = {"colour", "shape"}
    agreeing = Agreeing(InProcessEngine({}), Agreement(1, "", "", "", "", ""))
    agreeing.left_out = frozenset({"shape"})
    agreeing.traffic.add("colour", "score", 20, 3, absent=False)
    with FederationFile(tmp_path).follow(engine, agreeing):
        await_that((tmp_path / "federation.json").exists)
    found = sites(tmp_path)
    assert (found["colour"].state, found["shape"].state) == ("present", "absent")
    assert (found["colour"].messages, found["colour"].bytes_to_site) == (1, 20)


def test_bytes_of_the_stages_done_and_of_this_one(engine, tmp_path):
    """Router: 10 messages, 1,000 B there, 900 B back; now: 2 + 1 messages, 50 + 7 B there, 6 B back, 1 absence."""
    (tmp_path / "traffic").mkdir()
    (tmp_path / "traffic" / "router.json").write_text(json.dumps([["colour", "router", 10, 1000, 900, 0]]))
    for sent in (20, 30):
        engine.traffic.add("colour", "score", sent, 3, absent=False)
    engine.traffic.add("colour", "card", 7, 0, absent=True)
    with FederationFile(tmp_path).follow(engine):
        pass
    assert sites(tmp_path)["colour"] == SiteState("colour", "present", "1970-01-01T00:01:00Z", 13, 1, 1057, 906)
    assert sites(tmp_path)["shape"].messages == 0


def test_what_changes_is_written_and_what_does_not_is_left(engine, tmp_path):
    """A site that falls silent keeps the time at which it was last heard of."""
    file = tmp_path / "federation.json"
    with FederationFile(tmp_path, seconds=0.01).follow(engine):
        await_that(file.exists)
        before = file.stat().st_ino  # every writing makes a new file
        time.sleep(0.1)
        assert file.stat().st_ino == before
        engine.present, engine.heard = set(), {}
        await_that(lambda: sites(tmp_path)["colour"].state == "away")
        assert sites(tmp_path)["colour"].heard == "1970-01-01T00:01:00Z"


def test_the_end_is_told_apart_from_silence(engine, tmp_path):
    with pytest.raises(KeyboardInterrupt), FederationFile(tmp_path).follow(engine):
        raise KeyboardInterrupt
    found = read_federation(tmp_path)
    assert found is not None and found.ended


def test_the_last_lines_are_kept_with_their_times(engine, tmp_path):
    file = FederationFile(tmp_path)
    for n in range(7):
        file.tell(f"segment {n}")
    with file.follow(engine):
        pass
    said = read_federation(tmp_path).said
    assert [line.split("Z ")[1] for line in said] == [f"segment {n}" for n in range(2, 7)]


def test_it_holds_no_more_than_counts_and_times(engine, tmp_path):
    with FederationFile(tmp_path).follow(engine):
        pass
    table = json.loads((tmp_path / "federation.json").read_text())
    assert set(table) == {"updated", "ended", "said", "sites"}
    counts = {"messages", "absences", "bytes_to_site", "bytes_from_site"}
    assert all(set(site) == {"name", "state", "heard", *counts} for site in table["sites"])


def test_a_run_goes_on_where_nothing_can_be_written(engine, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.write_text("a file")
    with FederationFile(folder).follow(engine):
        pass
    assert "federation.json was not written" in caplog.text and folder.read_text() == "a file"


def test_no_file_and_a_damaged_one(tmp_path):
    assert read_federation(tmp_path) is None
    (tmp_path / "federation.json").write_bytes(msgspec.json.encode({"updated": 3}))
    with pytest.raises(RunError, match=r"federation.json is damaged .*; remove it"):
        read_federation(tmp_path)

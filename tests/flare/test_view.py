"""`accord watch` on made-up run folders: the stage and its time left, the trend, the sites; it only reads."""

import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console

from accord.errors import RunError
from accord.flare.state import Federation, SiteState
from accord.flare.view import blocks, look, page, watch

STARTED = 1_795_200_000  # 2026-11-20T18:40:00Z
RECIPE = """
name = "tiny"

[[sites]]
name = "colour"
checkpoint = "x"
"""
ELSEWHERE = {"router": 10, "align": 100, "compare average": 100, "evaluation": 0}
"""The stages and their steps, where the sites train elsewhere."""

PLANNED = {"site colour": 60, **ELSEWHERE}


def write_run(folder, *, done=(), records=(), seconds=(), federation=None, lock=None, planned=PLANNED):
    """A run that began at `STARTED`; its stages took `seconds` each, and 40 s later it noted its last record."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "manifest.json").write_text(json.dumps({"started": "2026-11-20T18:40:00Z", "seed": 0, "resumed": []}))
    (folder / "stages.json").write_text(json.dumps({"done": done, "planned": planned}))
    moment = STARTED + sum(spent for _, spent in seconds)
    for name, lines, changed in (
        ("timings.jsonl", [{"stage": stage, "seconds": spent, "done": True} for stage, spent in seconds], moment),
        ("metrics.jsonl", records, moment + 40),
    ):
        if lines:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
            os.utime(folder / name, (changed, changed))
    if federation is not None:
        (folder / "federation.json").write_bytes(msgspec.json.encode(federation))
    if lock is not None:
        (folder / "run.lock").write_text(lock)
    return folder


HERE = f"process {os.getpid()} on {socket.gethostname()}\n"
REWARDS = [{"stage": "align", "step": n + 1, "reward": n / 10, "kl": 0.01 * n} for n in range(20)]
SITES = [
    SiteState("colour", "present", "2026-11-20T18:41:05Z", 1024, 3, 8_412_690, 1_500_000),
    SiteState("shape", "given up", "", 0, 0, 0, 0),
]


def shown(glance, now=STARTED + 70, before=None, width=110):
    console = Console(width=width, file=io.StringIO(), record=True, highlight=False)
    console.print(page(glance, now, before))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_an_alignment_between_organisations(tmp_path):
    """The router took 30 s; then 20 of 100 steps in 40 s, so the other 80 take 160 s. Sites train elsewhere.

    Block n of 0 to 19 is ⌊8 n / 19⌋, at most 7.
    """
    federation = Federation("2026-11-20T18:41:08Z", False, ["2026-11-20T18:40:02Z a segment with colour"], SITES)
    folder = write_run(
        tmp_path / "run",
        done=["router"],
        seconds=[("router", 30)],
        records=REWARDS,
        federation=federation,
        lock=HERE,
        planned=ELSEWHERE,
    )
    lines = shown(look(folder))
    last = ("last", "heard")
    assert lines[0] == f"run       tiny, running, {HERE.strip()}"
    assert lines[1] == "done      router 0:00:30"
    assert lines[2].split() == ["stage", "align", "20/100", "━" * 6, "about", "0:02:40", "left"]
    assert lines[3] == "reward    1.900 ▁▁▁▂▂▃▃▃▄▄▅▅▆▆▆▇▇███ align, step 20, KL 0.190"
    assert lines[5].split() == ["site", "state", "messages", "absences", "MB", "to", "it", "MB", "from", "it", *last]
    assert lines[6].split() == ["colour", "present", "1,024", "3", "8.41", "1.50", "0:00:05", "ago"]
    assert lines[7].split() == ["shape", "given", "up", "0", "0", "0.00", "0.00", "never"]
    assert lines[8:] == ["2026-11-20T18:40:02Z a segment with colour"]


def test_accuracy_by_type_is_drawn_as_the_report_draws_it(tmp_path):
    """Three points of the run's own stage; a bar of 20 for 3/4 is 15 long, and a type that came late has one point.

    The router's accuracy, a number, is not among them, and what a data set calls its types cannot steer the terminal.
    """
    points = [(5, 0.25, {"colour": 0.25}), (10, 0.5, {"colour": 0.5}), (15, 0.5, {"colour": 0.75, "a\x1b[2J": 0.25})]
    curve = [{"stage": "align", "step": n, "accuracy_macro": mean, "accuracy": by} for n, mean, by in points]
    records = [{"stage": "router", "step": 1, "accuracy": 0.9}, *REWARDS, *curve]
    glance = look(write_run(tmp_path / "run", done=["site colour", "router"], records=records, lock=HERE))
    assert shown(glance)[-1].strip() == "on dev questions"
    lines = [line for line in shown(glance) if "%" in line]
    assert lines[0].split() == ["accuracy", "mean", "over", "types", "━" * 10, "25%", "→", "50%", "▁██"]
    assert lines[1].split() == ["colour", "━" * 15, "25%", "→", "75%", "▁▅█"]
    assert lines[2].split()[-3:] == ["━" * 5, "25%", "▄"] and "\x1b" not in lines[2] and len(lines) == 3


def test_whom_hidden_questions_trust(tmp_path):
    """As at the last step that says it; a name cannot steer the terminal, and other methods have no such line."""
    told = [{"colour": 0.5, "a\x1b[2J": 0.5}, {"colour": 1.0, "a\x1b[2J": 0.0}]
    records = [{"stage": "align", "step": n + 1, "reward": 0.5, "trust": trust} for n, trust in enumerate(told)]
    glance = look(write_run(tmp_path / "run", records=[*records, {"stage": "align", "step": 3, "reward": 0.5}]))
    assert shown(glance)[-1] == "trust     colour 100%, a?[2J 0% of all sites' trust, by hidden questions"
    other = look(write_run(tmp_path / "other", records=REWARDS))
    assert not any(line.startswith("trust") for line in shown(other))


def test_the_trend_goes_from_the_least_to_the_greatest():
    """Four values over eight levels: 0, 1/3, 2/3 and 1 of the way; halves are means of their two."""
    assert blocks([0.0, 1.0, 2.0, 3.0]) == "▁▃▆█"
    assert blocks([0.0, 0.0, 6.0, 0.0], width=2) == "▁█"
    assert blocks([5.0, 5.0]) == "▄▄" and blocks([]) == ""
    assert len(blocks([float(n) for n in range(1000)])) == 32


def test_the_pace_is_that_of_the_view_once_it_has_seen_a_step(tmp_path):
    """From step 20 to 40 it took 10 s since the view began, so the other 60 take 30 s."""
    folder = write_run(tmp_path / "run", done=["site colour", "router"], seconds=[("router", 30)], records=REWARDS)
    glance = look(folder)
    later = replace(glance, step=40, noted=glance.noted + 10)
    assert glance.left() == pytest.approx(160.0) and later.left(glance) == pytest.approx(30.0)
    assert later.left(replace(glance, stage="router")) == pytest.approx(50 / 40 * 60)


def test_a_stage_that_was_resumed_has_no_time_left_at_first(tmp_path):
    """Nobody knows from which checkpoint it went on, and so how long its steps took."""
    folder = write_run(tmp_path / "run", done=["site colour", "router"], seconds=[("router", 30)], records=REWARDS)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "resumed": [{"started": "2026-11-20T20:00:00Z"}]}))
    assert look(folder).left() is None


def test_a_step_that_is_long_in_coming_is_told(tmp_path):
    folder = write_run(
        tmp_path / "run", done=["site colour", "router"], seconds=[("router", 30)], records=REWARDS, lock=HERE
    )
    assert "last step" not in shown(look(folder), STARTED + 99)[2]
    assert shown(look(folder), STARTED + 70 + 3600)[2].endswith("left, last step 1:00:00 ago")


def test_a_run_of_one_process_trains_its_sites_and_shows_none(tmp_path):
    records = [{"stage": "site", "site": "colour", "step": 20, "ranking_macro": 0.7}]
    glance = look(write_run(tmp_path / "run", records=records, lock=HERE))
    assert (glance.stage, glance.step, glance.steps, glance.left()) == ("site colour", 20, 60, pytest.approx(80.0))
    assert len(shown(glance)) == 2


def test_the_plan_and_not_the_recipe_says_which_stages_there_are(tmp_path):
    """A method with a stage of its own length, and no router; then one of a comparison."""
    plan = {"site colour": 60, "align": 7, "compare own": 30, "evaluation": 0}
    records = [{"stage": "align", "step": 3, "reward": 0.5}]
    folder = write_run(tmp_path / "run", done=["site colour"], records=records, planned=plan)
    assert (look(folder).stage, look(folder).step, look(folder).steps) == ("align", 3, 7)
    (folder / "stages.json").write_text(json.dumps({"done": ["site colour", "align"], "planned": plan}))
    assert (look(folder).stage, look(folder).step, look(folder).steps) == ("compare own", 0, 30)


def test_a_stage_alone_has_no_plan(tmp_path):
    """`accord site train` plans nothing: the stage of the last record is shown, of a length that is not known."""
    records = [{"stage": "site", "site": "colour", "step": 20, "ranking_macro": 0.7}]
    glance = look(write_run(tmp_path / "run", records=records, planned={}))
    assert (glance.stage, glance.step, glance.steps, glance.left()) == ("site colour", 20, 0, None)
    assert not glance.finished
    ended = look(write_run(tmp_path / "ended", done=["site colour"], records=records, planned={}))
    assert ended.finished and ended.stage == ""
    assert not look(write_run(tmp_path / "begun", planned={})).finished


def test_a_damaged_plan(tmp_path):
    folder = write_run(tmp_path / "run", planned={"align": "many"})
    with pytest.raises(RunError, match=r"stages\.json must map the names of stages to steps .*'many'.*remove the file"):
        look(folder)


def test_a_run_that_is_finished(tmp_path):
    done = ["site colour", "router", "align", "compare average", "evaluation"]
    folder = write_run(tmp_path / "run", done=done, records=REWARDS, seconds=[("align", 30), ("align", 4)])
    lines = shown(look(folder))
    assert lines[0] == "run       tiny, finished" and "align 0:00:34" in lines[1] and "evaluation 0:00:00" in lines[1]
    assert lines[-1] == f"report    {folder / 'report.html'}"


def test_a_run_that_was_killed(tmp_path):
    """Its lock names a process that is gone; one on another machine cannot be looked for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    folder = write_run(
        tmp_path / "run", records=REWARDS, lock=f"process {process.pid} on {socket.gethostname()}\n", done=["router"]
    )
    assert shown(look(folder))[0] == "run       tiny, not running"
    (folder / "run.lock").write_text("process 1 on elsewhere.example\n")
    assert look(folder).holder == "process 1 on elsewhere.example"


def test_sites_of_a_run_that_has_ended_are_let_go_and_of_one_that_was_killed_unknown(tmp_path):
    folder = write_run(tmp_path / "run", federation=Federation("2026-11-20T18:41:08Z", True, [], SITES))
    assert [line.split()[1:3] for line in shown(look(folder))[-2:]] == [["let", "go"], ["let", "go"]]
    (folder / "federation.json").write_bytes(msgspec.json.encode(Federation("2026-11-20T18:41:08Z", False, [], SITES)))
    assert [line.split()[1] for line in shown(look(folder))[-2:]] == ["unknown", "unknown"]


def test_what_was_said_cannot_steer_the_terminal(tmp_path):
    federation = Federation("2026-11-20T18:41:08Z", False, ["\x1b[2J[bold]gone"], SITES)
    assert shown(look(write_run(tmp_path / "run", federation=federation)))[-1] == "?[2J[bold]gone"


def test_records_without_a_reward_draw_nothing(tmp_path):
    """A step that nobody scored has none; the others are drawn."""
    records = [*REWARDS[:2], {"stage": "align", "step": 3, "reward": None}]
    glance = look(write_run(tmp_path / "run", done=["site colour", "router"], records=records))
    assert glance.step == 3 and shown(glance)[-1] == "reward    0.100 ▁█ align, step 2, KL 0.010"


def test_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"holds no run \(no recipe.toml\); name the folder of one"):
        look(tmp_path)
    (tmp_path / "recipe.toml").write_text('title = "pancakes"')
    with pytest.raises(RunError, match=r"recipe.toml is no run's recipe"):
        look(tmp_path)


def test_off_a_terminal_there_is_one_block(tmp_path):
    folder = write_run(tmp_path / "run", records=REWARDS, lock=HERE)
    console = Console(file=io.StringIO(), width=80)
    watch(folder, console, once=False)
    assert console.file.getvalue().count("run  ") == 1 and "\x1b" not in console.file.getvalue()


def test_on_a_terminal_it_shows_until_the_run_is_finished(tmp_path, monkeypatch):
    """Three looks: the first before the view begins, one at step 20, one once all is done and the process gone."""
    folder = write_run(tmp_path / "run", records=REWARDS, lock=HERE)

    def finish(_):
        (folder / "stages.json").write_text(json.dumps({"done": [*PLANNED], "planned": PLANNED}))
        (folder / "run.lock").unlink()

    monkeypatch.setattr("accord.flare.view.time.sleep", finish)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, _environ={"TERM": "xterm-256color"})
    watch(folder, console, once=False)
    assert "running" in console.file.getvalue() and "finished" in console.file.getvalue()


def test_a_look_changes_nothing(tmp_path):
    folder = write_run(tmp_path / "run", records=REWARDS, lock=HERE, federation=Federation("", False, [], SITES))
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    look(folder)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


def test_it_starts_without_torch(tmp_path):
    """Looking in on a run takes a fraction of a second, and a machine with nothing to spare can do it."""
    code = "import sys, accord.flare.view; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

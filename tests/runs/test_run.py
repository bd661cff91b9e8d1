"""A run's folder survives what interrupts it: a full disk, a killed process, a second process."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from accord.errors import RunError
from accord.runs import (
    Run,
    append_line,
    full_disk_told,
    peak_memory_bytes,
    read_lines,
    replace_folder,
    something_done,
    stages_done,
    stages_planned,
    write_atomic,
)

RECIPE = "seed = 1\n\n[align]\nsteps = 100\n"


def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def script(body: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(body), *map(str, arguments)]


# files


def test_write_atomic_writes_text_and_bytes_and_makes_the_folder(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.txt", "größe\n")
    write_atomic(str(tmp_path / "a" / "b.bin"), b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "größe\n".encode()
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "a") == ["b.bin", "b.txt"]


def test_write_atomic_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    write_atomic(tmp_path / "x", b"0123456789")
    monkeypatch.undo()
    assert (tmp_path / "x").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_full_disk_leaves_the_old_file_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(
            RunError, match=r"summary\.json cannot be written: the disk is full \([\d,]+ bytes free"
        ) as e:
            write_atomic(path, "new")
    assert "--resume" in str(e.value) and "--out" in str(e.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["summary.json"]


def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "x").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == ["x"]


def test_a_folder_in_the_way_is_reported_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(RunError, match=r"x cannot be written: .*pass another --out"):
        write_atomic(tmp_path / "x", "new")


def test_append_line_writes_one_line_whatever_the_text(tmp_path: Path) -> None:
    """A line break inside a text, and those of Unicode (U+2028, U+0085), must not break the line."""
    record = {"text": "a\nb\u2028c\u0085d\ud800", "n": 1}
    append_line(tmp_path / "x.jsonl", record)
    append_line(tmp_path / "x.jsonl", {"n": 2})
    content = (tmp_path / "x.jsonl").read_text()
    assert len(content.splitlines()) == 2 and content.endswith("\n")
    assert read_lines(tmp_path / "x.jsonl") == [record, {"n": 2}]


def test_append_line_turns_nan_into_null_and_numpy_into_numbers(tmp_path: Path) -> None:
    import numpy as np

    append_line(tmp_path / "x", {"a": float("nan"), "b": [np.float32(0.5), np.int64(3), float("-inf")], "c": (True,)})
    assert read_lines(tmp_path / "x") == [{"a": None, "b": [0.5, 3, None], "c": [True]}]


def test_append_line_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got set; convert it first"):
        append_line(tmp_path / "x", {"a": {1}})


def test_a_full_disk_tears_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room for four bytes of the second line: they are taken back."""
    path = tmp_path / "x.jsonl"
    append_line(path, {"n": 1})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
        with pytest.raises(RunError, match="disk is full"):
            append_line(path, {"n": 2})
    assert path.read_text() == '{"n": 1}\n'


def test_read_lines_leaves_out_a_torn_last_line_and_names_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_lines(path) == []
    path.write_text('{"n": 1}\n{"n"')
    assert read_lines(path) == [{"n": 1}]
    path.write_text('{"n": 1}\n{"n"\n')
    with pytest.raises(RunError, match="line 2, is not JSON"):
        read_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(RunError, match="line 1, is not a JSON object"):
        read_lines(path)


def test_peak_memory_is_in_bytes() -> None:
    """An interpreter with PyTorch needs more than 10 MB and less than 1 TB."""
    assert 10**7 < peak_memory_bytes() < 10**12


# folders


def model(weights: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(weights)
        (folder / "nested").mkdir()
        (folder / "nested" / "config.json").write_text("{}")

    return write


def test_replace_folder_replaces_the_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "policy"
    replace_folder(path, model("old"))
    (path / "stale.bin").write_text("")
    replace_folder(path, model("new"))
    assert names(path) == ["model.safetensors", "nested"]
    assert (path / "model.safetensors").read_text() == "new"
    assert names(tmp_path) == ["policy"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "policy"
    replace_folder(path, model("old"))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(RunError, match="policy cannot be written: the disk is full"):
            replace_folder(path, model("new"))
    assert (path / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["policy"]


def test_the_old_folder_returns_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy"
    replace_folder(path, model("old"))
    replace = os.replace

    def second_fails(source: Path, target: Path) -> None:
        if target == path:
            full_disk()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_fails)
        with pytest.raises(RunError, match="disk is full"):
            replace_folder(path, model("new"))
    assert (path / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["policy"]


def test_a_full_disk_reported_as_text_only_is_recognised(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise RuntimeError('Error while serializing: I/O error: Os { code: 28, message: "No space left on device" }')

    with pytest.raises(RunError, match="disk is full"):
        replace_folder(tmp_path / "policy", write)
    assert names(tmp_path) == []


QUOTA = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.mark.parametrize(
    "error",
    [
        QUOTA,
        SafetensorError(f"Error while serializing: I/O error: {QUOTA.strerror} (os error {errno.EDQUOT})"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
    ids=["quota", "safetensors, quota", "safetensors", "torch.save"],
)
def test_a_full_disk_is_told_of_what_others_write(tmp_path: Path, error: Exception) -> None:
    cleaned: list[bool] = []
    with (
        pytest.raises(RunError, match=r"checkpoints cannot be written: the disk is full .* continue with --resume"),
        full_disk_told(tmp_path / "checkpoints", clean=lambda: cleaned.append(True)),
    ):
        raise error
    assert cleaned == [True]


def test_other_errors_of_others_are_not_the_disk() -> None:
    with pytest.raises(RuntimeError, match="shapes"), full_disk_told("checkpoints", clean=lambda: pytest.fail("no")):
        raise RuntimeError("shapes do not match")


def test_another_failure_passes_through_and_cleans_up(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "half").write_text("")
        raise ValueError("a tensor is shared")

    with pytest.raises(ValueError, match="a tensor is shared"):
        replace_folder(tmp_path / "policy", write)
    assert names(tmp_path) == []


def test_a_crash_between_the_two_renames_is_healed(tmp_path: Path) -> None:
    """Such a crash leaves the old folder moved away and nothing in its place."""
    run = Run.create(tmp_path / "run", RECIPE, seed=1)
    run.close()
    replace_folder(run.path / "sites" / "colour", model("old"))
    os.rename(run.path / "sites" / "colour", run.path / "sites" / "colour.replaced-99")
    (run.path / "sites" / "colour.partial-99").mkdir()
    (run.path / "sites" / "colour.partial-99" / "half").write_text("")
    Run.resume(run.path, RECIPE).close()
    assert names(run.path / "sites") == ["colour"]
    assert (run.path / "sites" / "colour" / "model.safetensors").read_text() == "old"


# a run begins


def test_create_records_what_was_asked_and_where(tmp_path: Path) -> None:
    with Run.create(tmp_path / "a" / "run", RECIPE, seed=7) as run:
        assert (run.seed, run.resumed, run.path) == (7, False, tmp_path / "a" / "run")
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert (run.path / "recipe.toml").read_text() == RECIPE
    assert manifest["seed"] == 7 and manifest["resumed"] == []
    assert set(manifest["versions"]) == {"accord", "torch", "transformers", "trl"}
    assert {"started", "python", "platform", "cpus", "commit"} < set(manifest)


def test_create_refuses_a_run_and_a_foreign_folder_and_a_file(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run, run.doing("router"):
        pass
    with pytest.raises(RunError, match="run already holds a run; add --resume to go on with it, or pass another --out"):
        Run.create(tmp_path / "run", RECIPE, seed=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("")
    with pytest.raises(RunError, match=r"notes is not empty \(it holds thesis.txt\).*pass another --out"):
        Run.create(tmp_path / "notes", RECIPE, seed=1)
    assert names(tmp_path / "notes") == ["thesis.txt"]
    with pytest.raises(RunError, match="is a file"):
        Run.create(tmp_path / "notes" / "thesis.txt", RECIPE, seed=1)


def test_a_run_that_died_before_it_began_can_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(RunError, match="disk is full"):
            Run.create(tmp_path / "run", RECIPE, seed=1)
    Run.create(tmp_path / "run", RECIPE, seed=1).close()


def fail_at_once(path: Path) -> None:
    """Leave what a run leaves whose first stage fails before it has made anything, as for a wrong path."""
    with Run.create(path, RECIPE, seed=1) as run, pytest.raises(RuntimeError), run.doing("site colour"):
        raise RuntimeError
    (path / "tensorboard").mkdir()


def test_a_run_in_which_nothing_was_done_makes_way(tmp_path: Path) -> None:
    """For another recipe too; the timings of what failed are not the new run's."""
    path = tmp_path / "run"
    fail_at_once(path)
    assert names(path) == ["manifest.json", "recipe.toml", "run.lock", "tensorboard", "timings.jsonl"]
    assert not something_done(path)
    with pytest.raises(RunError, match=r"seed was 1 and is now 2; .* or leave out --resume: nothing is done yet"):
        Run.resume(path, "seed = 2\n")
    with Run.create(path, "seed = 2\n", seed=2) as run:
        assert (run.path / "recipe.toml").read_text() == "seed = 2\n" and run.seconds() == {}
        assert json.loads((path / "manifest.json").read_text())["seed"] == 2
    Run.resume(path, "seed = 2\n").close()


def test_a_run_that_has_only_been_planned_makes_way(tmp_path: Path) -> None:
    """The stages there will be are noted before the first begins; none is done, and the new run's are others."""
    path = tmp_path / "run"
    with Run.create(path, RECIPE, seed=1) as run:
        run.plan({"site colour": 6, "align": 4})
    assert stages_planned(path) == {"site colour": 6, "align": 4} and stages_done(path) == []
    assert not something_done(path)
    with Run.create(path, "seed = 2\n", seed=2) as run:
        assert stages_planned(path) == {} and not run.done("align")


@pytest.mark.parametrize("left", ["stages.json", "metrics.jsonl", "sites", "checkpoints", "notes.txt", "tensorboard/x"])
def test_a_run_that_left_anything_more_does_not(tmp_path: Path, left: str) -> None:
    path = tmp_path / "run"
    fail_at_once(path)
    (path / left).write_text('{"done": ["router"]}' if left == "stages.json" else "")
    assert something_done(path)
    before = {name: (path / name).read_bytes() for name in ("recipe.toml", "manifest.json", "timings.jsonl")}
    with pytest.raises(RunError, match="already holds a run; add --resume"):
        Run.create(path, "seed = 2\n", seed=2)
    assert {name: (path / name).read_bytes() for name in before} == before


def test_a_recipe_that_somebody_put_there_is_not_replaced(tmp_path: Path) -> None:
    """Without the manifest of a run it is a file like any other."""
    (tmp_path / "recipe.toml").write_text("# by hand\n")
    with pytest.raises(RunError, match="pass another --out"):
        Run.create(tmp_path, RECIPE, seed=1)
    assert (tmp_path / "recipe.toml").read_text() == "# by hand\n"


# a run goes on


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run to resume .*leave out --resume"):
        Run.resume(tmp_path / "nowhere", RECIPE)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("recipe", "difference"),
    [
        ("seed = 1\n[align]\nsteps = 200\n", "align.steps was 100 and is now 200"),
        ("seed = 1\n[align]\n", "align.steps was 100 and is now left out"),
        ("seed = 1\n[align]\nsteps = 100\nbeta = 0.1\n", "align.beta was left out and is now 0.1"),
        ("seed = 1\n[align\n", "line 2 was '' and is now '\\[align'"),
    ],
)
def test_resume_names_the_first_difference_of_the_recipe(tmp_path: Path, recipe: str, difference: str) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run, run.doing("router"):
        pass
    with pytest.raises(RunError, match=difference) as error:
        Run.resume(tmp_path / "run", recipe)
    assert "recipe.toml to resume it, or another --out" in str(error.value)
    # The lock is free again.
    Run.resume(tmp_path / "run", RECIPE).close()


def test_resume_accepts_comments_and_layout_and_keeps_the_seed(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", RECIPE, seed=7).close()
    with Run.resume(tmp_path / "run", "align = {steps = 100}  # as before\nseed = 1\n") as run:
        assert (run.seed, run.resumed) == (7, True)
    assert len(json.loads((run.path / "manifest.json").read_text())["resumed"]) == 1


def test_resume_accepts_other_settings_that_change_no_result(tmp_path: Path) -> None:
    """They do so in the top table only; elsewhere a setting of that name may mean anything."""
    free = 'processes = 2\n[features]\nmemory = 0\nfolder = "f"\n'
    Run.create(tmp_path / "run", free + RECIPE.replace("seed = 1\n", "", 1), seed=1).close()
    Run.resume(tmp_path / "run", RECIPE.replace("seed = 1\n", "", 1)).close()
    with pytest.raises(RunError, match=r"align.processes was left out and is now 2"):
        Run.resume(tmp_path / "run", RECIPE.replace("seed = 1\n", "", 1) + "processes = 2\n")


def test_resume_takes_another_quorum_and_deadline_and_notes_them(tmp_path: Path) -> None:
    """Where a site does not come back, the remedy is to go on without it."""
    before = RECIPE + "[routing]\nquorum = 0.9\nonline = false\n"
    now = RECIPE + "[routing]\nquorum = 0.3\ndeadline = 60.0\nonline = false\n"
    Run.create(tmp_path / "run", before, seed=1).close()
    with pytest.raises(RunError, match=r"routing.online was False and is now True"):
        Run.resume(tmp_path / "run", now.replace("online = false", "online = true"))
    assert (tmp_path / "run" / "recipe.toml").read_text() == before
    Run.resume(tmp_path / "run", now).close()
    assert (tmp_path / "run" / "recipe.toml").read_text() == now


def test_resume_reports_a_damaged_manifest(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", RECIPE, seed=7).close()
    (tmp_path / "run" / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json cannot be read.*another --out"):
        Run.resume(tmp_path / "run", RECIPE)


# one writer


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    body = """
        import sys
        from accord.runs import Run
        run = Run.create(sys.argv[1], sys.argv[2], seed=1)
        print("ready", flush=True)
        sys.stdin.read()
    """
    holder = subprocess.Popen(
        script(body, tmp_path / "run", RECIPE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        with pytest.raises(RunError, match=f"run is in use by process {holder.pid} on .*; wait until it ends"):
            Run.resume(tmp_path / "run", RECIPE)
        with pytest.raises(RunError, match="run is in use by"):
            Run.create(tmp_path / "run", RECIPE, seed=1)
        # Killed, not asked: the system must free the lock.
        holder.kill()
    Run.resume(tmp_path / "run", RECIPE).close()


def test_the_same_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1), pytest.raises(RunError, match="in use"):
        Run.resume(tmp_path / "run", RECIPE)


# stages


def metrics(run: Run) -> list[tuple[object, ...]]:
    return [
        (record["stage"], *([record["site"]] if "site" in record else []), record["step"])
        for record in read_lines(run.path / "metrics.jsonl")
    ]


def test_a_finished_stage_stays_done_and_an_interrupted_one_starts_over(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run:
        with run.doing("site colour"):
            run.log({"stage": "site", "site": "colour", "step": 1})
        with pytest.raises(KeyboardInterrupt), run.doing("site shape"):
            run.log({"stage": "site", "site": "shape", "step": 1})
            raise KeyboardInterrupt
    with Run.resume(run.path, RECIPE) as run:
        assert run.done("site colour") and not run.done("site shape")
        with run.doing("site shape"):
            run.log({"stage": "site", "site": "shape", "step": 1})
            run.log({"stage": "site", "site": "shape", "step": 2})
        assert run.done("site shape")
        assert metrics(run) == [("site", "colour", 1), ("site", "shape", 1), ("site", "shape", 2)]
        assert list(run.seconds()) == ["site colour", "site shape"]
        assert [line["done"] for line in read_lines(run.path / "timings.jsonl")] == [True, False, True]


def test_a_stage_in_progress_counts_and_so_does_an_earlier_process(tmp_path: Path) -> None:
    """The evaluation writes the summary while it runs; the process before may have needed more memory."""
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run:
        with run.doing("router"):
            pass
        (noted,) = read_lines(run.path / "timings.jsonl")
        assert isinstance(noted["peak_memory_bytes"], int) and noted["peak_memory_bytes"] > 0
        write_atomic(run.path / "timings.jsonl", json.dumps({**noted, "peak_memory_bytes": 10**15}) + "\n")
        with run.doing("evaluation"):
            assert list(run.seconds()) == ["router", "evaluation"]
            assert run.peak_memory_bytes() == 10**15


def test_a_stage_done_again_is_not_done_until_it_ends(tmp_path: Path) -> None:
    """Killed in the middle of the second time, it has to be done anew, and so has what was built on it."""
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run:
        for stage in ("site colour", "router", "align"):
            with run.doing(stage):
                pass
        with pytest.raises(KeyboardInterrupt), run.doing("router", undoes=lambda stage: stage == "align"):
            raise KeyboardInterrupt
    with Run.resume(run.path, RECIPE) as run:
        assert [run.done(stage) for stage in ("site colour", "router", "align")] == [True, False, False]


def test_an_interrupted_stage_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """Records of steps 0, 10, 20, 30; the checkpoint is of step 20; so 30 is logged once more and stands once."""
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run, pytest.raises(RuntimeError), run.doing("align"):
        for step in (0, 10, 20, 30):
            run.log({"stage": "align", "step": step})
        raise RuntimeError
    with Run.resume(run.path, RECIPE) as run, run.doing("align"):
        run.truncate("align", after_step=20)
        run.log({"stage": "align", "step": 30})
        run.log({"stage": "align", "step": 40})
    assert metrics(run) == [("align", step) for step in (0, 10, 20, 30, 40)]


def test_a_stage_that_logs_nothing_anew_leaves_no_old_records(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run, pytest.raises(RuntimeError), run.doing("router"):
        run.log({"stage": "router", "step": 1})
        raise RuntimeError
    with Run.resume(run.path, RECIPE) as run, run.doing("router"):
        pass
    assert metrics(run) == []


def test_a_stage_tried_again_in_one_process_starts_over(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run:
        with pytest.raises(RuntimeError), run.doing("router"):
            run.log({"stage": "router", "step": 1})
            raise RuntimeError
        with run.doing("router"):
            run.log({"stage": "router", "step": 1})
        assert metrics(run) == [("router", 1)]


def test_a_torn_last_line_is_repaired(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run, run.doing("router"):
        run.log({"stage": "router", "step": 1})
    for name in ("metrics.jsonl", "timings.jsonl"):
        with (run.path / name).open("ab") as file:
            file.write(b'{"stage": "ali')
    with Run.resume(run.path, RECIPE) as run, run.doing("align"):
        run.log({"stage": "align", "step": 1})
    assert metrics(run) == [("router", 1), ("align", 1)]
    assert list(run.seconds()) == ["router", "align"]


def test_a_killed_process_loses_only_its_unfinished_stage(tmp_path: Path) -> None:
    body = """
        import os, signal, sys
        from accord.runs import Run
        run = Run.create(sys.argv[1], sys.argv[2], seed=1)
        with run.doing("router"):
            run.log({"stage": "router", "step": 1})
        with run.doing("align"):
            run.log({"stage": "align", "step": 1})
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run(script(body, tmp_path / "run", RECIPE)).returncode == -9
    with Run.resume(tmp_path / "run", RECIPE) as run:
        assert run.done("router") and not run.done("align")
        with run.doing("align"):
            run.log({"stage": "align", "step": 1})
    assert metrics(run) == [("router", 1), ("align", 1)]


def test_what_is_planned_outlives_what_is_done(tmp_path: Path) -> None:
    """Planned in order, kept as stages end, begin anew and are resumed; a later plan replaces it."""
    planned = {"site colour": 6, "router": 2, "align": 4, "evaluation": 0}
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run:
        run.plan(planned)
        with run.doing("site colour"):
            assert list(stages_planned(run.path).items()) == list(planned.items())
    with Run.resume(run.path, RECIPE) as run:
        run.plan(planned)
        with run.doing("site colour", undoes=lambda stage: True):
            assert stages_done(run.path) == [] and stages_planned(run.path) == planned
        assert stages_done(run.path) == ["site colour"] and stages_planned(run.path) == planned
        run.plan({"align": 9})
    assert stages_planned(run.path) == {"align": 9} and stages_done(run.path) == ["site colour"]


def test_a_run_without_a_plan_has_none(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run:
        assert stages_planned(run.path) == {} and stages_done(run.path) == []
        with run.doing("router"):
            pass
    assert stages_planned(run.path) == {}
    assert json.loads((run.path / "stages.json").read_text()) == {"done": ["router"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"done": "router"}', "must list the names of finished stages under 'done', got 'router'; remove the file"),
        ('{"done": [1]}', r"under 'done', got \[1\]"),
        ("{", "cannot be read"),
        ('{"done": [], "planned": ["align"]}', r"names of stages to steps under 'planned', got \['align'\]; remove"),
        ('{"done": [], "planned": {"align": "4"}}', "under 'planned', got {'align': '4'}"),
    ],
)
def test_a_damaged_list_of_stages_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(RunError, match=rf"stages\.json .*{said}"):
        (stages_planned if "planned" in text else stages_done)(tmp_path)


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with Run.create(tmp_path / name, RECIPE, seed=1) as run, run.doing("align"):
            run.log({"stage": "align", "step": 1, "routed": {"shape": 0.1 + 0.2, "colour": 1e-9}})
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_a_record_must_belong_to_the_stage_being_done(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run:
        with pytest.raises(RunError, match=r"log it inside run\.doing\('align'\)"):
            run.log({"stage": "align", "step": 1})
        with run.doing("router"), pytest.raises(RunError, match="names no stage, got None"):
            run.log({"step": 1})
    assert not (run.path / "metrics.jsonl").exists()


def test_a_full_disk_at_the_end_of_a_stage_leaves_it_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.create(tmp_path / "run", RECIPE, seed=1) as run, monkeypatch.context() as patch:
        with pytest.raises(RunError, match="disk is full"), run.doing("router"):
            patch.setattr(os, "fsync", full_disk)
        assert not run.done("router")
    with Run.resume(run.path, RECIPE) as run:
        assert not run.done("router")


def test_a_failure_inside_a_stage_is_not_hidden_by_the_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", RECIPE, seed=1)
    with run, monkeypatch.context() as patch, pytest.raises(ValueError, match="the cause"), run.doing("router"):
        patch.setattr(os, "write", full_disk)
        raise ValueError("the cause")


def test_the_tag_of_a_run_outlives_interruptions_and_is_a_word(tmp_path: Path) -> None:
    """Twelve letters of the folder's name at most, and digits of when it was begun."""
    with Run.create(tmp_path / "a run of mine, long", RECIPE, seed=1) as run:
        tag = run.tag
    assert re.fullmatch(r"a-run-of-min-[0-9a-f]{8}", tag)
    with Run.resume(tmp_path / "a run of mine, long", RECIPE) as run:
        assert run.tag == tag

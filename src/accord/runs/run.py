"""Keep a run's folder: what was asked, what was measured, which stages are done; safe to interrupt at any moment.

    runs/<name>/
      recipe.toml      what was asked; a resumed run must ask the same
      manifest.json    versions, machine, seed, commit, start
      stages.json      the stages that are done, and those that there will be
      metrics.jsonl    what was measured, one record a line; the same recipe and seed give the same bytes
      timings.jsonl    wall seconds and peak memory of every attempt at a stage
      run.lock         held by the one process that writes here

Files and model folders appear whole or not at all: they are written beside their place and renamed into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from accord.errors import RunError
from accord.runs.atomic import (
    PARTIAL,
    REPLACED,
    append_line,
    cannot_write,
    finished_lines,
    parse_line,
    put_back,
    read_json,
    read_lines,
    to_json,
    write_atomic,
)
from accord.runs.difference import first_difference
from accord.runs.environment import environment, peak_memory_bytes
from accord.runs.lock import locked
from accord.runs.received import refuse_foreign


class Run:
    """One run's folder, locked for this process from `create` or `resume` until `close`.

    A stage is named as in its records: the record's `stage`, followed by its `site` if it has one, as in
    `site colour`. Work inside `with run.doing("router"):` and skip it when `run.done("router")`.

    Attributes:
        path: the folder.
        seed: the seed the run was created with.
        resumed: whether an earlier process worked in this folder.
    """

    def __init__(self, path: Path, seed: int, lock: int, *, resumed: bool) -> None:
        """Take over a folder already locked by file descriptor `lock`; use `create` or `resume` instead."""
        self.path = path
        self.seed = seed
        self.resumed = resumed
        self._lock: int | None = lock
        self._done = stages_done(path)
        self._planned = stages_planned(path)
        self._stand_on = _stand_on(path)
        self._noted = dict(self._stand_on)  # as it is in the file
        self._doing: dict[str, float] = {}  # stages in progress, and when they began
        # Stages that have dealt with the records of an interrupted attempt. Those go when the stage logs anew, not on
        # opening: only the stage knows whether it starts over or goes on from a checkpoint (`truncate`).
        self._settled: set[str] = set()

    @classmethod
    def create(cls, path: Path | str, recipe_text: str, *, seed: int) -> Self:
        """Start a run in a folder that is new or empty, or holds a run in which nothing was done yet.

        Raises:
            RunError: the folder holds something else, is in use, or cannot be written.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file, and a run needs a folder; pass another --out")
        if path.is_dir() and (found := _foreign(path)):
            raise RunError(_occupied(path, found))
        lock = locked(path)
        try:
            # A process that lost the race for the lock looks again: the winner may have come and gone.
            if found := _foreign(path):
                raise RunError(_occupied(path, found))
            _drop_beginning(path)
            write_atomic(path / "manifest.json", to_json({**environment(), "seed": seed, "resumed": []}))
            # Last, for it is what makes the folder a run that can be resumed.
            write_atomic(path / "recipe.toml", recipe_text)
            return cls(path, seed, lock, resumed=False)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def resume(cls, path: Path | str, recipe_text: str, *, renewed: Callable[[str], str] = str) -> Self:
        """Go on with an interrupted run: lock it, repair what a crash left, and keep what is done.

        Args:
            path: the run's folder.
            recipe_text: the recipe, which may differ from the run's in what `first_difference` does not count.
            renewed: returns a recipe that an older Accord stored as today's would write it, with its new settings.

        Raises:
            RunError: there is no run, it is in use, its recipe differs from `recipe_text`, or its files are damaged or
                not its own.
        """
        path = Path(path)
        if not (path / "recipe.toml").is_file():
            raise RunError(f"{path} holds no run to resume (no recipe.toml); leave out --resume to start one there")
        refuse_foreign(path)
        lock = locked(path)
        try:
            recipe = (path / "recipe.toml").read_text(encoding="utf-8")
            if difference := first_difference(renewed(recipe), recipe_text):
                new = "another --out for a new run" if _foreign(path) else "leave out --resume: nothing is done yet"
                raise RunError(
                    f"{path} was started with another recipe: {difference}; "
                    f"pass {path / 'recipe.toml'} to resume it, or {new}"
                )
            _heal(path)
            manifest = read_json(path / "manifest.json")
            seed, earlier = manifest.get("seed"), manifest.get("resumed")
            if not isinstance(seed, int) or not isinstance(earlier, list):
                raise RunError(f"{path / 'manifest.json'} has no usable seed ({seed!r}); start anew with another --out")
            write_atomic(path / "manifest.json", to_json({**manifest, "resumed": [*earlier, environment()]}))
            if recipe != recipe_text:
                write_atomic(path / "recipe.toml", recipe_text)
            return cls(path, seed, lock, resumed=True)
        except BaseException:
            os.close(lock)
            raise

    @property
    def tag(self) -> str:
        """A short name for others' records, the same after each interruption: the folder's, and digits of its start."""
        started = str(read_json(self.path / "manifest.json").get("started", ""))
        name = re.sub(r"[^A-Za-z0-9_-]", "-", self.path.resolve().name)[:12]
        return f"{name}-{hashlib.sha256(started.encode()).hexdigest()[:8]}"

    def __enter__(self) -> Self:
        """Return the run itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the folder."""
        self.close()

    def close(self) -> None:
        """Release the folder for other processes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def done(self, stage: str) -> bool:
        """Tell whether `stage` was finished, by this process or an earlier one."""
        return stage in self._done

    def stands_on(self, stage: str) -> list[str] | None:
        """Return what a stage said that it stands on when it was last begun; None where it said nothing."""
        return self._stand_on.get(stage)

    @contextlib.contextmanager
    def doing(
        self,
        stage: str,
        *,
        undoes: Callable[[str], bool] = lambda _later: False,
        stands_on: Collection[str] | None = None,
    ) -> Iterator[None]:
        """Time the body, and mark `stage` done if it succeeds.

        Records that an interrupted attempt left are dropped as soon as the stage logs, unless it called `truncate`.

        Args:
            stage: its name.
            undoes: which of the finished stages were built on what this one makes again: they are done no longer, and
                neither is `stage` itself until it ends.
            stands_on: what it needs of earlier stages, kept for `stands_on`; None for all of them.
        """
        # Noted at once, so that what an interrupted stage stands on is known too.
        self._stand_on.pop(stage, None)
        if stands_on is not None:
            self._stand_on[stage] = sorted(stands_on)
        self._write_done([done for done in self._done if done != stage and not undoes(done)])
        start = time.monotonic()
        self._doing[stage] = start
        try:
            yield
            if stage not in self._settled:
                self.truncate(stage)
        except BaseException:
            # What went wrong in the body matters more than a lost timing, as when the disk is full.
            with contextlib.suppress(RunError):
                self._time(stage, time.monotonic() - start, done=False)
            raise
        finally:
            del self._doing[stage]
            self._settled.discard(stage)
        self._time(stage, time.monotonic() - start, done=True)
        self._write_done([*self._done, stage])

    def plan(self, stages: Mapping[str, int]) -> None:
        """Note which stages there will be, in order, with their steps; 0 where a stage has none."""
        if dict(stages) != self._planned:
            self._write_stages(self._done, dict(stages))
            self._planned = dict(stages)

    def _write_done(self, done: list[str]) -> None:
        if done != self._done or self._stand_on != self._noted:
            self._write_stages(done, self._planned)
            self._done = done

    def _write_stages(self, done: list[str], planned: Mapping[str, int]) -> None:
        more: dict[str, object] = {"planned": planned} if planned else {}
        if self._stand_on:
            more["stands_on"] = self._stand_on
        write_atomic(self.path / "stages.json", to_json({"done": done, **more}))
        self._noted = dict(self._stand_on)

    def log(self, record: Mapping[str, object]) -> None:
        """Append a record of the stage being done to metrics.jsonl; it must hold no wall time.

        Raises:
            RunError: the record names another stage (its records could not be told apart on resuming), or the disk
                is full.
        """
        stage = stage_of(record)
        if stage not in self._doing:
            raise RunError(
                f"a record of stage {stage!r} was logged while doing {[*self._doing] or 'no stage'}; "
                f"log it inside run.doing({stage!r})"
            )
        if stage not in self._settled:
            self.truncate(stage)
        append_line(self._metrics, record)

    def truncate(self, stage: str, after_step: int | None = None) -> None:
        """Drop the records of `stage` whose step is after `after_step`; all of them when it is None.

        A stage that goes on from a checkpoint of step n calls this with n before it logs.
        """

        def kept(record: Mapping[str, object]) -> bool:
            step = record.get("step")
            return stage_of(record) != stage or (
                after_step is not None and isinstance(step, int) and step <= after_step
            )

        lines = finished_lines(self._metrics)
        keep = [line for number, line in enumerate(lines, start=1) if kept(parse_line(self._metrics, number, line))]
        if len(keep) < len(lines):
            write_atomic(self._metrics, b"".join(keep))
        self._settled.add(stage)

    def seconds(self) -> dict[str, float]:
        """Return the wall seconds of each stage so far, all attempts added up, in the order they were first begun."""
        total: dict[str, float] = {}
        for record in read_lines(self.path / "timings.jsonl"):
            stage, seconds = record.get("stage"), record.get("seconds")
            if isinstance(stage, str) and isinstance(seconds, int | float):
                total[stage] = total.get(stage, 0.0) + seconds
        for stage, start in self._doing.items():
            total[stage] = total.get(stage, 0.0) + round(time.monotonic() - start, 3)
        return total

    def peak_memory_bytes(self) -> int:
        """Return the largest resident memory of all processes that have worked here, as noted when a stage ended."""
        noted = [record.get("peak_memory_bytes") for record in read_lines(self.path / "timings.jsonl")]
        return max([peak_memory_bytes(), *(peak for peak in noted if isinstance(peak, int))])

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def _time(self, stage: str, seconds: float, *, done: bool) -> None:
        noted = {"stage": stage, "seconds": round(seconds, 3), "done": done, "peak_memory_bytes": peak_memory_bytes()}
        append_line(self.path / "timings.jsonl", noted)


def stage_of(record: Mapping[str, object]) -> str:
    """Return the name of the stage a metrics record belongs to: its `stage`, then its `site` if it has one."""
    stage, site = record.get("stage"), record.get("site")
    if not isinstance(stage, str):
        raise RunError(f"a metrics record names no stage, got {stage!r}; give it a text under the key 'stage'")
    return stage if site is None else f"{stage} {site}"


def _heal(folder: Path) -> None:
    """Remove what a killed process left half-written. The caller holds the lock, so nobody else is writing."""
    for replaced in sorted(folder.rglob(f"*{REPLACED}*")):
        put_back(replaced.with_name(replaced.name.partition(REPLACED)[0]))
    for partial in sorted(folder.rglob(f"*{PARTIAL}*")):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
    for name in ("metrics.jsonl", "timings.jsonl"):
        path = folder / name
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n") and content:
            write_atomic(path, content[: content.rfind(b"\n") + 1])


def stages_done(folder: Path) -> list[str]:
    """Return the stages that a run folder's `stages.json` lists as done; none where there is no such file.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / "stages.json"
    if not path.exists():
        return []
    done = read_json(path).get("done")
    if not isinstance(done, list) or not all(isinstance(stage, str) for stage in done):
        raise RunError(f"{path} must list the names of finished stages under 'done', got {done!r}; remove the file")
    return done


def stages_planned(folder: Path) -> dict[str, int]:
    """Return the stages that a run will have, in order, with their steps; none where they were not noted.

    Raises:
        RunError: the file is damaged.
    """
    path = folder / "stages.json"
    planned = read_json(path).get("planned", {}) if path.exists() else {}
    if not isinstance(planned, dict) or not all(isinstance(steps, int) for steps in planned.values()):
        raise RunError(
            f"{path} must map the names of stages to steps under 'planned', got {planned!r}; remove the file"
        )
    return planned


def something_done(folder: Path) -> bool:
    """Tell whether a folder holds a run that has left more than its beginning, so that it is resumed."""
    return (folder / "recipe.toml").is_file() and bool(_foreign(folder))


def _foreign(folder: Path) -> list[str]:
    """Return what stands in the way of a new run: nothing, where an earlier one ended before it left a result."""
    found = {entry.name for entry in folder.iterdir() if PARTIAL not in entry.name}
    board = folder / "tensorboard"
    if board.is_dir() and not any(board.iterdir()):
        found.remove(board.name)
    # Without our manifest a recipe is the user's own file.
    ours = {"manifest.json", *_BEGINNING} if "manifest.json" in found else set()
    if stages_done(folder):
        ours.discard("stages.json")
    return [] if found <= ours | {"run.lock"} else sorted(found - {"manifest.json", "run.lock"})


_BEGINNING = ("recipe.toml", "timings.jsonl", "federation.json", "stages.json")
"""What a run has left when its first stage has failed at once, as for a wrong path."""


def _drop_beginning(folder: Path) -> None:
    for name in _BEGINNING:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(folder / name, error) from error


def _occupied(folder: Path, found: list[str]) -> str:
    if "recipe.toml" in found:
        return f"{folder} already holds a run; add --resume to go on with it, or pass another --out"
    return f"{folder} is not empty (it holds {', '.join(found[:3])}) and is not a run; pass another --out"


def _stand_on(folder: Path) -> dict[str, list[str]]:
    path = folder / "stages.json"
    kept = read_json(path).get("stands_on", {}) if path.exists() else {}
    if not isinstance(kept, dict) or not all(isinstance(needs, list) for needs in kept.values()):
        raise RunError(f"{path} must map stages to what they stand on under 'stands_on', got {kept!r}; remove the file")
    return kept

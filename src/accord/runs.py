"""Keep a run's folder: what was asked, what was measured, which stages are done; safe to interrupt at any moment.

    runs/<name>/
      recipe.toml      what was asked; a resumed run must ask the same
      manifest.json    versions, machine, seed, commit, start
      stages.json      the stages that are done
      metrics.jsonl    what was measured, one record a line; the same recipe and seed give the same bytes
      timings.jsonl    wall seconds and peak memory of every attempt at a stage
      run.lock         held by the one process that writes here

Files and model folders appear whole or not at all: they are written beside their place and renamed into it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import importlib.metadata
import json
import math
import numbers
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from accord.errors import RunError

_PARTIAL = ".partial-"
_REPLACED = ".replaced-"


def write_atomic(path: Path | str, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write `data` (text as UTF-8) to `path` so that a reader, or a crash, never sees half of it.

    Missing parent folders are made. `mode` is of the new file, less the umask.

    Raises:
        RunError: the file cannot be written; what stood at `path` before still stands, and no temporary file is left.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise


def append_line(path: Path | str, record: Mapping[str, object]) -> None:
    """Append `record` to `path` as one line of JSON; NaN and infinity become null.

    The line is one `write`, so a process that dies leaves at most its last line torn; `Run.resume` removes that line.

    Raises:
        RunError: the line cannot be written; the file is as it was.
    """
    path = Path(path)
    line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                if (written := os.write(descriptor, line)) < len(line):
                    raise OSError(errno.ENOSPC, f"wrote {written} of {len(line)} bytes")
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _cannot_write(path, error) from error


def read_lines(path: Path | str) -> list[dict[str, object]]:
    """Read the records of a JSON-lines file; none when it is absent. An unfinished last line is left out.

    Raises:
        RunError: a finished line is not a JSON object.
    """
    path = Path(path)
    return [_parse(path, number, line) for number, line in enumerate(_finished_lines(path), start=1)]


def replace_folder(path: Path | str, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder, then put that folder at `path`, in place of an older one.

    `write` gets an empty folder beside `path`. Every file is on disk before the older folder is moved away.

    Raises:
        RunError: the disk is full, or the folder cannot be written; the older folder is intact and the new one removed.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{_PARTIAL}{os.getpid()}")
    replaced = path.with_name(f"{path.name}{_REPLACED}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _put_back(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        _sync_tree(partial)
        moved = path.exists()
        if moved:
            os.replace(path, replaced)
        try:
            os.replace(partial, path)
        except BaseException:
            if moved:
                os.rename(replaced, path)
            raise
        sync(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or _disk_is_full(error):
            raise _cannot_write(path, error) from error
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def full_disk_told(path: Path | str, *, clean: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let others write below `path`, as a trainer does with its checkpoints, and name a disk that is full.

    Args:
        path: the folder that the body writes to.
        clean: called after a failed write, to remove what is half-written.

    Raises:
        RunError: the disk is full.
    """
    try:
        yield
    except RunError:
        clean()
        raise
    except Exception as error:
        if not _disk_is_full(error):
            raise
        told = _cannot_write(Path(path), error)  # before the room that `clean` makes
        clean()
        raise told from error


def peak_memory_bytes() -> int:
    """Return the largest resident memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


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
        self._done = _read_stages(path)
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
        lock = _locked(path)
        try:
            # A process that lost the race for the lock looks again: the winner may have come and gone.
            if found := _foreign(path):
                raise RunError(_occupied(path, found))
            _drop_beginning(path)
            write_atomic(path / "manifest.json", _json({**_environment(), "seed": seed, "resumed": []}))
            # Last, for it is what makes the folder a run that can be resumed.
            write_atomic(path / "recipe.toml", recipe_text)
            return cls(path, seed, lock, resumed=False)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def resume(cls, path: Path | str, recipe_text: str) -> Self:
        """Go on with an interrupted run: lock it, repair what a crash left, and keep what is done.

        Raises:
            RunError: there is no run, it is in use, its recipe differs from `recipe_text`, or its files are damaged.
        """
        path = Path(path)
        if not (path / "recipe.toml").is_file():
            raise RunError(f"{path} holds no run to resume (no recipe.toml); leave out --resume to start one there")
        lock = _locked(path)
        try:
            recipe = (path / "recipe.toml").read_text(encoding="utf-8")
            if difference := _first_difference(recipe, recipe_text):
                new = "another --out for a new run" if _foreign(path) else "leave out --resume: nothing is done yet"
                raise RunError(
                    f"{path} was started with another recipe: {difference}; "
                    f"pass {path / 'recipe.toml'} to resume it, or {new}"
                )
            _heal(path)
            manifest = _read_json(path / "manifest.json")
            seed, earlier = manifest.get("seed"), manifest.get("resumed")
            if not isinstance(seed, int) or not isinstance(earlier, list):
                raise RunError(f"{path / 'manifest.json'} has no usable seed ({seed!r}); start anew with another --out")
            write_atomic(path / "manifest.json", _json({**manifest, "resumed": [*earlier, _environment()]}))
            return cls(path, seed, lock, resumed=True)
        except BaseException:
            os.close(lock)
            raise

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

    @contextlib.contextmanager
    def doing(self, stage: str, *, undoes: Callable[[str], bool] = lambda _later: False) -> Iterator[None]:
        """Time the body, and mark `stage` done if it succeeds.

        Records that an interrupted attempt left are dropped as soon as the stage logs, unless it called `truncate`.

        Args:
            stage: its name.
            undoes: which of the finished stages were built on what this one makes again: they are done no longer, and
                neither is `stage` itself until it ends.
        """
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

    def _write_done(self, done: list[str]) -> None:
        if done != self._done:
            write_atomic(self.path / "stages.json", _json({"done": done}))
            self._done = done

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

        lines = _finished_lines(self._metrics)
        keep = [line for number, line in enumerate(lines, start=1) if kept(_parse(self._metrics, number, line))]
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


def _plain(value: object) -> object:
    """Turn mappings, sequences and NumPy numbers into what JSON holds."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a record holds numbers, texts, lists and mappings, got {type(value).__name__}; convert it first")


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def _disk_is_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    # safetensors and tokenizers report the operating system's error as text only, torch.save what it noticed.
    text = str(error)
    return any(os.strerror(code) in text for code in codes) or (
        "inline_container.cc" in text and "unexpected pos" in text
    )


def _cannot_write(path: Path, error: BaseException) -> RunError:
    if not _disk_is_full(error):
        return RunError(
            f"{path} cannot be written: {error}; check the folder and its permissions, or pass another --out"
        )
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return RunError(
        f"{path} cannot be written: the disk is full ({free:,} bytes free on the disk of {folder}, a quota aside); "
        "free some space and continue with --resume, or pass an --out on another disk"
    )


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def _put_back(path: Path) -> None:
    """Restore the older folder if a crash fell between moving it away and moving the new one in."""
    for replaced in sorted(path.parent.glob(f"{glob.escape(path.name)}{_REPLACED}*")):
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, path)


def _heal(folder: Path) -> None:
    """Remove what a killed process left half-written. The caller holds the lock, so nobody else is writing."""
    for replaced in sorted(folder.rglob(f"*{_REPLACED}*")):
        _put_back(replaced.with_name(replaced.name.partition(_REPLACED)[0]))
    for partial in sorted(folder.rglob(f"*{_PARTIAL}*")):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
    for name in ("metrics.jsonl", "timings.jsonl"):
        path = folder / name
        if path.exists() and not (content := path.read_bytes()).endswith(b"\n") and content:
            write_atomic(path, content[: content.rfind(b"\n") + 1])


def _finished_lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _parse(path: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RunError(f"{path}, line {number}, is not JSON ({error}); remove that line") from error
    if not isinstance(record, dict):
        raise RunError(f"{path}, line {number}, is not a JSON object, got {line[:60]!r}; remove that line")
    return record


def _read_json(path: Path) -> dict[str, object]:
    try:
        return _parse(path, 1, path.read_bytes())
    except (RunError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}; start anew with another --out") from error


def _read_stages(folder: Path) -> list[str]:
    path = folder / "stages.json"
    if not path.exists():
        return []
    done = _read_json(path).get("done")
    if not isinstance(done, list) or not all(isinstance(stage, str) for stage in done):
        raise RunError(f"{path} must list the names of finished stages under 'done', got {done!r}; remove the file")
    return done


def something_done(folder: Path) -> bool:
    """Tell whether a folder holds a run that has left more than its beginning, so that it is resumed."""
    return (folder / "recipe.toml").is_file() and bool(_foreign(folder))


def _foreign(folder: Path) -> list[str]:
    """Return what stands in the way of a new run: nothing, where an earlier one ended before it left a result."""
    found = {entry.name for entry in folder.iterdir() if _PARTIAL not in entry.name}
    board = folder / "tensorboard"
    if board.is_dir() and not any(board.iterdir()):
        found.remove(board.name)
    # Without our manifest a recipe is the user's own file.
    ours = {"manifest.json", *_BEGINNING} if "manifest.json" in found else set()
    return [] if found <= ours | {"run.lock"} else sorted(found - {"manifest.json", "run.lock"})


_BEGINNING = ("recipe.toml", "timings.jsonl", "federation.json")
"""What a run has left when its first stage has failed at once, as for a wrong path."""


def _drop_beginning(folder: Path) -> None:
    for name in _BEGINNING:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(folder / name, error) from error


def _occupied(folder: Path, found: list[str]) -> str:
    if "recipe.toml" in found:
        return f"{folder} already holds a run; add --resume to go on with it, or pass another --out"
    return f"{folder} is not empty (it holds {', '.join(found[:3])}) and is not a run; pass another --out"


def _locked(folder: Path) -> int:
    """Return a file descriptor that holds the folder's lock; the system frees the lock however this process ends."""
    path = folder / "run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise RunError(f"{folder} is in use by {holder}; wait until it ends, or pass another --out") from error
    except OSError as error:
        os.close(descriptor)
        raise _cannot_write(path, error) from error
    return descriptor


def _first_difference(old: str, new: str) -> str | None:
    """Name the first setting in which two recipes differ; comments and layout do not count."""
    try:
        before, after = dict(_flat(tomllib.loads(old))), dict(_flat(tomllib.loads(new)))
    except tomllib.TOMLDecodeError:
        return None if old == new else _first_line(old, new)
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            return f"{key} was {before[key]} and is now left out"
        if key not in before:
            return f"{key} was left out and is now {after[key]}"
        if before[key] != after[key]:
            return f"{key} was {before[key]} and is now {after[key]}"
    return None


def _first_line(old: str, new: str) -> str:
    before, after = old.splitlines(), new.splitlines()
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    return f"line {same + 1} was {''.join(before[same : same + 1])!r} and is now {''.join(after[same : same + 1])!r}"


def _flat(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{place}[{index}]")
    else:
        yield place, repr(value)


def _environment() -> dict[str, object]:
    return {
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": {name: _version(name) for name in ("accord", "torch", "transformers", "trl")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": commit(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit this package runs from, with `-dirty` if it was edited; None outside Accord's own checkout."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An environment inside somebody else's repository must not report that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")) / "src" / "accord" != package:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
    except (OSError, subprocess.SubprocessError):
        return None

"""Write files, lines and folders whole or not at all: beside their place first, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import numbers
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from accord.errors import RunError

Record = TypeVar("Record")

PARTIAL = ".partial-"
REPLACED = ".replaced-"


def write_atomic(path: Path | str, data: bytes | str, *, mode: int = 0o666) -> None:
    """Write `data` (text as UTF-8) to `path` so that a reader, or a crash, never sees half of it.

    Missing parent folders are made. `mode` is of the new file, less the umask.

    Raises:
        RunError: the file cannot be written; what stood at `path` before still stands, and no temporary file is left.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}-{threading.get_ident()}")
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
            raise cannot_write(path, error) from error
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
        raise cannot_write(path, error) from error


def read_lines(path: Path | str) -> list[dict[str, object]]:
    """Read the records of a JSON-lines file; none when it is absent. An unfinished last line is left out.

    Raises:
        RunError: a finished line is not a JSON object.
    """
    path = Path(path)
    return [parse_line(path, number, line) for number, line in enumerate(finished_lines(path), start=1)]


def replace_folder(path: Path | str, write: Callable[[Path], object]) -> None:
    """Let `write` fill a new folder, then put that folder at `path`, in place of an older one.

    `write` gets an empty folder beside `path`. Every file is on disk before the older folder is moved away.

    Raises:
        RunError: the disk is full, or the folder cannot be written; the older folder is intact and the new one removed.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{PARTIAL}{os.getpid()}")
    replaced = path.with_name(f"{path.name}{REPLACED}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        put_back(path)
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
            raise cannot_write(path, error) from error
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
        told = cannot_write(Path(path), error)  # before the room that `clean` makes
        clean()
        raise told from error


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


def put_back(path: Path) -> None:
    """Restore the older folder if a crash fell between moving it away and moving the new one in."""
    for replaced in sorted(path.parent.glob(f"{glob.escape(path.name)}{REPLACED}*")):
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, path)


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


def to_json(value: Mapping[str, object]) -> str:
    """Return a record as indented JSON; NaN and infinity become null."""
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


def cannot_write(path: Path, error: BaseException) -> RunError:
    """Return the error that says why `path` cannot be written, and what to do."""
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


def finished_lines(path: Path) -> list[bytes]:
    """Return the whole lines of a file; none where it is absent."""
    if not path.exists():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def parse_line(path: Path, number: int, line: bytes) -> dict[str, object]:
    """Return the record in a line of a JSON-lines file.

    Raises:
        RunError: it is none; the message names file and line.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}, line {number}, is not JSON ({error}); remove that line") from error
    if not isinstance(record, dict):
        raise RunError(f"{path}, line {number}, is not a JSON object, got {line[:60]!r}; remove that line")
    return record


def read_json(path: Path) -> dict[str, object]:
    """Return the record in a JSON file.

    Raises:
        RunError: the file cannot be read, or holds none.
    """
    try:
        if path.is_symlink():  # before the folder is known to be a run of ours
            raise RunError("it is a link")
        return parse_line(path, 1, path.read_bytes())
    except (RunError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}; start anew with another --out") from error


def read_record(path: Path, kind: type[Record], *, remedy: str) -> Record | None:
    """Return the `kind` in a JSON file; None where there is no file.

    Raises:
        RunError: the file cannot be read, or holds none; the message ends with `remedy`.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise RunError(f"{path} is damaged or cannot be read ({error}); {remedy}") from error

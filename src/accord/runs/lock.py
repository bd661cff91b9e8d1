"""Hold a run's folder for one process; let processes read and write one file in turn."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accord.errors import RunError
from accord.runs.atomic import cannot_write


def locked(folder: Path, remedy: str = "wait until it ends, or pass another --out") -> int:
    """Return a file descriptor that holds the folder's lock; the system frees the lock however this process ends.

    Raises:
        RunError: another process holds it, and `remedy` says what to do; or the folder cannot be written.
    """
    path = folder / "run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise RunError(f"{folder} is in use by {holder}; {remedy}") from error
    except OSError as error:
        os.close(descriptor)
        raise cannot_write(path, error) from error
    return descriptor


@contextmanager
def in_turn_at(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Let one process at a time read and write `path`; the system frees the lock however this process ends.

    Raises:
        RunError: there is a folder or a device in its place, or the lock beside it cannot be opened; it says `what` the
            file is, and the `remedy`.
    """
    try:
        if path.exists() and not path.is_file():  # a device or a pipe has no end
            raise RunError(f"{path}: {what} is no ordinary file; {remedy}")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RunError(f"{path}: {what} cannot be opened ({error}); {remedy}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

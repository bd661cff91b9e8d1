"""Length-prefixed messages over a Unix socket: how Accord's processes reach FLARE's on the same machine.

    organisation A (server)                                   organisation B (site)
    accord run ⇄ server.sock ⇄ FLARE job ⇄ mutual TLS ⇄ FLARE job ⇄ <site>.sock ⇄ accord site join

FLARE starts a process for every job; models stay warm in Accord's own processes, and the jobs' processes only pass
bytes on. A socket lies in a folder that only its owner may enter; nothing listens on a network.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from accord.errors import RunError

SOCKETS_VARIABLE: Final = "ACCORD_SOCKETS"
"""The environment variable by which FLARE's processes learn the folder of the sockets."""

MAX_FRAME: Final = 256 * 2**20
"""Bytes; a longer message is refused before it is read."""


def socket_folder(kit: Path | str) -> Path:
    """Return the folder of the sockets that belong to a start-up kit, made for this user alone.

    It is in the system's temporary folder, since the path of a Unix socket is at most 107 bytes long.

    Raises:
        RunError: the folder exists and is not this user's.
    """
    name = hashlib.sha256(os.fsencode(Path(kit).resolve())).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"accord-{os.getuid()}" / name
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise RunError(
                f"{each} is not a folder that is this user's alone; remove it, or set TMPDIR to another place"
            )
    return folder


def site_socket(folder: Path, site: str) -> Path:
    """Return the path of a site's socket, as long for one name as for another."""
    return folder / f"{hashlib.sha256(site.encode()).hexdigest()[:16]}.sock"


WAITING: Final = 16
"""Connections that wait to be accepted at most; the system refuses or holds back further ones."""


def listen(path: Path) -> socket.socket:
    """Listen on a Unix socket that only this user may connect to; one that a dead process left is replaced.

    Raises:
        RunError: another process listens there, or the path is longer than the system takes.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        probe = socket.socket(socket.AF_UNIX)
        with probe:
            probe.connect(os.fspath(path))
        listener.close()
        raise RunError(f"another process listens on {path}; stop it, or wait until it ends")
    except (FileNotFoundError, ConnectionRefusedError):
        path.unlink(missing_ok=True)
    except OSError as error:
        listener.close()
        if error.errno is not None:
            raise
        raise RunError(f"{path} is too long for a socket ({error}); set TMPDIR to a shorter folder") from error
    listener.bind(os.fspath(path))
    path.chmod(0o600)
    listener.listen(WAITING)
    return listener


def connect(path: Path, *, timeout: float | None = None) -> socket.socket:
    """Connect to a Unix socket.

    Raises:
        OSError: no process listens there.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout)
        connection.connect(os.fspath(path))
    except BaseException:
        connection.close()
        raise
    return connection


def send_frame(connection: socket.socket, data: bytes) -> None:
    """Send one message.

    Raises:
        OSError: the other side is gone, or the connection's timeout passed.
    """
    connection.sendall(len(data).to_bytes(8, "big"))
    connection.sendall(data)


def receive_frame(
    connection: socket.socket,
    *,
    limit: int = MAX_FRAME,
    seconds: float | None = None,
    admit: Callable[[int], None] = lambda _length: None,
) -> bytes:
    """Receive one message.

    Args:
        connection: where from.
        limit: bytes at most.
        seconds: in which the whole message must come, however slowly it does; None for the connection's own timeout.
        admit: told the message's length before anything is kept of it; may raise ValueError.

    Raises:
        EOFError: the other side closed.
        ValueError: it announced more than `limit` bytes, or was not admitted; the connection is of no further use.
        OSError: the connection broke, or its time passed.
    """
    end = None if seconds is None else time.monotonic() + seconds
    length = int.from_bytes(_receive(connection, 8, end), "big")
    if length > limit:
        raise ValueError(f"a message of {length} bytes, at most {limit} are read")
    admit(length)
    return _receive(connection, length, end)


def _receive(connection: socket.socket, length: int, end: float | None) -> bytes:
    buffer = bytearray(length)
    view, received = memoryview(buffer), 0
    while received < length:
        if end is not None:
            connection.settimeout(max(end - time.monotonic(), 1e-3))  # 0 would be: do not wait
        count = connection.recv_into(view[received:])
        if count == 0:
            raise EOFError("the other side closed the connection")
        received += count
    return bytes(buffer)

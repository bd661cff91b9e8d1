"""The sockets by which Accord's processes reach FLARE's on the same machine: nobody else's."""

import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from accord.errors import RunError
from accord.flare.frames import connect, listen, site_socket, socket_folder


@pytest.fixture
def temporary(monkeypatch):
    """A temporary folder whose name is short, as the path of a socket must be."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_only_their_owner_may_enter(temporary):
    folder = socket_folder("kits/server")
    with listen(folder / "server.sock"):
        assert [mode(each) for each in (folder.parent, folder, folder / "server.sock")] == [0o700, 0o700, 0o600]
    assert socket_folder("kits/server") == folder != socket_folder("kits/colour")


@pytest.mark.parametrize("which", ["parent", "folder"])
def test_a_folder_that_others_may_enter_is_refused(temporary, which):
    folder = socket_folder("kits/server")
    (folder.parent if which == "parent" else folder).chmod(0o755)
    with pytest.raises(RunError, match=r"is not a folder that is this user's alone; remove it, or set TMPDIR"):
        socket_folder("kits/server")


def test_a_link_that_another_user_left_is_not_followed(temporary):
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (temporary / f"accord-{os.getuid()}").symlink_to(elsewhere)
    with pytest.raises(RunError, match="this user's alone"):
        socket_folder("kits/server")


def test_a_socket_that_a_dead_process_left_is_replaced_and_a_live_one_is_not(temporary):
    path = socket_folder("kits/server") / "server.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    with listen(path):
        connect(path).close()
        with pytest.raises(RunError, match=r"another process listens on .*; stop it, or wait until it ends"):
            listen(path)


def test_the_longest_name_of_a_site_fits():
    """Below the services' own temporary folder, at the greatest number of a user; the system takes 107 bytes."""
    folder = Path("/run/accord-site/accord-4294967294") / f"{0:016x}"
    assert len(os.fspath(site_socket(folder, "x" * 64))) <= 103  # macOS takes no more
    assert site_socket(folder, "x" * 64) != site_socket(folder, "x" * 63)


def test_a_temporary_folder_that_is_too_long_is_told(tmp_path):
    with pytest.raises(RunError, match=r"server\.sock is too long for a socket .*; set TMPDIR to a shorter folder"):
        listen(tmp_path / ("x" * 100) / "server.sock")

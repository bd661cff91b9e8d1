"""A consortium's later days on FLARE, as docs/deploy.md tells them: add, revoke, renew, replace, move, another port.

Server and sites are FLARE's own processes; the sites are kept as `accord site join` keeps them, without a model.
"""

import contextlib
import shutil
import subprocess
import sysconfig
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from accord.flare.client import REVOKED, FlareClient, revoked
from accord.flare.engine import FlareEngine
from accord.flare.frames import socket_folder
from accord.flare.kit import check_certificate, kit_of, start_command, start_environment
from accord.flare.launch import Production
from accord.flare.provision import Consortium, Member, Server, provision
from processes import free_port

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


class Site:
    """A site's FLARE client, kept as its service keeps it."""

    def __init__(self, kit):
        self.kit, self.said, self.stop = kit_of(kit), [], threading.Event()
        self.client = FlareClient(
            start_command(self.kit),
            start_environment(self.kit),
            self.kit.path / "flare.log",
            self.said.append,
            (self.kit.host, self.kit.port),
        )
        self.thread = threading.Thread(target=self.client.keep, args=(self.stop, lambda _: None))
        self.thread.start()

    def leave(self):
        self.stop.set()
        self.thread.join()
        self.client.__exit__()


class Walk:
    """The lead's folder, and what runs."""

    def __init__(self, root):
        self.root, self.kits = root, root / "kits"
        self.members = Consortium("demo", Server("lab", port=free_port()), (Member("a", "org_a"), Member("b", "org_b")))
        provision(self.members, self.kits)
        self.server_kit = self.kits / "server"
        self.server, self.sites = None, {}

    def start_server(self):
        command = [str(Path(sysconfig.get_path("scripts")) / "accord"), "server", "start", str(self.server_kit)]
        self.server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert "listening on" in self.server.stdout.readline()

    def stop_server(self):
        if self.server is not None:
            self.server.terminate()
            assert self.server.wait(60) == 0
            self.server.stdout.close()
            self.server = None

    def accord(self, *words):
        command = [str(Path(sysconfig.get_path("scripts")) / "accord"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def operator(self):
        production = Production(self.server_kit.parent / "operator")
        try:
            yield production
        finally:
            production.close()

    def here(self, *names, seconds=240.0):
        """Wait until FLARE's server hears of these sites and no others."""
        with self.operator() as production:
            until = time.monotonic() + seconds
            while True:
                with contextlib.suppress(ConnectionError):
                    if production.connected().keys() == {*names}:
                        return
                assert time.monotonic() < until, production.connected()
                time.sleep(1.0)

    def close(self):
        for site in self.sites.values():
            site.leave()
        self.stop_server()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    made = Walk(tmp_path_factory.mktemp("walk"))
    try:
        made.start_server()
        for name in ("a", "b"):
            made.sites[name] = Site(made.kits / name)
        made.here("a", "b")
        yield made
    finally:
        made.close()


def put_in_place(new, old):
    """Do as the page says with a kit that was renewed: only `startup` is exchanged."""
    shutil.rmtree(old / "startup")
    shutil.copytree(new / "startup", old / "startup")


def test_a_site_is_added(walk):
    """The server runs on, and no other kit changes."""
    walk.members = replace(walk.members, sites=(*walk.members.sites, Member("c", "org_c")))
    provision(walk.members, walk.root / "added", authority=walk.kits / "authority")
    walk.sites["c"] = Site(walk.root / "added" / "c")
    walk.here("a", "b", "c")


def test_jobs_leave_little_and_import_no_torch(walk):
    """Two segments: the first is forgotten; the processes of the second have no PyTorch in their memory."""
    sockets, store, first = socket_folder(walk.server_kit), walk.server_kit / "storage" / "jobs", ""
    for _ in range(2):
        with FlareEngine(("a", "b", "c"), Production(walk.server_kit.parent / "operator"), sockets, wait=120.0) as each:
            each._settled()
            lines = {process: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}
            jobs = [process for process, line in lines.items() if "_process" in line and str(walk.root) in line]
            assert len(jobs) == 4, lines.values()
            for process in jobs:
                assert not [m.path for m in process.memory_maps() if "libtorch" in m.path]
        time.sleep(15.0)
        kept = {path.name for path in store.iterdir()}
        assert len(kept) == 1 and first not in kept
        first = first or kept.pop()
    audit = (walk.server_kit / "audit.log").read_text()
    assert "submit_job" in audit and "check_status" not in audit


def test_a_site_is_revoked_and_told(walk):
    """By its name, while the server runs; it stays out when the server starts again, until it is let in."""
    out = walk.accord("server", "revoke", walk.server_kit, "c")
    assert out.startswith("c is revoked")
    walk.here("a", "b")
    until = time.monotonic() + 120
    while REVOKED not in walk.sites["c"].said:
        assert time.monotonic() < until, walk.sites["c"].said
        time.sleep(0.5)
    assert revoked(walk.sites["c"].kit.path / "flare.log")
    walk.stop_server()
    walk.start_server()
    walk.here("a", "b")
    walk.accord("server", "revoke", walk.server_kit, "c", "--undo")
    walk.here("a", "b", "c")
    assert not revoked(walk.sites["c"].kit.path / "flare.log")


def test_a_kit_is_renewed(walk):
    """Only that site stops for it; `replace` is the same with a kit that was lost."""
    new = walk.root / "renewed"
    provision(replace(walk.members, days=90), new, authority=walk.kits / "authority", renew=["b"])
    walk.members = replace(walk.members, days=90)
    walk.sites.pop("b").leave()
    before = check_certificate(kit_of(walk.kits / "b"))
    put_in_place(new / "b", walk.kits / "b")
    assert check_certificate(kit_of(walk.kits / "b")) < before
    walk.sites["b"] = Site(walk.kits / "b")
    walk.here("a", "b", "c")


def test_the_servers_kit_moves(walk):
    """To another folder, with all that it has learnt; the sites find it by themselves."""
    walk.accord("server", "revoke", walk.server_kit, "c")
    walk.stop_server()
    moved = walk.root / "moved"
    moved.mkdir()
    for name in ("server", "operator"):
        shutil.move(walk.kits / name, moved / name)
    walk.server_kit = moved / "server"
    walk.start_server()
    walk.here("a", "b")
    walk.accord("server", "revoke", walk.server_kit, "c", "--undo")
    walk.here("a", "b", "c")


def test_another_port(walk):
    """Everybody's kit is made anew by the same authority, and put in the place of the old one."""
    walk.members = replace(walk.members, server=replace(walk.members.server, port=free_port()))
    new = walk.root / "ported"
    provision(walk.members, new, authority=walk.kits / "authority", renew=["all"])
    for name in list(walk.sites):
        walk.sites.pop(name).leave()
    walk.stop_server()
    places = {"server": walk.server_kit, "operator": walk.server_kit.parent / "operator", "a": walk.kits / "a"}
    for name, old in places.items():
        put_in_place(new / name, old)
    assert kit_of(walk.server_kit).port == walk.members.server.port
    walk.start_server()
    walk.sites["a"] = Site(walk.kits / "a")
    walk.here("a")

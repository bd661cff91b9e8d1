"""Consortia on loopback, of real FLARE processes.

`consortium` is run by the commands of the documentation, each site in its own folder; in `wire` the sites' services are
threads of the test, which say what the test wants said.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import pytest
import tomli_w

from accord.flare.engine import FlareEngine
from accord.flare.frames import listen, receive_frame, send_frame, site_socket, socket_folder
from accord.flare.kit import kit_of, start_command, start_environment
from accord.flare.launch import Production
from accord.flare.provision import Consortium as Members
from accord.flare.provision import Member, Server, provision
from processes import end, free_port

SITES = ("colour", "shape", "yes-no")


class Consortium:
    """Kits, and the processes of server and sites; `kits` are the start-up kits, `folders` the sites' own."""

    def __init__(self, root, names, folders):
        self.root, self.names, self.folders = root, names, folders
        self.kits = root / "kits"
        self.logs = root / "logs"
        self.logs.mkdir(parents=True)
        self.processes = {}
        self.environment = {**ENVIRONMENT}
        self.port = free_port()
        table = {
            "name": "trial",
            "server": {"org": "lead", "address": "localhost", "port": self.port},
            "sites": [{"name": name, "org": f"hospital_{n}"} for n, name in enumerate(names)],
        }
        (root / "consortium.toml").write_text(tomli_w.dumps(table))
        done = self.accord("provision", root / "consortium.toml", "--out", self.kits)
        assert done.returncode == 0, done.stderr

    @staticmethod
    def command(*words):
        return [str(Path(sysconfig.get_path("scripts")) / "accord"), *map(str, words)]

    def accord(self, *words, timeout=250):
        """Run a command to its end."""
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=timeout, cwd=self.root, env=self.environment
        )

    def start(self, name, *words):
        """Start a command under a name, its output in a log."""
        log = (self.logs / f"{name}.log").open("ab")
        with log:
            self.processes[name] = subprocess.Popen(
                self.command(*words),
                stdout=log,
                stderr=log,
                cwd=self.root,
                env=self.environment,
                start_new_session=True,
            )
        return self.processes[name]

    def start_server(self):
        self.start("server", "server", "start", self.kits / "server")

    def join(self, name):
        self.start(name, "site", "join", self.kits / name, self.folders[name], "--quiet")

    def kill(self, name):
        """As if the power had gone."""
        end(self.processes.pop(name))

    def log(self, name):
        return (self.logs / f"{name}.log").read_text()

    def await_log(self, name, text, seconds=120):
        until = time.monotonic() + seconds
        while text not in self.log(name):
            ended = self.processes[name].poll()
            assert ended is None, f"{name} ended with {ended}: {self.log(name)}"
            assert time.monotonic() < until, f"{text!r} never appeared: {self.log(name)}"
            time.sleep(0.2)

    def close(self):
        for name in list(self.processes):
            self.kill(name)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def recipe(tiny_recipe, tmp_path_factory):
    """The tiny recipe with six steps and a deadline, in a file."""
    table = {**tiny_recipe, "alignment": {**tiny_recipe["alignment"], "steps": 6}}
    table["routing"] = {**tiny_recipe["routing"], "deadline": 20.0}
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(tomli_w.dumps(table))
    return path


@pytest.fixture(scope="session")
def in_process(recipe, tmp_path_factory):
    """The recipe, run in one process: its folder."""
    out = tmp_path_factory.mktemp("in-process") / "run"
    done = subprocess.run(
        Consortium.command("run", recipe, "--out", out, "--quiet"), capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def site_folders(in_process, tmp_path_factory):
    """A folder for each site, with its own part of the run in one process and nothing else."""
    folders = {name: tmp_path_factory.mktemp("site") / name for name in SITES}
    for name, folder in folders.items():
        shutil.copytree(in_process / "sites" / name, folder / "sites" / name)
        for file in ("recipe.toml", "manifest.json"):
            shutil.copyfile(in_process / file, folder / file)
        (folder / "stages.json").write_text(json.dumps({"done": [f"site {name}"]}))
    return folders


@pytest.fixture(scope="module")
def consortium(site_folders, tmp_path_factory):
    """Server and sites, running."""
    made = Consortium(tmp_path_factory.mktemp("consortium"), SITES, site_folders)
    try:
        made.start_server()
        made.await_log("server", "listening")
        for name in made.names:
            made.join(name)
        yield made
    finally:
        made.close()


class Service:
    """A site's service: `reply` answers a message, `send` puts it on the connection; both may be changed."""

    def __init__(self, path, reply):
        self.path, self.reply, self.send = path, reply, send_frame
        self.asked = []
        self.start()

    def start(self):
        self.listener = listen(self.path)
        self.listener.settimeout(0.1)
        self.running = True
        self.thread = threading.Thread(target=self.accept)
        self.thread.start()

    def stop(self):
        """As if it had been killed: whoever asks meets nobody."""
        self.running = False
        self.thread.join()
        self.listener.close()

    def accept(self):
        while self.running:
            with contextlib.suppress(TimeoutError):
                connection, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with connection, contextlib.suppress(OSError, EOFError):
            connection.settimeout(None)
            message = receive_frame(connection)
            self.asked.append(message)
            self.send(connection, self.reply(message))


class Wire:
    """FLARE's server and clients, and light services in place of the sites' own."""

    def __init__(self, root, replies):
        self.root, self.names = root, tuple(replies)
        self.kits = root / "kits"
        members = tuple(Member(name, f"hospital_{n}") for n, name in enumerate(self.names))
        provision(Members("trial", Server("lead", port=free_port()), members), self.kits)
        self.processes, self.said = {}, []
        self.open = None
        self.services = {
            name: Service(site_socket(socket_folder(self.kits / name), name), reply) for name, reply in replies.items()
        }
        for name in ("server", *self.names):
            self.start(name)

    def start(self, name):
        """Start a participant's FLARE process."""
        kit = kit_of(self.kits / name)
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                start_command(kit),
                env=start_environment(kit),
                cwd=kit.path,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, name):
        """As if the power had gone."""
        end(self.processes.pop(name))

    def engine(self, *, new=False):
        """Return the engine, another one if it must be new."""
        if self.open is not None and new:
            self.open.close()
            self.open = None
        if self.open is None:
            launcher = Production(self.kits / "operator")
            self.open = FlareEngine(self.names, launcher, socket_folder(self.kits / "server"), tell=self.said.append)
        return self.open

    def close(self):
        if self.open is not None:
            self.open.close()
        for name in list(self.processes):
            self.kill(name)
        for service in self.services.values():
            if service.running:
                service.stop()


@pytest.fixture(scope="module")
def wire(request, tmp_path_factory):
    """Start FLARE for the sites that the module's `REPLIES` names, each with the function that answers there."""
    made = Wire(tmp_path_factory.mktemp("wire"), request.module.REPLIES)
    yield made
    made.close()

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from accord.federation.endpoint import Endpoint
from accord.federation.messages import Card, CardRequest, Refusal, decode_reply, encode
from accord.flare import relay
from accord.flare.frames import listen, receive_frame, send_frame, site_socket


class Called:
    """What FLARE says of the call in hand."""

    def __init__(self, caller):
        self.caller, self.site_name = caller, "colour"


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A service that answers with a card, where the relay looks for it; what it was sent."""
    monkeypatch.setenv("ACCORD_SOCKETS", str(tmp_path))
    endpoint, seen = Endpoint("colour", lambda request: Card(request.id, "none", 0, 0, 0, False, {})), []

    def serve(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                seen.append(receive_frame(connection))
                if seen[-1] != b"silence":
                    send_frame(connection, endpoint(seen[-1]))
                else:
                    time.sleep(1.0)

    with listen(site_socket(tmp_path, "colour")) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield seen


def ask(message, seconds=5.0):
    return decode_reply(relay.SiteRelay().answer(message, seconds))


def test_the_server_is_answered(service, monkeypatch):
    monkeypatch.setattr(relay, "collab", Called("server"))
    assert ask(encode(CardRequest("c"))) == Card("c", "none", 0, 0, 0, False, {})


@pytest.mark.parametrize("caller", ["shape", "colour", "", "server2"])
def test_nobody_else_is(service, monkeypatch, caller, caplog):
    """FLARE lets every participant of a job call every other's published functions."""
    monkeypatch.setattr(relay, "collab", Called(caller))
    assert ask(encode(CardRequest("c"))) == Refusal("", "refused") and service == []
    assert "only the server may" in caplog.text


def test_after_the_deadline_the_relay_hangs_up(service, monkeypatch):
    monkeypatch.setattr(relay, "collab", Called("server"))
    began = time.monotonic()
    assert ask(b"silence", seconds=0.2) == Refusal("", "gone")
    assert time.monotonic() - began < 0.8


def test_without_a_service(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCORD_SOCKETS", str(tmp_path))
    monkeypatch.setattr(relay, "collab", Called("server"))
    assert ask(encode(CardRequest("c"))) == Refusal("", "gone")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_flares_process_ends_with_the_one_that_started_it(tmp_path):
    """The parent is killed with SIGKILL; its child, which would sleep for a minute, is gone within seconds."""
    (tmp_path / "sleeper.py").write_text("import time, pathlib\npathlib.Path('up').touch()\ntime.sleep(60)\n")
    parent = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'accord.flare.child', str(os.getpid()), 'sleeper'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        child = psutil.Process(int(process.stdout.readline()))
        until = time.monotonic() + 60
        while not (tmp_path / "up").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        process.kill()
        assert psutil.wait_procs([child], timeout=30)[1] == [] or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("relay", ["SiteRelay", "ServerRelay"])
def test_a_jobs_process_imports_no_torch(relay):
    """FLARE's own half of a job looks for torch where a job begins, in its controller and its executor."""
    code = f"""
import sys
import nvflare.collab.runtime.controller, nvflare.collab.runtime.executor
import nvflare.private.fed.app.client.worker_process, nvflare.private.fed.app.server.runner_process
from nvflare.fuel.utils.import_utils import optional_import
from accord.flare.relay import {relay}
{relay}()
_, found = optional_import(module="nvflare.app_opt.pt.decomposers", name="TensorDecomposer")
assert not found and "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

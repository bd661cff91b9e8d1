"""The operator's session: one connection, used by one thread, and never in the way of Ctrl-C."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from accord.errors import RunError
from accord.flare.client import FAILED, FlareClient, put_aside, remove_job_folders, unheard
from accord.flare.launch import Production, _Line


@pytest.fixture
def operator(tmp_path):
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "fed_admin.json").write_text(json.dumps({"admin": {"username": "operator@accord.local"}}))
    return tmp_path


@pytest.fixture
def session(monkeypatch):
    """A session as FLARE's, which counts how often it was opened and closed."""
    made = SimpleNamespace(opened=0, closed=0, threads=set(), info=lambda: SimpleNamespace(client_info=[]))

    def get_system_info():
        made.threads.add(threading.current_thread())
        return made.info()

    def close():
        made.closed += 1

    def opened(*_, **__):
        made.opened += 1
        made.get_system_info, made.close = get_system_info, close
        return made

    monkeypatch.setattr("nvflare.fuel.flare_api.flare_api.new_secure_session", opened)
    return made


def test_ctrl_c_is_not_lost_in_flares_code(operator, session):
    """FLARE catches whatever is raised in it, and goes on; the interrupt comes all the same, while it is at work."""
    began, interrupted = threading.Event(), threading.Event()

    def stubborn():
        began.set()
        with contextlib.suppress(BaseException):
            interrupted.wait(60)
        return SimpleNamespace(client_info=[])

    session.info = stubborn
    launcher = Production(operator)
    threading.Thread(target=lambda: began.wait(60) and os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launcher.connected()
    interrupted.set()
    launcher.close()
    assert (session.opened, session.closed) == (1, 1)


def test_one_connection_and_one_thread(operator, session):
    launcher = Production(operator)
    callers = [threading.Thread(target=launcher.connected) for _ in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    launcher.close()
    launcher.close()
    assert (session.opened, session.closed, len(session.threads)) == (1, 1, 1)


def test_a_session_that_failed_is_opened_anew(operator, session):
    """Once it cannot be reached; then it can, with a site that was heard of now and one of an hour ago."""
    launcher, now = Production(operator), time.time()

    def fail():
        raise ValueError("no")

    session.info = fail
    with pytest.raises(ConnectionError, match="ValueError: no"):
        launcher.connected()
    clients = [SimpleNamespace(name=n, last_connect_time=t) for n, t in (("colour", now), ("shape", now - 3600))]
    session.info = lambda: SimpleNamespace(client_info=clients)
    assert launcher.connected() == {"colour": now}
    launcher.close()
    assert (session.opened, session.closed) == (2, 2)


def test_a_call_that_never_ends_is_given_up(operator, session, monkeypatch):
    """As FLARE's does now and then when its server was killed; the next call has a thread and a session of its own.

    So does whoever waited behind the first: it gives up the first call's thread, too, and not the one that came after.
    Once the first call ends after all, it closes the session that it used, and no other.
    """
    launcher, ended, both, ask = Production(operator), threading.Event(), threading.Barrier(2), _Line.ask
    session.info = lambda: ended.wait(60)
    refused = []

    def together(line, what):
        future = ask(line, what)
        both.wait(60)
        return future

    def call():
        with pytest.raises(ConnectionError, match="no answer within 0 s"):
            launcher.connected()
        refused.append(True)

    with monkeypatch.context() as patch:
        patch.setattr("accord.flare.launch.ANSWER", 0.2)
        patch.setattr(_Line, "ask", together)
        behind = threading.Thread(target=call)
        behind.start()
        call()
        behind.join()
    session.info = lambda: SimpleNamespace(client_info=[])
    assert launcher.connected() == {} and refused == [True, True]
    assert (session.opened, session.closed) == (2, 0)
    ended.set()
    until = time.monotonic() + 60
    while session.closed < 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert launcher.connected() == {} and session.opened == 2
    launcher.close()
    assert (session.opened, session.closed) == (2, 2)
    with pytest.raises(ConnectionError, match="logged out"):
        launcher.connected()


def test_a_call_that_never_ends_holds_up_neither_results_nor_exit(operator):
    """FLARE's lines, which it prints for a console of its own, are not among the results."""
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from nvflare.fuel.flare_api import flare_api\n"
        "from nvflare.fuel.hci.client.api import _print_hci_message\n"
        "from accord.flare import launch\n"
        "from accord.terminal import say\n"
        "def never():\n"
        "    _print_hci_message('Connecting to FLARE ...')\n"
        "    threading.Event().wait()\n"
        "flare_api.new_secure_session = lambda *_, **__: SimpleNamespace(get_system_info=never)\n"
        "launch.ANSWER = launch.PARTING = 0.5\n"
        "production = launch.Production(Path(sys.argv[1]))\n"
        "try:\n"
        "    production.connected()\n"
        "except ConnectionError as error:\n"
        "    say(error)\n"
        "production.close()\n"
        "say('report: run/report.html')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(operator)], capture_output=True, text=True, timeout=50)
    assert done.stdout == "FLARE's server gave no answer within 0 s\nreport: run/report.html\n", done.stderr
    assert done.returncode == 0


def test_closing_waits_for_a_call_no_longer_than_that(operator, session, monkeypatch):
    """As after Ctrl-C, while FLARE waits for a server that was killed."""
    monkeypatch.setattr("accord.flare.launch.PARTING", 0.2)
    launcher, began, ended = Production(operator), threading.Event(), threading.Event()
    session.info = lambda: began.set() or (ended.wait(60) and SimpleNamespace(client_info=[]))
    calling = threading.Thread(target=launcher.connected)
    calling.start()
    began.wait(60)
    launcher.close()
    assert session.closed == 0
    ended.set()
    calling.join()


def test_what_is_no_operators_kit(tmp_path):
    with pytest.raises(RunError, match=r"is no operator's start-up kit .*; name that folder"):
        Production(tmp_path)


def test_what_flare_leaves_behind_is_tidied(tmp_path):
    """Of four jobs' folders the newest two stay, and whatever is no job's; a log begins anew for who appends to it."""
    names = [f"{n:08d}-1111-2222-3333-444444444444" for n in range(4)]
    for name in (*names, "startup", "local"):
        (tmp_path / name).mkdir()
        time.sleep(0.02)
    remove_job_folders(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names[2:], "startup", "local"}
    log = tmp_path / "flare.log"
    with log.open("ab", buffering=0) as appending:
        appending.write(b"old" * 10)
        put_aside(log, 100)
        assert log.stat().st_size == 30
        put_aside(log, 10)
        appending.write(b"new")
    assert log.read_bytes() == b"new" and (tmp_path / "flare.log.1").read_bytes() == b"old" * 10
    put_aside(tmp_path / "none")


def test_looks_are_not_audited(tmp_path):
    """The child's own process says so to FLARE before it becomes FLARE; what else an operator does is written down."""
    (tmp_path / "audited.py").write_text(
        "from nvflare.fuel.sec.audit import Auditor\n"
        "auditor = Auditor('audit.log')\n"
        "for command in ('check_status server', 'submit_job', 'disable_client colour'):\n"
        "    auditor.add_event('operator', command)\n"
    )
    command = [sys.executable, "-m", "accord.flare.child", str(os.getpid()), "audited"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run(command, check=True, timeout=60, cwd=tmp_path, env=environment)
    text = (tmp_path / "audit.log").read_text()
    assert "check_status" not in text and "submit_job" in text and "disable_client colour" in text


def test_heartbeats_that_fail_are_the_last_word(tmp_path):
    """Three lines at the end, of the client that runs now; a log that was put aside meanwhile begins at 0."""
    log, failed = tmp_path / "flare.log", "INFO - Failed to send heartbeat. Will try again. Exception: <class 'E'>\n"
    assert not unheard(log)
    for text, told in ((2 * failed, False), (3 * failed, True), (3 * failed + "connected\n", False)):
        log.write_text(text)
        assert unheard(log) is told
    log.write_text(3 * failed)
    assert not unheard(log, start=len(failed)) and unheard(log, start=10_000)


class Stop(threading.Event):
    """Keeps how long is waited between two starts, waits no longer than a moment, and is set before the fourth."""

    def __init__(self):
        super().__init__()
        self.pauses = []

    def wait(self, timeout=None):
        if timeout >= 1.0:
            self.pauses.append(timeout)
            if len(self.pauses) == 3:
                self.set()
        return super().wait(min(timeout, 0.05))


def client(folder, code, told, **settings):
    """A client whose FLARE process is that Python, and whose server is there."""
    return FlareClient(
        [sys.executable, "-uc", code], dict(os.environ), folder / "flare.log", told.append, ("", 0), **settings
    )


def test_a_server_that_answers_no_heartbeat_is_told_and_asked_ever_more_seldom(tmp_path, monkeypatch):
    """The port answers; FLARE is started again after 2, 4 and 8 seconds, and each time a person can read why."""
    monkeypatch.setattr("accord.flare.client.listens", lambda *_: True)
    monkeypatch.setattr("accord.flare.client.LOOK", 0.0)
    told, stop = [], Stop()
    code = f"import time\nfor _ in range(3): print({FAILED.decode()!r})\ntime.sleep(600)"
    client(tmp_path, code, told).keep(stop, lambda _: None)
    assert stop.pauses == [2.0, 4.0, 8.0]
    again = "the server is there, but answers none of its heartbeats, again in"
    assert told == [word for n in (2, 4, 8) for word in ("running", f"{again} {n} s")]


def test_a_certificate_is_looked_at_before_each_start(tmp_path):
    """One that ends while the site is there: at the first start after its end the site hears so, and stops."""
    told, looks = [], []

    def check():
        looks.append(True)
        if len(looks) == 2:
            raise RunError("client.crt expired on 2027-11-16")

    with pytest.raises(RunError, match="expired on"):
        client(tmp_path, "raise SystemExit(7)", told, check=check).keep(Stop(), lambda _: None)
    assert told == ["running", "ended with status 7, again in 2 s"]


def test_revoking_ends_the_jobs(operator, session):
    """FLARE ends none; those that are over are left, and one that ends meanwhile is no failure."""
    aborted = []

    def abort(job):
        aborted.append(job)
        if job == "over":
            raise ValueError("server internal error: Job over is not running.")

    session.disable_client = lambda name: {
        "clients": [{"client_name": name, "already_disabled": False, "active_session_removed": name == "colour"}]
    }
    jobs = {"old": "FINISHED:COMPLETED", "now": "RUNNING", "over": "RUNNING", "next": "SUBMITTED"}
    session.list_jobs = lambda: [{"job_id": job, "status": status} for job, status in jobs.items()]
    session.abort_job = abort
    launcher = Production(operator)
    assert launcher.revoke("colour") is True and aborted == ["now", "over", "next"]
    assert launcher.revoke("color") is False
    jobs.clear()
    jobs["bad"] = "RUNNING"
    session.abort_job = lambda job: (_ for _ in ()).throw(ValueError(f"{job}: no reply"))
    with pytest.raises(
        ConnectionError, match="colour is shut out, but the job that it may be in was not ended: ValueError: bad"
    ):
        launcher.revoke("colour")
    launcher.close()

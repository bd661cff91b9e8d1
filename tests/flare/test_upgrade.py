"""An upgrade as docs/deploy.md tells it, with two versions of Accord: the server first, then the sites, in mid-run.

The newer Accord is this one under another version, with one setting more. Its folder comes first on the import path of
what is upgraded.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import accord
from accord.federation.messages import MESSAGES
from accord.version import VERSION

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

NEWER = "99.0.0"


@pytest.fixture(scope="module", autouse=True)
def told_of_ctrl_c():
    """Tests that run in the background may have been told to ignore Ctrl-C, and all that they start with them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def newer(folder, messages=MESSAGES):
    """Write the newer Accord, which has a setting more, and messages that may be of another version.

    Returns:
        the environment that imports it.
    """
    package = folder / "accord"
    shutil.copytree(Path(accord.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    exchange(package / "version.py", f'VERSION = "{VERSION}"', f'VERSION = "{NEWER}"')
    last = "    leave_out: bool = False"
    exchange(package / "routing" / "router.py", f"\n{last}", f"\n    of_tomorrow: int = 0\n{last}")
    exchange(package / "federation" / "messages.py", f"\nMESSAGES = {MESSAGES}\n", f"\nMESSAGES = {messages}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


def exchange(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def stop(consortium, name):
    """Ctrl-C, which ends a run after its step, a site after its request."""
    process = consortium.processes.pop(name)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) in (0, 130), consortium.log(name)


def started_again(consortium):
    stop(consortium, "server")
    (consortium.logs / "server.log").unlink()
    consortium.start_server()
    consortium.await_log("server", "listening")


def go_on(consortium, recipe, run, name):
    words = ("run", recipe, "--out", run, "--engine", "flare", "--kit", consortium.kits / "server")
    return consortium.start(name, *words, *(["--resume"] if run.exists() else []))


def await_step(consortium, run, name):
    until = time.monotonic() + 240
    while not any("align" in line for line in lines_of(run)):
        assert consortium.processes[name].poll() is None, consortium.log(name)
        assert time.monotonic() < until, consortium.log(name)
        time.sleep(0.02)


def lines_of(run):
    file = run / "metrics.jsonl"
    return [json.loads(line)["stage"] for line in file.read_text().splitlines()] if file.is_file() else []


def words_of(consortium, name):
    return " ".join(consortium.log(name).split())


def test_the_server_goes_first_and_sites_when_it_suits_them(consortium, recipe, in_process, tmp_path):
    """The run is stopped for it and goes on with the newer server, one newer site and two older ones."""
    run = consortium.root / "upgraded"
    go_on(consortium, recipe, run, "before")
    await_step(consortium, run, "before")
    stop(consortium, "before")
    assert not (run / "policy").exists()
    consortium.environment |= newer(tmp_path)
    assert NEWER in consortium.accord("--version").stdout
    started_again(consortium)
    stop(consortium, "shape")
    checked = consortium.accord("site", "check", consortium.kits / "shape", consortium.folders["shape"])
    assert "takes this site's certificate" in " ".join(checked.stdout.split()), checked.stdout + checked.stderr
    consortium.join("shape")
    assert go_on(consortium, recipe, run, "after").wait(600) == 0, consortium.log("after")
    told = words_of(consortium, "after")
    for name in ("colour", "yes-no"):
        assert f"site {name} runs Accord {VERSION}, the server {NEWER}; they understand each other" in told
    assert "site shape runs" not in told
    for file in ("policy/model.safetensors", "router/router.safetensors"):
        assert (run / file).read_bytes() == (in_process / file).read_bytes()


def test_versions_that_do_not_understand_each_other_do_not_begin(consortium, recipe, tmp_path):
    """The messages' version has risen at the server alone."""
    consortium.environment |= newer(tmp_path, messages=MESSAGES + 1)
    started_again(consortium)
    assert go_on(consortium, recipe, consortium.root / "refused", "refused").wait(300) == 2
    told = words_of(consortium, "refused")
    assert f"messages of version {MESSAGES}, and the server's are of {MESSAGES + 1}" in told and "Traceback" not in told
    for name in consortium.names:
        assert f"site {name}: " in told

"""The main job made as small as it gets: some eighty pictures of easy-VQA in a folder, and a recipe of few steps."""

import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest
import tomli_w

from accord.cli import main


@pytest.fixture(scope="session")
def write_recipe(tiny_recipe):
    """Return a function that writes the tiny recipe, with whole tables exchanged, and returns its path."""

    def write(path, **changes):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps({**tiny_recipe, **changes}))
        return path

    return write


@pytest.fixture(scope="session")
def start():
    """Return a function that starts a process, Ctrl-C at work in it whatever this process does with it."""

    def open_process(command, **settings):
        # A shell starts its background jobs deaf to SIGINT, which children inherit; a handler they do not.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
            )
        finally:
            signal.signal(signal.SIGINT, before)

    return open_process


@pytest.fixture(scope="session")
def script():
    """The installed `accord` command."""
    return Path(sysconfig.get_path("scripts")) / "accord"


@pytest.fixture
def accord(monkeypatch, capsys):
    """Return a function that runs the command line in this process; it returns status, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["accord", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory, start, script, write_recipe):
    """A whole run of the tiny recipe by the installed command, in a process of its own: recipe, run folder, output."""
    place = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(place / "tiny.toml")
    process = start([script, "run", recipe, "--out", place / "run"])
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    return recipe, place / "run", out, err

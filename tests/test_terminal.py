"""Output in every encoding, at every width, with colour or without, and into a pipe that is closed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from accord import cli, terminal
from accord.terminal import clean, show_page

REPOSITORY = Path(__file__).resolve().parents[1]
RUN = "from accord.cli import main; main()"


def accord(*words, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", RUN, *words], env=env, capture_output=True, timeout=120)


@pytest.mark.parametrize(("encoding", "arrow"), [("utf-8", "→"), ("cp1252", "->"), ("ascii", "->"), ("latin-1", "->")])
def test_what_an_encoding_lacks_is_written_with_what_it_has(encoding, arrow):
    code = (
        "from accord.terminal import say, take_any_encoding, tell\n"
        "take_any_encoding(); say('36 % → 53 % … é \U0001f534'); tell('a → b')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert f"36 % {arrow} 53 %" in out and f"a {arrow} b" in err
    rest = {"utf-8": "… é \U0001f534", "cp1252": "… é ?", "latin-1": "... é ?", "ascii": "... e ?"}[encoding]
    assert out.rstrip().endswith(rest)


@pytest.mark.parametrize("columns", ["1", "30", "400"])
@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_help_at_every_width(columns, encoding):
    done = accord("evaluate", "--help", PYTHONIOENCODING=encoding, COLUMNS=columns)
    assert done.returncode == 0 and b"Error" not in done.stderr, done.stderr


def test_no_colour_where_none_is_wanted():
    done = accord("evaluate", "--help", NO_COLOR="1", FORCE_COLOR="", TERM="xterm-256color")
    assert done.returncode == 0 and b"\x1b[3" not in done.stdout


def test_a_closed_pipe_is_no_error():
    """As `accord … | head -0`: nothing is said."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", RUN, "plan", "recipes/demo.toml"],
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=120,
        cwd=REPOSITORY,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_narrow_space_is_a_space():
    assert clean("36.7\u202f%\u00a0and\u2028more\x1b") == "36.7 % and?more?"


@pytest.fixture
def opened(monkeypatch):
    """The addresses that a browser was asked to open."""
    addresses = []
    monkeypatch.setattr(terminal.webbrowser, "open", addresses.append)
    return addresses


@pytest.mark.parametrize(
    ("system", "display", "typed", "read", "times"),
    [
        ("linux", ":0", True, True, 1),
        ("darwin", "", True, True, 1),
        ("win32", "", True, True, 1),
        ("linux", "", True, True, 0),  # over SSH there is no window to open
        ("linux", ":0", False, True, 0),  # started by a program
        ("linux", ":0", True, False, 0),  # read by a program
    ],
)
def test_a_page_is_opened_where_a_person_sits(system, display, typed, read, times, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: typed))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: read, raising=False)
    show_page(tmp_path / "report.html")
    assert opened == [(tmp_path / "report.html").as_uri()] * times


def test_a_browser_that_does_not_start_is_no_fault(tmp_path, monkeypatch):
    def fail(_):
        raise terminal.webbrowser.Error("no browser")

    monkeypatch.setattr(terminal, "somebody_sits_here", lambda: True)
    monkeypatch.setattr(terminal.webbrowser, "open", fail)
    show_page(tmp_path / "report.html")


@pytest.mark.parametrize(("words", "shown"), [([], True), (["--no-open"], False)])
def test_the_demo_opens_its_report_unless_told_not_to(words, shown, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "_whole", lambda *_, show: given.append(show))
    monkeypatch.setattr(sys, "argv", ["accord", "demo", *words])
    cli.main()
    assert given == [shown]

import json
import sys
import warnings

import pytest

from accord.cli import _prepare, main
from accord.errors import DataWarning
from accord.terminal import clean
from accord.version import VERSION


def test_the_version_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["accord", "--version"])
    main()
    assert capsys.readouterr().out == f"accord {VERSION}\n"


def test_no_command_shows_the_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["accord"])
    with pytest.raises(SystemExit):
        main()
    assert "--version" in capsys.readouterr().out


ESCAPE = "\x1b[2J\x1b]0;owned\x07\u202e\x9b31m"


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["accord", *map(str, words)])
    main()


@pytest.mark.parametrize("command", ["report", "compare", "plan", "watch"])
def test_a_message_steers_no_terminal(command, tmp_path, monkeypatch, capsys):
    folder = tmp_path / f"x{ESCAPE}"
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, command, folder)
    said = capsys.readouterr()
    assert "error:" in said.err and all(line.isprintable() for line in (said.err + said.out).split("\n"))


def test_an_unknown_option_steers_no_terminal(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, f"--{ESCAPE}")
    assert all(line.isprintable() for line in capsys.readouterr().err.split("\n"))


def test_neither_does_what_nobody_foresaw(monkeypatch, capsys):
    """A traceback, a warning, and a library's log may quote anything."""
    monkeypatch.setattr(sys, "excepthook", None)
    with warnings.catch_warnings():
        _prepare()
        warnings.showwarning(DataWarning(ESCAPE), DataWarning, "", 0)
    error = ValueError(ESCAPE)
    sys.excepthook(ValueError, error, None)
    said = capsys.readouterr().err
    assert "warning:" in said and "ValueError" in said
    assert all(line.isprintable() for line in said.split("\n"))


def test_lines_and_tabs_stay():
    assert clean("a\tb\r\n\x1b[31mc\u2028") == "a\tb?\n?[31mc?"
    assert json.loads(clean(json.dumps({"a": ESCAPE}))) == {"a": ESCAPE}


@pytest.mark.parametrize(
    ("rank", "said"),
    [(None, "this goes on where it was: cd "), ("0", "the launcher with the same command and --resume"), ("1", "")],
)
def test_what_a_stop_says_of_going_on(rank, said, tmp_path, monkeypatch, capsys):
    """Of several processes one speaks, and its own command alone would not go on with all of them."""

    def stop(*_args, **_options):
        monkeypatch.delenv("RANK", raising=False)  # as the first process does
        raise KeyboardInterrupt

    monkeypatch.setattr("accord.cli.app", stop)
    monkeypatch.setattr(sys, "argv", ["accord", "run", "recipe.toml", "--out", str(tmp_path)])
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        main()
    told = "".join(capsys.readouterr())
    assert ended.value.code == 130 and said in told and bool(told) == bool(said)

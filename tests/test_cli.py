import pytest

from accord.cli import main
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

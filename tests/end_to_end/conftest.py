"""The main job made as small as it gets: some eighty pictures of easy-VQA in a folder, and a recipe of few steps."""

import json
import shutil
import signal
import subprocess
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from accord.cli import main
from accord.recipe_file import dump_recipe, import_methods, load_recipe, recipe_of
from accord.runs import Run
from accord.stages.job import open_job


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
def finished(made_once, start, script, write_recipe):
    """A whole run of the tiny recipe by the installed command, in a process of its own: recipe, run folder, output."""

    def run(place):
        recipe = write_recipe(place / "tiny.toml")
        process = start([script, "run", recipe, "--out", place / "run"])
        out, err = process.communicate(timeout=250)
        assert process.returncode == 0, err
        (place / "out").write_text(out)
        (place / "err").write_text(err)

    place = made_once("finished", run)
    return place / "tiny.toml", place / "run", (place / "out").read_text(), (place / "err").read_text()


@pytest.fixture(scope="session")
def trained(finished, tiny_recipe):
    """Return a function that copies the finished run's sites, and its router, to a run of another recipe.

    What is trained once serves every method: a run of that folder begins with its alignment.
    """

    def copy(to, *, router=True, **changes):
        recipe = recipe_of({**tiny_recipe, **changes})
        kept = ["sites", "router"] if router else ["sites"]
        for name in kept:
            shutil.copytree(finished[1] / name, to / name)
        if router:
            (to / "traffic").mkdir()
            shutil.copyfile(finished[1] / "traffic" / "router.json", to / "traffic" / "router.json")
        shutil.copyfile(finished[1] / "manifest.json", to / "manifest.json")
        (to / "recipe.toml").write_text(dump_recipe(recipe))
        done = [f"site {site.name}" for site in recipe.sites] + (["router"] if router else [])
        (to / "stages.json").write_text(json.dumps({"done": done}))
        lines = (finished[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
        own = [line for line in lines if json.loads(line)["stage"] in ("site", *kept)]
        (to / "metrics.jsonl").write_text("".join(own))
        return to

    return copy


@pytest.fixture(scope="session")
def opened():
    """Return a function that goes on with the run of a folder in this process, as `accord run --resume` does."""

    @contextmanager
    def go_on(folder):
        file = folder / "recipe.toml"
        with open_job(import_methods(load_recipe(file)), Run.resume(folder, file.read_text()), quiet=True) as job:
            yield job

    return go_on

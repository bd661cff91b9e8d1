"""The documents say what is: their code runs, their links lead somewhere, their commands, modules and tests exist.

A comment on the line before a block says what becomes of it:

    run                      Python runs in an empty folder; TOML must be a recipe
    run beside runs/demo     Python runs in a folder with the run of a demo   (tests/examples/test_examples.py)
    run with run_folder      Python runs with that folder's path as a name    (the same)
    not run: REASON          the block is a fragment

Every block of Python has such a comment.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from accord.cli import app
from accord.recipe_file import recipe_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for folder in ("docs", "benchmarks", "recipes", ".github") for page in (ROOT / folder).rglob("*.md")),
    ]
)
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.M | re.S)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language, mark=None):
    text = page.read_text(encoding="utf-8")
    return [m for m in BLOCK.finditer(text) if m["language"] == language and (mark is None or m["mark"] == mark)]


def of_all(language, mark):
    found = [(page, m["code"]) for page in PAGES for m in blocks(page, language, mark)]
    return [pytest.param(code, id=f"{page.name}-{n}") for n, (page, code) in enumerate(found)]


@pytest.mark.parametrize("code", of_all("python", "run"))
def test_python_blocks_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", of_all("toml", "run"))
def test_recipes_are_recipes(code):
    recipe_of(tomllib.loads(code))


MARKS = {"run", "run beside runs/demo", "run with run_folder"}


@pages
def test_every_python_block_runs_or_says_why_not(page):
    marks = [block["mark"] or "" for block in blocks(page, "python")]
    assert [mark for mark in marks if mark not in MARKS and not re.fullmatch(r"not run: .{10,}", mark)] == []


def test_there_is_something_to_run():
    assert len(of_all("python", "run")) >= 5 and of_all("toml", "run")


@pages
def test_every_python_block_is_python(page):
    for block in blocks(page, "python"):
        ast.parse(block["code"])


@pages
def test_tables_of_sources_are_recipes(page):
    """A `[[questions]]` table alone becomes a recipe with one site."""
    for block in blocks(page, "toml"):
        if (block["mark"] or "").startswith("not run: "):
            continue
        table = tomllib.loads(block["code"])
        recipe_of({"name": "x", "sites": [{"name": "a", "checkpoint": "b"}], **table})


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


@pages
def test_modules_files_and_tests_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"`(accord(?:\.\w+)+)`", text)):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"
    for path in set(re.findall(r"`((?:examples|tests|recipes|docs|benchmarks)/[\w./-]+\.\w+)`", text)):
        assert (ROOT / path).exists(), f"{page.name}: {path}"
    for path, test in set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)):
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{page.name}: {path}::{test}"


@pages
def test_equations_name_functions_that_exist(page):
    """`accord.module` (`name`, `name`): the names are in the module."""
    text = page.read_text(encoding="utf-8")
    for module, names in re.findall(r"`(accord(?:\.\w+)+)` \((`\w+`(?:, `\w+`)*)\)", text):
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(module), name), f"{page.name}: {module}.{name}"


def shell_lines(page):
    """Every line of the shell blocks, and every inline `accord …`, `make …` and `python …`."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page, "sh"):
        yield from block["code"].splitlines()
    yield from re.findall(r"`((?:accord|make|python) [^`\n]+)`", BLOCK.sub("", text))


def check_accord(words):
    command = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if rest and rest[0] in {name for parameter in command.params for name in parameter.opts}:
            return  # accord --version
        assert rest and rest[0] in command.commands, f"accord has no command {' '.join(words)!r}"
        command = command.commands[rest.pop(0)]
    known = {name for parameter in command.params for name in parameter.opts}
    for word in rest:
        assert not word.startswith("--") or word.split("=")[0] in known, f"{' '.join(words)}: no option {word}"


def check_line(line):
    words = shlex.split(line, comments=True)
    while words and "=" in words[0] and not words[0].startswith("-"):
        words.pop(0)  # OMP_NUM_THREADS=1 python …
    if not words:
        return
    program = Path(words[0]).name
    if program == "accord" and words[1:] and words[1:] != ["…"]:
        check_accord(words[1:])
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        assert set(words[1:]) <= targets, line
    elif program == "python" and words[1].endswith(".py"):
        script = (ROOT / words[1]).read_text(encoding="utf-8")
        for word in words[2:]:
            assert not word.startswith("--") or f'"{word}"' in script, f"{line}: no option {word}"


@pages
def test_commands_exist(page):
    for line in shell_lines(page):
        check_line(line)


@pytest.mark.parametrize(
    "line",
    [
        "accord fly",
        "accord --fly",
        "accord site fly",
        "accord demo --fly",
        "make fly",
        "python examples/own_router.py --fly",
    ],
)
def test_a_command_that_does_not_exist_is_found(line):
    with pytest.raises(AssertionError):
        check_line(line)


def test_each_command_is_in_the_walkthrough():
    """The table has a row for every command of the command line."""

    def names(command, path="accord"):
        if not hasattr(command, "commands"):
            return [path]
        return [name for key, child in command.commands.items() for name in names(child, f"{path} {key}")]

    text = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    assert [name for name in names(typer.main.get_command(app)) if f"| `{name}" not in text] == []

"""What the repository promises of itself: no code in data, one version everywhere, commands that exist."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from accord.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
CODE_IN_DATA = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}


def dotted(node: ast.expr) -> str:
    """Spell `a.b.c`; the empty text for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Find what could run code that came as data; names are followed through `import … as …`."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name.partition(".")[0]] = (
                    name.name if name.asname else name.name.partition(".")[0]
                )
                if name.name.partition(".")[0] in CODE_IN_DATA:
                    yield node.lineno, f"import {name.name}"
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
            if node.module.partition(".")[0] in CODE_IN_DATA:
                yield node.lineno, f"from {node.module} import"
    for node in ast.walk(tree):
        # The bare text counts too, as a key of keyword arguments; a docstring that only mentions it does not.
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield node.lineno, "trust_remote_code"
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = dotted(node.func).partition(".")
        called = f"{aliases.get(first, first)}{dot}{rest}"
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if called in FORBIDDEN_CALLS:
            yield node.lineno, called
        if called in ("numpy.load", "np.load"):
            allowed = keywords.get("allow_pickle")
            if not (isinstance(allowed, ast.Constant) and allowed.value is False):
                yield node.lineno, "numpy.load without allow_pickle=False"
        trusted = keywords.get("trust_remote_code")
        refused = isinstance(trusted, ast.Constant) and trusted.value is False
        # Where nothing is said, transformers asks whether to run a checkpoint's code, and takes a piped `y` for a yes.
        loads = isinstance(node.func, ast.Attribute) and node.func.attr in ("from_pretrained", "from_config")
        if (trusted or loads) and not refused:
            yield node.lineno, "a checkpoint without trust_remote_code=False"
        shell = keywords.get("shell")
        if isinstance(shell, ast.Constant) and shell.value is True:
            yield node.lineno, "shell=True"


SCRIPTS = sorted([*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_never_runs_code_that_came_as_data(path: Path) -> None:
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import torch as t\nt.load(x)",
        "from torch import load as l\nl(x)",
        "import torch\ntorch.load(x, weights_only=True)",
        "import numpy as np\nnp.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import yaml\nyaml.load(x)",
        "eval(x)",
        "exec(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trusted)",
        "AutoConfig.from_pretrained(x)",
        "kind[0].from_pretrained(x)",
        "type(model).from_pretrained(x, **options)",
        "AutoModel.from_config(x)",
        "pipeline(x, trust_remote_code=0)",
        "options = {'trust_remote_code': True}",
        "subprocess.run(x, shell=True)",
        "from marshal import loads",
    ],
)
def test_the_walk_finds_what_it_looks_for(code: str) -> None:
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "json.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=False)",
        "re.compile(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
    ],
)
def test_the_walk_lets_the_harmless_pass(code: str) -> None:
    assert not list(dangers(ast.parse(code)))


def test_text_is_printed_where_it_is_cleaned() -> None:
    """Elsewhere is no `print`, `typer.echo` or write to a standard stream: text from elsewhere steers nothing."""
    found = {}
    for path in SOURCES:
        calls = [dotted(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {c for c in calls if c in ("print", "typer.echo", "click.echo", "sys.stdout.write", "sys.stderr.write")}
        if names:
            found[str(path.relative_to(ROOT / "src/accord"))] = names
    assert found == {
        "terminal.py": {"sys.stdout.write"},  # cleans
        "cli.py": {"sys.stderr.write"},  # of a traceback, which is cleaned
        "pipeline/apart.py": {"sys.stderr.write"},  # of a child's lines, which are cleaned
        "pipeline/child.py": {"print"},  # JSON, to the process that started it
    }


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert [path for path in SOURCES if path.name in drawers] == []


ORDER = (
    *("version", "errors", "terminal", "types", "progress", "toml", "runs"),
    *("data", "models", "rewards", "federation", "attacks", "routing", "alignment", "evaluation"),
    *("annotation", "recipe", "stages", "methods", "recipe_file", "footprint", "plan", "pipeline", "flare"),
    *("reward_cli", "annotate_cli", "cli"),
)
"""The parts of the package; each imports only from itself and from those before it."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Name the parts of Accord that a module imports, wherever in it."""
    for node in ast.walk(tree):
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"accord.{name.name}" for name in node.names] if node.module == "accord" else [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("accord."))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_backwards_along_the_path(path: Path) -> None:
    part = path.relative_to(ROOT / "src" / "accord").parts[0].removesuffix(".py")
    if part != "__init__":
        later = ORDER[ORDER.index(part) + 1 :]
        assert [name for name in imported(ast.parse(path.read_text(encoding="utf-8"))) if name in later] == []


def test_the_walk_finds_imports() -> None:
    code = "import accord.cli\nfrom accord import plan\ndef f():\n    from accord.routing.fit import g\nimport torch"
    assert list(imported(ast.parse(code))) == ["cli", "plan", "routing"]


def project() -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def test_one_version_everywhere() -> None:
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    released = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited and released
    assert {cited[1], released[1]} == {VERSION}
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in pyproject["project"] and pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["hatch"]["version"] == {"path": "src/accord/version.py"}
    assert [path for path in SOURCES if VERSION in path.read_text(encoding="utf-8")] == [ROOT / "src/accord/version.py"]


def plain(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_every_dependency_has_a_reason_and_a_pin() -> None:
    table = project()
    dependencies, extras = table["dependencies"], table["optional-dependencies"]
    assert isinstance(dependencies, list) and isinstance(extras, dict)
    wanted = {
        plain(each)
        for each in [
            *dependencies,
            *extras["annotate"],
            *extras["browser"],
            *extras["flare"],
            *extras["pretrained"],
            *extras["dev"],
            *extras["docs"],
        ]
    } - {"accord"}
    document = (ROOT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9, -]+) \| .{10,} \|$", document, re.MULTILINE)
    assert wanted <= {name.strip() for row in rows for name in row.split(",")}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {plain(line) for line in pins if not line.startswith("#")}
    assert wanted <= pinned
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in pins if not line.startswith("#"))


def test_no_constraint_brings_cuda() -> None:
    names = {plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")}
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_of_the_documents_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?:sh|bash|console|text)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (.+)$", text, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", text)
    commands = re.findall(r"(?:^|\n|&& |\$ )make ([a-z]+)", "\n".join([*fenced, *indented, *inline]))
    assert set(commands) <= targets()


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    described = set(re.findall(r"^([a-z-]+):[^\n]*## \S", makefile, re.MULTILINE))
    tests = {"test", "test-long", "test-browser", "test-families", "test-newest", "audit", "lint"}
    others = {"help", "setup", "demo", "worlds", "image", "format", "docs", "release", "clean"}
    assert described == tests | others == targets()


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text() and "\nmake test\nmake test-browser\n" in script.read_text()


def test_the_licence_is_apache() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert project()["license"] == "Apache-2.0"

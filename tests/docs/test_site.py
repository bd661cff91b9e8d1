"""The front door: what a stranger sees first, and that the site and the lists of recipes leave nothing out.

The site itself is built by `make docs`, which fails on a broken link.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readme_is_short():
    """At most 700 words, and one picture that loads at once."""
    page = text("README.md")
    assert len(page.split()) <= 700
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert (ROOT / picture).stat().st_size < 300_000


def test_every_page_of_the_documentation_is_in_the_navigation():
    listed = set(re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text("mkdocs.yml"), re.M))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= listed
    assert {"index.md", "recipes/README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"} <= listed


def test_the_navigation_names_files_that_exist():
    for name in re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text("mkdocs.yml"), re.M):
        source = {"index.md": "README.md", "examples/mor_in_one_file.md": "examples/mor_in_one_file.py"}.get(name, name)
        assert (ROOT / source).is_file() or (ROOT / "docs" / source).is_file(), name


def test_the_site_asks_no_other_server():
    """Material would fetch fonts; a diagram in Mermaid would fetch a script."""
    assert re.search(r"^  font: false\b", text("mkdocs.yml"), re.M)
    assert [page.name for page in (ROOT / "docs").glob("*.md") if "```mermaid" in page.read_text()] == []


def test_every_recipe_is_explained():
    """A row with its link; what it is, its time and its numbers are for people to judge."""
    page = text("recipes/README.md")
    linked = set(re.findall(r"^\| \[\S+\]\((\S+\.toml)\) \|", page, re.M))
    assert linked == {str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.toml")}


def test_forms_for_reports_and_changes_are_there():
    for name in ("SECURITY.md", "CODE_OF_CONDUCT.md", ".github/pull_request_template.md"):
        assert len(text(name).split()) > 50, name
    assert {form.name for form in (ROOT / ".github/ISSUE_TEMPLATE").iterdir()} == {
        "bug.yml",
        "question.yml",
        "config.yml",
    }

"""What `mkdocs build` adds to the pages of docs/: the repository's other pages, the examples, and the API.

A file keeps the path that it has in the repository, but for docs/, whose pages are at the top, and the README, which is
the first page. So a link between two files is rewritten by where both lie, and one that leads nowhere fails the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "accord"
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md", "recipes/README.md")
FOLDERS = ("benchmarks", "examples", "recipes")
"""Shown as pages where they hold code, and copied where they hold a figure."""

LANGUAGES = {".py": "python", ".toml": "toml", ".cff": "yaml", "LICENSE": "text"}
FIGURES = (".png", ".svg")
LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?P<after>\))")
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]* src=\"?https?:|<link[^>]* rel=\"?(?:stylesheet|preconnect)[^>]*https?:"
)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def parts() -> list[str]:
    """Name the parts of the package that have something to say to a caller, in alphabetical order."""
    found = [*PACKAGE.glob("*/__init__.py"), *PACKAGE.glob("*.py")]
    names = {path.parent.name if path.stem == "__init__" else path.stem for path in found}
    return sorted(names - {PACKAGE.name})


def files() -> list[Path]:
    """List what is added to docs/, relative to the repository."""
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = [path for path in below if path.suffix in {".md", *FIGURES, *LANGUAGES}]
    return [*map(Path, (*PAGES, "CITATION.cff", "LICENSE")), *sorted(path.relative_to(ROOT) for path in wanted)]


def place(path: PurePosixPath) -> str:
    """Return where in the site a file of the repository is."""
    if path == PurePosixPath("README.md"):
        return "index.md"
    if path.parts[0] == "docs":
        return str(path.relative_to("docs"))
    return str(path.with_suffix(".md")) if path.suffix in LANGUAGES or path.name in LANGUAGES else str(path)


def origin(place: str) -> PurePosixPath:
    """Return where in the repository the page at a place comes from; the inverse of `place`."""
    if place == "index.md":
        return PurePosixPath("README.md")
    if (ROOT / "docs" / place).is_file():
        return PurePosixPath("docs", place)
    return PurePosixPath(place)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the API behind the other pages."""
    if config.nav is not None:
        config.nav.append({"API": [{f"accord.{name}": f"api/{name}.md"} for name in parts()]})
    return config


def on_files(files_: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, the code that they link to, and a page of the API for each part."""
    for path in dict.fromkeys(files()):
        where, source = place(PurePosixPath(path)), ROOT / path
        if path.suffix in FIGURES:
            files_.append(File.generated(config, where, abs_src_path=str(source)))
            continue
        text = source.read_text(encoding="utf-8")
        if where != str(path) and where != "index.md":
            text = f"# `{path}`\n\n```{LANGUAGES.get(path.suffix, 'text')}\n{text}```\n"
        files_.append(File.generated(config, where, content=text))
    for name in parts():
        files_.append(File.generated(config, f"api/{name}.md", content=f"::: accord.{name}\n"))
    return files_


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links between files of the repository lead to their places in the site."""
    here = origin(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        path = link["path"]
        if "://" in path or path.startswith("mailto:"):
            return link[0]
        there = PurePosixPath(os.path.normpath(here.parent / path))
        target = os.path.relpath(place(there), PurePosixPath(page.file.src_uri).parent)
        return f"{link['before']}{target}{link['anchor'] or ''}{link['after']}"

    kept: list[str] = FENCE.findall(markdown)
    outside = [LINK.sub(moved, text) for text in FENCE.split(markdown)]
    return "".join(text + code for text, code in zip(outside, [*kept, ""], strict=True))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from another server when it is read."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches from another server: {found[0]}")
    return output

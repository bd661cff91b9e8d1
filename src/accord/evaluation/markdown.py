"""Write tables in Markdown: the one place that knows what would end a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_ESCAPES: Mapping[str, str] = {"\\": "\\\\", "|": "\\|", "<": "&lt;", "&": "&amp;", "`": "\\`"}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the cells of `rows` are Markdown, so that a name in one goes through `escaped` first."""
    lines = [f"| {' | '.join(map(escaped, header))} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def escaped(text: str) -> str:
    """Return a text that shows as it is in a cell: nothing in it ends the cell or begins HTML."""
    return " ".join("".join(_ESCAPES.get(letter, letter) for letter in text).split())

"""Print to a terminal: the one place where text from elsewhere loses what would steer a terminal or forge a line.

A site chooses its name, a received run its recipe's, a checkpoint its error; any of them may hold escape sequences.
Bars and tables that `rich` draws clean their texts themselves (`accord.progress`, `accord.flare`).
"""

from __future__ import annotations

import codecs
import logging
import os
import sys
import unicodedata
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from accord.errors import printable

console = Console(stderr=True, soft_wrap=True)
"""Standard error, where everything goes that is no result."""


_PLAIN: Final = {"→": "->", "←": "<-", "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "≥": ">=", "≤": "<="}
"""How signs are written where a terminal's or a pipe's encoding lacks them; other characters become a question mark."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = []
    for sign in error.object[error.start : error.end]:
        bare = unicodedata.normalize("NFKD", sign)[:1]
        letters.append(_PLAIN.get(sign) or (bare if bare.isascii() else "?"))
    return "".join(letters), error.end


codecs.register_error("accord.plain", _plain)


def take_any_encoding() -> None:
    """Let standard output and error write what their encoding lacks as something that it has, and never raise."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="accord.plain")


def hush() -> None:
    """Silence transformers' own lines and bars."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def clean(text: object) -> str:
    """Return lines without control characters but tabs; bidirectional marks go, too."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in str(text).split("\n"))


def say(result: object, *, end: str = "\n") -> None:
    """Print a result to standard output."""
    sys.stdout.write(clean(result) + end)
    sys.stdout.flush()


def tell(text: str, *, word: str = "", style: str = "") -> None:
    """Print a line to standard error: a `word` in a style and a text, or a text in that style."""
    line = Text.assemble((word, style), " ", printable(text)) if word else Text(printable(text), style=style)
    console.print(line, highlight=False)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    tell(text, word="warning:", style="yellow")


def somebody_sits_here() -> bool:
    """Tell whether a person reads and types in this terminal, on a machine that can show a window."""
    display = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return display and sys.stdin.isatty() and sys.stdout.isatty()


def show_page(page: Path | str) -> None:
    """Open a file or an address in the person's browser where one sits here; one that does not start is no fault."""
    if somebody_sits_here():
        with suppress(webbrowser.Error, OSError):
            webbrowser.open(page.resolve().as_uri() if isinstance(page, Path) else page)


class CleanFormatter(logging.Formatter):
    """Format a record of a library's log, which may quote anything."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines, cleaned."""
        return clean(super().format(record))

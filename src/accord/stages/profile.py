"""Say what a stage's time went to: `accord run --profile`.

    profile/stages.md       a table: each stage's seconds, the processor's share of them, and whose code took them
    profile/<stage>.html    its call tree and, under "Timeline", its flame graph over time; it opens without a network

pyinstrument looks at the main thread a hundred times a second and slows a run down by some hundredths at most. Sites
that train in processes of their own (`processes`) are not looked into.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from accord.errors import RunError
from accord.evaluation.markdown import markdown_table
from accord.runs import write_atomic

if TYPE_CHECKING:
    from pyinstrument import Profiler
    from pyinstrument.frame import Frame

FOLDER: Final = "profile"

INTERVAL: Final = 0.01
"""Seconds between two looks."""

SHOWN: Final = 6
"""Parts of a stage in the table."""


class Profiled(msgspec.Struct, frozen=True):
    """A stage's time: all of it, the processor's, and by whose code it was spent."""

    seconds: float
    cpu_seconds: float
    parts: dict[str, float]  # seconds of a package, or of a module of Accord's, the largest first


@contextmanager
def profiled(run: Path, stage: str) -> Iterator[None]:
    """Look at what the body does, and write it into the folder `profile` of a run.

    Raises:
        RunError: pyinstrument is not installed.
    """
    profiler = _profiler()
    began, cpu = time.perf_counter(), time.process_time()
    profiler.start()
    try:
        yield
    finally:
        session = profiler.stop()
        spent = time.perf_counter() - began, time.process_time() - cpu
    parts: dict[str, float] = defaultdict(float)
    if (root := session.root_frame()) is not None:
        _count(root, "", parts)
    largest = {part: round(parts[part], 3) for part in sorted(parts, key=parts.__getitem__, reverse=True)}
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stage)
    write_atomic(run / FOLDER / f"{name}.html", profiler.output_html())
    _write_table(run / FOLDER, stage, Profiled(round(spent[0], 3), round(spent[1], 3), largest))


def check_profiler() -> None:
    """Refuse to begin a run whose profile could not be written.

    Raises:
        RunError: pyinstrument is not installed.
    """
    _profiler()


def _profiler() -> Profiler:
    try:
        from pyinstrument import Profiler
    except ImportError as error:
        raise RunError(
            "--profile needs pyinstrument; install it with `pip install 'accord[profile]'`, or leave --profile out"
        ) from error
    return Profiler(interval=INTERVAL, async_mode="disabled")


def _count(frame: Frame, owner: str, parts: dict[str, float]) -> None:
    """Add each frame's own time to whom its code belongs to; time without a file is the caller's."""
    owner = _owner(frame.file_path) or owner
    parts[owner] += frame.time - sum(child.time for child in frame.children)
    for child in frame.children:
        _count(child, owner, parts)


def _owner(path: str | None) -> str:
    """Return the package of a file, and of Accord's own files the module; empty for what is no file."""
    if not path or path.startswith("<"):
        return ""
    parts = Path(path).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1].removesuffix(".py")
    if "accord" in parts[:-1]:
        inner = parts[len(parts) - parts[::-1].index("accord") :]
        return ".".join(["accord", *inner]).removesuffix(".py")
    return "Python"


def _write_table(folder: Path, stage: str, this: Profiled) -> None:
    file = folder / "stages.json"
    known = json.loads(file.read_bytes()) if file.is_file() else {}
    known[stage] = msgspec.to_builtins(this)  # a stage that is done again has its newest
    write_atomic(file, json.dumps(known, indent=2) + "\n")
    rows = []
    for name, each in msgspec.convert(known, dict[str, Profiled]).items():
        whole = max(each.seconds, 1e-9)
        shown = list(each.parts.items())[:SHOWN]
        whose = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in shown)
        rows.append([name, f"{each.seconds:.1f}", f"{each.cpu_seconds / whole:.0%}", whose])
    table = markdown_table(["stage", "seconds", "of the processor", "whose code took them"], rows)
    write_atomic(folder / "stages.md", table + "\n")

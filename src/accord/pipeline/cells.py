"""Read what a grid has measured from its folders, and write its table.

    <out>/<recipe>/
      table.md, table.csv, table.svg   mean over seeds, 95 % intervals, n (`accord.evaluation.table`)
      failed.txt                       the cells that failed, and why
      <seed>/                          a run folder, with compare/<method>.json or compare/<method>.failed

Nothing is kept besides: a table covers all that its folders hold, whichever process measured it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from accord.errors import RunError
from accord.evaluation.table import Cell, table, to_csv, to_figure, to_markdown
from accord.methods import METHODS
from accord.pipeline.comparison import arm_file
from accord.runs import stages_done, write_atomic


def read_cells(folder: Path) -> list[Cell]:
    """Return the cells of a recipe that are measured or have failed, by seed and then in the order of measurement.

    Args:
        folder: `<out>/<recipe>`.
    """
    return [cell for place in _seed_folders(folder) for cell in cells_of(place)]


def _seed_folders(folder: Path) -> list[Path]:
    found = [place for place in folder.glob("*") if place.name.isdecimal() and place.is_dir()]
    return sorted(found, key=lambda place: int(place.name))


def cells_of(folder: Path) -> list[Cell]:
    """Return the cells of one seed's run folder."""
    cells, seed = [], int(folder.name)
    for method in (stage.removeprefix("compare ") for stage in stages_done(folder) if stage.startswith("compare ")):
        measured = _read(arm_file(folder, method))
        correct = {name: (right, n) for name, (right, n) in measured["test"].items()}
        down, up = (sum(row[k] for row in measured["traffic"]) for k in (3, 4))
        role = _role(method, measured)
        cells.append(Cell(method, seed, correct, down, up, measured["seconds"], role=role))
    measured_already = {cell.method for cell in cells}
    for file in sorted((folder / "compare").glob("*.failed")):
        failure = _read(file)
        if failure["method"] not in measured_already:
            role = _role(failure["method"], failure)
            cells.append(Cell(failure["method"], seed, failed=failure["error"], role=role))
    return cells


def write_table(folder: Path) -> str:
    """Write the table of a recipe's folder as Markdown, CSV and SVG, and its failures; return the Markdown."""
    cells = read_cells(folder)
    roles = {cell.method: cell.role for cell in cells if cell.role != "competes"}
    made = table(cells, _in_domain(folder), roles)
    text = f"## {folder.name}\n\n{to_markdown(made)}"
    write_atomic(folder / "table.csv", to_csv(made))
    if figure := to_figure(made):
        write_atomic(folder / "table.svg", figure + "\n")
    failures = [f"seed {cell.seed} {cell.method}: {' '.join(cell.failed.split())}\n" for cell in cells if cell.failed]
    if failures:
        write_atomic(folder / "failed.txt", "".join(failures))
    else:
        (folder / "failed.txt").unlink(missing_ok=True)
    write_atomic(folder / "table.md", text)
    return text


def _role(method: str, noted: Mapping[str, Any]) -> str:
    """Return a method's place in a table: as Accord knows it, else as its file notes it; older files note none."""
    return METHODS[method].role if method in METHODS else str(noted.get("role", "competes"))


def _in_domain(folder: Path) -> list[str]:
    """Return the types that a site holds: the same for every seed."""
    for place in _seed_folders(folder):
        if "compare base" in stages_done(place):
            return cast(list[str], _read(arm_file(place, "base"))["in_domain"])
    return []


def failure_file(folder: Path, method: str) -> Path:
    """Return where it is noted why a method failed."""
    return arm_file(folder, method).with_suffix(".failed")


def _read(file: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}; remove its folder to measure that seed again") from error

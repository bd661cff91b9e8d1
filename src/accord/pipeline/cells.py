"""Read what a grid has measured from its folders, and write its table.

    <out>/<recipe>/
      table.md, table.csv, table.svg   mean over seeds, 95 % intervals, tests (`accord.evaluation.table`)
      failed.txt                       the cells that failed, and why
      tried.json                       how many settings of a method were tried on dev, as its recipe says
      <seed>/                          a run folder, with compare/<method>.json or compare/<method>.failed

Nothing is kept besides: a table covers all that its folders hold, whichever process measured it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from accord.errors import RunError
from accord.evaluation.table import Cell, table, to_csv, to_figure, to_markdown
from accord.methods import METHODS
from accord.pipeline.comparison import arm_file, questions_file
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


def cells_of(folder: Path, *, but: Collection[str] = ()) -> list[Cell]:
    """Return the cells of one seed's run folder, `but` for those of some methods."""
    cells, seed = [], int(folder.name)
    methods = [stage.removeprefix("compare ") for stage in stages_done(folder) if stage.startswith("compare ")]
    waiting = [method for method in methods if method not in but]
    file = questions_file(folder)
    asked = _read(file) if waiting and file.is_file() else {}  # older folders do not say what was asked
    for method in waiting:
        measured = _read(arm_file(folder, method))
        correct = {name: (right, n) for name, (right, n) in measured["test"].items()}
        down, up = (sum(row[k] for row in measured["traffic"]) for k in (3, 4))
        cells.append(
            Cell(
                method,
                seed,
                correct,
                down,
                up,
                measured["seconds"],
                role=_role(method, measured),
                shuffled={name: (right, n) for name, (right, n) in measured.get("shuffled", {}).items()},
                outcomes=measured.get("outcomes", {}),
                asked=asked,
            )
        )
    for file in sorted((folder / "compare").glob("*.failed")):
        failure = _read(file)
        method = failure["method"]
        if method not in methods and method not in but:
            cells.append(Cell(method, seed, failed=failure["error"], role=_role(method, failure)))
    return cells


def write_table(folder: Path) -> str:
    """Write the table of a recipe's folder as Markdown, CSV and SVG, and its failures; return the Markdown."""
    cells = read_cells(folder)
    roles = {cell.method: cell.role for cell in cells if cell.role != "competes"}
    tried = _read(tried_file(folder)) if tried_file(folder).is_file() else {}
    made = table(cells, in_domain(folder), roles, tried)
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


def in_domain(folder: Path) -> list[str] | None:
    """Return the types that a site holds, the same for every seed; None where columns are no types."""
    for place in _seed_folders(folder):
        if "compare base" in stages_done(place):
            return cast(list[str] | None, _read(arm_file(place, "base"))["in_domain"])
    return []


def tried_file(folder: Path) -> Path:
    """Return where a recipe's folder says how many settings of each method were tried."""
    return folder / "tried.json"


def failure_file(folder: Path, method: str) -> Path:
    """Return where it is noted why a method failed."""
    return arm_file(folder, method).with_suffix(".failed")


def _read(file: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}; remove its folder to measure that seed again") from error

"""Train one site in a process of its own, and end when the process that started it does, however that happens.

    python -m accord.pipeline.child RUN SITE [--quiet]

Standard input is a pipe that the parent holds open: its end is the parent's. Progress goes to standard error; a failure
that Accord foresees goes to standard output, as `{"error": class, "message": text}`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from pathlib import Path

from accord.errors import AccordError
from accord.pipeline.apart import apart
from accord.recipe_file import load_recipe
from accord.runs import Run
from accord.stages.job import on_own_projector, open_job
from accord.stages.process import prepare
from accord.stages.sites import train_site
from accord.terminal import hush


def main() -> None:
    """Train the site that the command line names, in its own part of the run folder."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # of rows left out the parent tells, once
    hush()
    told, sys.stdout = sys.stdout, sys.stderr
    run, name, quiet = Path(sys.argv[1]), sys.argv[2], "--quiet" in sys.argv[3:]
    try:
        train(run, name, quiet=quiet)
    except AccordError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=told, flush=True)
        raise SystemExit(2) from None


def train(run: Path, name: str, *, quiet: bool) -> None:
    """Train a site of the run in the folder `run`, in a run folder of its own."""
    file = run / "recipe.toml"
    recipe = load_recipe(file)
    prepare(recipe)
    own = Run.create(apart(run, name), file.read_text(encoding="utf-8"), seed=recipe.seed)
    with open_job(on_own_projector(recipe, run), own, quiet=quiet, main=run) as job:
        train_site(job, name)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()

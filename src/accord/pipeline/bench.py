"""Run a grid of methods x seeds, go on where it stopped, and keep its table up to date.

    <out>/<recipe>/
      table.md, table.csv, table.svg   mean over seeds, 95 % intervals, tests (`accord.evaluation.table`)
      failed.txt                       the cells that failed, and why
      <seed>.log                       what a process of its own said (`jobs`)
      <seed>/                          a run folder (`accord.runs`): sites, router, and compare/<method>.json

A cell is one method with one seed: `accord.pipeline.comparison.compare` on the sites and the router of that seed, which
are trained once for all methods. The folder's recipe has no `compare`, so that a method added later finds them. Beside
the methods each seed has two controls, the base and answers from the question alone. Everything that the table says is
read from the folders, so it covers all that they hold, whichever process measured it; how many settings of a method
were tried on dev, the recipe's table `[tried]` says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import cast

from accord.errors import AccordError, RecipeError, RunError
from accord.evaluation.accuracy import question_only
from accord.evaluation.table import CIDER, CONTROLS, Cell, macro
from accord.methods import check_methods, check_names, find_method, needed
from accord.models.load import load_model
from accord.pipeline.apart import train_sites
from accord.pipeline.cells import cells_of, failure_file, tried_file, write_table
from accord.pipeline.comparison import Ask, answers, compare, measure, role_noted, with_other_images, write_arm
from accord.recipe import Recipe
from accord.recipe_file import dump_recipe, import_methods, load_recipe
from accord.runs import OF_NO_RESULT, Run, read_lines, something_done, stages_done, write_atomic
from accord.stages.alignment import greedy
from accord.stages.job import Job, open_job
from accord.stages.process import prepare
from accord.stages.projector import check_projector, pretrain_projector
from accord.stages.routing import train_router


@dataclass(frozen=True)
class SeedRun:
    """One seed of one recipe: the cells that share sites and router."""

    file: Path  # of the recipe
    recipe: Recipe  # with this seed, and without `compare` and `tried`
    folder: Path
    methods: tuple[str, ...]
    tried: Mapping[str, int] = field(default_factory=dict)  # settings of a method, as the recipe's [tried] says

    @property
    def log(self) -> Path:
        """What a process of its own says on standard error."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def rows(self) -> tuple[str, ...]:
        """The controls and the methods."""
        return (*CONTROLS, *self.methods)


def plan_grid(files: Sequence[Path], *, seeds: Sequence[int], out: Path, methods: Sequence[str] = ()) -> list[SeedRun]:
    """Return every seed of every recipe with its folder; `methods` instead of each recipe's `compare`.

    Raises:
        RecipeError: a recipe or a method is wrong, there is no method, or two recipes would share a folder.
    """
    grid: list[SeedRun] = []
    for file in files:
        recipe = import_methods(load_recipe(file))
        if methods:
            recipe = check_names(replace(recipe, compare=tuple(methods)))
        if not recipe.compare:
            raise RecipeError(f'{file} compares no methods; add compare = ["routed", …] to it, or --methods routed,…')
        check_methods(recipe, recipe.compare)
        if any(other.recipe.name == recipe.name for other in grid):
            raise RecipeError(f"two recipes are called {recipe.name!r} and would share a folder; rename one")
        for seed in seeds:
            foreign = [name for name in recipe.compare if ":" in name and find_method(name, ()).tables]
            uses = tuple(dict.fromkeys([*recipe.uses, *foreign]))
            own = replace(recipe, seed=seed, compare=(), tried={}, uses=uses)
            chosen = tuple(dict.fromkeys(recipe.compare))
            grid.append(SeedRun(file, own, out / recipe.name / str(seed), chosen, recipe.tried))
    return grid


def bench(
    grid: Sequence[SeedRun], *, jobs: int = 1, bars: bool = False, tell: Callable[[str], object] = lambda line: None
) -> str:
    """Measure every cell that is not measured, and return the recipes' tables in Markdown.

    A cell that fails with an `AccordError` is noted, and tried again by the next call; the others go on.

    Args:
        grid: what `plan_grid` returned.
        jobs: how many seeds at once, each in a process of its own; with 1 all are done in this one.
        bars: show the stages' progress bars; only with one job.
        tell: called with one line for every cell that was measured.

    Raises:
        RunError: a folder holds a run of another recipe, is in use, or cannot be written.
    """
    for seed in grid:
        for method in seed.rows:
            failure_file(seed.folder, method).unlink(missing_ok=True)
        file = tried_file(seed.folder.parent)
        if seed.tried:
            write_atomic(file, json.dumps(seed.tried, indent=2) + "\n")
        else:
            file.unlink(missing_ok=True)
    progress = _Progress(grid, jobs, tell)
    # A process takes seconds to start: what is finished is only looked at, and that here.
    apart = [seed for seed in grid if jobs > 1 and _waiting(seed)]
    for seed in grid:
        if seed not in apart:
            finish_seed(seed, bars=bars, on_cell=progress.update)
    _finish_apart(apart, jobs, progress.update)
    folders = dict.fromkeys(seed.folder.parent for seed in grid)
    return "\n".join(write_table(folder) for folder in folders)


def finish_seed(seed: SeedRun, *, bars: bool = False, on_cell: Callable[[], object] = lambda: None) -> None:
    """Measure the cells of one seed that are not measured; sites and router are trained if a method needs them."""
    with _open(seed, bars=bars) as job:
        failed = _train_judges(job, seed.methods)
        # Only now, for a site or router that was trained has undone the comparisons that stand on it.
        measures = {"base": measure_base, "question-only": measure_question_only}
        measures |= {method: partial(compare, arm=method) for method in seed.methods if method not in failed}
        for row, stage in measures.items():
            if not job.run.done(f"compare {row}"):
                _attempt(job, [row], stage)
                on_cell()
        on_cell()


@contextmanager
def _open(seed: SeedRun, *, bars: bool) -> Iterator[Job]:
    text, stored = dump_recipe(seed.recipe), seed.folder / "recipe.toml"
    if something_done(seed.folder):
        same = _same(seed)
        run = Run.resume(seed.folder, stored.read_text(encoding="utf-8") if same else text)
        if same:
            write_atomic(stored, text)
    else:
        run = Run.create(seed.folder, text, seed=seed.recipe.seed)
    prepare(seed.recipe)
    with open_job(seed.recipe, run, quiet=not bars) as job:
        if job.written is not None and not run.done("projector"):
            check_projector(job.written)
            pretrain_projector(job)
        yield job


def _same(seed: SeedRun) -> bool:
    """Tell whether all that a folder holds was measured by this recipe, whatever else its stored recipe says.

    A setting that this version has added is absent there, or its default. Free are the recipe's own `method`, for no
    cell is aligned by it, what changes no byte of a result, and the tables that no measured method reads: a method that
    is added later brings its own.
    """
    recipe = seed.recipe
    try:
        kept = import_methods(load_recipe(seed.folder / "recipe.toml"))
        measured = [
            stage.removeprefix("compare ") for stage in stages_done(seed.folder) if stage.startswith("compare ")
        ]
        sites = [site.name for site in recipe.sites]
        read = [table for row in measured if row not in CONTROLS for table in find_method(row, sites).tables]
        free = {name: getattr(recipe, name) for name in ("method", *OF_NO_RESULT)}
        alike = all(table.of(kept) == table.of(recipe) for table in read)
        return alike and replace(kept, tables={}, uses=(), **free) == replace(recipe, tables={}, uses=())
    except RecipeError:
        return False


def _train_judges(job: Job, methods: Sequence[str]) -> set[str]:
    """Train what waiting methods need and is not trained: sites first, then the router; return whom a failure stops."""
    stopped: set[str] = set()
    for need, train in (("sites", train_sites), ("router", _train_router_once)):
        rows = [row for row in methods if row not in stopped and need in needed(job.recipe, [row])]
        if not all(job.run.done(f"compare {row}") for row in rows) and not _attempt(job, rows, train):
            stopped |= set(rows)
    return stopped


def _train_router_once(job: Job) -> None:
    if not job.run.done("router"):
        train_router(job)


def _attempt(job: Job, rows: Sequence[str], stage: Callable[[Job], None]) -> bool:
    """Do a stage that these rows need; return whether it succeeded, and note why not for those not measured."""
    try:
        stage(job)
    except AccordError as error:
        for row in rows:
            if not job.run.done(f"compare {row}"):
                noted = {"method": row, "error": str(error), **role_noted(job.recipe, row)}
                write_atomic(failure_file(job.path, row), json.dumps(noted) + "\n")
        return False
    return True


def measure_base(job: Job) -> None:
    """Measure the untrained policy, as `compare` measures an aligned one; note also which types a site holds."""
    with job.doing("compare base", needs=()):
        model, processor = load_model(job.recipe.policy.checkpoint)
        _note(job, "base", lambda asked, _: greedy(model, processor, asked, job.recipe))


def measure_question_only(job: Job) -> None:
    """Measure the commonest answer to the question's text; dev questions have the base split's answers only."""
    base = job.questions.get("base", [])
    known = {"dev": base, "test": [*base, *job.questions["dev"]]}
    with job.doing("compare question-only", needs=()):
        _note(job, "question-only", lambda asked, split: question_only(known[split], asked), looks=False)


def _note(job: Job, row: str, ask: Ask, *, looks: bool = True) -> None:
    began = time.monotonic()
    measured = measure(job, answers(job, ask))
    dealt, held = job.recipe.dealing is not None, job.shares.values()  # whatever is dealt is some site's, if few
    in_domain = sorted({q.question_type for q in job.evaluated if dealt or any(share.wants(q) for share in held)})
    noted = {"in_domain": None if job.recipe.captions else in_domain}  # the columns of captions are no types
    measured |= {"traffic": [], "seconds": round(time.monotonic() - began, 1), **noted}
    write_arm(job, row, {**measured, **(with_other_images(job, ask) if looks else {})})


class _Progress:
    """Tell of every cell once, as it appears in the folders, and keep the tables up to date."""

    def __init__(self, grid: Sequence[SeedRun], jobs: int, tell: Callable[[str], object]) -> None:
        self.grid, self.jobs, self.tell = grid, jobs, tell
        self.told = {(seed.folder, row) for seed in grid for row in seed.rows if row not in _waiting(seed)}

    def update(self) -> None:
        """Look for new cells."""
        for seed in self.grid:
            told = {row for folder, row in self.told if folder == seed.folder}
            fresh = [cell for cell in cells_of(seed.folder, but=told) if cell.method in seed.rows]
            if fresh:
                write_table(seed.folder.parent)
            for cell in fresh:
                self.told.add((seed.folder, cell.method))
                place = f"[{len(self.told)}/{sum(len(s.rows) for s in self.grid)}] {seed.recipe.name} seed {cell.seed}"
                result = f"failed: {cell.failed}" if cell.failed else _result(cell)
                left = self._left()
                self.tell(f"{place} {cell.method}: {result}" + (f", about {duration(left)} left" if left else ""))

    def _left(self) -> float:
        """Estimate the seconds left from what each stage has taken with other seeds; 0 where no method tells."""
        known: dict[tuple[str, str], list[float]] = defaultdict(list)
        usual = []
        for seed in self.grid:
            for record in read_lines(seed.folder / "timings.jsonl"):
                if record["done"]:
                    stage, seconds = str(record["stage"]), cast(float, record["seconds"])
                    known[seed.recipe.name, stage].append(seconds)
                    if stage.removeprefix("compare ") in seed.methods:
                        usual.append(seconds)
        total, unfinished = 0.0, 0
        for seed in self.grid:
            rows = [row for row in seed.rows if (seed.folder, row) not in self.told]
            unfinished += bool(rows)
            for stage in [*_judges_waiting(seed, rows), *(f"compare {row}" for row in rows)]:
                total += fmean(known.get((seed.recipe.name, stage)) or usual or [0.0])
        return total / max(1, min(self.jobs, unfinished)) if usual else 0.0


def _judges_waiting(seed: SeedRun, rows: Sequence[str]) -> list[str]:
    """Return the stages of sites and router that are still to come, for the sake of these rows."""
    needs = needed(seed.recipe, [row for row in rows if row not in CONTROLS])
    done = stages_done(seed.folder)
    sites = [f"site {site.name}" for site in seed.recipe.sites if "sites" in needs]
    waiting = [stage for stage in sites if stage not in done]
    again = bool(waiting) or "router" not in done  # a site undoes the router
    return [*waiting, "router"] if "router" in needs and again else waiting


def _result(cell: Cell) -> str:
    took = duration(cell.seconds)
    if CIDER in cell.correct:  # measures of captions have no mean; the one that all have is named
        return f"{CIDER} {macro(cell, [CIDER]) or 0:.3f} in {took}"
    return f"{100 * (macro(cell, cell.correct) or 0):.1f} % in {took}"


def duration(seconds: float) -> str:
    """Return a time as one says it: `83 s`, `12 min`, `1 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _finish_apart(seeds: Sequence[SeedRun], jobs: int, update: Callable[[], object]) -> None:
    """Finish every seed in a process of its own, `jobs` at a time."""
    waiting, working = [*seeds], list[tuple[SeedRun, subprocess.Popen[bytes]]]()
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                seed = waiting.pop(0)
                working.append((seed, _start(seed, jobs)))
            time.sleep(0.5)
            ended = [(seed, process) for seed, process in working if process.poll() is not None]
            working = [(seed, process) for seed, process in working if (seed, process) not in ended]
            update()
            for seed, process in ended:
                _check(seed, process.returncode)
    finally:
        for _, process in working:
            process.terminate()  # a run may be broken off at any moment
        for _, process in working:
            process.wait()


def _start(seed: SeedRun, jobs: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "accord.cli", "bench", str(seed.file), "--quiet"]
    command += ["--seed-only", str(seed.recipe.seed), "--out", str(seed.folder.parent.parent)]
    command += ["--methods", ",".join(seed.methods)]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))  # by default each process would take every core
    seed.log.parent.mkdir(parents=True, exist_ok=True)
    with seed.log.open("wb") as log:
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)


def _check(seed: SeedRun, status: int) -> None:
    if status == 130:
        raise KeyboardInterrupt
    if status:
        said = seed.log.read_text(errors="replace").split("error: ")[-1].strip()
        raise RunError(
            f"the process of {seed.recipe.name}, seed {seed.recipe.seed}, ended with status {status}: {said[-1000:]}; "
            "correct that, and the same command goes on"
        )


def _waiting(seed: SeedRun) -> list[str]:
    done = stages_done(seed.folder)
    return [row for row in seed.rows if f"compare {row}" not in done]

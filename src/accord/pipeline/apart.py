"""Train the sites of a run in processes of their own, several at once; the result is that of one after the other.

    run/apart/<site>/   a run folder, the child's until it ends: records, timings, sites/<site>
    run/privacy/        the ledgers of private sites, which stand here from the start: what is paid stays paid

A site's training depends on no other site, so it may happen anywhere. A child works in a run folder of its own, and
what it made is taken over in the order of the recipe: `metrics.jsonl` is what one process would have written. A folder
whose site is trained is kept until it is taken over, also by a later process. A child ends when its parent does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from accord import errors
from accord.errors import RunError
from accord.recipe import Recipe
from accord.runs import append_line, read_lines, stages_done
from accord.stages import routing
from accord.stages.job import Job
from accord.stages.private import has_certificate, settle_site
from accord.stages.sites import check_sites
from accord.terminal import clean

POLL_SECONDS: Final = 0.1


def train_sites(job: Job) -> None:
    """Train the sites of this process's machine that are not trained, as many at once as the recipe and cores allow.

    Raises:
        AccordError: a site failed; the others are stopped, and those that were trained are kept.
    """
    here = [] if job.engine is not None else [site.name for site in job.recipe.sites]
    waiting = [
        name for name in here if not (job.run.done(f"site {name}") or _whole(job, name) or has_certificate(job, name))
    ]
    count = min(at_once(job.recipe), len(waiting))
    if count > 1:
        check_sites(job)
        _train_apart(job, waiting, count)
    routing.train_sites(job, take_over=partial(_take_over, job))
    shutil.rmtree(job.path / "apart", ignore_errors=True)


def at_once(recipe: Recipe) -> int:
    """Return how many processes the recipe wants at once, and no more than there are cores for their threads."""
    cores = (os.cpu_count() or 1) // max(1, recipe.threads)
    return max(1, min(recipe.processes, cores))


def apart(run: Path, name: str) -> Path:
    """Return the run folder of the process that trains a site."""
    return run / "apart" / name


def _whole(job: Job, name: str) -> bool:
    """Tell whether a process has trained the site, and nobody has taken it over."""
    folder = apart(job.path, name)
    return f"site {name}" in stages_done(folder) and (folder / "sites" / name).is_dir()


@dataclass(frozen=True)
class _Child:
    name: str
    process: subprocess.Popen[str]
    relay: threading.Thread
    said: deque[str]  # the last lines on its standard error

    def check(self) -> None:
        """Raise what the process, which has ended, says that it failed by."""
        told = self.end()
        if self.process.returncode == 0:
            return
        if told:
            failure = json.loads(told)
            kind = getattr(errors, failure["error"], RunError)
            raise kind(failure["message"])
        raise RunError(
            f"the process that trains site {self.name} ended with status {self.process.returncode}: "
            f"{''.join(self.said).strip() or 'it said nothing; a kill for want of memory looks like this'}; "
            "correct that and go on with --resume, or lower processes"
        )

    def end(self) -> str:
        """Wait for the process, close its pipes, and return what it told on standard output."""
        with self.process:  # closes them, too
            self.relay.join()
            assert self.process.stdout is not None
            return self.process.stdout.read()


def _train_apart(job: Job, names: list[str], count: int) -> None:
    """Train sites, `count` at a time, the longest first: the last to start decides when all are done."""
    steps = {
        site.name: site.reward_model.steps + (site.finetune.steps if site.finetune else 0) for site in job.recipe.sites
    }
    waiting, working = sorted(names, key=lambda name: -steps[name]), list[_Child]()
    try:
        while waiting or working:
            while waiting and len(working) < count:
                working.append(_start(job, waiting.pop(0)))
            time.sleep(POLL_SECONDS)
            for child in [child for child in working if child.process.poll() is not None]:
                working.remove(child)
                child.check()
    finally:
        for child in working:
            child.process.kill()
        for child in working:
            child.end()


def _start(job: Job, name: str) -> _Child:
    shutil.rmtree(apart(job.path, name), ignore_errors=True)
    command = [sys.executable, "-m", "accord.pipeline.child", str(job.path), name, *(["--quiet"] if job.quiet else [])]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # held open for as long as this process lives
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C reaches this process alone, which then stops its children
        env={**os.environ, "OMP_NUM_THREADS": str(max(1, job.recipe.threads))},
    )
    said: deque[str] = deque(maxlen=20)

    def relay() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if not job.quiet:
                sys.stderr.write(clean(line))
                sys.stderr.flush()

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    return _Child(name, process, thread, said)


def _take_over(job: Job, name: str) -> bool:
    """Move a site that a process has trained into the run, with its records and its time; False if none has."""
    if not _whole(job, name):
        return False
    folder, place = apart(job.path, name), job.path / "sites" / name
    with job.doing(f"site {name}"):
        for record in read_lines(folder / "metrics.jsonl"):
            job.log(record)
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        # The last thing that can be undone: from here on the folder apart is not whole, and is made anew.
        os.replace(folder / "sites" / name, place)
        for timing in read_lines(folder / "timings.jsonl"):
            append_line(job.path / "timings.jsonl", timing)
        settle_site(job, name)
    return True

"""Training that shares parameters, on the sites of a job: through the same engine, counted in the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from accord.errors import ReplyError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import Reply, Request, Task, UpdateRequest
from accord.federation.site import LocalUpdate
from accord.progress import stage_bar
from accord.stages.job import Job

Updates: TypeAlias = Callable[[str], Mapping[Task, LocalUpdate]]
"""A site's name → how it trains shared models."""


def open_training(job: Job, updates: Updates) -> InProcessEngine:
    """Start every site in this process with nothing but its half of a training.

    Raises:
        RunError: the sites are other organisations', whose private data this process has not.
    """
    engine = InProcessEngine({site.name: _handler(updates(site.name)) for site in job.recipe.sites})
    engine.traffic = job.traffic
    return engine


def _handler(updates: Mapping[Task, LocalUpdate]) -> Callable[[Request], Reply]:
    def handle(request: Request) -> Reply:
        if not isinstance(request, UpdateRequest) or request.task not in updates:
            raise ReplyError(f"this site does not answer a {type(request).__name__}")
        return updates[request.task](request)

    return handle


@contextmanager
def rounds_told(job: Job, stage: str, rounds: int, *, about: str = "") -> Iterator[Callable[[int, float], None]]:
    """Yield what to call after every federated round of a stage: it notes the loss, and moves the progress bar on."""
    with stage_bar(f"{stage}: {about}" if about else stage, rounds, quiet=job.quiet) as advance:

        def on_round(number: int, loss: float) -> None:
            job.log({"stage": stage, "step": 0, "round": number, "loss": loss})
            advance(1)

        yield on_round

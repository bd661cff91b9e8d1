"""Align one policy with several processes: what the ranks beside rank 0 do in `accord run` under a launcher.

    rank 0           sites, router        align, compare …    evaluation, report
    rank 1 … W−1     (wait)               align, compare …    (end)

Rank 0 alone has the run folder, the sites and the records; the others read what it has written, and take their share of
every step's completions.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from accord.errors import RecipeError
from accord.federation.ranks import OneConnection, Together
from accord.methods import find_method
from accord.recipe import Recipe
from accord.runs import Run, stages_done
from accord.stages.job import Job, on_own_projector


class _Followed:
    """Another process's run: its folder, and what it has finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def done(self, stage: str) -> bool:
        return stage in stages_done(self.path)


def check_together(recipe: Recipe) -> None:
    """Refuse a method that several processes cannot align by, before anything is trained.

    Raises:
        RecipeError: names it.
    """
    for name in (recipe.method, *recipe.compare):
        if not find_method(name, [site.name for site in recipe.sites]).together:
            raise RecipeError(
                f"the method {name!r} trains or learns more than the policy, or asks hidden questions, which is one "
                "process's; leave it out, or start `accord` without accelerate or torchrun"
            )


def aligned_together(job: Job) -> list[str]:
    """Return the stages that are still to do in which a policy is aligned."""
    stages = ["align", *(f"compare {arm}" for arm in job.recipe.compare)]
    return [stage for stage in stages if not job.run.done(stage)]


def follow(recipe: Recipe, folder: Path, together: Together) -> None:
    """Take part in what rank 0 aligns, and end."""
    stages = together.meet()
    sites = [site.name for site in recipe.sites]
    run, engine = cast(Run, _Followed(folder)), OneConnection(None, sites)
    job = Job(on_own_projector(recipe, folder), run, quiet=True, engine=engine, together=together)
    for stage in stages:
        name = recipe.method if stage == "align" else stage.removeprefix("compare ")
        find_method(name, sites).align(job, stage)
    together.part()

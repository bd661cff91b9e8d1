"""The main job, stage by stage: projector if wanted, sites, router, alignment, comparisons, evaluation, report.

    questions ──► site k: pairs ──► reward model k ──┐
    (dealt out)                                      ├──► router (federated) ──► alignment ──► evaluation ──► report
    base policy ─────────────────────────────────────┘    what the method needs of these

Every stage reads what the stages before it left in the run folder and can be run alone, repeated, or resumed. The
method says which of them it needs (`accord.methods`).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from accord.evaluation.report import write_report
from accord.methods import check_methods, find_method, needed
from accord.models.load import check_quantized, save_model
from accord.models.trial import try_checkpoint
from accord.pipeline.apart import train_sites
from accord.pipeline.comparison import compare
from accord.pipeline.evaluation import evaluate
from accord.pipeline.ranks import aligned_together, check_together
from accord.pipeline.reward import open_reward
from accord.stages.data_check import warn_of_long_answers, warn_of_triggers
from accord.stages.job import Job
from accord.stages.projector import check_projector, pretrain_projector
from accord.stages.routing import train_router
from accord.stages.sites import holds_several, train_site
from accord.stages.traffic import save_traffic

__all__ = [
    "Job",
    "align_policy",
    "compare",
    "evaluate",
    "execute",
    "open_reward",
    "pretrain_projector",
    "train_router",
    "train_site",
]


def execute(job: Job) -> Path:
    """Run every stage that is not done; return the report's path.

    Raises:
        RecipeError: a method cannot be done by this recipe, or with other organisations' sites; nothing is trained.
        CheckpointError: a checkpoint is of a family that Accord does not carry; no site, router or policy is trained.
    """
    recipe = job.recipe
    check_methods(recipe, [recipe.method, *recipe.compare], elsewhere=job.engine is not None)
    check_projector(job.written or recipe, elsewhere=job.engine is not None)
    if job.together is not None:
        check_together(recipe)
    if recipe.alignment.quantize:
        check_quantized()
    job.run.plan(stages_of(job))
    if not job.run.done("align"):
        warn_of_long_answers(job)
        warn_of_triggers(job, held=job.engine is None)
    needs = needed(recipe, [recipe.method, *recipe.compare])
    if job.written and not job.run.done("projector"):
        try_checkpoint(job.written.policy.checkpoint)
        pretrain_projector(job)
    for checkpoint, several in _untried(job, needs).items():
        try_checkpoint(checkpoint, several=several)
    if "sites" in needs:
        train_sites(job)
    if "router" in needs and not job.run.done("router"):
        train_router(job)
    if job.together is not None:
        job.together.meet(aligned_together(job))
    if not job.run.done("align"):
        align_policy(job)
    for arm in recipe.compare:
        if not job.run.done(f"compare {arm}"):
            compare(job, arm)
    if job.together is not None:
        job.together.part()
    if not job.run.done("evaluation"):
        evaluate(job)
    return write_report(job.path)


def _untried(job: Job, needs: Collection[str]) -> dict[str, bool]:
    """Return the checkpoints that the stages to come start from, and whether they will get several images a prompt.

    None may turn out at alignment not to be carried.
    """
    recipe, run = job.recipe, job.run
    open_, sites = not run.done("align"), recipe.sites if "sites" in needs and job.engine is None else ()
    untrained = [site for site in sites if not run.done(f"site {site.name}")]
    if not open_ and not untrained:
        return {}
    asked = any(q.further for questions in job.questions.values() for q in questions)
    held = {site.name: holds_several(job, site.name) for site in sites}
    found = [(recipe.policy.checkpoint, asked)] if open_ else []
    if open_ and "router" in needs:  # sites read their pairs with it
        found.append((recipe.encoder_checkpoint, asked or any(held.values())))
    found += [(site.checkpoint, held[site.name]) for site in untrained]
    return {checkpoint: any(several for name, several in found if name == checkpoint) for checkpoint, _ in found}


def stages_of(job: Job) -> dict[str, int]:
    """Return the stages of a run in order, with their steps or rounds; 0 where they have none."""
    recipe = job.recipe
    names = [site.name for site in recipe.sites]
    needs = needed(recipe, [recipe.method, *recipe.compare])
    projector = job.written.projector if job.written else None
    stages: dict[str, int] = {} if projector is None else {"projector": projector.averaging.rounds}
    if "sites" in needs and job.engine is None:
        stages |= {f"site {site.name}": site.reward_model.steps for site in recipe.sites}
    if "router" in needs:
        stages["router"] = recipe.router.rounds
    stages["align"] = find_method(recipe.method, names).steps(recipe)
    stages |= {f"compare {arm}": find_method(arm, names).steps(recipe) for arm in recipe.compare}
    return stages | {"evaluation": 0}


def align_policy(job: Job) -> None:
    """Align the policy by the recipe's method, and keep it: the run's own result."""
    check_methods(job.recipe, [job.recipe.method], elsewhere=job.engine is not None)
    method = find_method(job.recipe.method, [site.name for site in job.recipe.sites])
    with job.doing("align", needs=method.needs):
        model, processor = method.align(job, "align")
        save_model(model, processor, job.path / "policy")
        save_traffic(job, "align")
    # Not before the stage is done: killed in between, a run would have every step to do again.
    shutil.rmtree(job.path / "checkpoints" / "align", ignore_errors=True)

"""The main job, stage by stage: sites, router, alignment, comparisons, evaluation, report.

    questions ──► site k: pairs ──► reward model k ──┐
    (dealt out)                                      ├──► router (federated) ──► GRPO ──► evaluation ──► report
    base policy ─────────────────────────────────────┘    or FedGRPO's choice

Every stage reads what the stages before it left in the run folder and can be run alone, repeated, or resumed.
"""

from __future__ import annotations

from pathlib import Path

from accord.evaluation.report import write_report
from accord.pipeline.alignment import open_reward
from accord.pipeline.comparison import compare
from accord.pipeline.evaluation import evaluate
from accord.pipeline.job import Job
from accord.pipeline.methods import align_policy
from accord.pipeline.routing import train_judges, train_router, train_sites
from accord.pipeline.sites import train_site

__all__ = ["Job", "align_policy", "compare", "evaluate", "execute", "open_reward", "train_router", "train_site"]


def execute(job: Job) -> Path:
    """Run every stage that is not done; return the report's path. FedGRPO by itself needs no router."""
    if job.recipe.method == "routed" or job.recipe.compare:
        train_judges(job)
    else:
        train_sites(job)
    if not job.run.done("align"):
        align_policy(job)
    for arm in job.recipe.compare:
        if not job.run.done(f"compare {arm}"):
            compare(job, arm)
    if not job.run.done("evaluation"):
        evaluate(job)
    return write_report(job.path)

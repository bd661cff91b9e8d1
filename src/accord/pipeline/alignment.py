"""Stage 3: GRPO of the base policy against the federation."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin, set_seed
from transformers.trainer_utils import get_last_checkpoint

from accord.alignment.grpo import RewardFunction, align
from accord.alignment.reward import FederatedReward
from accord.evaluation.accuracy import count_correct, sample_questions
from accord.federation.engine import Engine
from accord.models.generate import answer
from accord.models.load import load_vlm, save_vlm
from accord.pipeline.job import Job
from accord.pipeline.sites import open_federation
from accord.pipeline.traffic import SaveTraffic, load_traffic, save_traffic
from accord.progress import ProgressBarCallback
from accord.recipe import Recipe
from accord.routing.router import LearnedRouter, Router, load_router
from accord.types import Question


def align_policy(job: Job) -> None:
    """Align the policy with the learned router and the sites' rewards."""
    with job.run.doing("align"):
        engine = open_federation(job)
        router = LearnedRouter(job.encoder, load_router(job.need("router", "accord router train RECIPE")))
        reward = federated_reward(job, engine, router)
        model, processor = run_grpo(job, "align", reward)
        save_vlm(model, processor, job.path / "policy")
        shutil.rmtree(job.path / "checkpoints" / "align", ignore_errors=True)
        save_traffic(job, "align")


def federated_reward(job: Job, engine: Engine, router: Router, *, soft: bool | None = None) -> FederatedReward:
    """Make the federation a reward function with the recipe's routing; `soft` overrides its mode."""
    routing = job.recipe.routing
    mode = routing.mode if soft is None else "soft" if soft else "top1"
    return FederatedReward(
        engine,
        router,
        mode=mode,
        scope=routing.scope,
        end_tokens=_end_tokens(job.encoder.model),
        deadline=routing.deadline,
        unfinished=job.recipe.scores.low if job.recipe.scores else None,
        sources={q.id: q.image for q in job.questions["public"]},
    )


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ids = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def run_grpo(job: Job, stage: str, reward: RewardFunction) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Align a fresh copy of the base policy, from the newest checkpoint if the stage was interrupted."""
    recipe = job.recipe
    set_seed(recipe.seed)
    model, processor = load_vlm(recipe.policy.checkpoint)
    out = job.path / "checkpoints" / stage
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    if last is not None:
        job.run.truncate(stage, after_step=int(last.rsplit("-", 1)[1]))
        load_traffic(job, Path(last) / "traffic.json")
    dev = sample_questions(job.questions["dev"], recipe.alignment.evaluate_on, seed=0)

    def measure() -> Mapping[str, float]:
        counts = count_correct(dev, greedy(model, processor, dev, recipe))
        return {name: right / n for name, (right, n) in counts.items()}

    with ProgressBarCallback(stage, metrics=("reward", "kl"), quiet=job.quiet) as bar:
        model = align(
            model,
            processor,
            job.questions["public"],
            reward,
            recipe.alignment,
            seed=recipe.seed,
            out=out,
            measure=measure,
            log=lambda record: job.run.log({"stage": stage, **record}),
            callbacks=[bar, SaveTraffic(job)],
            resume=last is not None,
        )
    return model, processor


def greedy(
    model: PreTrainedModel, processor: ProcessorMixin, questions: Sequence[Question], recipe: Recipe
) -> list[str]:
    """Return the policy's greedy answers."""
    return [
        texts[0] for texts in answer(model, processor, questions, max_new_tokens=recipe.alignment.max_completion_length)
    ]

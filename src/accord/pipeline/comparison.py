"""The same alignment with other rewards: what the routed federation is measured against."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from transformers import set_seed

from accord.alignment.grpo import RewardFunction, exact_match_reward
from accord.alignment.reward import FederatedReward
from accord.evaluation.accuracy import count_correct, sample_questions
from accord.evaluation.summary import Accuracy, accuracy
from accord.federation.engine import InProcessEngine, Traffic
from accord.federation.site import Site, SiteRecord
from accord.pipeline.alignment import federated_reward, greedy, run_grpo
from accord.pipeline.job import Job
from accord.pipeline.routing import constant_router, random_router
from accord.pipeline.sites import common_answers, fit_reward_model, open_federation, site_pairs
from accord.rewards.model import RewardModel
from accord.rewards.train import rank
from accord.runs import write_atomic


def best_site(job: Job) -> int:
    """Return the index of the site whose reward model ranks right answers first most often over all dev questions."""
    asked = sample_questions(job.questions["dev"], 300, seed=0)
    vocabulary = common_answers(asked, 64)
    models = [RewardModel.load(job.path / "sites" / site.name / "reward") for site in job.recipe.sites]
    macros = [rank(model, asked, vocabulary).macro for model in models]
    return macros.index(max(macros))


def single_site_reward(job: Job, k: int) -> FederatedReward:
    """Let one site judge everything."""
    one_hot = [float(i == k) for i in range(len(job.recipe.sites))]
    return federated_reward(job, open_federation(job), constant_router(one_hot))


def compare(job: Job, arm: str) -> None:
    """Repeat the alignment with another reward and note its accuracy on dev and test."""
    stage = f"compare {arm}"
    count = len(job.recipe.sites)
    with job.doing(stage):
        job_traffic, job.traffic = job.traffic, Traffic()  # what a comparison sends is not part of the run's bytes
        try:
            reward: RewardFunction
            if arm == "ground-truth":
                reward = exact_match_reward
            elif arm == "pooled":
                reward = federated_reward(job, _pooled_engine(job, stage), constant_router([1.0]))
            elif arm == "average":
                reward = federated_reward(job, open_federation(job), constant_router([1 / count] * count), mode="soft")
            elif arm == "random":
                # What its router drew is in no checkpoint, so this arm starts over.
                shutil.rmtree(job.path / "checkpoints" / stage, ignore_errors=True)
                reward = federated_reward(job, open_federation(job), random_router(count, job.recipe.seed))
            elif arm == "best-site":
                reward = single_site_reward(job, best_site(job))
            else:
                names = [site.name for site in job.recipe.sites]
                reward = single_site_reward(job, names.index(arm.removeprefix("site ")))
            model, processor = run_grpo(job, stage, reward)
        finally:
            job.traffic = job_traffic
        counts = {
            name: count_correct(questions, greedy(model, processor, questions, job.recipe))
            for name, questions in (("dev", job.questions["dev"]), ("test", job.evaluated))
        }
        write_atomic(_arm_file(job, arm), json.dumps(counts, indent=2) + "\n")
        shutil.rmtree(job.path / "checkpoints" / stage, ignore_errors=True)


def _arm_file(job: Job, arm: str) -> Path:
    return job.path / "compare" / f"{arm.replace(' ', '-')}.json"


def arm_accuracy(job: Job, arm: str, split: str) -> Accuracy:
    """Return what a comparison measured on `split`, "dev" or "test"."""
    place = str(_arm_file(job, arm).relative_to(job.path))
    file = job.need(place, "accord run RECIPE --resume", f"compare {arm}")
    counts = json.loads(file.read_text())[split]
    return accuracy({name: (right, n) for name, (right, n) in counts.items()})


def _pooled_engine(job: Job, stage: str) -> InProcessEngine:
    """Train one reward model on all sites' pairs in one place: what no consortium may do, as an opponent."""
    pooled = job.recipe.pooled
    folder = job.path / "compare" / "pooled-reward"
    if not folder.is_dir():
        seed = job.recipe.seed * 1000 + 999
        questions = [q for site in job.recipe.sites for q in job.private[site.name]]
        pairs = [  # ids are unique at a site only
            replace(pair, question_id=f"{site.name}/{pair.question_id}")
            for site in job.recipe.sites
            for pair in site_pairs(job, site.name)
        ]
        set_seed(seed)
        model, _ = fit_reward_model(
            job,
            "pooled",
            pooled.checkpoint,
            pooled.finetune,
            pooled.reward_model,
            lora=None,
            questions=questions,
            pairs=pairs,
            held_out=job.questions["dev"],
            seed=seed,
            log=lambda record: job.log({"stage": stage, **record, "step": 0, "reward_model_step": record["step"]}),
        )
        model.save(folder)
    judge = Site("pooled", RewardModel.load(folder), SiteRecord(), score_range=job.recipe.scores)
    return InProcessEngine({"pooled": judge.answer})

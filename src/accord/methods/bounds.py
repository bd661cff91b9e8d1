"""Bounds: what no federation may do or know.

ground-truth    the reference answers themselves as reward: what learned rewards can reach at best
pooled          one reward model on all sites' pairs in one place
oracle          the first site that holds questions of the prompt's true domain and type
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import set_seed

from accord.alignment.grpo import exact_match_reward
from accord.alignment.reward import FederatedReward
from accord.data.images import Pictures, as_list, load_images, picture_key
from accord.errors import RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.site import Site, SiteRecord
from accord.methods.method import Method, Table, by_reward
from accord.models.encoder import prompt_words
from accord.models.finetune import FineTuneConfig
from accord.recipe import Recipe
from accord.rewards.model import RewardModel
from accord.rewards.train import RewardConfig
from accord.routing.router import Router
from accord.stages.alignment import Aligned, federated_reward, run_grpo
from accord.stages.job import Job
from accord.stages.routing import constant_router
from accord.stages.sites import fit_reward_model, site_pairs
from accord.types import Prompt, prompt_of


@dataclass(frozen=True)
class Pooled:
    """The one reward model of `pooled`, trained on all sites' pairs in one place."""

    checkpoint: str = "accord/idefics3"
    finetune: FineTuneConfig | None = FineTuneConfig()
    reward_model: RewardConfig = RewardConfig()


POOLED: Final = Table("pooled", Pooled)


def pooled(job: Job, stage: str) -> Aligned:
    """Train one reward model on all sites' pairs in one place, and align with it: what no consortium may do.

    Raises:
        RecipeError: it fine-tunes on the sites' private questions, and no site holds any.
    """
    engine = _pooled_engine(job, stage)
    return run_grpo(job, stage, federated_reward(job, constant_router([1.0]), engine=engine))


def check_pooled(recipe: Recipe) -> None:
    """Refuse to fine-tune on no questions.

    Raises:
        RecipeError: no site holds private questions.
    """
    if POOLED.of(recipe).finetune and not any(site.needs_questions for site in recipe.sites):
        raise RecipeError(
            "the method 'pooled' fine-tunes on the sites' private questions, and no site holds any; "
            "add finetune = false to [pooled], or leave 'pooled' out"
        )


def _told(recipe: Recipe) -> str:
    settings = POOLED.of(recipe)
    tuning = f"{settings.finetune.steps} steps of fine-tuning and " if settings.finetune else ""
    steps = settings.reward_model.steps
    return f"in one place, on all sites' private data: {tuning}{steps} steps of Bradley–Terry of {settings.checkpoint}"


def _pooled_engine(job: Job, stage: str) -> InProcessEngine:
    settings = POOLED.of(job.recipe)
    folder = job.kept("pooled-reward", after="site")
    check_pooled(job.recipe)
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
            "all sites together",
            settings.checkpoint,
            settings.finetune,
            settings.reward_model,
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


def oracle(job: Job) -> FederatedReward:
    """Ask the first site that holds questions of the prompt's domain and type; all sites alike where there is none."""
    return federated_reward(job, oracle_router(job), mode="soft")


def oracle_router(job: Job) -> Router:
    """Return the router that looks a prompt's domain and type up: what no server knows of a real prompt."""
    shares = [*job.shares.values()]
    known: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for q in job.prompts:
        fitting = [k for k, share in enumerate(shares) if share.wants(q)]
        weights = one_hot(torch.tensor(fitting[:1]), len(shares)).float()[0] if fitting else None
        known[_seen(prompt_of(q), load_images(q.images))] = (
            torch.full((len(shares),), 1 / len(shares)) if weights is None else weights
        )

    def route(prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /) -> Tensor:
        rows = [known[_seen(prompt, pictures)] for prompt, pictures in zip(prompts, images, strict=True)]
        return torch.stack(rows).repeat_interleave(torch.tensor([len(c) for c in completions]), dim=0)

    return route


def _seen(prompt: Prompt, pictures: Pictures) -> tuple[str, tuple[int, ...]]:
    # A picture by its hash: the pixels of all prompts would fill the memory.
    return prompt_words(prompt), tuple(hash(picture_key(image)) for image in as_list(pictures))


METHODS: Final = {
    "oracle": Method(
        by_reward(oracle),
        "the first site that holds questions of the prompt's true type",
        role="bound",
        needs=frozenset({"sites"}),
        asks=lambda recipe: 1,
    ),
    "pooled": Method(
        pooled,
        "one reward model on all pairs in one place",
        role="bound",
        needs=frozenset({"private"}),
        check=check_pooled,
        tables=(POOLED,),
        training=_told,
    ),
    "ground-truth": Method(
        by_reward(lambda job: exact_match_reward),
        "exact match with the reference answer",
        role="ceiling",
        together=True,
    ),
}

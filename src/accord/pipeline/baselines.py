"""The baselines that share parameters, on the sites of a job: through the same engine, counted in the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

from transformers import set_seed

from accord.baselines import fedit
from accord.baselines.dpo import AdapterDpo
from accord.baselines.fedavg_reward import local_updates, standardise, train_shared_reward
from accord.baselines.fedbiscuit import LocalSelector, train_biscuit
from accord.baselines.feddpo import LocalDpo, seeded_adapter, train_dpo
from accord.baselines.selector import Selector
from accord.errors import ReplyError
from accord.evaluation.accuracy import sample_questions
from accord.federation.engine import InProcessEngine, Traffic
from accord.federation.messages import Reply, Request, Task, UpdateRequest
from accord.federation.site import LocalUpdate, Site
from accord.models.generate import answer
from accord.models.load import add_lora, load_model
from accord.pipeline.alignment import Aligned, federated_reward, run_grpo
from accord.pipeline.job import Job
from accord.pipeline.routing import constant_router
from accord.pipeline.sites import site_pairs
from accord.pipeline.traffic import add_rows, traffic_rows
from accord.progress import ProgressBarCallback, stage_bar
from accord.rewards.model import RewardModel
from accord.runs import write_atomic

Updates: TypeAlias = Callable[[str], Mapping[Task, LocalUpdate]]
"""A site's name → how it trains shared models."""


def open_training(job: Job, updates: Updates) -> InProcessEngine:
    """Start every site in this process with nothing but its half of a baseline."""
    engine = InProcessEngine({site.name: _handler(updates(site.name)) for site in job.recipe.sites})
    engine.traffic = job.traffic
    return engine


def _handler(updates: Mapping[Task, LocalUpdate]) -> Callable[[Request], Reply]:
    def handle(request: Request) -> Reply:
        if not isinstance(request, UpdateRequest) or request.task not in updates:
            raise ReplyError(f"this site does not answer a {type(request).__name__}")
        return updates[request.task](request)

    return handle


def tune_together(job: Job, stage: str, *, algorithm: Literal["fedavg", "fedprox", "scaffold"]) -> Aligned:
    """Tune the policy on the sites' answers with an averaged adapter (FedIT)."""
    config = job.recipe.fedit
    settings, rule = config.averaging, fedit.fedavg()
    if algorithm == "fedprox":
        rule = fedit.fedprox(config.mu)
    if algorithm == "scaffold":
        settings, rule = replace(settings, learning_rate=config.sgd_learning_rate), fedit.scaffold()
    set_seed(job.recipe.seed)
    job.run.truncate(stage)  # an attempt that was broken off starts over
    model, processor = load_model(job.recipe.policy.checkpoint)
    adapted = add_lora(model, config.lora)

    def updates(site: str) -> Mapping[Task, LocalUpdate]:
        questions = job.private[site]  # none where a site has preferences of its own alone: it sits out
        return {"supervised": fedit.LocalSupervised(adapted, processor, questions, settings, rule)} if questions else {}

    with stage_bar(stage, settings.rounds, quiet=job.quiet) as advance:
        engine = open_training(job, updates)
        tuned = fedit.train_supervised(
            engine,
            adapted,
            settings,
            rule,
            seed=job.recipe.seed,
            on_round=lambda t, loss: _note(job, stage, t, loss, advance),
        )
    return tuned, processor


def dpo_together(job: Job, stage: str) -> Aligned:
    """Take DPO steps at the sites and average the adapters (FedDPO)."""
    config, checkpoint = job.recipe.feddpo, job.recipe.policy.checkpoint
    job.run.truncate(stage)
    model, processor = load_model(checkpoint)
    scratch = job.path / "checkpoints" / stage
    shared = AdapterDpo(
        load_model(checkpoint)[0],
        processor,
        config.lora,
        beta=config.beta,
        sft=config.sft,
        batch_size=config.averaging.batch_size,
        accumulate=config.averaging.gradient_accumulation,
        out=scratch,
    )
    with stage_bar(stage, config.averaging.rounds, quiet=job.quiet) as advance:
        engine = open_training(
            job, lambda site: {"preference": LocalDpo(shared, site_pairs(job, site), config.averaging)}
        )
        trained = train_dpo(
            engine, model, config, seed=job.recipe.seed, on_round=lambda t, loss: _note(job, stage, t, loss, advance)
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return trained, processor


def biscuit(job: Job, stage: str) -> Aligned:
    """Let selectors of groups of sites label the server's own pairs, and take DPO steps there (FedBiscuit)."""
    config, checkpoint = job.recipe.fedbiscuit, job.recipe.policy.checkpoint
    job.run.truncate(stage)
    model, processor = load_model(checkpoint)
    selector = Selector(seeded_adapter(load_model(checkpoint)[0], config.lora, job.recipe.seed), processor)
    scratch = job.path / "checkpoints" / stage
    with (
        stage_bar(f"{stage}: selectors", config.rounds, quiet=job.quiet) as advance,
        ProgressBarCallback(f"{stage}: DPO", quiet=job.quiet) as bar,
    ):
        engine = open_training(job, lambda site: {"selector": LocalSelector(selector, site_pairs(job, site), config)})
        trained = train_biscuit(
            engine,
            model,
            processor,
            job.prompts,
            config,
            seed=job.recipe.seed,
            max_new_tokens=job.recipe.alignment.max_completion_length,
            questions_at_once=job.recipe.alignment.questions_at_once,
            out=scratch,
            on_round=lambda t, loss: _note(job, stage, t, loss, advance),
            callbacks=[bar],
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return trained, processor


def shared_reward(job: Job, stage: str) -> Aligned:
    """Average the weights of one reward model over the sites, and align with it at the server (FedAvg)."""
    folder = job.path / "compare" / "shared-reward"
    if not folder.is_dir():
        config, seed = job.recipe.shared_reward, job.recipe.seed
        set_seed(seed)
        job.run.truncate(stage)
        model = RewardModel.from_checkpoint(config.checkpoint, lora=config.lora)
        rounds = config.averaging.rounds + (config.finetune.rounds if config.finetune else 0)
        with stage_bar(f"{stage}: reward model", rounds, quiet=job.quiet) as advance:
            engine = open_training(
                job, lambda site: local_updates(model, job.private[site], site_pairs(job, site), config)
            )
            engine.traffic = Traffic()
            train_shared_reward(
                engine, model, config, seed=seed, on_round=lambda t, loss: _note(job, stage, t, loss, advance)
            )
        asked = sample_questions(job.prompts, 300, seed=seed)
        said = answer(
            job.encoder.model,
            job.encoder.processor,
            asked,
            max_new_tokens=job.recipe.alignment.max_completion_length,
            samples=4,
            seed=seed,
        )
        standardise(model, asked, said)
        write_atomic(folder.with_suffix(".json"), json.dumps(traffic_rows(engine.traffic)) + "\n")
        model.save(folder)
    add_rows(job.traffic, json.loads(folder.with_suffix(".json").read_text()))
    judge = Site("shared", RewardModel.load(folder), score_range=job.recipe.scores)
    engine = InProcessEngine({"shared": judge.answer})  # at the server itself: what it is asked crosses no border
    return run_grpo(job, stage, federated_reward(job, engine, constant_router([1.0])))


def _note(job: Job, stage: str, number: int, loss: float, advance: Callable[[int], None]) -> None:
    job.log({"stage": stage, "step": 0, "round": number, "loss": loss})
    advance(1)

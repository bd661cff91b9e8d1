"""Stage 3: GRPO of the base policy against the federation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol, TypeAlias, TypedDict, Unpack

from rich.console import Console
from safetensors.torch import load, save
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from accord.alignment.grpo import AlignmentConfig, RewardFunction, align
from accord.alignment.reward import FederatedReward, Mode, Scope
from accord.checkpoints import keep_newest, newest_good, seal, step_of
from accord.errors import RunError
from accord.evaluation.accuracy import count_correct, sample_questions
from accord.federation.engine import Engine, InProcessEngine
from accord.federation.messages import MAX_SCORE, Judge
from accord.federation.ranks import OneConnection, rank_and_count
from accord.models.generate import answer
from accord.models.load import Processor, load_model
from accord.pipeline.job import Job
from accord.pipeline.sites import open_site
from accord.pipeline.traffic import SaveTraffic, load_traffic
from accord.progress import ProgressBarCallback
from accord.recipe import Recipe, load_recipe
from accord.routing.fusion import Fusion
from accord.routing.router import Encoder, LearnedRouter, Router, load_router
from accord.runs import full_disk_told, write_atomic
from accord.types import ImageSource, Question

Aligned: TypeAlias = tuple[PreTrainedModel, Processor]

MEMORY: Final = "memory.safetensors"


class RewardOptions(TypedDict, total=False):
    """What a method chooses of a `FederatedReward`; the recipe has `mode` and `scope`, the others their defaults."""

    mode: Mode
    scope: Scope
    fusion: Fusion
    within_group: bool
    group_size: int
    judged_by: Judge
    truth: bool
    form: float


def federated_reward(
    job: Job, engine: Engine, router: Router, *, clipped: bool = True, **options: Unpack[RewardOptions]
) -> FederatedReward:
    """Make the federation a reward function with the recipe's routing, but for the options that are given.

    Where the sites' scores are not `clipped`, no score is the lowest, and a completion that was cut off is scored.
    """
    recipe = job.recipe if clipped else replace(job.recipe, scores=None)
    sources = {q.id: q.image for q in job.questions["public"] if q.image is not None}
    return _reward(recipe, engine, router, job.encoder.model, sources, options)


def open_reward(folder: Path | str) -> FederatedReward:
    """Open the sites and the router of a run folder as one TRL reward function, for a training script of your own.

    Under `accelerate launch` with several processes all of them call this, and the first alone opens the sites.

    Raises:
        RunError: the folder holds no recipe, or that of a run by another method than routing.
        CheckpointError: a site's reward model or the router is missing or damaged.
    """
    path = Path(folder)
    if not (path / "recipe.toml").is_file():
        raise RunError(
            f"{path}: no recipe.toml, so this is not a run folder; make one with `accord demo` or `accord run`"
        )
    recipe = load_recipe(path / "recipe.toml")
    if recipe.method != "routed":
        raise RunError(
            f"{path} was aligned by {recipe.method!r}, whose reward needs the run's questions; open one by 'routed'"
        )
    names = [site.name for site in recipe.sites]
    rank, count = rank_and_count()
    engine: Engine | None = None
    if rank == 0:
        engine = InProcessEngine({name: open_site(recipe, path, name).answer for name in names})
    if engine is None or count > 1:
        engine = OneConnection(engine, names)
    encoder = Encoder(*load_model(recipe.policy.checkpoint))
    return _reward(recipe, engine, LearnedRouter(encoder, load_router(path / "router")), encoder.model, {}, {})


def _reward(
    recipe: Recipe,
    engine: Engine,
    router: Router,
    model: PreTrainedModel,
    sources: Mapping[str, ImageSource],
    options: RewardOptions,
) -> FederatedReward:
    chosen: RewardOptions = {"mode": recipe.routing.mode, "scope": recipe.routing.scope, **options}
    return FederatedReward(
        engine,
        router,
        **chosen,
        end_tokens=_end_tokens(model),
        deadline=recipe.routing.deadline,
        unfinished=recipe.scores.low if recipe.scores else None,
        sources=sources,
        limits=(recipe.scores.low, recipe.scores.high) if recipe.scores else (-MAX_SCORE, MAX_SCORE),
        quorum=recipe.routing.quorum,
        tell=_tell if rank_and_count()[0] == 0 else lambda _: None,
    )


def _tell(line: str) -> None:
    """Say a line on standard error, above a progress bar if there is one."""
    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ids = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]


class Memory(Protocol):
    """What a reward learns as the run goes on, and a resumed run must know."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return it."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Go on from it."""
        ...


class _SaveMemory(TrainerCallback):
    """Keep a memory with every checkpoint."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        known = {name: tensor.contiguous() for name, tensor in self.memory.state_dict().items()}
        write_atomic(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / MEMORY, save(known))


class _Seal(TrainerCallback):
    """Seal every checkpoint; the last of the callbacks, for a file that is written later would count as damage."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        out = Path(str(args.output_dir))
        with (self.job.path / "metrics.jsonl").open("rb") as records:
            os.fsync(records.fileno())  # those of the steps that a sealed checkpoint makes final
        seal(out / f"checkpoint-{state.global_step}")
        keep_newest(out, 2)


def run_grpo(
    job: Job,
    stage: str,
    reward: RewardFunction,
    *,
    questions: Sequence[Question] = (),
    settings: AlignmentConfig | None = None,
    memory: Memory | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Aligned:
    """Align a fresh copy of the base policy, from the newest checkpoint if the stage was interrupted.

    It comes back in the base checkpoint's own type, whatever it was trained in.

    Args:
        job: the run.
        stage: under what name.
        reward: any TRL reward function.
        questions: the prompts; by default the recipe's public ones.
        settings: of the alignment; by default the recipe's.
        memory: what `reward` learns; it is kept with every checkpoint.
        callbacks: further trainer callbacks; what they learn belongs into `memory`.

    Raises:
        RunError: this is one of several processes, or the disk is full; no half-written checkpoint is left.
    """
    if (processes := rank_and_count()[1]) > 1:
        raise RunError(
            f"a run folder is one process's, and this is one of {processes}; start `accord` without accelerate or "
            "torchrun, or train with several processes in a script of your own, as examples/two_ranks.py does"
        )
    recipe = job.recipe
    set_seed(recipe.seed)
    model, processor = load_model(recipe.policy.checkpoint, trainable=recipe.alignment.lora is None)
    out = job.path / "checkpoints" / stage
    # The trainer reads optimizer.pt, scheduler.pt and rng_state.pth from there by torch.load (weights only): our own
    # files in our own run folder. Their hashes, compared here before any is read, show damage and not malice.
    last = newest_good(out)
    # Records of step 0 are of a reward model that this stage has trained and kept.
    job.run.truncate(stage, after_step=step_of(last) if last else 0)
    if last is not None:
        load_traffic(job, last / "traffic.json")
        if memory is not None:
            memory.load_state_dict(load((last / MEMORY).read_bytes()))
    dev = sample_questions(job.questions["dev"], recipe.alignment.evaluate_on, seed=0)

    def measure() -> Mapping[str, float]:
        counts = count_correct(dev, greedy(model, processor, dev, recipe))
        return {name: right / n for name, (right, n) in counts.items()}

    with (
        full_disk_told(out, clean=lambda: newest_good(out)),
        ProgressBarCallback(stage, metrics=("reward", "kl"), quiet=job.quiet) as bar,
    ):
        model = align(
            model,
            processor,
            questions or job.prompts,
            reward,
            settings or recipe.alignment,
            seed=recipe.seed,
            out=out,
            measure=measure,
            log=lambda record: job.log({"stage": stage, **record}),
            callbacks=[
                bar,
                *callbacks,
                *([_SaveMemory(memory)] if memory is not None else []),
                SaveTraffic(job),
                _Seal(job),
            ],
            resume=last is not None,
        )
    return model.to(job.encoder.model.dtype), processor


def greedy(model: PreTrainedModel, processor: Processor, questions: Sequence[Question], recipe: Recipe) -> list[str]:
    """Return the policy's greedy answers."""
    settings = recipe.alignment
    given = answer(
        model,
        processor,
        questions,
        max_new_tokens=settings.max_completion_length,
        batch_size=settings.questions_at_once,
    )
    return [texts[0] for texts in given]

"""Stage 3: GRPO of the base policy against the federation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

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

from accord import terminal
from accord.alignment.grpo import AlignmentConfig, RewardFunction, align
from accord.alignment.reward import FederatedReward, Mode, PerGroup, Scaling, Scope, Waiting
from accord.data.sampling import sample_questions
from accord.errors import RunError
from accord.evaluation.accuracy import count_correct
from accord.federation.engine import Engine
from accord.federation.messages import ScoreRange
from accord.federation.ranks import OneConnection, rank_and_count
from accord.models.encoder import Encoder
from accord.models.generate import answer
from accord.models.load import Processor, load_model
from accord.progress import ProgressBarCallback
from accord.recipe import Recipe
from accord.routing.canaries import Canaries
from accord.routing.fusion import Fusion, mixture
from accord.routing.router import Router
from accord.runs import full_disk_told, write_atomic
from accord.runs.checkpoints import keep_newest, newest_good, seal, step_of
from accord.runs.failures import FAILURES
from accord.stages.job import Job
from accord.stages.sites import open_federation
from accord.stages.traffic import SaveTraffic, load_traffic
from accord.types import ImageSource, Question

Aligned: TypeAlias = tuple[PreTrainedModel, Processor]

MEMORY: Final = "memory.safetensors"


def federated_reward(
    job: Job,
    router: Router,
    *,
    mode: Mode | None = None,
    scope: Scope | None = None,
    fusion: Fusion = mixture,
    per_group: PerGroup | None = None,
    scores: ScoreRange | Literal["recipe"] | None = "recipe",
    standardised: bool = True,
    engine: Engine | None = None,
    canaries: Canaries | None = None,
    scaling: Scaling | None = None,
) -> FederatedReward:
    """Make the sites of a job a reward function.

    Args:
        job: the run.
        router: whose judgement counts.
        mode: as `FederatedReward`; by default the recipe's.
        scope: likewise.
        fusion: likewise.
        per_group: likewise.
        scores: the range to which the sites clip; by default the recipe's.
        standardised: whether the sites standardise their scores.
        engine: carries the questions; by default the federation is opened.
        canaries: as `FederatedReward`.
        scaling: likewise.
    """
    chosen = job.recipe.scores if scores == "recipe" else scores
    if engine is None and (job.together is None or job.together.rank == 0):
        engine = open_federation(job, scores=chosen, standardised=standardised)
    if job.together is not None and job.together.met:
        engine = OneConnection(engine, [site.name for site in job.recipe.sites])
    assert engine is not None
    return reward_of(
        job.recipe,
        engine,
        router,
        job.policy[0],
        mode=mode,
        scope=scope,
        fusion=fusion,
        per_group=per_group,
        scores=chosen,
        sources={q.id: q.images for q in job.questions["public"] if q.images},
        canaries=canaries,
        scaling=scaling,
    )


def reward_of(
    recipe: Recipe,
    engine: Engine,
    router: Router,
    model: PreTrainedModel,
    *,
    scores: ScoreRange | None,
    mode: Mode | None = None,
    scope: Scope | None = None,
    fusion: Fusion = mixture,
    per_group: PerGroup | None = None,
    sources: Mapping[str, ImageSource | Sequence[ImageSource]] | None = None,
    canaries: Canaries | None = None,
    scaling: Scaling | None = None,
) -> FederatedReward:
    """Return the reward of a recipe's federation; `model` says which tokens end a completion."""
    tell = terminal.tell if rank_and_count()[0] == 0 else lambda _: None
    return FederatedReward(
        engine,
        router,
        mode=mode or recipe.routing.mode,
        scope=scope or recipe.routing.scope,
        fusion=fusion,
        per_group=per_group,
        scores=scores,
        end_tokens=_end_tokens(model),
        waiting=Waiting(recipe.routing.deadline, recipe.routing.quorum, tell),
        sources=sources,
        canaries=canaries,
        scaling=scaling,
    )


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
        write_atomic(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / MEMORY, _to_bytes(self.memory))


class _Seal(TrainerCallback):
    """Seal every checkpoint; the last of the callbacks, for a file that is written later would count as damage."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        out, together = Path(str(args.output_dir)), self.job.together
        if together is not None:
            together.wait()  # every rank writes the state of its random numbers
            if together.rank:
                return
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
    encoder: Encoder | None = None,
    memory: Memory | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Aligned:
    """Align a fresh copy of the base policy, from the newest checkpoint if the stage was interrupted.

    It comes back in the base checkpoint's own type, whatever it was trained in. Where an adapter is trained on the
    model that the router's encoder is, both have one copy of it, and the job's own is loaded anew when it is wanted.

    Args:
        job: the run.
        stage: under what name.
        reward: any TRL reward function.
        questions: the prompts; by default the recipe's public ones.
        settings: of the alignment; by default the recipe's.
        encoder: what the reward's router reads completions with, if it does; it is handed what the reference computed.
        memory: what `reward` learns; it is kept with every checkpoint, and as it is in the end (`remembered`).
        callbacks: further trainer callbacks; what they learn belongs into `memory`.

    Raises:
        RunError: this is one of several processes, or the disk is full; no half-written checkpoint is left.
    """
    together = job.together
    if together is None and (processes := rank_and_count()[1]) > 1:
        raise RunError(
            f"a run folder is one process's, and this is one of {processes}; start a whole recipe by `accord run`, or "
            "train with several processes in a script of your own, as examples/two_ranks.py does"
        )
    first = together is None or together.rank == 0
    recipe = job.recipe
    model, processor = job.policy
    dtype = model.dtype
    if recipe.one_base:  # the adapter comes onto the encoder, and is merged in at last; whoever asks again gets another
        del job.policy, job.encoder
    elif recipe.encoder_checkpoint != recipe.policy.checkpoint:
        del job.policy, model  # not a third copy beside policy and reference; it is loaded again if it is wanted
    set_seed(recipe.seed)
    if not recipe.one_base:
        whole, stored = recipe.alignment.lora is None, recipe.alignment.quantize
        model, processor = load_model(recipe.policy.checkpoint, trainable=whole, quantize=stored)
    out = job.path / "checkpoints" / stage
    # The trainer reads optimizer.pt, scheduler.pt and rng_state.pth from there by torch.load (weights only): our own
    # files in our own run folder. Their hashes, compared here before any is read, show damage and not malice.
    last = newest_good(out) if first else None
    if last is not None:
        _check_processes(last, together.count if together else 1)
    # Records of step 0 are of a reward model that this stage has trained and kept.
    if first:
        job.run.truncate(stage, after_step=step_of(last) if last else 0)
    resume = last is not None
    if together is not None:  # nobody looks for a checkpoint before a broken one is gone
        resume = together.tell(b"y" if resume else b"n") == b"y"
    if last is not None:
        load_traffic(job, last / "traffic.json")
        if memory is not None:
            memory.load_state_dict(load((last / MEMORY).read_bytes()))
    dev = sample_questions(job.questions["dev"], recipe.alignment.evaluate_on, seed=0)

    def measure() -> Mapping[str, float]:
        counts = count_correct(dev, greedy(model, processor, dev, recipe))
        return {name: right / n for name, (right, n) in counts.items()}

    with (
        full_disk_told(out, clean=lambda: newest_good(out) if first else None),
        ProgressBarCallback(stage, metrics=("reward", "kl", "parked"), quiet=job.quiet or not first) as bar,
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
            log=(lambda record: job.log({"stage": stage, **record})) if first else (lambda _: None),
            callbacks=[
                bar,
                *callbacks,
                *([_SaveMemory(memory)] if memory is not None else []),
                *([SaveTraffic(job)] if first else []),
                _Seal(job),
            ],
            resume=resume,
            encoder=encoder,
            failures=failures_file(job.path, stage),
        )
    if memory is not None:
        write_atomic(memory_file(job.path, stage), _to_bytes(memory))
    return model.to(dtype), processor  # type: ignore[arg-type]


def _check_processes(checkpoint: Path, count: int) -> None:
    """Refuse a checkpoint of another number of processes: each has drawn random numbers of its own.

    Raises:
        RunError: names both numbers.
    """
    before = len(list(checkpoint.glob("rng_state*.pth")))
    if before != count:
        raise RunError(
            f"{checkpoint} was written by {before} processes, and this is a run of {count}; resume with as many, or "
            f"remove {checkpoint.parent} to align from the start"
        )


def remembered(run: Path, stage: str) -> dict[str, Tensor] | None:
    """Return what a reward had learnt when `stage` of a run folder ended; None where it learns nothing."""
    file = memory_file(run, stage)
    return load(file.read_bytes()) if file.is_file() else None


def memory_file(run: Path, stage: str) -> Path:
    """Return where a run folder keeps what a reward had learnt when `stage` ended; gone once that is done no longer."""
    return run / "kept" / "stage" / stage / MEMORY


def failures_file(run: Path, stage: str) -> Path:
    """Return where a run folder keeps which questions failed in `stage`, as long as `memory_file` is kept."""
    return run / "kept" / "stage" / stage / FAILURES


def _to_bytes(memory: Memory) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in memory.state_dict().items()})


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

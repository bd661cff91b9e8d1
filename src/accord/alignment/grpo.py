"""Align a policy with GRPO through `trl.GRPOTrainer` (MoR, stage 3).

    A_i = (R_i − mean(R)) / (std(R) + ε)                        over the G completions of a prompt
    J   = E[min(ρ A, clip(ρ, 1 ± ε) A)] − β KL(π_θ ‖ π_ref)     Shao et al. 2024, arXiv 2402.03300

TRL's default β is 0; MoR needs the KL term to the frozen reference, so ours is not. The trainer (TRL's, which computes
once what completions share: `accord.alignment.trainer`) knows nothing of the federation: `reward` is any TRL reward
function.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import datasets  # type: ignore[import-untyped]
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from peft import LoraConfig, PeftModel
from PIL.Image import Image
from torch import nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from accord.alignment.discriminative import discriminative_loss
from accord.alignment.parking import Parking
from accord.alignment.trainer import Objective, SharedPrefixTrainer
from accord.data.images import image_bytes, load_image
from accord.data.questions import normalise_answer
from accord.data.sampling import draw_balanced
from accord.errors import DataError, DataWarning, RecipeError, check_least, check_positive
from accord.federation.weights import set_trainable_weights, trainable_weights
from accord.models.encoder import Encoder
from accord.models.finetune import on_one_device
from accord.models.load import (
    LoraSettings,
    Processor,
    Quantized,
    adapter_errors,
    add_lora,
    lora_config,
    placeholder_tokens,
)
from accord.models.words import plain_prompt, plain_words
from accord.types import ImageSource, Message, Prompt, Question, prompt_of

MUTED = -1e4
"""The logit of a token that cannot be said: finite, since an entropy with 0 · -inf in it is no number."""

OBJECTIVES: Final[Mapping[str, Objective]] = {"discriminative": discriminative_loss}
"""Losses that TRL has not, by name."""

RewardFunction: TypeAlias = Callable[..., list[float | None]]
"""TRL's own: `(prompts, completions, **columns) -> list[float | None]`."""


@dataclass(frozen=True)
class AlignmentConfig:
    """How the policy is aligned."""

    steps: int = 300
    prompts_per_step: int = 36  # P
    group_size: int = 8  # G
    learning_rate: float = 3e-4
    kl: float = 0.02  # β
    temperature: float = 1.0
    max_completion_length: int = 4  # tokens
    questions_at_once: int = 128  # whenever the policy answers outside training: for pairs, curve and evaluation
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo", "discriminative"] = "grpo"  # TRL's, and DisCO
    scale_rewards: Literal["group", "batch", "none"] = "group"
    iterations: int = 1  # updates, which are what `steps` counts, on the same completions (μ)
    balanced: bool = True  # draw question types equally often, which must be known; false: questions as they come
    completions_per_device: int = 0  # rows of one forward and backward pass; 0 for all at once
    rollout_rows: int = 0  # completions sampled at once in one process; 0 for as many as `completions_per_device`
    gradient_checkpointing: bool = False
    vllm: Literal["", "colocate", "server"] = ""  # what samples: vLLM beside the policy, vLLM served, or the policy
    vllm_memory: float = 0.3  # share of a GPU that a colocated vLLM takes
    vllm_server: str = "http://127.0.0.1:8000"  # where vLLM is served
    lora: LoraSettings | None = None
    quantize: Quantized = ""  # "nf4": the base under the adapter in 4 bits, which is the reference too
    evaluate_every: int = 50  # steps between points of the accuracy curve; 0 for none
    evaluate_on: int = 300  # dev questions of one point
    save_every: int = 50  # steps between checkpoints
    shared_prefix: bool = True  # compute once what the completions of a prompt share; False for full rows

    def __post_init__(self) -> None:
        """Refuse a group of one, rows that do not divide, and counts that leave nothing to train."""
        check_least(self, steps=1, prompts_per_step=1, max_completion_length=1, learning_rate=0, kl=0)
        check_positive(self, "temperature")
        if not 0 < self.vllm_memory < 1:
            raise RecipeError(f"vllm_memory is a share between 0 and 1, got {self.vllm_memory}; correct it")
        check_least(self, completions_per_device=0, rollout_rows=0, questions_at_once=1, iterations=1)
        check_least(self, evaluate_every=0, evaluate_on=1, save_every=0)
        if self.group_size < 2:
            raise RecipeError(
                f"group_size must be at least 2 to centre rewards, got {self.group_size}; raise alignment.group_size"
            )
        if self.quantize and (self.lora is None or self.vllm):
            raise RecipeError(
                "a base in 4 bits is trained by an adapter, and vLLM cannot be handed it; set alignment.lora and leave "
                "alignment.vllm out, or leave alignment.quantize out"
            )
        rows = self.prompts_per_step * self.group_size
        if self.completions_per_device and rows % self.completions_per_device:
            raise RecipeError(
                f"completions_per_device must divide prompts_per_step × group_size = {rows}, "
                f"got {self.completions_per_device}"
            )
        if self.loss == "discriminative":
            if self.scale_rewards != "group":
                raise RecipeError(
                    "the discriminative loss tells good from bad by a group's deviation, got "
                    f'scale_rewards = "{self.scale_rewards}"; set it to "group"'
                )
            if self.completions_per_device % self.group_size:
                raise RecipeError(
                    "the discriminative loss compares the completions of a group, got completions_per_device = "
                    f"{self.completions_per_device}; make it a multiple of group_size = {self.group_size}"
                )
        if self.save_every % self.iterations:
            raise RecipeError(
                f"save_every must be a multiple of iterations = {self.iterations}, since completions are in no "
                f"checkpoint, got {self.save_every}; correct alignment.save_every"
            )


def exact_match_reward(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Message]],
    answer: Sequence[str],
    references: Sequence[Sequence[str]] | None = None,
    **_: object,
) -> list[float | None]:
    """Return 1 for a completion equal to a reference answer, else 0: the bound on what learned rewards can reach.

    Args:
        prompts: not read.
        completions: what the policy said.
        answer: the reference answer of each.
        references: further answers that are as good.
    """
    texts = [normalise_answer(str(completion[-1]["content"])) for completion in completions]
    others = references or [()] * len(texts)
    right = [{normalise_answer(text) for text in (a, *more)} for a, more in zip(answer, others, strict=True)]
    return [float(text in those) for text, those in zip(texts, right, strict=True)]


def finite(reward: RewardFunction) -> RewardFunction:
    """Return `reward` with None, which TRL leaves out, for every value that is NaN or infinite."""
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        return reward

    @functools.wraps(reward, updated=())
    def checked(*args: object, **columns: object) -> list[float | None]:
        given = reward(*args, **columns)
        kept = [value if value is None or math.isfinite(value) else None for value in given]
        if wrong := [value for value, good in zip(given, kept, strict=True) if value is not None and good is None]:
            warnings.warn(
                f"the reward function {getattr(reward, '__name__', 'reward')!r} returned {wrong[0]}, which is no "
                "reward; such completions are left out",
                DataWarning,
                stacklevel=2,
            )
        return kept

    return checked


def prompt_dataset(
    questions: Sequence[Question],
    count: int,
    generator: random.Random,
    *,
    processor: Processor | None = None,
    keep_errors: bool = False,
    balanced: bool = True,
) -> datasets.Dataset:
    """Return `count` prompts in training order, in TRL's form with further columns.

    Images stay compressed until a row is read, and repeated rows share them. They are decoded as everywhere in Accord
    (`accord.data.images.load_image`): the policy sees the pixels that the sites see. Questions without images make no
    image column. Where a question has several, the column `images` holds those of each, and prompts say their places.

    Args:
        questions: what is asked.
        count: rows.
        generator: of the order.
        processor: of the policy; its special tokens are neutralised in the questions (`accord.models.words`).
        keep_errors: whether an image that cannot be read is its `DataError` in a row, and not raised.
        balanced: whether question types come equally often; else all questions do, in reshuffled passes.

    Raises:
        DataError: some questions have an image and others none.
    """
    bare, several = sum(not q.images for q in questions), any(q.further for q in questions)
    if 0 < bare < len(questions):
        raise DataError(
            f"{bare} of {len(questions)} prompts have no image, and a policy is aligned on "
            "questions about images or on questions without any; choose one kind in [prompts]"
        )
    used: dict[ImageSource, dict[str, object]] = {source: _cell(source) for q in questions for source in q.images}
    text, stored = datasets.Value("string"), datasets.Image(decode=False)
    content: object = text
    pictures: dict[str, list[object]] = {}
    kinds: dict[str, object] = {}
    if several:
        content = [{"type": text, "text": text}]
        pictures, kinds = {"images": [[used[source] for source in q.images] for q in questions]}, {"images": [stored]}
    elif used:
        pictures, kinds = {"image": [used[q.images[0]] for q in questions]}, {"image": stored}
    features = datasets.Features(
        {
            "prompt": [{"role": text, "content": content}],
            **kinds,
            "question_id": text,
            "question_type": text,
            "answer": text,
            "references": [text],
        }
    )
    columns = {
        "prompt": [_turns(q, processor, in_blocks=several) for q in questions],
        **pictures,
        "question_id": [q.id for q in questions],
        "question_type": [q.question_type for q in questions],
        "answer": [q.answer for q in questions],
        "references": [list(q.references) for q in questions],
    }
    order = draw_balanced([q.question_type if balanced else "" for q in questions], count, generator)
    return (
        datasets.Dataset.from_dict(columns, features=features)
        .select(order)
        .with_transform(functools.partial(_decoded, keep_errors=keep_errors))
    )


def _turns(question: Question, processor: Processor | None, *, in_blocks: bool) -> list[dict[str, object]]:
    """Return a question's conversation, its words as plain text or in blocks between the places of its images."""
    if not in_blocks:
        words = question.text if processor is None else plain_words(processor, question.text)
        return [{"role": "user", "content": words}]
    prompt = prompt_of(question)
    return [dict(turn) for turn in (prompt if processor is None else plain_prompt(processor, prompt))]


def _decoded(rows: dict[str, list[Any]], *, keep_errors: bool) -> dict[str, object]:
    found: dict[str, object] = dict(rows)  # there may be columns that were not asked for
    if "image" in rows:
        found["image"] = [
            own if isinstance(own, DataError) else own[0]
            for own in _opened([[cell] for cell in rows["image"]], keep_errors)
        ]
    if "images" in rows:
        found["images"] = _opened(rows["images"], keep_errors)
        found["prompt"] = [[_without_nulls(turn) for turn in prompt] for prompt in rows.get("prompt", [])]
    return found


def _without_nulls(turn: Mapping[str, Any]) -> dict[str, object]:
    """Return a turn without what Arrow adds: it gives every block all fields, and chat templates print nulls."""
    blocks = [{name: value for name, value in block.items() if value is not None} for block in turn["content"]]
    return {**turn, "content": blocks}


def _opened(cells: Sequence[Sequence[Mapping[str, object]]], keep_errors: bool) -> list[list[Image] | DataError]:
    """Return the opened images of every row, or why one of them cannot be opened; the rows of a group share theirs."""
    known: dict[bytes | Path, Image | DataError] = {}
    rows: list[list[Image] | DataError] = []
    for own in cells:
        images: list[Image | DataError] = []
        for cell in own:
            source = cast(bytes | None, cell["bytes"]) or Path(str(cell["path"]))
            if source not in known:
                try:
                    known[source] = load_image(source)
                except DataError as error:
                    if not keep_errors:
                        raise
                    known[source] = error
            images.append(known[source])
        wrong = [image for image in images if isinstance(image, DataError)]
        rows.append(wrong[0] if wrong else cast(list[Image], images))
    return rows


def _cell(source: ImageSource) -> dict[str, object]:
    return (
        {"bytes": None, "path": str(source)}
        if isinstance(source, Path)
        else {"bytes": image_bytes(source), "path": None}
    )


def grpo_config(config: AlignmentConfig, *, seed: int, out: Path) -> GRPOConfig:
    """Translate our settings into TRL's; several processes share the completions of a step, in whole groups.

    Raises:
        RecipeError: a step's prompts are no whole number for each process, or its rows there no whole passes.
    """
    count = PartialState().num_processes
    if config.prompts_per_step % count:
        raise RecipeError(
            f"{config.prompts_per_step} prompts a step cannot be shared out to {count} processes; make "
            "alignment.prompts_per_step a multiple of their number"
        )
    rows = config.prompts_per_step * config.group_size // count
    at_once = min(config.completions_per_device or rows, rows)
    if rows % at_once:
        raise RecipeError(
            f"completions_per_device must divide the {rows} completions of each of {count} processes, got {at_once}; "
            "correct alignment.completions_per_device"
        )
    settings = GRPOConfig(
        output_dir=str(out),
        seed=seed,
        max_steps=config.steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=rows // at_once,
        num_generations=config.group_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        beta=config.kl,
        temperature=config.temperature,
        max_completion_length=config.max_completion_length,
        loss_type="grpo" if config.loss in OBJECTIVES else config.loss,
        epsilon_high=0.28 if config.loss == "dapo" else None,  # "clip higher", Yu et al. 2025, arXiv 2503.14476
        num_iterations=config.iterations,
        scale_rewards=config.scale_rewards,
        shuffle_dataset=False,  # `prompt_dataset` already holds the order
        activation_checkpointing=config.gradient_checkpointing,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps" if config.save_every else "no",
        save_steps=max(config.save_every, 1),
        save_total_limit=3,  # `run_grpo` keeps two, and removes the oldest only once the newest is sealed
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_vllm=bool(config.vllm),
        vllm_mode=config.vllm or "colocate",
        vllm_gpu_memory_utilization=config.vllm_memory,
        vllm_server_base_url=config.vllm_server if config.vllm == "server" else None,
    )
    return on_one_device(settings)


class _Record(TrainerCallback):
    """Pass on what TRL logs, under our names and without wall times."""

    def __init__(self, log: Callable[[Mapping[str, object]], None]) -> None:
        self.log = log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        if not logs or "reward" not in logs:
            return
        record: dict[str, object] = {"step": state.global_step}
        for ours, theirs in _NAMES.items():
            if theirs in logs:
                record[ours] = logs[theirs]
        record["routed"] = {
            name.removeprefix("routed/"): value for name, value in logs.items() if name.startswith("routed/")
        }
        record |= {name: logs[name] for name in ("absent", "failed", "parked") if name in logs}
        for kind in ("trust", "influence"):  # of methods that defend against sites that lie
            if told := {name.removeprefix(f"{kind}/"): v for name, v in logs.items() if name.startswith(f"{kind}/")}:
                record[kind] = told
        self.log(record)


_NAMES = {
    "loss": "loss",
    "reward": "reward",
    "reward_std": "reward_std",
    "kl": "kl",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
}


class _Curve(TrainerCallback):
    """Every few steps, measure accuracy on held-out questions."""

    def __init__(
        self, every: int, measure: Callable[[], Mapping[str, float]], log: Callable[[Mapping[str, object]], None]
    ) -> None:
        self.every, self.measure, self.log = every, measure, log

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            by_type = self.measure()
            macro = sum(by_type.values()) / len(by_type)
            self.log({"step": state.global_step, "accuracy_macro": macro, "accuracy": dict(by_type)})


@contextmanager
def placeholders_muted(*models: PreTrainedModel | None) -> Iterator[None]:
    """Take image placeholders out of the distribution that the models are trained on; None is passed over.

    TRL suppresses them when it samples, and computes log-probabilities over the whole vocabulary. A token that is never
    sampled is never pushed down, and the KL estimate does not see it either: probability gathers there (measured: after
    300 steps the greedy answer to most questions was `<image>`, at a reward still rising). A bias of the output layer
    shuts them out in every code path; no checkpoint holds it where the layer had none, and it goes in the end.
    """
    with ExitStack() as undo:
        for model in models:
            if model is None or not (ids := placeholder_tokens(model)):
                continue
            head = cast(nn.Linear, model.get_output_embeddings())
            if head.bias is not None:
                undo.callback(head.bias.data.__setitem__, ids, head.bias.data[ids].clone())
                head.bias.data[ids] = MUTED
                continue
            bias = head.weight.new_zeros(head.out_features)
            bias[ids] = MUTED
            del head.bias
            head.register_buffer("bias", bias, persistent=False)
            undo.callback(head.register_parameter, "bias", None)
            undo.callback(head.__delattr__, "bias")  # the last comes first
        yield


def is_reference(encoder: Encoder, model: PreTrainedModel) -> bool:
    """Tell whether `encoder` is what `model` was loaded from, as its reference is."""
    alike: list[tuple[object, ...]] = [
        (each.name_or_path, each.dtype, getattr(each, "is_loaded_in_4bit", False)) for each in (encoder.model, model)
    ]
    return alike[0] == alike[1]


def _attention(model: PreTrainedModel) -> dict[str, str]:
    """Return how each part of `model` attends, as `from_pretrained` takes it.

    TRL asks for the language model's way in every part of the reference, and a convolutional tower knows none.
    """
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    return {"": model.config._attn_implementation} | {
        name: part._attn_implementation for name, part in parts.items() if part is not None
    }


@contextmanager
def _unheeded_left_out() -> Iterator[None]:
    """Leave out TRL's warning that `model_init_kwargs` go unheeded: the reference is made by them."""

    def heeded(record: logging.LogRecord) -> bool:
        return "`model_init_kwargs` will be ignored" not in record.getMessage()

    logger = logging.getLogger(GRPOTrainer.__module__)
    logger.addFilter(heeded)
    try:
        yield
    finally:
        logger.removeFilter(heeded)


def _collected(trainer: GRPOTrainer, model: PreTrainedModel) -> PreTrainedModel:
    """Return the policy whole, in the first process with what was trained; each process has its part until now."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    whole = type(model).from_pretrained(model.name_or_path, dtype=model.dtype, trust_remote_code=False)
    if trainer.accelerator.is_main_process:
        whole.load_state_dict(state)
    return whole


def align(
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    reward: RewardFunction,
    config: AlignmentConfig,
    *,
    seed: int,
    out: Path,
    measure: Callable[[], Mapping[str, float]] | None = None,
    log: Callable[[Mapping[str, object]], None] = lambda _: None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    encoder: Encoder | None = None,
    failures: Path | None = None,
) -> PreTrainedModel:
    """Align `model` in place on the prompts of `questions`; return it, a LoRA adapter merged in.

    Args:
        model: the policy, loaded from a checkpoint, in float32 unless an adapter is trained. TRL loads the frozen
            reference from the same place in the model's type, so that the first step's KL is 0; under an adapter the
            base itself is the reference.
        processor: its processor.
        questions: the prompts; their answers train nothing unless `reward` reads them.
        reward: any TRL reward function.
        config: settings.
        seed: of the prompts' order and the sampling.
        out: folder of the trainer's checkpoints.
        measure: accuracy by question type on held-out questions, for the curve.
        log: receives one record per step, and one per point of the curve.
        callbacks: further trainer callbacks, such as a progress bar.
        resume: continue from the newest checkpoint in `out`, which the caller has verified (`accord.runs.checkpoints`).
        encoder: what the reward's router reads completions with, if it does. Where it is the same model as the
            reference it is handed what the reference has computed.
        failures: file that keeps which questions failed; with it they are left out (`accord.alignment.parking`), but by
            several processes that have a policy in parts, or vLLM. None: what fails is raised.

    Raises:
        RecipeError: the adapter's `target_modules` fit nothing in the policy.
    """
    dataset = functools.partial(prompt_dataset, processor=processor, keep_errors=failures is not None)
    count = config.steps * config.prompts_per_step
    data = dataset(questions, count, random.Random(seed), balanced=config.balanced)
    parking = None
    if failures is not None:
        parking = Parking(questions, lambda question: dataset([question], 1, random.Random(0))[0], failures)
    extra: list[TrainerCallback] = [_Record(log), *callbacks]
    curve = _Curve(config.evaluate_every, measure, log) if measure is not None and config.evaluate_every else None
    extra += [curve] if curve else []
    peft: LoraConfig | None = lora_config(config.lora) if config.lora else None
    if encoder is not None and not is_reference(encoder, model):
        encoder = None
    arguments = grpo_config(config, seed=seed, out=out)
    # Without a device map: TRL's "auto" would split a reference over several GPUs, or leave parts of it on the CPU,
    # and say nothing. The trainer puts it beside the policy, or it fails for want of memory.
    arguments.model_init_kwargs = {"attn_implementation": _attention(model), "device_map": None}
    with adapter_errors(config.lora) if config.lora else nullcontext(), _unheeded_left_out():
        trainer = SharedPrefixTrainer(
            shared_prefix=config.shared_prefix,
            encoder=encoder,
            parking=parking,
            rollout_rows=config.rollout_rows,
            objective=OBJECTIVES.get(config.loss),
            model=model,
            reward_funcs=finite(reward),
            args=arguments,
            train_dataset=data,
            processing_class=processor,
            callbacks=extra,
            peft_config=peft,
        )
    trainer.remove_callback(PrinterCallback)
    if config.quantize:  # TRL makes the adapter bfloat16, which rounds small updates away
        for weight in cast(nn.Module, trainer.model).parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
    if sharded := trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        if config.lora:
            raise RecipeError(
                "an adapter is trained on a whole base, and DeepSpeed or FSDP cuts it into parts; launch without them, "
                "one GPU a process, or leave alignment.lora out"
            )
        if curve:
            warnings.warn("no accuracy curve of a policy that is in parts", DataWarning, stacklevel=2)
            trainer.remove_callback(curve)
    unwrap = trainer.accelerator.unwrap_model
    with placeholders_muted(model, unwrap(trainer.ref_model) if trainer.ref_model is not None else None):
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            if encoder is not None:
                encoder.remember({}, [])
    if sharded:
        return _collected(trainer, model)
    trained = unwrap(trainer.model)
    if config.lora and config.quantize:
        trained = _dequantized(trained, config.lora)
    return trained.merge_and_unload() if config.lora else trained  # type: ignore[no-any-return]


def _dequantized(trained: PeftModel, lora: LoraSettings) -> PeftModel:
    """Return an adapter on the numbers that its base in 4 bits stood for: merged there, it says what was trained."""
    weights = trainable_weights(trained)
    base = cast(PreTrainedModel, trained.unload())
    dtype = base.dtype
    again = add_lora(base.dequantize(dtype).to(dtype), lora)
    set_trainable_weights(again, weights)
    return again

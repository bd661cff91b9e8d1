"""Supervised fine-tuning of a model on questions with answers, through `transformers.Trainer`.

    L(θ) = − Σ_t log π_θ(a_t | image, question, a_<t)          over the tokens of the answer, its end token included

A site uses it to make its own backbone; the pre-training script uses it to make the small checkpoints that ship with
Accord. Question types are drawn equally often, because on natural VQA mixtures the commonest type (yes/no) stays at its
prior for most of the training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from PIL.Image import Image, Transpose
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from accord.data.images import load_images
from accord.data.sampling import draw_balanced
from accord.errors import check_least
from accord.models.inputs import build_batch
from accord.models.load import Processor
from accord.types import Question, prompt_of

Arguments = TypeVar("Arguments", bound=TrainingArguments)

SYMMETRIES: tuple[tuple[Transpose, ...], ...] = (
    (),
    (Transpose.FLIP_LEFT_RIGHT,),
    (Transpose.FLIP_TOP_BOTTOM,),
    (Transpose.ROTATE_180,),
    (Transpose.TRANSPOSE,),
    (Transpose.ROTATE_90,),
    (Transpose.ROTATE_270,),
    (Transpose.TRANSVERSE,),
)
"""The eight symmetries of the square. For questions whose answer does not depend on left, right, above or below."""


@dataclass(frozen=True)
class FineTuneConfig:
    """How a backbone is fine-tuned on questions."""

    steps: int = 200
    batch_size: int = 64  # questions
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps
    symmetries: bool = False  # augment with the symmetries of the square
    gradient_checkpointing: bool = False
    gradient_accumulation: int = 1

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train."""
        check_least(self, steps=1, batch_size=1, gradient_accumulation=1, learning_rate=0, weight_decay=0, warmup=0)


def transform(images: Sequence[Image], symmetry: int) -> list[Image]:
    """Apply one of the eight `SYMMETRIES` to a question's images, the same to each."""
    for operation in SYMMETRIES[symmetry]:
        images = [image.transpose(operation) for image in images]
    return list(images)


class _Drawn(Dataset[tuple[Question, int]]):
    """The questions of a whole training, each with the symmetry drawn for it.

    Types come equally often in all of it; the trainer shuffles it, so that a batch holds them in random proportion.
    """

    def __init__(self, questions: Sequence[Question], config: FineTuneConfig, generator: random.Random) -> None:
        count = config.steps * config.batch_size * config.gradient_accumulation
        order = draw_balanced([q.question_type for q in questions], count, generator)
        choices = len(SYMMETRIES) if config.symmetries else 1
        self.items = [(questions[i], generator.randrange(choices)) for i in order]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Question, int]:
        return self.items[i]


def finetune(
    model: PreTrainedModel | PeftModel,
    processor: Processor,
    questions: Sequence[Question],
    config: FineTuneConfig,
    *,
    seed: int,
    out: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """Fine-tune `model` in place on `questions`; return the mean training loss (nats per answer token)."""

    def collate(items: Sequence[tuple[Question, int]]) -> dict[str, torch.Tensor]:
        batch = build_batch(
            processor,
            [prompt_of(q) for q, _ in items],
            [transform(load_images(q.images), s) for q, s in items],
            [[q.answer] for q, _ in items],
        )
        return {**batch.accepted(model), "labels": batch.labels}

    arguments = trainer_arguments(
        out,
        seed=seed,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=round(config.warmup * config.steps),
        gradient_accumulation_steps=config.gradient_accumulation,
        activation_checkpointing=config.gradient_checkpointing,
    )
    data = _Drawn(questions, config, random.Random(seed))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)  # it writes every log line to standard output
    return float(trainer.train().training_loss)


def trainer_arguments(out: Path, *, seed: int, **settings: object) -> TrainingArguments:
    """Return what all of Accord's supervised stages share: cosine decay, no external reporting, our own bars.

    One process trains on one device, however many GPUs it sees: see `on_one_device`.
    """
    shared: dict[str, object] = {
        "output_dir": str(out),
        "seed": seed,
        "lr_scheduler_type": "cosine",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    }
    return on_one_device(TrainingArguments(**(shared | settings)))  # type: ignore[arg-type]


def on_one_device(arguments: Arguments) -> Arguments:
    """Keep the trainer from `nn.DataParallel`; return the same arguments.

    With several GPUs visible to one process, `Trainer` copies the model to each and takes that many times the batch,
    which makes another training of it; batches that are no tensors cannot be split at all. Several processes
    (`accelerate launch`) have one GPU each as they are.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)  # reading it sets the devices up
    return arguments

"""Direct preference optimisation of an adapter, through `trl.DPOTrainer`.

    L = − E log σ(β [log π(y⁺|x)/π_ref(y⁺|x) − log π(y⁻|x)/π_ref(y⁻|x)]) − α E log π(y⁺|x) / |y⁺|

The first term is eq. 7 of Rafailov et al. 2023, arXiv 2305.18290; the second, off unless asked for, is that of Pang
et al. 2024, arXiv 2404.19733, eq. 1, averaged over the tokens of a batch. DPO alone cares for differences only, and may
make both answers of a pair less likely: short ones lose the end token that they share (measured on easy-VQA: "no"
became "notriangletriangle").

π is the base under a LoRA adapter, π_ref the base with the adapter off, whatever round of a federation it is. The
trainer and its losses are TRL's, and it lives as long as the adapter: one that is made around an adapter takes the
adapter as it is then for the reference. The batches are ours (`preference_batch`): TRL's collator never lets the
tokenizer begin a sequence, also where the chat template leaves that to it, and passes on every field of a processor.
"""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, cast

import datasets  # type: ignore[import-untyped]
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from accord.alignment.grpo import placeholders_muted
from accord.data.images import as_list, load_images
from accord.data.sampling import draw_balanced
from accord.errors import DataError
from accord.models.finetune import SYMMETRIES, on_one_device, transform
from accord.models.inputs import batch_of, encode, endings
from accord.models.load import LoraSettings, Processor, adapter_errors, lora_config, tokenizer_of, without_adapter
from accord.types import PreferencePair

Drawn: TypeAlias = tuple[PreferencePair, int]
"""A pair, and which symmetry of the square its images are seen under."""


def preference_batch(model: PreTrainedModel, processor: Processor, drawn: Sequence[Drawn]) -> dict[str, Tensor]:
    """Return what `DPOTrainer` reads of P pairs: a row for each chosen answer, then one for each rejected one.

    Args:
        model: whose forward pass says which fields are taken.
        processor: its processor.
        drawn: P pairs with their symmetries.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask`, which is 1 on answers, `[2 P, T]`, and what is made of the
        images of the 2 P rows.

    Raises:
        DataError: some pairs have images and others none, or the model takes none.
        ImageError: an image cannot be read.
    """
    pairs = [pair for pair, _ in drawn]
    prompts = [pair.prompt for pair in pairs]
    seen = [as_list(transform(load_images(pair.images), symmetry)) for pair, symmetry in drawn]
    if any(seen) and not all(seen):
        raise DataError(
            f"{sum(map(bool, seen))} of {len(seen)} prompts have an image, and a batch takes one for each or none; "
            "keep questions about images and questions without any in runs of their own"
        )
    encoded = encode(processor, prompts, seen)
    both = endings(processor, prompts, [[pair.chosen, pair.rejected] for pair in pairs])
    rows = [[chosen] for chosen, _ in both] + [[rejected] for _, rejected in both]
    batch = batch_of([*encoded, *encoded], rows, cast(int, tokenizer_of(processor).pad_token_id))
    return {**batch.accepted(model), "completion_mask": (batch.labels != -100).long()}


class _Trainer(DPOTrainer):
    """`DPOTrainer` whose data needs no preparation, since `preference_batch` does all of it."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: object) -> datasets.Dataset:
        return dataset


class AdapterDpo:
    """A frozen base with a trainable adapter, and the trainer that improves it on preference pairs.

    Args:
        model: the base, which is the reference too; it carries the adapter from here on.
        processor: its processor.
        lora: the adapter.
        beta: β, how much a log-ratio counts.
        sft: α, how much the likelihood of the chosen answers counts beside.
        batch_size: pairs of one batch.
        accumulate: batches to a step.
        seed: of the adapter's first weights.
        out: scratch folder of the trainer, which writes nothing.

    Raises:
        RecipeError: the adapter's `target_modules` fit nothing in the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Processor,
        lora: LoraSettings,
        *,
        beta: float = 0.1,
        sft: float = 0.0,
        batch_size: int = 32,
        accumulate: int = 1,
        seed: int = 0,
        out: Path,
    ) -> None:
        settings = DPOConfig(
            output_dir=str(out),
            seed=seed,
            beta=beta,
            loss_type=["sigmoid", "sft"] if sft else ["sigmoid"],
            loss_weights=[1.0, sft] if sft else None,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=1,  # `_Drawn` holds a whole training, in its order
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            max_length=None,
            activation_checkpointing=False,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        with adapter_errors(lora):
            self._trainer = _Trainer(
                model=model,
                args=on_one_device(settings),
                # Of the data that it is made with, the trainer looks only at the names of the columns.
                train_dataset=datasets.Dataset.from_dict({"pair": [None]}),
                data_collator=functools.partial(preference_batch, model, processor),
                processing_class=processor,
                peft_config=lora_config(lora),
            )
        self._trainer.remove_callback(PrinterCallback)
        self._per_step = batch_size * accumulate

    @property
    def model(self) -> PeftModel:
        """The base with its adapter."""
        return cast(PeftModel, self._trainer.model)

    def train(
        self,
        pairs: Sequence[PreferencePair],
        *,
        steps: int,
        learning_rate: float,
        weight_decay: float = 0.0,
        seed: int,
        symmetries: bool = False,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> float:
        """Take `steps` steps of a fresh AdamW on `pairs` from where the adapter is; return the mean loss, in nats.

        Args:
            pairs: what is learned from; question types come equally often.
            steps: how many.
            learning_rate: of all of them.
            weight_decay: of AdamW.
            seed: of the order, which nothing else changes.
            symmetries: augment with the symmetries of the square.
            callbacks: further trainer callbacks, such as a progress bar.
        """
        trainer = self._trainer
        trainer.args.learning_rate, trainer.args.weight_decay = learning_rate, weight_decay
        trainer.optimizer = None
        trainer.train_dataset = _Drawn(pairs, steps * self._per_step, symmetries, random.Random(seed))
        for callback in callbacks:
            trainer.add_callback(callback)
        with placeholders_muted(without_adapter(self.model)):
            # A training collects garbage three times, which costs as much as three steps of a small model.
            gc.freeze()
            try:
                loss = float(trainer.train().training_loss)
            finally:
                gc.unfreeze()
                for callback in callbacks:
                    trainer.remove_callback(callback)
                # Every training wraps the model in autocast anew.
                trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return loss

    def merged(self) -> PreTrainedModel:
        """Return the base with the adapter merged in; this object is of no use afterwards."""
        model = self.model.merge_and_unload()
        model.__dict__.pop("forward", None)  # the trainer's, which computes log-probabilities too
        return cast(PreTrainedModel, model)


class _Drawn(Dataset[Drawn]):
    """The pairs of a whole training in their order, types equally often, each with the symmetry drawn for it."""

    def __init__(self, pairs: Sequence[PreferencePair], count: int, symmetries: bool, generator: random.Random) -> None:
        choices = len(SYMMETRIES) if symmetries else 1
        order = draw_balanced([pair.question_type for pair in pairs], count, generator)
        self.items = [(pairs[i], generator.randrange(choices)) for i in order]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Drawn:
        return self.items[i]

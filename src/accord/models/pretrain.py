"""Make small checkpoints such as those that ship with Accord: `accord pretrain OUT`.

They stand for what a consortium downloads: a model that sees well and speaks, but answers poorly. Two steps, on the
questions' `base` split alone (of easy-VQA images that no site holds, no prompt uses and no test contains):

1. *Vision warm-up.* Each open question type gets a linear head on the mean image feature; its answers are the
   labels. All 1,000 images, with the eight symmetries of the square. Without it a tower this small does not tell
   shapes apart (it needs thousands of steps; the fine-tuning of step 2 is too short).
2. *Instruction tuning* on the questions of each domain's first few images only, so that the model answers fluently
   and often wrongly: that is the room which preferences can fill.

A text-only model has no tower to warm up; it is tuned for a short while, to the same end.

A recipe may ask for models with a pretrained tower instead (`[[pretrain.fast_vlm]]`): `accord.models.fast_vlm` builds
them. That tower sees already and stays frozen, so that step 1 is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling

from accord.data.images import load_image
from accord.data.questions import uniform
from accord.errors import RecipeError, check_least
from accord.models.fast_vlm import FastVlmSettings, build_fast_vlm
from accord.models.finetune import FineTuneConfig, finetune
from accord.models.load import Processor, save_model
from accord.models.tiny import FAMILIES, TEXT_FAMILIES, Family, TinyConfig, build_tiny, train_tokenizer
from accord.progress import ProgressBarCallback, stage_bar
from accord.types import ImageSource, Question

VISION_BATCH: Final = 64
"""Images of a step of the vision tower's warm-up."""

VISION_RATE: Final = 3e-3
VISION_DECAY: Final = 0.05


@dataclass(frozen=True)
class PretrainConfig:
    """How a small checkpoint is made."""

    tiny: TinyConfig = TinyConfig()
    vision_steps: int = 6000
    symmetries: bool = True
    instruction_images: int = 20  # of each domain, or questions without an image; 0 for all
    vocabulary: int = 512  # tokens
    instruction: FineTuneConfig = FineTuneConfig(steps=100, batch_size=64, learning_rate=2e-3)
    seed: int = 0
    fast_vlm: tuple[FastVlmSettings, ...] = ()  # these, with pretrained towers, in place of the tiny families

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train, and two checkpoints of one name."""
        check_least(self, vision_steps=1)
        check_least(self, instruction_images=0, vocabulary=1)
        names = [each.name for each in self.fast_vlm]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RecipeError(f"two tables of pretrain.fast_vlm have the name {twice[0]!r}; name each differently")


def pretrain(
    family: Family, questions: Sequence[Question], config: PretrainConfig, *, quiet: bool = False
) -> tuple[PreTrainedModel, Processor]:
    """Build, warm up and tune one small model on `questions`; one seed gives one result on one machine."""
    set_seed(config.seed)
    model, processor = build_tiny(family, _tokenizer(questions, config), config.tiny, seed=config.seed)
    _warm_up(model, processor, questions, config, description=f"{family}: vision", quiet=quiet)
    _instruct(family, model, processor, questions, config.instruction, config, quiet=quiet)
    return model.eval(), processor


def pretrain_fast_vlm(
    settings: FastVlmSettings, questions: Sequence[Question], config: PretrainConfig, *, quiet: bool = False
) -> tuple[PreTrainedModel, Processor]:
    """Build one model with a pretrained tower, and tune its projector and language model on `questions`.

    Of SmolLM2, which has learned to speak, the projector alone is tuned.

    Raises:
        CheckpointError: the tower's package is not installed, or its file is not the known release.
    """
    set_seed(config.seed)
    model, processor = build_fast_vlm(settings, _tokenizer(questions, config), seed=config.seed)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fixed = [p for name, p in trained if settings.text == "smollm2" and "multi_modal_projector" not in name]
    for parameter in fixed:
        parameter.requires_grad_(False)
    instruction = settings.instruction or config.instruction
    _instruct(settings.name, model, processor, questions, instruction, config, quiet=quiet)
    for parameter in fixed:
        parameter.requires_grad_(True)
    return model.eval(), processor


def _tokenizer(questions: Sequence[Question], config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Train the tokenizer; it is the same for every model of the same questions."""
    return train_tokenizer([text for q in questions for text in (q.text, q.answer)], config.vocabulary)


def _instruct(
    name: str,
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    instruction: FineTuneConfig,
    config: PretrainConfig,
    *,
    quiet: bool,
) -> None:
    """Tune the model on the questions of each domain's first few images."""
    few = first_of_each_domain(questions, config.instruction_images)
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProgressBarCallback(f"{name}: instruction", quiet=quiet) as bar,
    ):
        finetune(
            model,
            processor,
            [q for q in questions if (q.domain, str(q.subjects[0])) in few],
            instruction,
            seed=config.seed,
            out=Path(scratch),
            callbacks=[bar],
        )


def first_of_each_domain(questions: Sequence[Question], count: int) -> set[tuple[str, str]]:
    """Return the first `count` images of every domain, or all if 0, as (domain, image); a text counts as an image.

    Texts are in the order of their hashes: alphabetically, the first twenty sums would all begin with 10.
    """
    subjects = {(q.domain, str(q.subjects[0])): q.image is None for q in questions}
    found = sorted(subjects, key=lambda each: (each[0], uniform("text", 0, *each) if subjects[each] else 0, each[1]))
    return {each for _, some in groupby(found, key=itemgetter(0)) for each in islice(some, count or None)}


def _warm_up(
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    config: PretrainConfig,
    *,
    description: str,
    quiet: bool,
) -> None:
    """Train tower and projector to tell apart the answers to open questions, one linear head per question type."""
    images, types, labels = _labels(questions)
    if not types or isinstance(processor, PreTrainedTokenizerBase):
        return
    pixels = processor.image_processor([load_image(i) for i in images], return_tensors="pt")["pixel_values"]
    pixels = pixels.reshape(len(images), 1, *pixels.shape[-3:]) if pixels.dim() == 5 else pixels
    width = model.config.get_text_config().hidden_size
    heads = nn.ModuleList([nn.Linear(width, int(labels[:, t].max()) + 1) for t in range(len(types))])
    parameters = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, VISION_RATE, weight_decay=VISION_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, VISION_RATE, total_steps=config.vision_steps)
    generator = torch.Generator().manual_seed(config.seed)
    model.train()
    with stage_bar(description, config.vision_steps, quiet=quiet) as advance:
        for _ in range(config.vision_steps):
            index = torch.randint(len(images), (VISION_BATCH,), generator=generator)
            batch = pixels[index]
            if config.symmetries:
                batch = _turned(batch, torch.randint(8, (len(batch),), generator=generator))
            encode = cast(Callable[..., BaseModelOutputWithPooling], model.get_image_features)
            features = encode(pixel_values=batch, return_dict=True).pooler_output
            pooled = torch.stack(list(cast(Sequence[Tensor], features))).mean(dim=1)  # [batch, D]
            losses = [cross_entropy(head(pooled), labels[index, t]) for t, head in enumerate(heads)]
            known = [loss for loss in losses if not loss.isnan()]
            if known:  # a batch may hold no image with an open question
                optimiser.zero_grad()
                torch.stack(known).sum().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
            advance()


def _labels(questions: Sequence[Question]) -> tuple[list[ImageSource], list[str], Tensor]:
    """Return the images, the open question types, and class indices `[images, types]`, −100 without an answer."""
    images = sorted({q.image for q in questions if q.image is not None}, key=str)
    open_ones = [
        q for q in questions if q.image and q.answer not in ("yes", "no")
    ]  # the answer to those needs the question too
    types = sorted({q.question_type for q in open_ones})
    classes = {t: sorted({q.answer for q in open_ones if q.question_type == t}) for t in types}
    row = {image: i for i, image in enumerate(images)}
    labels = torch.full((len(images), len(types)), -100)
    for q in open_ones:
        labels[row[cast(ImageSource, q.image)], types.index(q.question_type)] = classes[q.question_type].index(q.answer)
    return images, types, labels


def _turned(batch: Tensor, symmetry: Tensor) -> Tensor:
    """Turn each image of `[N, …, H, W]` by `symmetry % 4` quarters, and flip it from 4 on."""
    turned = torch.stack([torch.rot90(image, int(s) % 4, (-2, -1)) for image, s in zip(batch, symmetry, strict=True)])
    flip = (symmetry > 3).view(-1, *[1] * (batch.dim() - 1))
    return torch.where(flip, turned.flip(-1), turned)


def pretrain_families(
    out: Path,
    questions: Sequence[Question],
    config: PretrainConfig,
    families: Sequence[str] = (),
    *,
    quiet: bool = False,
) -> list[Path]:
    """Make the checkpoints of `families`, by default of all that fit `questions`, under `out`; return their folders.

    With `config.fast_vlm` these are its models, by their names.

    Raises:
        RecipeError: an unknown family.
        CheckpointError: as `pretrain_fast_vlm`.
    """
    with_images = any(q.image is not None for q in questions)
    make: dict[str, Callable[[], tuple[PreTrainedModel, Processor]]]
    if config.fast_vlm:
        if not with_images:
            raise RecipeError(
                "the recipe wants models with a vision tower ([[pretrain.fast_vlm]]), and its base "
                "questions have no image; remove these tables"
            )
        make = {each.name: partial(pretrain_fast_vlm, each, questions, config, quiet=quiet) for each in config.fast_vlm}
    else:
        fitting = FAMILIES if with_images else TEXT_FAMILIES
        make = {family: partial(pretrain, family, questions, config, quiet=quiet) for family in fitting}
    if unknown := [name for name in families if name not in make]:
        raise RecipeError(f"there is no family {unknown[0]!r} for these questions; use one of {', '.join(make)}")
    return [Path(save_model(*made(), out / name)) for name, made in make.items() if not families or name in families]

"""Load Hugging Face checkpoints, shipped, local or from the hub, and adapt them with LoRA.

A vision-language model comes with its processor, a text-only one with its tokenizer; both are called alike, and all
else is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from accord.errors import CheckpointError, RecipeError, check_least
from accord.models.pixels import process_once
from accord.models.tower import pin
from accord.runs import replace_folder

SHIPPED = Path(__file__).parent / "checkpoints"
PREFIX = "accord/"

Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
"""What makes a model's inputs: a processor of images and text, or the tokenizer of a text-only model."""


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank adapter on the linear layers of the language model (Hu et al. 2021); the vision tower stays frozen."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = (
        r".*(language_model|text_model|model\.layers).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    )

    def __post_init__(self) -> None:
        """Refuse an adapter without weights or effect, and a dropout that leaves nothing."""
        check_least(self, rank=1, alpha=1, dropout=0)
        if not self.dropout < 1:
            raise RecipeError(f"dropout must be below 1, got {self.dropout}; lower dropout")


def locate(checkpoint: str) -> str:
    """Return where `checkpoint` is: a shipped one (`accord/<name>`), a folder, or an id on the Hugging Face hub.

    Raises:
        CheckpointError: no such shipped checkpoint, or a path-like name without a folder.
    """
    if checkpoint.startswith(PREFIX):
        folder = SHIPPED / checkpoint.removeprefix(PREFIX)
        if not (folder / "config.json").is_file():
            have = (
                ", ".join(sorted(PREFIX + p.name for p in SHIPPED.iterdir() if p.is_dir()))
                if SHIPPED.is_dir()
                else "none"
            )
            raise CheckpointError(f"{checkpoint!r} does not ship with Accord; shipped are: {have}")
        return str(folder)
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: no config.json, so this is not a Hugging Face checkpoint; name the folder that holds one"
            )
        return str(path)
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1:
        raise CheckpointError(
            f"{checkpoint!r}: there is no such folder; name a checkpoint folder or a Hugging Face model id"
        )
    return checkpoint


def device() -> torch.device:
    """Return where models are put: the accelerator that torch finds (CUDA, MPS, …), otherwise the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_model(
    checkpoint: str, *, revision: str = "main", trainable: bool = False
) -> tuple[PreTrainedModel, Processor]:
    """Load a model that answers questions, about images or without any, onto `device()`, and its processor.

    Code from the checkpoint is never run. The vision tower is frozen, and stays in evaluation mode through any
    `model.train()`, unless the checkpoint's config.json says `"freeze_vision": false`, as those of models whose tower
    is trained with the rest do (`accord.models.tower`). What is saved from the model says the same.

    Args:
        checkpoint: what `locate` finds.
        revision: a branch, tag or commit of a checkpoint on the hub; a folder has none.
        trainable: load it in float32, as whatever is trained whole must be: a bfloat16 weight has 8 significant bits,
            and an update of 1e-6 is rounded away. A frozen model keeps its checkpoint's type, under an adapter too.

    Raises:
        CheckpointError: it is absent, incomplete, or of another kind (a vision-only model, or one that only reads).
    """
    place = locate(checkpoint)
    try:
        config = AutoConfig.from_pretrained(place, revision=revision)
        kinds = (AutoModelForImageTextToText, AutoProcessor), (AutoModelForCausalLM, AutoTokenizer)
        kind = next((each for each in kinds if type(config) in each[0]._model_mapping), None)
        if kind is None:
            raise CheckpointError(
                f"{checkpoint}: a {config.model_type!r} model cannot answer questions; "
                "use a checkpoint that AutoModelForImageTextToText or AutoModelForCausalLM loads"
            )
        processor = cast(Processor, kind[1].from_pretrained(place, revision=revision))
        if isinstance(processor, PreTrainedTokenizerBase) and kind[1] is AutoTokenizer:
            _ready_tokenizer(checkpoint, processor)
        loaded = kind[0].from_pretrained(
            place,
            revision=revision,
            dtype=torch.float32 if trainable else "auto",
            use_safetensors=True,
            output_loading_info=True,
        )
        model, found = cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{checkpoint}: cannot load the checkpoint ({reason}); check the name and that the folder is complete"
        ) from error
    if found["missing_keys"]:  # transformers draws these at random and goes on
        raise CheckpointError(
            f"{checkpoint}: {len(found['missing_keys'])} weights are missing, {min(found['missing_keys'])} first; "
            "the folder is incomplete or mixes two models, save the checkpoint again"
        )
    sees = kind[1] is AutoProcessor
    if sees and (getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None):
        raise CheckpointError(
            f"{checkpoint}: no image processor or no tokenizer; save the processor into the same folder"
        )
    if sees:
        process_once(processor.image_processor)
    tokenizer_of(processor).padding_side = "left"  # generation continues from the last column
    if model.generation_config is not None and not model.generation_config.suppress_tokens:
        model.generation_config.suppress_tokens = placeholder_tokens(model) or None
    model.to(device())  # type: ignore[arg-type]  # the signature of transformers' wrapper has lost `self`
    if getattr(model.config, "freeze_vision", True):
        pin(model)
    return model, processor


def _ready_tokenizer(checkpoint: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """See to what the processor of a vision-language model always has: a chat template, and a token to pad with."""
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer has no chat template, so that nothing says how a question is put; use a "
            "checkpoint that was tuned on instructions, or save chat_template.jinja into the folder"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, which a text-only model's is itself."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    return cast(PreTrainedTokenizerBase, processor.tokenizer)


def placeholder_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids of the tokens that stand for an image or a video in a prompt, and mean nothing in an answer."""
    ids = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
    return [i for i in ids if i is not None]


def save_model(model: PreTrainedModel, processor: Processor, path: Path) -> str:
    """Write an ordinary Hugging Face checkpoint to the folder `path`, whole or not at all; return the path."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    replace_folder(path, write)
    return str(path)


def lora_config(settings: LoraSettings) -> LoraConfig:
    """Translate our settings into PEFT's."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Freeze `model` and add a trainable adapter to its language layers.

    Raises:
        RecipeError: as `adapter_errors`.
    """
    with adapter_errors(settings):
        return cast(PeftModel, get_peft_model(model, lora_config(settings)))


@contextmanager
def adapter_errors(settings: LoraSettings) -> Iterator[None]:
    """Name the setting where PEFT finds no layer, inside a trainer that adds the adapter too.

    Raises:
        RecipeError: `target_modules` is no regular expression, matches nothing, or a module that takes no adapter.
    """
    try:
        yield
    except (ValueError, re.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, re.error) and "target module" not in reason.lower().replace("_", " "):
            raise
        raise RecipeError(
            f"lora.target_modules = {settings.target_modules!r} fits no adapter to this model ({reason}); give a "
            "regular expression for whole names of linear layers, or leave it out for those of the language model"
        ) from error


def without_adapter(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model, with LoRA layers inside it if there are any."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters `model` has."""
    return sum(parameter.numel() for parameter in model.parameters())


def seeded_adapter(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze `model` and add an adapter to it whose weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return add_lora(model, settings)

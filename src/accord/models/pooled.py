"""Describe pictures and texts by one vector each, by what of a model is frozen: its tower and its token embeddings.

    picture    mean over positions of the tower's last hidden state, before the projector        ∈ R^D
    text       mean over tokens of the language model's input embeddings                         ∈ R^E

A projector that is not trained yet changes neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling

from accord.data.images import load_image
from accord.errors import CheckpointError
from accord.models.load import Processor, tokenizer_of
from accord.models.tower import vision_tower
from accord.types import ImageSource


@torch.no_grad()
def image_means(model: PreTrainedModel, processor: Processor, images: Sequence[ImageSource]) -> Tensor:
    """Return `[N, D]` in float32 on the CPU; the tower computes pictures one by one, and remembers them if pinned.

    Raises:
        CheckpointError: the model has no vision tower.
        ImageError: as `accord.data.images.load_image`.
    """
    if vision_tower(model) is None or isinstance(processor, PreTrainedTokenizerBase):
        raise CheckpointError(
            f"{model.config._name_or_path or type(model).__name__} reads no pictures, and they are to be compared; "
            "name an encoder with a vision tower"
        )
    encode = cast(Callable[..., BaseModelOutputWithPooling], model.get_image_features)
    means = []
    for image in images:
        pixels = processor.image_processor(images=[load_image(image)], return_tensors="pt").to(model.device)
        hidden = encode(**pixels, return_dict=True).last_hidden_state
        assert hidden is not None
        # A convolutional tower's is [1, D, H, W]; the others' have D last.
        mean = hidden.flatten(2).mean(dim=(0, 2)) if hidden.dim() == 4 else hidden.flatten(0, -2).mean(dim=0)
        means.append(mean.float().cpu())
    return torch.stack(means)


@torch.no_grad()
def text_means(model: PreTrainedModel, processor: Processor, texts: Sequence[str]) -> Tensor:
    """Return `[N, E]` in float32 on the CPU; a text without a token is 0."""
    tokenizer, embedding = tokenizer_of(processor), model.get_input_embeddings()
    means = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        means.append(embedding(ids.to(model.device)).float().sum(dim=0).cpu() / max(len(ids), 1))
    return torch.stack(means)

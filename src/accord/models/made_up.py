"""Ask a model about a made-up picture: weights under which it has no finite answer are no weights."""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from accord.models.inputs import Batch, build_batch
from accord.models.load import Processor, without_adapter
from accord.types import vqa_prompt

SIDE = 64
"""Pixels of the picture's side."""


def made_up(processor: Processor) -> Batch:
    """Return a batch of one question with an answer: about a picture, grey and brighter outwards, if the model sees."""
    sees = not isinstance(processor, PreTrainedTokenizerBase)
    prompt = vqa_prompt("What is this?") if sees else [{"role": "user", "content": "What is this?"}]
    picture = Image.radial_gradient("L").resize((SIDE, SIDE)).convert("RGB") if sees else None
    return build_batch(processor, [prompt], [picture], [["yes"]])


def made_up_loss(model: PreTrainedModel | PeftModel, processor: Processor) -> Callable[[], Tensor]:
    """Return what gives the mean negative log-likelihood of the made-up answer under `model` as it is, a scalar."""
    batch = made_up(processor).to(without_adapter(model).device)
    inputs = batch.accepted(model)

    def loss() -> Tensor:
        value: Tensor = model(**inputs, labels=batch.labels).loss
        return value

    return loss

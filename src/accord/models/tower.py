"""The vision tower of a model: frozen once and for all, so that an image always has the same features.

    features = tower(pixels)          no gradient, evaluation mode, weights and statistics of the checkpoint

Trainers call `model.train()`. A tower with BatchNorm (EfficientNet) would then normalise by the batch at hand, which
changes its features, and overwrite its running statistics; one with dropout would answer differently every time. A
pinned tower stays in evaluation mode whatever is called.
"""

from __future__ import annotations

from types import MethodType
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def vision_tower(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    """Return what turns pixels into features, with the patch merger of Qwen-VL inside it; None of a text-only model.

    The projector that comes after it in the other families (LLaVA, FastVLM, Idefics3) is no part of it.
    """
    plain = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    found: nn.Module = plain.get_encoder(modality="image")  # the model or its base if there is none
    return None if found in (plain, plain.base_model) else found


def pin(model: PreTrainedModel | PeftModel) -> None:
    """Freeze the vision tower of `model`, if it has one, and keep it in evaluation mode through any `model.train()`."""
    tower = vision_tower(model)
    if tower is not None:
        tower.requires_grad_(False).eval()
        # A bound method of the instance: a deep copy binds it to the copy, and no weight file knows it.
        setattr(tower, "train", MethodType(_stay, tower))  # noqa: B010  # an assignment would not type-check


def is_pinned(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether `pin` took."""
    tower = vision_tower(model)
    return tower is not None and "train" in vars(tower)


def _stay(tower: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of a pinned tower's `train`."""
    return tower

"""`trl.GRPOTrainer` as a script without Accord makes it: what the step benchmarks compare with.

transformers loads model and processor; prompts, images, rollouts and losses are TRL's own. Equal on both sides are the
settings of training, the frozen vision tower, and the placeholders of images, which no rollout may say.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_callback import PrinterCallback
from trl import GRPOTrainer

from accord.models.load import locate, placeholder_tokens
from accord.models.tower import vision_tower


def stock_trainer(checkpoint: str, dtype: torch.dtype | str = "auto", **settings: object) -> GRPOTrainer:
    """Return a trainer of `checkpoint`, loaded in `dtype`; `settings` are those of `GRPOTrainer`."""
    place = locate(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype, trust_remote_code=False)
    tower = vision_tower(model)
    if tower is not None and getattr(model.config, "freeze_vision", True):
        tower.requires_grad_(False)
    model.generation_config.suppress_tokens = placeholder_tokens(model) or None
    processor = AutoProcessor.from_pretrained(place, padding_side="left", trust_remote_code=False)
    trainer = GRPOTrainer(model=model, processing_class=processor, **settings)
    trainer.remove_callback(PrinterCallback)
    return trainer

"""Train a reward model on a file of preference pairs, for those who want nothing else of a federation.

    pairs = read_preferences("pairs.jsonl")
    model, ranking = train_on_pairs("accord/idefics3", pairs)
    model.save(Path("reward"))

It is a site's training (`accord.rewards.train`), on the site's terms: there are no reference answers, so the weights
that rank the pairs of some images best are kept, and those pairs train nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import set_seed

from accord.errors import DataError
from accord.models.load import LoraSettings, reads_images
from accord.models.trial import try_checkpoint
from accord.progress import ProgressBarCallback
from accord.rewards.model import RewardModel
from accord.rewards.train import Ranking, RewardConfig, train_reward_model
from accord.types import PreferencePair

ALONE = RewardConfig(choose="pairs")
"""How a reward model is trained whose owner has pairs and nothing else."""


def train_on_pairs(
    checkpoint: str,
    pairs: Sequence[PreferencePair],
    config: RewardConfig = ALONE,
    *,
    lora: LoraSettings | None = None,
    seed: int = 0,
    quiet: bool = True,
    log: Callable[[Mapping[str, object]], None] = lambda _: None,
) -> tuple[RewardModel, Ranking]:
    """Put a head on a checkpoint and train both on preference pairs.

    Args:
        checkpoint: a vision-language or text-only model: shipped (`accord/…`), a folder, or an id on the hub.
        pairs: as `accord.data.preferences.read_preferences` gives them.
        config: with `choose = "pairs"`.
        lora: train an adapter in place of the whole backbone.
        seed: of the head's first weights, of what is kept back, and of the order.
        quiet: without a progress bar.
        log: receives one record per ranking.

    Returns:
        The model, and how often it ranked the pairs kept back as people did, by question type.

    Raises:
        DataError: the pairs have images and the model reads none, or all are about one image.
        CheckpointError: the checkpoint cannot be loaded, or pairs have several images and it does not take them.
        RecipeError: training diverged.
    """
    if any(pair.images for pair in pairs) and not reads_images(checkpoint):
        raise DataError(
            f"the pairs are about images, and {checkpoint} is a text-only model; name a vision-language checkpoint"
        )
    if any(len(pair.images) > 1 for pair in pairs):
        try_checkpoint(checkpoint, several=True)
    set_seed(seed)
    model = RewardModel.from_checkpoint(checkpoint, lora=lora, head=config.head)
    with tempfile.TemporaryDirectory() as scratch, ProgressBarCallback("reward model", quiet=quiet) as bar:
        ranking = train_reward_model(
            model, pairs, [], [], config, seed=seed, out=Path(scratch), callbacks=[bar], log=log
        )
    return model.eval(), ranking

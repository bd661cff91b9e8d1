"""Make the digests by which server and sites find out that they were given different recipes.

A policy is known by what its files hold, not by where they lie: paths are each participant's own. (Reading 7 billion
parameters takes half a minute, once in the life of a process.)
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
from huggingface_hub import snapshot_download

from accord.federation.messages import MESSAGES, Agreement
from accord.models.load import FETCHED, locate
from accord.recipe import Recipe
from accord.version import VERSION

DIGITS: Final = 16


def agreement_of(recipe: Recipe) -> Agreement:
    """Return what a recipe says of all that server and sites must agree on.

    Raises:
        CheckpointError: the policy or the encoder is not there.
    """
    models = sorted({recipe.policy.checkpoint, recipe.encoder_checkpoint})
    return Agreement(
        MESSAGES,
        VERSION,
        sites=_digest([site.name for site in recipe.sites]),
        router=_digest([recipe.router, weights_digest(recipe.encoder_checkpoint)]),
        scores=_digest(recipe.scores),
        policy=_digest([weights_digest(model) for model in models]),
    )


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:DIGITS]


@cache
def weights_digest(checkpoint: str) -> str:
    """Return the SHA-256 of a checkpoint's configuration and weights, whatever it is called here.

    Raises:
        CheckpointError: it is not there.
    """
    place = Path(locate(checkpoint))
    folder = place if place.is_dir() else Path(snapshot_download(checkpoint, allow_patterns=list(FETCHED)))
    total = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as opened:
            total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()

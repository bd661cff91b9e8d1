"""Make the digests by which server and sites find out that they were given different recipes.

A policy is known by what its files hold, not by where they lie: paths are each participant's own. (Reading 7 billion
parameters takes half a minute, once in the life of a process.)

A setting that has its default is no part of a digest. So a newer Accord that has one more agrees with an older one, as
long as nobody uses it; one whose defaults mean something else has messages of another version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Final

import msgspec

from accord.federation.messages import MESSAGES, Agreement, ScoreRange
from accord.federation.projector import ProjectorConfig
from accord.models.load import inspected
from accord.recipe import Recipe
from accord.routing.router import RouterConfig
from accord.version import VERSION

DIGITS: Final = 16

OWN: Final = ("rows_at_once", "audit", "leave_out")
"""Settings of the router that are a participant's own: memory, and what the server makes of updates."""


def agreement_of(recipe: Recipe) -> Agreement:
    """Return what a recipe says of all that server and sites must agree on.

    Raises:
        CheckpointError: the policy or the encoder is not there.
    """
    models = sorted({weights_digest(model) for model in (recipe.policy.checkpoint, recipe.encoder_checkpoint)})
    projector = recipe.projector and changed(recipe.projector, ProjectorConfig())
    return Agreement(
        MESSAGES,
        VERSION,
        sites=_digest([site.name for site in recipe.sites]),
        router=_digest([changed(recipe.router, RouterConfig(), but=OWN), weights_digest(recipe.encoder_checkpoint)]),
        scores=_digest(recipe.scores and changed(recipe.scores, ScoreRange())),
        policy=_digest([models, recipe.max_pixels, projector]),
    )


def changed(settings: object, usual: object, *, but: Collection[str] = ()) -> dict[str, object]:
    """Return what settings have in place of the usual ones, those of tables within them too, `but` for some."""
    found: dict[str, object] = {}
    for name in (field.name for field in fields(settings) if field.name not in but):  # type: ignore[arg-type]
        value, other = getattr(settings, name), getattr(usual, name)
        if value != other:
            found[name] = changed(value, other) if is_dataclass(value) and type(value) is type(other) else value
    return found


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:DIGITS]


@cache
def weights_digest(checkpoint: str) -> str:
    """Return the SHA-256 of a checkpoint's configuration and weights, whatever it is called here.

    Raises:
        CheckpointError: it is not there.
    """
    total = hashlib.sha256()
    with inspected(checkpoint, "main") as (place, _):
        for file in sorted([Path(place, "config.json"), *Path(place).glob("model*.safetensors")]):
            with file.open("rb") as opened:
                total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()

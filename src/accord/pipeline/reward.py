"""Open the federation of a run folder as one TRL reward function, for a training script of one's own."""

from __future__ import annotations

from pathlib import Path

from accord.alignment.reward import FederatedReward
from accord.errors import RunError
from accord.federation.engine import Engine, InProcessEngine
from accord.federation.ranks import OneConnection, rank_and_count
from accord.methods import find_method
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.recipe_file import import_methods, load_recipe
from accord.stages.alignment import reward_of
from accord.stages.job import on_own_projector
from accord.stages.sites import open_site


def open_reward(folder: Path | str) -> FederatedReward:
    """Open the sites and the router of a run folder as one TRL reward function.

    Under `accelerate launch` with several processes all of them call this, and the first alone opens the sites.

    Raises:
        RunError: the folder holds no recipe, or that of a run whose method's reward needs more than the folder holds.
        CheckpointError: a site's reward model or the router is missing or damaged.
    """
    path = Path(folder)
    if not (path / "recipe.toml").is_file():
        raise RunError(
            f"{path}: no recipe.toml, so this is not a run folder; make one with `accord demo` or `accord run`"
        )
    recipe = on_own_projector(import_methods(load_recipe(path / "recipe.toml")), path)
    names = [site.name for site in recipe.sites]
    method = find_method(recipe.method, names)
    if method.opened is None:
        raise RunError(
            f"{path} was aligned by {recipe.method!r}, whose reward needs the run's questions; open one by 'routed'"
        )
    rank, count = rank_and_count()
    engine: Engine | None = None
    if rank == 0:
        sites = {name: open_site(recipe, path, name, scores=recipe.scores) for name in names}
        engine = InProcessEngine({name: site.answer for name, site in sites.items()})
    if engine is None or count > 1:
        engine = OneConnection(engine, names)
    policy, processor = load_model(recipe.policy.checkpoint)
    alike = recipe.encoder_checkpoint == recipe.policy.checkpoint
    encoder = Encoder(policy, processor) if alike else Encoder(*load_model(recipe.encoder_checkpoint))
    return reward_of(recipe, engine, method.opened(path, recipe, encoder), policy, scores=recipe.scores)

from pathlib import Path

import pytest
import torch

from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.recipe import Recipe, SiteConfig
from accord.recipe_file import dump_recipe
from accord.rewards.model import RewardModel
from accord.routing.router import RouterConfig, RouterNetwork, save_router

SITES = {"colour": "llava-siglip-qwen2", "shape": "idefics3", "yes-no": "llava-clip-llama"}


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `accord demo` leaves of sites and router, untrained."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    folder.mkdir()
    recipe = Recipe("demo", tuple(SiteConfig(name, f"accord/{family}") for name, family in SITES.items()))
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for site in recipe.sites:
            RewardModel.from_checkpoint(site.checkpoint).save(folder / "sites" / site.name / "reward")
        features = Encoder(*load_model(recipe.policy.checkpoint)).features
        save_router(folder / "router", RouterNetwork(features, len(SITES), RouterConfig()))
    return folder

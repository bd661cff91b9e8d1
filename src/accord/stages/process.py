"""Give a process what a recipe says of it, before anything is loaded there."""

from __future__ import annotations

import os

import torch

from accord.models.features import remember
from accord.models.pixels import limit_pixels
from accord.recipe import Recipe


def prepare(recipe: Recipe) -> None:
    """Set this process's threads, its memory for features, the size of images, and whether it computes alike each time.

    Every process that opens a model of a recipe calls it: a run's own, those that train sites apart, a site's service.

    Warns:
        DataWarning: as `accord.models.features.remember`.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    remember(recipe.features)
    limit_pixels(recipe.max_pixels)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)

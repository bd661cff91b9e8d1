"""Every family that is built here, and the table that the tests make of them."""

import importlib.util

import pytest

from families.checkpoints import FAMILIES, build

WITHOUT_TORCHVISION = {"llava_next", "idefics3", "gemma3", "paligemma", "mllama"}
"""Families whose processors work with Pillow alone."""

SEES_TORCHVISION = importlib.util.find_spec("torchvision") is not None


@pytest.fixture(params=[pytest.param(name, id=name) for name in FAMILIES])
def family(request):
    """Each family that this environment can build, in turn."""
    if not SEES_TORCHVISION and request.param not in WITHOUT_TORCHVISION:
        pytest.skip("its processor needs torchvision; make test-families has it")
    return request.param


@pytest.fixture(scope="session")
def built(made_once):
    """Return a function that gives the folder of a family's checkpoint."""
    return lambda name: str(made_once(f"family-{name}", lambda folder: build(name, folder)))


@pytest.fixture(scope="session")
def cells():
    """What was found of each family, by column."""
    return {}

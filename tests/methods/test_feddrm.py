import pytest
import torch
from pytest import approx

from accord.data.images import load_image
from accord.methods import feddrm
from accord.methods.mor import routed
from accord.recipe import Policy
from accord.rewards.model import RewardModel
from accord.routing.router import RouterConfig, RouterNetwork, save_router
from accord.types import vqa_prompt


@pytest.fixture
def unequal(job, ask, llava):
    """A run whose router sees the same in every prompt, and has learnt from 30 pairs of a and 10 of b.

    At the optimum of what both sites train σ(z) is then (.75, .25), whatever the prompt.
    """
    job.recipe = job.recipe.__class__(job.recipe.name, job.recipe.sites, policy=Policy(llava))
    job.questions = {"public": [ask(1)], "dev": [ask(0)]}
    for name in "ab":
        with job.doing(f"site {name}"):
            RewardModel.from_checkpoint(llava).save(job.path / "sites" / name / "reward")
    with job.doing("router"):
        network = RouterNetwork(job.encoder.features, 2, RouterConfig(layers=1, width=8))
        with torch.no_grad():
            network.head.weight.zero_()
            network.head.bias.copy_(torch.tensor([0.75, 0.25]).logit())
        network.examples = (30, 10)
        save_router(job.path / "router", network)
    return job


def test_a_site_is_not_chosen_for_its_size(unequal, square):
    """σ(z) = p = (.75, .25): the ratio is 1 for both, where the posterior is softmax(±1.0986) = (.9, .1)."""
    asked = [vqa_prompt("what?")], [load_image(square("red"))], [["x"]]
    assert routed(unequal).router(*asked)[0].tolist() == approx([0.9, 0.1], abs=1e-4)
    assert feddrm.routed_ratio(unequal).router(*asked)[0].tolist() == approx([0.5, 0.5], abs=1e-4)
    again = feddrm.opened(unequal.path, unequal.recipe, unequal.encoder)
    assert again(*asked)[0].tolist() == approx([0.5, 0.5], abs=1e-4)

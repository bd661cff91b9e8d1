import shutil
from dataclasses import replace

import pytest
import torch
from pytest import approx

from accord.data.images import load_image
from accord.errors import RecipeError
from accord.federation.engine import InProcessEngine
from accord.methods import check_methods
from accord.methods.means import class_means, means, means_abstain, routed_abstain
from accord.recipe import Policy
from accord.rewards.model import RewardModel
from accord.rewards.private import Privacy
from accord.routing.router import RouterConfig, RouterNetwork, save_router
from accord.stages.sites import prompt_sums
from accord.types import vqa_prompt

PROMPT = vqa_prompt("what colour is it?")


@pytest.fixture
def gathered(job, ask, prefer, llava):
    """The job with untrained reward models; a's pairs are about a red or a blue square, b's a green or a yellow one."""
    job.recipe = replace(job.recipe, policy=Policy(llava), scores=None)
    job.questions = {"public": [ask(1)], "dev": [ask(0)]}
    for name in "ab":
        with job.doing(f"site {name}"):
            RewardModel.from_checkpoint(llava).save(job.path / "sites" / name / "reward")
    job.pairs = {
        "a": [prefer(n, colour, "yellow") for n, colour in enumerate(["red", "blue"] * 3)],
        "b": [prefer(n, colour, "red") for n, colour in enumerate(["green", "yellow"] * 3)],
    }
    return job


def weights_of(reward, square, colours=("red", "green")):
    return reward.router([PROMPT] * len(colours), [load_image(square(c)) for c in colours], [["x", "y"]] * len(colours))


def test_one_round_gathers_the_means_and_every_method_pays_for_it(gathered):
    first = class_means(gathered)
    sent = {key: vars(count).copy() for key, count in gathered.traffic.counts.items()}
    gathered.traffic.counts.clear()
    again = class_means(gathered)
    assert first.count.tolist() == again.count.tolist() == [6, 6] and torch.equal(first.total, again.total)
    assert sent == {key: vars(count) for key, count in gathered.traffic.counts.items()}
    assert {site: sent[site, "means"]["messages"] for site in "ab"} == {"a": 1, "b": 1}


def test_means_choose_one_site_for_all_completions_of_a_prompt(gathered, square):
    """By the posterior of the states before the answer."""
    reward = means(gathered)
    weights = weights_of(reward, square)
    states = gathered.encoder.before_answers([PROMPT] * 2, [load_image(square(c)) for c in ("red", "green")])
    assert reward.mode == "top1" and torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[::2], class_means(gathered).posterior(states).float())
    assert weights[::2].argmax(dim=-1).tolist() == [0, 1]


@pytest.mark.parametrize("make", [means_abstain, routed_abstain])
@pytest.mark.parametrize(("quantile", "asked"), [(-1e9, 1.0), (1e9, 0.0)])
def test_abstention(gathered, square, make, quantile, asked):
    """Rows sum to 1 where a site's quantile is below the prompt's density, and to 0 where none is."""
    with gathered.doing("router"):
        size = gathered.encoder.features
        save_router(gathered.path / "router", RouterNetwork(size, 2, RouterConfig(layers=1, width=8)))
    reward = make(gathered)
    reward.router.means = replace(reward.router.means, quantile=torch.full((2,), quantile, dtype=torch.float64))
    weights = weights_of(reward, square)
    assert weights.shape == (4, 2) and weights.sum(dim=-1).tolist() == approx([asked] * 4)


@pytest.mark.parametrize("name", ["means", "means-abstain", "routed-abstain"])
def test_other_organisations_sites_agree_to_it_or_are_refused_at_once(gathered, name):
    first, second = gathered.recipe.sites
    agreeing = replace(first, sums=True)
    with pytest.raises(RecipeError, match=f"'{name}' needs sums of .* prompts, and none go from b to another"):
        check_methods(replace(gathered.recipe, sites=(agreeing, second)), [name], elsewhere=True)
    check_methods(replace(gathered.recipe, sites=(agreeing, replace(second, sums=True))), [name], elsewhere=True)


def test_other_organisations_sites_send_what_is_gathered_here(gathered):
    engine = InProcessEngine({name: prompt_sums(gathered, name) for name in "ab"})
    here = class_means(gathered)
    shutil.rmtree(gathered.path / "kept")
    gathered.engine = engine
    there = class_means(gathered)
    assert all(torch.equal(one, other) for one, other in zip(vars(here).values(), vars(there).values(), strict=True))


def test_sums_of_a_private_site_have_no_noise(gathered):
    with pytest.raises(RecipeError, match="has privacy, and sums carry no noise; take sums = true out"):
        replace(gathered.recipe.sites[0], privacy=Privacy(), finetune=None, sums=True)

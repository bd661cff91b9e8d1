from dataclasses import replace

import torch
from pytest import approx
from torch import tensor

from accord.methods.sketches import SKETCH, Combined, Only, distances
from accord.recipe import Policy
from accord.rewards.model import RewardModel
from accord.routing.sketches import SketchConfig
from accord.types import vqa_prompt


def route(prompts, images, completions):
    """Weights of three sites for two completions."""
    return tensor([[0.6, 0.3, 0.1], [0.0, 0.0, 1.0]])


def test_a_judge_has_the_weights_of_its_sites():
    """Judges of sites (0, 2) and (1): .7 and .3; where a site has no judge and all the weight, all judges alike."""
    asked = [], [], []
    assert Combined(route, [[0, 2], [1]])(*asked).flatten().tolist() == approx([0.7, 0.3, 1, 0])
    assert Combined(route, [[0], [1]])(*asked).flatten().tolist() == approx([2 / 3, 1 / 3, 0.5, 0.5])


def test_who_is_set_aside_is_not_asked():
    found = Only(route, tensor([True, True, False]))([], [], [])
    assert found.flatten().tolist() == approx([2 / 3, 1 / 3, 0, 0.5, 0.5, 0])


def test_one_sketch_serves_a_run_and_every_method_pays_for_it(job, ask, prefer, llava):
    """Asked again the distances are the same, and so are the bytes, though the noise would be other."""
    config = SketchConfig(dimensions=2, components=2)
    job.recipe = replace(job.recipe, policy=Policy(llava), tables={SKETCH.name: config})
    job.questions = {"public": [ask(n, colour) for n, colour in enumerate(("red", "blue", "green"))], "dev": [ask(0)]}
    for name in "ab":
        with job.doing(f"site {name}"):
            RewardModel.from_checkpoint(llava).save(job.path / "sites" / name / "reward")
    job.pairs = {
        name: [prefer(n, "red", "blue", prompt=vqa_prompt(f"colour {n}?")) for n in range(200)] for name in "ab"
    }
    first = distances(job)
    sent = {key: vars(count).copy() for key, count in job.traffic.counts.items()}
    job.traffic.counts.clear()
    again = distances(job)
    assert torch.equal(first.between, again.between) and first.between.isfinite().all()
    assert sent == {key: vars(count) for key, count in job.traffic.counts.items()}
    assert {site: sent[site, "means"]["messages"] for site in "ab"} == {"a": 1, "b": 1}

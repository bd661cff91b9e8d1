from dataclasses import replace

import pytest
import torch

from accord.alignment.grpo import AlignmentConfig
from accord.data.images import image_bytes, load_image
from accord.federation.messages import ScoreItem, ScoreReply, ScoreRequest, image_name, to_turns
from accord.federation.site import ScoreRange
from accord.pipeline import alignment
from accord.pipeline.methods import METHODS, routed, routed_unclipped
from accord.recipe import Policy
from accord.rewards.model import RewardModel, Standardisation
from accord.routing.router import RouterConfig, RouterNetwork, save_router
from accord.types import vqa_prompt

KL = {"routed": 0.02, "routed-kl-0": 0.0, "routed-kl-0.005": 0.005, "routed-kl-0.08": 0.08}
COLOURS = ["red", "blue", "green", "yellow"]


@pytest.fixture
def trained(job, ask, llava):
    """The job with both sites' untrained reward models and a router; scores are cut to [0, 2].

    By their sites' statistics (μ the first two's mean, σ a sixth of their distance) raw scores r₀ < r₁ become ∓3.
    """
    request = _request(ask(0))
    job.recipe = replace(job.recipe, policy=Policy(llava), scores=ScoreRange(0.0, 2.0))
    job.questions = {"public": [ask(1)], "dev": [ask(0)]}
    raw = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = RewardModel.from_checkpoint(llava)
        (scores,) = model.score([vqa_prompt("what colour is it?")], [load_image(ask(0).image)], [COLOURS])
        raw[name] = scores
        low, high = sorted(scores[:2].tolist())
        model.standardisation = Standardisation((low + high) / 2, (high - low) / 6)
        with job.doing(f"site {name}"):
            model.save(job.path / "sites" / name / "reward")
    with job.doing("router"):
        size = job.encoder.model.config.get_text_config().hidden_size
        save_router(job.path / "router", RouterNetwork(size, 2, RouterConfig(layers=1, width=8)))
    return request, raw


def _request(question):
    data = image_bytes(question.image)
    item = ScoreItem(image_name(data), to_turns(vqa_prompt("what colour is it?")), COLOURS)
    return ScoreRequest("r", {image_name(data): data}, [item])


def sent(reward, request):
    replies = reward.engine.ask({name: request for name in "ab"}, deadline=None)
    assert all(isinstance(reply, ScoreReply) for reply in replies.values())
    return {name: torch.tensor(reply.scores[0]) for name, reply in replies.items()}


def test_what_the_sites_send(job, trained):
    """The first two raw scores become -3 and 3 in order, clipped 0 and 2; raw they are what the head puts out."""
    request, raw = trained
    clipped, plain = sent(routed(job), request), sent(routed_unclipped(job), request)
    bare = sent(routed_unclipped(job, standardised=False), request)
    for name in "ab":
        sign = 1 if raw[name][0] > raw[name][1] else -1
        assert clipped[name][:2].tolist() == ([2, 0] if sign > 0 else [0, 2])
        assert torch.allclose(plain[name][:2], torch.tensor([3.0, -3.0]) * sign, atol=1e-2)
        assert torch.allclose(bare[name], raw[name], rtol=1e-5, atol=0)


def test_without_clipping_no_score_is_the_lowest(job, trained):
    """A completion that was cut off gets the low end of the range, or what its site says."""
    assert routed(job).unfinished == 0
    assert routed_unclipped(job).unfinished is None
    assert routed_unclipped(job, standardised=False).unfinished is None


@pytest.mark.parametrize("name", KL)
def test_the_weight_of_the_kl_term(job, trained, monkeypatch, name):
    """By the method's name, all else as in the recipe."""
    seen = []

    def align(model, processor, prompts, reward, config, **_):
        seen.append(config)
        return model

    monkeypatch.setattr(alignment, "align", align)
    job.recipe = replace(job.recipe, alignment=replace(job.recipe.alignment, steps=7))
    METHODS[name](job, f"compare {name}")
    assert seen == [AlignmentConfig(steps=7, kl=KL[name])]

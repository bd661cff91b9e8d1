from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from accord.alignment.grpo import AlignmentConfig
from accord.data.images import image_bytes, load_image
from accord.federation.messages import ScoreItem, ScoreRange, ScoreReply, ScoreRequest, image_name, to_turns
from accord.methods import METHODS, mor
from accord.methods.mor import learnt_reward, opened_online, routed, routed_unclipped
from accord.recipe import EncoderConfig, Policy
from accord.rewards.model import RewardModel, Standardisation
from accord.routing.router import RouterConfig, RouterNetwork, save_router
from accord.runs import write_atomic
from accord.stages import alignment
from accord.stages.alignment import memory_file
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
    item = ScoreItem([image_name(data)], to_turns(vqa_prompt("what colour is it?")), COLOURS)
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
    assert routed(job).scores == ScoreRange(0.0, 2.0)
    assert routed_unclipped(job).scores is None
    assert routed_unclipped(job, standardised=False).scores is None


@pytest.mark.parametrize("name", KL)
def test_the_weight_of_the_kl_term(job, trained, monkeypatch, name):
    """By the method's name, all else as in the recipe."""
    seen = []

    def align(model, processor, prompts, reward, config, **_):
        seen.append(config)
        return model

    monkeypatch.setattr(alignment, "align", align)
    job.recipe = replace(job.recipe, alignment=replace(job.recipe.alignment, steps=7))
    METHODS[name].align(job, f"compare {name}")
    assert seen == [AlignmentConfig(steps=7, kl=KL[name])]


def test_anchors_are_in_the_policys_tokens_whatever_the_encoder(job, ask, checkpoints, monkeypatch):
    """The signal compares the policy with itself; the encoder, of another family, has another tokeniser."""
    policy, other = checkpoints["llava-clip-llama"], checkpoints["idefics3"]
    job.recipe = replace(job.recipe, policy=Policy(policy), encoder=EncoderConfig(other))
    job.questions = {"base": [ask(n, colour, split="base") for n, colour in enumerate(COLOURS)]}
    seen = []
    monkeypatch.setattr(mor, "AnchorChange", lambda processor, pairs: seen.append((processor, len(pairs))))
    mor.anchor_change(job)
    assert seen == [(job.policy[1], 4)] and job.policy[1] is not job.encoder.processor


@pytest.mark.parametrize("kind", ["whole", "none"])
def test_the_reward_of_an_online_router_is_as_it_became(job, trained, kind):
    """Its head in the end; where no alignment has ended, as it began."""
    before = learnt_reward(job).router.state_dict()
    learnt = {f"router.{name}": tensor + 1 for name, tensor in before.items() if tensor.is_floating_point()}
    state = {**{f"router.{name}": tensor for name, tensor in before.items()}, **learnt}
    if kind == "whole":
        write_atomic(memory_file(job.path, "align"), save(state))
    after = learnt_reward(job).router.state_dict()
    opened = opened_online(job.path, job.recipe, job.encoder).state_dict()
    for name, tensor in after.items():
        expected = state[f"router.{name}"] if kind == "whole" else before[name]
        assert torch.equal(tensor, expected) and torch.equal(opened[name], expected)

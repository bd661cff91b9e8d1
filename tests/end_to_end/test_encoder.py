"""`[encoder] checkpoint`: routers and gates read another model than the policy, which is not loaded for them."""

import pytest
import torch

from accord.data.images import load_image
from accord.evaluation.summary import read_summary
from accord.methods.gates import ANCHOR_QUESTIONS, public_anchors
from accord.pipeline import execute, open_reward
from accord.plan import describe
from accord.routing.router import load_router
from accord.stages import job as job_module
from accord.stages import routing
from accord.stages.routing import train_router, trained_router
from accord.types import vqa_prompt

pytestmark = pytest.mark.filterwarnings("default::UserWarning")

POLICY = "accord/llava-clip-llama"


@pytest.fixture
def other(checkpoints):
    """A model of another family, whose hidden states are 32 wide; the policy's are 64."""
    return checkpoints["idefics3"]


@pytest.fixture
def loaded(monkeypatch):
    """What a job has loaded as its policy or encoder, in order."""
    seen, load = [], job_module.load_model

    def spy(checkpoint, **settings):
        seen.append(checkpoint)
        return load(checkpoint, **settings)

    monkeypatch.setattr(job_module, "load_model", spy)
    return seen


@pytest.fixture
def run(trained, tiny_recipe, other, tmp_path):
    """A run of trained sites whose pairs are made without the policy, and that has no router yet."""
    preferences = {**tiny_recipe["preferences"], "policy_samples": 0}
    return trained(tmp_path / "run", router=False, encoder={"checkpoint": other}, preferences=preferences)


def test_the_router_is_trained_on_it_alone(run, opened, loaded, other, monkeypatch):
    """The policy is wanted only for the answers on which the router is measured, which are left out here."""
    measured = []
    monkeypatch.setattr(routing, "routing_accuracy", lambda job, router: measured.append(router) or 1.0)
    with opened(run) as job:
        train_router(job)
        assert loaded == [other]
        assert trained_router(job).shape == (job.encoder.features, 3) == (32, 3)
        assert measured[0].encoder is job.encoder and type(job.encoder.model).__name__.startswith("Idefics3")
    assert load_router(run / "router").shape == (32, 3)


def test_the_anchors_of_gates_are_read_by_it_alone(run, opened, loaded, other):
    """At most 200 base questions, each pair as the encoder sees it: 32 numbers."""
    with opened(run) as job:
        anchors = public_anchors(job)
        assert loaded == [other]
    count = len(anchors.questions.unique())
    assert 0 < count <= ANCHOR_QUESTIONS
    assert anchors.prompts.shape[-1] == anchors.answers.shape[-1] == 32


def test_a_whole_run_reads_with_one_model_and_aligns_another(run, opened, loaded, other):
    """The policy is let go while it is aligned, for it would be a third copy; the folder opens with both."""
    with opened(run) as job:
        execute(job)
        assert sorted(loaded) == sorted([other, POLICY, POLICY])
        assert job.policy[0] is not job.encoder.model
        assert "frozen encoder" in describe(job.recipe) and other in describe(job.recipe)
    summary = read_summary(run / "summary.json")
    assert summary.policy.checkpoint == POLICY and summary.router is not None
    assert summary.policy.architecture == "LlavaForConditionalGeneration"
    reward = open_reward(run)
    assert reward.router.encoder.features == 32
    weights = reward.router([vqa_prompt("is it red?")], [load_image(job.evaluated[0].image)], [["yes", "no"]])
    assert torch.allclose(weights.sum(dim=-1), torch.ones(2))

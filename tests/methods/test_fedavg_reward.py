from dataclasses import replace

import pytest
import torch
from pytest import approx
from safetensors.torch import load

from accord.data.images import load_image
from accord.errors import DataError, DataWarning, RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.local import Averaging
from accord.federation.messages import UpdateRequest
from accord.federation.site import Site
from accord.federation.weights import set_trainable_weights, to_bytes, trainable_weights
from accord.methods.fedavg_reward import (
    LocalReward,
    SharedRewardConfig,
    local_updates,
    standardise,
    train_shared_reward,
)
from accord.methods.fedit import LocalSupervised, fedavg
from accord.models.inputs import build_batch
from accord.models.load import LoraSettings
from accord.rewards.model import RewardModel, Standardisation
from accord.rewards.train import bradley_terry, rank
from accord.types import vqa_prompt

SMALL = SharedRewardConfig(
    finetune=None, averaging=Averaging(rounds=1, local_steps=2, batch_size=1, learning_rate=1e-2)
)
LORA = LoraSettings(rank=2, alpha=4)


@pytest.fixture
def fresh(llava):
    """Return a function that makes the same untrained reward model."""

    def make(lora=None):
        torch.manual_seed(0)
        return RewardModel.from_checkpoint(llava, lora=lora)

    return make


def federation(model, data, config=SMALL):
    return InProcessEngine(
        {
            name: Site(name, model, updates={"reward": LocalReward(model, pairs, config)}).answer
            for name, pairs in data.items()
        }
    )


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_round_with_one_site_is_plain_local_training(fresh, prefer, arrived, lora):
    """Two AdamW steps on the one pair there is, bit by bit: every batch is that pair."""
    shared = fresh(lora)
    train_shared_reward(federation(shared, {"a": [prefer(0)]}), shared, SMALL, seed=0)
    alone, pair = fresh(lora), prefer(0)
    adamw = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        batch = build_batch(alone.processor, [pair.prompt], [load_image(pair.images[0])], [["red", "blue"]])
        adamw.zero_grad()
        bradley_terry(alone(batch), [2], SMALL.centring)[0].backward()
        adamw.step()
    start, end = trainable_weights(fresh(lora)), trainable_weights(alone)
    assert same(trainable_weights(shared), arrived(start, end)) and not same(start, end)
    for name, weight in trainable_weights(shared).items():  # a rounding of Δ, and one of the sum
        torch.testing.assert_close(weight, end[name], rtol=2**-22, atol=2**-23 * (end[name] - start[name]).abs().max())


def test_two_sites_are_averaged_by_their_pairs(fresh, prefer):
    """Site a has 1 pair, b has 3: (w_a + 3 w_b) / 4, whatever is in the batches."""
    data = {"a": [prefer(0)], "b": [prefer(n, "blue", "red") for n in (1, 2, 3)]}
    shared = fresh()
    engine = federation(shared, data)
    start = to_bytes(trainable_weights(shared))
    asked = []
    ask = engine.ask
    engine.ask = lambda requests, **more: (asked.append(requests), ask(requests, **more))[1]
    train_shared_reward(engine, shared, SMALL, seed=0)
    averaged = trainable_weights(shared)
    ends, changes = [], []
    for name, pairs in data.items():
        request = asked[0][name]
        assert request.weights == start
        alone = fresh()
        changes.append(load(LocalReward(alone, pairs, SMALL)(request).change))
        ends.append(trainable_weights(alone))
    before = load(start)
    for name, weight in averaged.items():
        torch.testing.assert_close(weight, (ends[0][name] + 3 * ends[1][name]) / 4, atol=1e-6, rtol=1e-5)
        summed = changes[0][name].double() / 4 + changes[1][name].double() * 3 / 4
        assert torch.equal(weight, (before[name].double() + summed).float())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_what_travels_is_what_is_trained(fresh, prefer, lora):
    """Everything, or the adapter and the head; both ways, an envelope aside."""
    shared = fresh(lora)
    engine = federation(shared, {"a": [prefer(0)]})
    train_shared_reward(engine, shared, SMALL, seed=0)
    weights = trainable_weights(shared)
    if lora:
        assert {name.split(".")[0] for name in weights} == {"backbone", "head"}
        assert all("lora_" in name or name.startswith("head.") for name in weights)
    else:
        assert weights.keys() == dict(shared.named_parameters()).keys()
    count = engine.traffic.counts["a", "reward"]
    assert 0 < count.bytes_to_site - len(to_bytes(weights)) < 150
    assert 0 < count.bytes_from_site - len(to_bytes(weights)) < 150


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_backbone_is_tuned_on_answers_before_the_head(fresh, prefer, ask, arrived, lora):
    """Two rounds of the backbone, then one of everything, each where the one before ended; rounds count on to 3."""
    first = Averaging(rounds=2, local_steps=1, batch_size=1, learning_rate=1e-2)
    config = replace(SMALL, finetune=first)
    shared, alone, told = fresh(lora), fresh(lora), []
    engine = InProcessEngine(
        {"a": Site("a", shared, updates=local_updates(shared, [ask(5)], [prefer(0)], config)).answer}
    )
    train_shared_reward(engine, shared, config, seed=0, on_round=lambda number, loss: told.append(number))
    tune = LocalSupervised(alone.backbone, alone.processor, [ask(5)], first, fedavg())
    local = LocalReward(alone, [prefer(0)], SMALL)
    for number, task, part, update in (
        (0, "supervised", alone.backbone, tune),
        (1, "supervised", alone.backbone, tune),
        (2, "reward", alone, local),
    ):
        start = trainable_weights(part)
        update(UpdateRequest("x", task, number, to_bytes(start), 0))
        set_trainable_weights(part, arrived(start, trainable_weights(part)))
    assert same(trainable_weights(shared), trainable_weights(alone)) and told == [1, 2, 3]
    messages = {kind: count.messages for (_, kind), count in engine.traffic.counts.items()}
    assert messages == {"supervised": 2, "reward": 1}


def test_a_site_without_questions_tunes_no_backbone(fresh, prefer):
    assert list(local_updates(fresh(), [], [prefer(0)], SharedRewardConfig())) == ["reward"]


def test_a_sites_pairs_count_up_to_the_limit(fresh, prefer):
    """1 and 3 pairs count alike at a limit of 1: (w_a + w_b) / 2."""
    config = replace(SMALL, averaging=replace(SMALL.averaging, examples_at_most=1))
    data = {"a": [prefer(0)], "b": [prefer(1, "blue", "red"), prefer(1, "blue", "green"), prefer(1, "blue", "yes")]}
    shared = fresh()
    train_shared_reward(federation(shared, data, config), shared, config, seed=0)
    ends = []
    for name, pairs in data.items():
        alone = fresh()
        train_shared_reward(federation(alone, {name: pairs}, config), alone, config, seed=0)
        ends.append(trainable_weights(alone))
    for name, weight in trainable_weights(shared).items():
        torch.testing.assert_close(weight, (ends[0][name] + ends[1][name]) / 2, atol=1e-6, rtol=1e-5)


def test_an_absent_site_is_left_out(fresh, prefer):
    """Site b was not started with `updates`, and refuses."""
    shared, alone = fresh(), fresh()
    engine = InProcessEngine(
        {
            "a": Site("a", shared, updates={"reward": LocalReward(shared, [prefer(0)], SMALL)}).answer,
            "b": Site("b", shared).answer,
        }
    )
    with pytest.warns(DataWarning, match=r"site b gave no answer \(invalid\)"):
        train_shared_reward(engine, shared, SMALL, seed=0)
    train_shared_reward(federation(alone, {"a": [prefer(0)]}), alone, SMALL, seed=0)
    assert same(trainable_weights(shared), trainable_weights(alone))


def test_what_two_sites_know_is_learnt_by_both(fresh, prefer, ask):
    """Site a has red squares, b blue ones: the shared model ranks the right colour first for both."""
    config = SharedRewardConfig(
        finetune=None, averaging=Averaging(rounds=15, local_steps=2, batch_size=2, learning_rate=5e-3)
    )
    shared = fresh()
    data = {"a": [prefer(0, "red", "blue")], "b": [prefer(1, "blue", "red")]}
    losses = []
    trained = train_shared_reward(
        federation(shared, data, config), shared, config, seed=0, on_round=lambda n, loss: losses.append((n, loss))
    )
    assert trained is shared and not trained.training
    assert rank(shared, [ask(8, "red"), ask(9, "blue")], ["red", "blue"]).macro == 1.0
    assert [n for n, _ in losses] == list(range(1, 16)) and losses[-1][1] < losses[0][1]


def test_the_same_seed_gives_the_same_weights(fresh, prefer):
    """With symmetries, drawn rejected answers and two batches to a step, so that every random draw takes part."""
    averaging = Averaging(local_steps=2, batch_size=2, symmetries=True, gradient_accumulation=2)
    config = replace(SMALL, averaging=averaging, rejected_per_prompt=1)
    pairs = [prefer(0), prefer(0, rejected="green"), prefer(1, "blue", "red", question_type="other")]
    weights = []
    for seed in (0, 0, 1):
        model = fresh()
        torch.manual_seed(len(weights))
        request = UpdateRequest("x", "reward", 0, to_bytes(trainable_weights(model)), seed)
        reply = LocalReward(model, pairs, config)(request)
        weights.append(load(reply.change))
        assert (reply.examples, reply.steps) == (3, 2)
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


class Scores:
    """A reward model whose scores are written down."""

    def __init__(self, scores):
        self.scores = scores
        self.standardisation = Standardisation(9.0, 9.0)

    def score(self, prompts, images, completions):
        return [torch.tensor([self.scores[text] for text in texts]) for texts in completions]


def test_standardisation_is_over_the_given_answers(ask):
    """Scores 1, 3 | 5: mean 3, deviation √((4 + 0 + 4) / 2) = 2."""
    model = Scores({"red": 1.0, "blue": 3.0, "green": 5.0})
    standardise(model, [ask(0), ask(1)], [["red", "blue"], ["green"]])
    assert model.standardisation == Standardisation(3.0, 2.0)


def test_standardised_scores_have_mean_0_and_deviation_1(fresh, ask):
    """Over the very answers that were given; a standardisation from before does not enter."""
    model, questions, answers = fresh(), [ask(0), ask(1, "blue")], [["red", "blue"], ["yes", "no", "red"]]
    model.standardisation = Standardisation(50.0, 7.0)
    standardise(model, questions, answers)
    images = [load_image(q.image) for q in questions]
    prompts = [vqa_prompt(q.text) for q in questions]
    scores = torch.cat(model.score(prompts, images, answers))
    assert (scores.mean().item(), scores.std().item()) == (approx(0, abs=1e-4), approx(1, abs=1e-4))


@pytest.mark.parametrize("scores", [{"red": 1.0, "blue": 1.0}, {"red": float("nan"), "blue": 0.0}])
def test_scores_that_cannot_be_standardised_are_told(ask, scores):
    with pytest.raises(RecipeError, match="cannot be standardised; lower"):
        standardise(Scores(scores), [ask(0)], [["red", "blue"]])


def test_no_pairs(fresh):
    with pytest.raises(DataError, match="on 0 preference pairs"):
        LocalReward(fresh(), [], SMALL)


def test_nothing_to_compare_is_refused():
    with pytest.raises(RecipeError, match="rejected_per_prompt must be at least 1"):
        SharedRewardConfig(rejected_per_prompt=0)

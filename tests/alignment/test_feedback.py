import itertools
import math

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from pytest import approx
from safetensors.torch import load, save
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from accord.alignment.feedback import (
    AnchorChange,
    LossSign,
    OnlineUpdate,
    QuantileLoss,
    RandomBit,
    log_likelihood,
)
from accord.alignment.grpo import AlignmentConfig, align
from accord.alignment.reward import FederatedReward
from accord.data.images import load_image
from accord.errors import DataError, RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreReply
from accord.models.encoder import Encoder
from accord.models.inputs import build_batch, model_inputs
from accord.models.load import load_model
from accord.routing.online import OnlineRouter
from accord.routing.router import RouterConfig, RouterNetwork
from accord.types import vqa_prompt

nan = math.nan


def told(signal, losses):
    return [signal({"loss": loss}, step, None) for step, loss in enumerate(losses, start=1)]


def resumed(signal, fresh):
    """Another signal with what the first one knows, as a checkpoint keeps it."""
    fresh.load_state_dict(load(save(signal.state_dict())))
    return fresh


# ----------------------------------------------------------------------------------------------------------------------
# Signals that read the loss, or nothing.

LOSSES = [1.0, 1.0, 0.5, 2.0, nan, 3.0, 3.0, 2.5]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("loss", [None, 1, 1, 0, None, None, 1, 1]), ("-loss", [None, 1, 0, 1, None, None, 1, 0])],
)
def test_the_two_readings_of_the_sign(objective, expected):
    """J: -, stays, falls, rises, unknown, after unknown, stays, falls; with −loss, fall and rise change places."""
    assert told(LossSign(objective), LOSSES) == expected
    for cut in range(len(LOSSES)):
        early = LossSign(objective)
        assert told(early, LOSSES[:cut]) + told(resumed(early, LossSign(objective)), LOSSES[cut:]) == expected


def test_the_quantile_of_the_loss():
    """Above 1: {3}, 1 of 1. Above 2: {3} of {3, 1}, ½. Above 2: none of {1, 2}, one equal: ¼. NaN is passed over.

    Above 0: both of {2, 2}. Above 9: none of {2, 0}.
    """
    losses, expected = [3.0, 1.0, 2.0, 2.0, nan, 0.0, 9.0], [None, 1.0, 0.5, 0.25, None, 1.0, 0.0]
    assert told(QuantileLoss(window=2), losses) == expected
    for cut in range(len(losses)):
        early = QuantileLoss(window=2)
        again = told(early, losses[:cut]) + told(resumed(early, QuantileLoss(window=2)), losses[cut:])
        assert again == expected
    with pytest.raises(RecipeError, match="window must be at least 1, got 0"):
        QuantileLoss(0)


def test_the_coin():
    """1000 tosses: 500 ± 4 · 15.8, none after the first step; by its own generator; a resumed coin goes on."""
    torch.manual_seed(1)
    coin, twin, other = RandomBit(0), RandomBit(0), RandomBit(1)
    first, *tosses = told(coin, [0.0] * 1001)
    assert first is None
    assert set(tosses) == {0.0, 1.0} and sum(tosses) == approx(500, abs=63)
    torch.manual_seed(2)
    assert told(twin, [1.0] * 501)[1:] == tosses[:500] != told(other, [1.0] * 501)[1:]
    assert told(resumed(twin, RandomBit(7)), [1.0] * 501)[1:] == tosses[500:]


# ----------------------------------------------------------------------------------------------------------------------
# Anchors.


def test_a_likelihood_is_that_of_transformers(vlm, square):
    """Of each answer alone, from the model's own loss: the mean over its tokens, times their number, negative."""
    model, processor = vlm
    model.eval()
    prompts, image = [vqa_prompt("what colour is it?"), vqa_prompt("is it red?")], load_image(square("red"))
    answers = [["red", "no yellow blue at all"], ["yes"]]
    expected = []
    with torch.no_grad():
        found = log_likelihood(model, build_batch(processor, prompts, [image] * 2, answers))
        for prompt, answer in ((prompts[0], "red"), (prompts[0], answers[0][1]), (prompts[1], "yes")):
            alone = build_batch(processor, [prompt], [image], [[answer]])
            loss = model(**model_inputs(model, alone), labels=alone.labels).loss.item()
            expected.append(-loss * (alone.labels != -100).sum().item())
    assert found.tolist() == approx(expected, rel=1e-4) and len(set(expected)) == 3


@pytest.fixture
def anchors(prefer, square):
    """Two pairs about two squares, and the opposite of the first: a policy is right about one of those two."""
    red = (square("red"),)
    return [prefer(0, images=red), prefer(1, "green", "one"), prefer(2, "blue", "red", images=red)]


def test_accuracy_on_anchors(llava, anchors):
    """Of a pair and its opposite exactly one is right; taught the chosen answers, the policy gets both others right."""
    model, processor = load_model(llava, trainable=True)
    signal = AnchorChange(processor, anchors, pairs_at_once=2)
    assert signal.measure(model.train()) in (1 / 3, 2 / 3) and model.training
    assert AnchorChange(processor, [anchors[0], anchors[2]]).measure(model.eval()) == 0.5 and not model.training
    signal = AnchorChange(processor, anchors[:2], every=1)
    batch = signal.batches[0]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    signal.accuracy = 0.4  # as if it had been so before
    for sign, r in ((1, 1.0), (1, 0.5), (-1, 0.0)):
        for _ in range(15):
            optimiser.zero_grad()
            chosen, rejected = log_likelihood(model, batch).view(2, 2).T
            (sign * (rejected - chosen)).sum().backward()
            optimiser.step()
        assert signal({"loss": 0.0}, 1, model) == r
    assert signal.accuracy == 0.0


def test_when_anchors_answer(llava, anchors, monkeypatch):
    """Every 2 steps; nothing to compare with at first; then as it was, up, down."""
    _, processor = load_model(llava)
    measured = iter([0.5, 0.5, 0.75, 0.25])
    monkeypatch.setattr(AnchorChange, "measure", lambda self, model: next(measured))
    early, late = (AnchorChange(processor, anchors, every=2) for _ in range(2))
    answers = [early({}, step, None) for step in range(1, 6)]
    answers += [resumed(early, late)({}, step, None) for step in range(6, 7)]
    answers += [late({}, step, None) for step in range(7, 9)]
    assert answers == [None, None, None, 0.5, None, 1.0, None, 0.0]


def test_anchors_that_cannot_be_used(llava, prefer):
    _, processor = load_model(llava)
    with pytest.raises(DataError, match="0 anchors; give AnchorChange public preference pairs"):
        AnchorChange(processor, [])
    with pytest.raises(RecipeError, match="every must be at least 1, got 0"):
        AnchorChange(processor, [prefer(0)], every=0)


# ----------------------------------------------------------------------------------------------------------------------
# The callback: in stock TRL, and in `align`.


class Diary:
    """A router that writes down what it is told."""

    def __init__(self):
        self.told = []

    def learn(self, feedback):
        self.told.append(feedback)

    def state_dict(self):
        return {"told": torch.tensor(self.told)}

    def load_state_dict(self, state):
        self.told = state["told"].tolist()


def judge(sign):
    """A site that likes long answers, or short ones."""
    return lambda request: ScoreReply(request.id, [[sign * len(c) / 9 for c in i.candidates] for i in request.items])


@pytest.fixture
def federation(llava):
    """Return a function that makes a reward of two sites, its online router anew."""

    def make(seed=0):
        torch.manual_seed(0)
        network = RouterNetwork(32, 2, RouterConfig(layers=1, width=8, heads=2))
        router = OnlineRouter(Encoder(*load_model(llava)), network, seed=seed)
        return FederatedReward(InProcessEngine({"long": judge(1.0), "short": judge(-1.0)}), router), router

    return make


@pytest.fixture
def stock(llava, square, tmp_path):
    """Return a function that trains by `GRPOTrainer` as it comes; it returns the trainer."""
    features = Features({"prompt": [{"role": Value("string"), "content": Value("string")}], "image": ImageFeature()})
    rows = [("what colour is it?", "red"), ("what colour is it?", "blue"), ("is it red?", "green")]
    columns = {
        "prompt": [[{"role": "user", "content": text}] for text, _ in rows],
        "image": [{"bytes": square(colour), "path": None} for _, colour in rows],
    }

    def train(reward, callback, **changes):
        settings = {"logging_steps": 1, "max_steps": 4, **changes}
        model, processor = load_model(llava)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=3,
                beta=0.02,
                learning_rate=1e-3,
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
                activation_checkpointing=False,
                bf16=False,
                dataloader_pin_memory=False,
                **settings,
            ),
            train_dataset=Dataset.from_dict(columns, features=features),
            processing_class=processor,
            callbacks=[callback],
        )
        trainer.train()
        return trainer

    return train


def test_what_the_callback_tells_in_stock_trl(federation, stock):
    """After every step but the first 1 or 0, as the logged loss has not risen or has."""
    reward, _ = federation()
    diary = Diary()
    trainer = stock(reward, OnlineUpdate(diary, LossSign()))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert diary.told == [float(now <= before) for before, now in itertools.pairwise(losses)]


def test_the_router_learns_in_stock_trl(federation, stock, anchors, llava):
    """By the anchors: measured after steps 2 and 4, so that the completions of all 4 steps wait for the one answer."""
    reward, router = federation()
    waiting = []

    class Watch(AnchorChange):
        def __call__(self, logs, step, model):
            r = super().__call__(logs, step, model)
            waiting.append((len(router.arms), r))
            return r

    update = OnlineUpdate(router, Watch(load_model(llava)[1], anchors, every=2))
    untouched = router.inverse.clone()
    trainer = stock(reward, update)
    counts = [count for count, _ in waiting]
    assert 0 < counts[0] < counts[1] < counts[2] < counts[3] <= 4 * 8
    assert [r is None for _, r in waiting] == [True, True, True, False]
    assert len(router.arms) == 0
    assert not torch.equal(router.head, router.offline)
    assert all(torch.trace(now) <= torch.trace(before) for now, before in zip(router.inverse, untouched, strict=True))
    assert not torch.equal(router.inverse, untouched)
    assert trainer.model.training


def test_a_trainer_that_does_not_log_every_step(federation, stock):
    reward, router = federation()
    with pytest.raises(RecipeError, match=r"OnlineUpdate needs the loss of every step, got .*logging_steps=10; set"):
        stock(reward, OnlineUpdate(router, LossSign()), logging_steps=10)


class Keep(TrainerCallback):
    """Keep an update's state with every checkpoint, and stop after step `last`."""

    def __init__(self, update, last=math.inf):
        self.update, self.last, self.saved = update, last, {}

    def on_save(self, args, state, control, **_):
        self.saved[state.global_step] = save(self.update.state_dict())
        control.should_training_stop = state.global_step >= self.last


@pytest.mark.parametrize("signal", ["sign", "anchors"])
def test_a_resumed_alignment_learns_the_same(federation, llava, ask, anchors, tmp_path, signal):
    """Four steps at once, against two, stopped, and two from the checkpoint: records and state are bitwise the same."""
    questions = [ask(0, "red"), ask(1, "blue"), ask(2, "green", text="is it red?")]
    settings = AlignmentConfig(
        steps=4,
        prompts_per_step=2,
        group_size=3,
        learning_rate=3e-3,
        max_completion_length=3,
        evaluate_every=0,
        save_every=2,
    )

    def run(folder, last=math.inf, known=None):
        reward, router = federation()
        told = LossSign() if signal == "sign" else AnchorChange(load_model(llava)[1], anchors, every=1)
        update, records = OnlineUpdate(router, told), []
        if known is not None:
            update.load_state_dict(load(known))
        keep = Keep(update, last)
        align(
            *load_model(llava),
            questions,
            reward,
            settings,
            seed=0,
            out=tmp_path / folder,
            log=records.append,
            callbacks=[update, keep],
            resume=known is not None,
        )
        return keep.saved, records, router

    whole, records, router = run("whole")
    early, first, _ = run("parts", last=2)
    late, second, _ = run("parts", known=early[2])
    assert early[2] == whole[2] and late[4] == whole[4]
    assert first + second == records and len(records) == 4
    assert not torch.equal(router.head, router.offline)

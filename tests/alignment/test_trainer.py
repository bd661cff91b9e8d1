"""The shared way against the stock way, on the same rollouts: nothing may be approximated."""

import dataclasses
import math
import random
import threading
import time
from contextlib import nullcontext
from typing import get_args, get_type_hints

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from pytest import approx
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from accord.alignment import trainer as trainer_module
from accord.alignment.grpo import OBJECTIVES, AlignmentConfig, align, grpo_config, is_reference, prompt_dataset
from accord.alignment.reward import FederatedReward
from accord.alignment.trainer import SharedPrefixTrainer
from accord.errors import DataWarning, RunError, warn_once
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ImageBlock, ScoreReply
from accord.models import prefix
from accord.models.encoder import Encoder
from accord.models.load import LoraSettings, load_model, lora_config, tokenizer_of
from accord.models.tower import pin, vision_tower
from accord.routing.router import LearnedRouter, RouterConfig, RouterNetwork

G = 4
SETTINGS = AlignmentConfig(
    steps=2,
    prompts_per_step=3,
    group_size=G,
    learning_rate=3e-3,
    max_completion_length=5,
    evaluate_every=0,
    save_every=0,
)


def letters(prompts, completions, **_):
    """Any reward that differs within a group."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(len(set(text))) + 0.1 * n for n, text in enumerate(texts)]


@pytest.fixture
def make(ask, tmp_path):
    """Return a function that makes a trainer on three questions, two of them with the same words."""
    questions = [ask(0, "red"), ask(1, "blue"), ask(2, "green", text="is it red? or is it some other colour?")]

    def build(model, processor, *, reward=letters, lora=None, data=None, shared=True, **changes):
        config = dataclasses.replace(SETTINGS, **changes)
        torch.manual_seed(0)
        return SharedPrefixTrainer(
            shared_prefix=shared,
            objective=OBJECTIVES.get(config.loss),
            model=model,
            reward_funcs=reward,
            args=grpo_config(config, seed=0, out=tmp_path / "out"),
            train_dataset=data or prompt_dataset(questions, 6, random.Random(0)),
            processing_class=processor,
            peft_config=lora_config(lora) if lora else None,
        )

    return build


def flat(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def rollouts(trainer):
    """One generation batch, as the trainer gets it."""
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_and_gradient(trainer, batch):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


def compare(trainer):
    """Loss and gradient of one batch in both ways."""
    batch = rollouts(trainer)
    assert trainer._shares and "pixel_values" not in batch
    with torch.no_grad():  # away from the reference, so that the KL term has a gradient
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    shared = loss_and_gradient(trainer, batch)
    trainer._shares = False
    return shared, loss_and_gradient(trainer, batch), batch


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skips"])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["whole", "lora"])
def test_loss_and_gradient_are_those_of_full_rows(vlm, make, monkeypatch, lora, skips):
    monkeypatch.setattr(prefix, "_worth_skipping", lambda *_: skips)
    (loss, gradient), (full_loss, full_gradient), batch = compare(make(*vlm, lora=lora))
    assert loss == approx(full_loss, abs=1e-5) and gradient.norm() > 1e-3
    torch.testing.assert_close(gradient, full_gradient, atol=1e-5, rtol=1e-4)
    assert batch["prompt_of"].unique().numel() == 3


@pytest.mark.parametrize("rows", [0, G], ids=["one pass", "three passes"])
@pytest.mark.parametrize("loss", get_args(get_type_hints(AlignmentConfig)["loss"]))
def test_every_loss_is_that_of_full_rows(llava, make, loss, rows):
    """Of TRL's losses that of full rows is TRL's own."""
    trainer = make(*load_model(llava), loss=loss, completions_per_device=rows, iterations=2)
    rollouts(trainer)
    parts = trainer._buffered_inputs
    assert len(parts) == (3 if rows else 1) and all(part["old_per_token_logps"] is not None for part in parts)
    with torch.no_grad():  # away from the policy that drew, and from the reference
        for parameter in trainer.model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    shared = [loss_and_gradient(trainer, part) for part in parts]
    trainer._shares = False
    full = [loss_and_gradient(trainer, part) for part in parts]
    for (mine, gradient), (theirs, full_gradient) in zip(shared, full, strict=True):
        assert mine == approx(theirs, abs=1e-5)
        torch.testing.assert_close(gradient, full_gradient, atol=1e-5, rtol=1e-4)
    assert sum(gradient for _, gradient in shared).norm() > 1e-3


def test_a_prompt_that_is_drawn_twice_has_two_groups(llava, make, ask):
    """Two questions twice each: a pass holds one group, and not half of either of a prompt."""
    trainer = make(
        *load_model(llava),
        data=prompt_dataset([ask(0), ask(1, "blue")], 12, random.Random(0)),
        loss="discriminative",
        prompts_per_step=4,
        completions_per_device=G,
    )
    rollouts(trainer)
    parts = trainer._buffered_inputs
    assert sorted(part["group_of"].tolist() for part in parts) == [[g] * G for g in range(4)]
    assert sorted(set(part["prompt_of"].tolist()).pop() for part in parts) == [0, 0, 1, 1]


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skips"])
def test_prompts_about_one_and_about_several_images(vlm, make, ask, square, monkeypatch, skips):
    """Two images between the words, three before them, one; two prompts differ in the order of their images alone."""
    monkeypatch.setattr(prefix, "_worth_skipping", lambda *_: skips)
    red, blue = square("red"), square("blue", (48, 24))
    between = dataclasses.replace(ask(0, "red", text="is <image> like <image>?"), further=(blue,))
    asked = [
        between,
        dataclasses.replace(between, id="q1", image=blue, further=(red,)),
        dataclasses.replace(ask(2, "blue", text="alike?"), further=(red, blue)),
        ask(3, "green"),
    ]
    data = prompt_dataset(asked, 4, random.Random(0), processor=vlm[1])
    trainer = make(*vlm, data=data, prompts_per_step=4)
    (loss, gradient), (full_loss, full_gradient), batch = compare(trainer)
    assert sorted(trainer._prompts["train"].counts) == [1, 2, 2, 3] and batch["prompt_of"].unique().numel() == 4
    assert loss == approx(full_loss, abs=1e-5) and gradient.norm() > 1e-3
    torch.testing.assert_close(gradient, full_gradient, atol=1e-5, rtol=1e-4)


def test_several_images_reach_the_sites_as_they_are_stored(llava, make, ask, square):
    """Their bytes in order, and their places between the words."""
    red, blue = square("red"), square("blue", (48, 24))
    asked = [dataclasses.replace(ask(n, text=f"is {n} <image> like <image>?"), further=(blue,)) for n in range(3)]
    seen = []

    def site(request):
        seen.extend((request, item) for item in request.items)
        return ScoreReply(request.id, [[float(len(text)) for text in item.candidates] for item in request.items])

    reward = FederatedReward(
        InProcessEngine({"here": site}),
        lambda prompts, images, completions: torch.ones(sum(map(len, completions)), 1),
        sources={q.id: q.images for q in asked},
    )
    rollouts(make(*load_model(llava), reward=reward, data=prompt_dataset(asked, 3, random.Random(0))))
    assert len(seen) == 3
    for request, item in seen:
        assert [request.images[name] for name in item.images] == [red, blue]
        assert [isinstance(block, ImageBlock) for block in item.prompt[0].content] == [False, True, False, True, False]


@pytest.mark.parametrize("skips", [False, True], ids=["dense", "skips"])
def test_gradient_checkpointing(llava, make, monkeypatch, skips):
    monkeypatch.setattr(prefix, "_worth_skipping", lambda *_: skips)
    (loss, gradient), (full_loss, full_gradient), _ = compare(make(*load_model(llava), gradient_checkpointing=True))
    assert loss == approx(full_loss, abs=1e-5)
    torch.testing.assert_close(gradient, full_gradient, atol=1e-5, rtol=1e-4)


def test_micro_batches_hold_whole_groups_and_add_up(llava, make):
    """12 completions in micro-batches of 4: each holds the 4 of one prompt, however TRL shuffled them."""
    trainer = make(*load_model(llava), completions_per_device=G)
    rollouts(trainer)
    parts = [part["prompt_of"].tolist() for part in trainer._buffered_inputs]
    assert sorted(parts) == [[0] * G, [1] * G, [2] * G]
    shared = [loss_and_gradient(trainer, part)[1] for part in trainer._buffered_inputs]
    trainer._shares = False
    full = [loss_and_gradient(trainer, part)[1] for part in trainer._buffered_inputs]
    torch.testing.assert_close(sum(shared), sum(full), atol=1e-5, rtol=1e-4)


def test_the_image_is_encoded_once_a_prompt(llava, make):
    """3 prompts × 4 completions: the vision tower sees 3 images where the stock trainer shows it 12."""
    for shared, images in ((True, {3}), (False, {12})):
        model, processor = load_model(llava)
        seen = []
        model.model.vision_tower.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(len(given[0])))
        trainer = make(model, processor, shared=shared)
        trainer._check = lambda *_: None  # it shows every row its own image
        rollouts(trainer)
        assert set(seen) == images


def test_the_processor_runs_once_a_prompt(llava, make, monkeypatch):
    model, processor = load_model(llava)
    trainer = make(model, processor)
    processed = []
    run = type(processor.image_processor).__call__

    def count(self, images, *args, **kwargs):
        processed.append(len(images))
        return run(self, images, *args, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "__call__", count)
    rollouts(trainer)
    assert processed == [3]


def test_reward_functions_see_the_image_column(llava, make):
    columns = []

    def reward(prompts, completions, image, question_id, **_):
        columns.append([picture.size for picture in image])
        return letters(prompts, completions)

    rollouts(make(*load_model(llava), reward=reward))
    assert columns == [[(32, 32)] * 12]


def test_a_model_that_differs_is_trained_with_full_rows(llava, make, monkeypatch):
    """A layer that mixes in the neighbour on the left, as no decoder does by its mask, breaks in a packed row."""
    model, processor = load_model(llava)

    def mix(module, inputs, output):
        return output + 20 * output.roll(1, dims=1)

    model.model.language_model.embed_tokens.register_forward_hook(mix)
    trainer = make(model, processor)
    batch = rollouts(trainer)  # the reference, which has no such layer, passes
    with pytest.warns(DataWarning, match=r"differ from those of full rows by .* \(allowed 0.0001\), so this model is"):
        loss, _ = loss_and_gradient(trainer, batch)
    assert not trainer._shares and math.isfinite(loss)
    again = rollouts(trainer)  # from now on without sharing
    assert trainer._sampling() is not None and "pixel_values" not in again
    assert math.isfinite(loss_and_gradient(trainer, again)[0])


def test_training_both_ways_ends_alike(llava, make, monkeypatch):
    """Two whole steps on the same scripted rollouts. By SGD: Adam would blow the rounding of a zero gradient up."""

    def script(self, prompt_ids, *_):
        return [[5 + n % 7, 9, 5 + n % 3, 2][: 1 + n % 4] for n in range(len(prompt_ids))], None

    monkeypatch.setattr(SharedPrefixTrainer, "_generate_single_turn", script)
    ended = []
    for shared in (True, False):
        model, processor = load_model(llava)
        before = flat(model)
        trainer = make(model, processor, shared=shared, learning_rate=0.5)
        trainer.args.optim = "sgd"
        trainer.train()
        assert len(trainer._checked) == 2 * shared and trainer._shares == shared
        ended.append(flat(model))
    assert (ended[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(ended[0], ended[1], atol=1e-5, rtol=1e-4)


def test_a_text_only_policy(checkpoints, make, tmp_path):
    """No image anywhere: a plain decoder and its tokenizer go through the same code."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llava-clip-llama"], padding_side="left")
    torch.manual_seed(0)
    shape = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=0, **shape))
    model.save_pretrained(tmp_path / "text")  # TRL loads the reference from where the model came
    model = LlamaForCausalLM.from_pretrained(tmp_path / "text")
    data = Dataset.from_dict({"prompt": ["is it red?", "how many squares?", "what colour is it?"] * 2})
    (loss, gradient), (full_loss, full_gradient), _ = compare(make(model, tokenizer, data=data))
    assert loss == approx(full_loss, abs=1e-5)
    torch.testing.assert_close(gradient, full_gradient, atol=1e-5, rtol=1e-4)


def test_lora_keeps_its_reference(llava, make):
    """Without a step taken the policy is its reference: log-probabilities agree, and so KL is 0."""
    trainer = make(*load_model(llava), lora=LoraSettings(rank=2))
    assert isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    batch = rollouts(trainer)
    with torch.no_grad():
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, batch)
    assert trainer._metrics["train"]["kl"][-1] == approx(0, abs=1e-6)


def test_lora_in_a_pinned_tower_is_trained(llava, make):
    """There is no second model that is the reference: to pin the policy again would freeze the adapter."""
    model, processor = load_model(llava)
    pin(model)
    trainer = make(model, processor, lora=LoraSettings(rank=2, target_modules=r".*\.q_proj"))
    tower = vision_tower(trainer.accelerator.unwrap_model(trainer.model))
    trained = {name.split(".")[-3] for name, p in tower.named_parameters() if p.requires_grad}
    assert trainer.ref_model is None and trained == {"lora_A", "lora_B"}


class Routed:
    """A reward whose router reads every completion with the base policy, beside what it would read by itself."""

    __name__ = "routed"

    def __init__(self, checkpoint):
        self.router = LearnedRouter(Encoder(*load_model(checkpoint)), RouterNetwork(32, 2, RouterConfig(1, 8, 2)))
        self.reward = FederatedReward(
            InProcessEngine({name: lambda request: ScoreReply(request.id, []) for name in "ab"}), self.router
        )
        self.apart = []

    def __call__(self, prompts, completions, **columns):
        groups = self.reward.group(prompts, completions, columns)
        given = [g.prompt for g in groups], [g.images for g in groups], [g.candidates for g in groups]
        encoder, computed = self.router.encoder, []
        real = encoder._compute
        encoder._compute = lambda *asked: computed.append(sum(map(len, asked[2]))) or real(*asked)
        quick = self.router(*given)
        encoder._compute = real
        known, encoder._known = encoder._known, {}
        slow = self.router(*given)
        encoder._known = known
        self.apart.append((sum(computed), len(slow), (quick - slow).abs().max().item()))
        return letters(prompts, completions)


@pytest.mark.parametrize("seeing", [1, 0, 2], ids=["images", "text", "several images"])
def test_the_router_reads_what_the_reference_has_read(llava, texts_only, seeing, tmp_path, ask, square, monkeypatch):
    """Two of three distinct answers end properly, one is cut off; none is read again, and the weights are the same."""
    checkpoint = llava if seeing else texts_only
    reward, tokenizer = Routed(checkpoint), tokenizer_of(load_model(checkpoint)[1])
    answers = [[*tokenizer(word, add_special_tokens=False)["input_ids"], 2] for word in ("red", "blue")] + [[9, 9]]

    def script(self, prompt_ids, *_):
        return [answers[n % 3] for n in range(len(prompt_ids))], None

    monkeypatch.setattr(SharedPrefixTrainer, "_generate_single_turn", script)
    questions = [ask(0, "red"), ask(1, "blue"), ask(2, "green", text="how many squares?")]
    if not seeing:
        texts = ("is it red?", "is it blue?", "how many squares?")
        questions = [dataclasses.replace(q, image=None, text=t) for q, t in zip(questions, texts, strict=True)]
    if seeing == 2:
        questions = [dataclasses.replace(q, further=(square("black"),)) for q in questions]
    encoder = reward.router.encoder
    align(*load_model(checkpoint), questions, reward, SETTINGS, seed=0, out=tmp_path / "out", encoder=encoder)
    assert len(reward.apart) == 2
    for again, all_of_them, apart in reward.apart:
        assert (again, all_of_them) == (0, 9) and apart < 1e-5
    assert reward.router.encoder._known == {}


def by_length(request):
    return ScoreReply(request.id, [[len(c) % 5 / 4 for c in item.candidates] for item in request.items])


class Timed(InProcessEngine):
    """Takes a while, and notes from when to when, in which thread."""

    def __init__(self, seconds=0.0):
        super().__init__({name: by_length for name in "ab"})
        self.seconds, self.spans = seconds, []

    def ask(self, requests, *, deadline=None):
        began = time.monotonic()
        time.sleep(self.seconds)
        replies = super().ask(requests, deadline=deadline)
        self.spans.append((began, time.monotonic(), threading.current_thread() is threading.main_thread()))
        return replies


def halves(prompts, images, completions):
    return torch.full((sum(map(len, completions)), 2), 0.5)


def without_start(reward):
    def plain(*rows, **columns):
        given = reward(*rows, **columns)
        plain.given.append(given)
        return given

    plain.given = []
    return plain


class Meeting(InProcessEngine):
    """Answers only once the reference pass has begun, which for its part waits until the question is under way."""

    def __init__(self):
        super().__init__({name: by_length for name in "ab"})
        self.asked, self.passed, self.met = threading.Event(), threading.Event(), []

    def ask(self, requests, *, deadline=None):
        self.asked.set()
        self.met.append((self.passed.wait(120), threading.current_thread() is threading.main_thread()))
        return super().ask(requests, deadline=deadline)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "stock"])
def test_the_question_goes_on_beside_the_reference(llava, make, shared):
    """Each waits for the other to begin: one after the other neither would end."""
    engine = Meeting()
    reward = FederatedReward(engine, halves, mode="soft")

    def finished(*rows, **columns):
        return reward(*rows, **columns)

    finished.__wrapped__ = reward  # as `accord.alignment.grpo.finite` leaves it
    trainer = make(*load_model(llava), reward=finished, shared=shared)
    trainer._check = lambda *_: None
    under_way = []

    def meet(*_):
        under_way.append(engine.asked.wait(120))
        engine.passed.set()

    trainer.accelerator.unwrap_model(trainer.ref_model).register_forward_pre_hook(meet)
    rollouts(trainer)
    assert under_way == [True] and engine.met == [(True, False)]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["whole", "lora"])
def test_an_early_question_changes_no_bit(llava, make, lora):
    """Two steps with and without: the same rewards and the same weights; only the thread that asked differs."""
    ended = []
    for early in (True, False):
        engine, model = Timed(), load_model(llava)
        reward = FederatedReward(engine, halves, mode="soft")
        noted = without_start(reward)
        if early:
            noted.__wrapped__ = reward
        trainer = make(*model, reward=noted, lora=lora)
        trainer.train()
        assert [in_main for *_, in_main in engine.spans] == [not early] * 2
        ended.append((noted.given, flat(trainer.accelerator.unwrap_model(trainer.model))))
    assert ended[0][0] == ended[1][0] and len({value for step in ended[0][0] for value in step}) > 1
    assert torch.equal(ended[0][1], ended[1][1])


def test_what_is_raised_meanwhile_stops_the_step(llava, make):
    class Down(Timed):
        def ask(self, requests, *, deadline=None):
            raise RunError("no site for an hour")

    trainer = make(*load_model(llava), reward=FederatedReward(Down(), halves))
    with pytest.raises(RunError, match="no site for an hour"):
        rollouts(trainer)


def test_a_router_that_reads_with_the_reference_comes_after_it(llava, tmp_path, ask):
    """The question then starts with the call, in its thread; with an encoder of its own the router comes first."""
    questions = [ask(0, "red"), ask(1, "blue")]
    for shared, in_thread in ((True, True), (False, False)):
        engine = Timed()
        router = LearnedRouter(Encoder(*load_model(llava)), RouterNetwork(32, 2, RouterConfig(1, 8, 2)))
        config = dataclasses.replace(SETTINGS, shared_prefix=shared)
        reward, out = FederatedReward(engine, router), tmp_path / str(shared)
        align(*load_model(llava), questions, reward, config, seed=0, out=out, encoder=router.encoder)
        assert [in_main for *_, in_main in engine.spans] == [in_thread] * 2


def test_another_encoder_reads_for_itself(llava, checkpoints, tmp_path, ask):
    """The reference is what the policy was loaded from, in its type. Whatever else reads, reads what it did before."""
    encoder = Encoder(*load_model(llava))
    assert is_reference(encoder, load_model(llava)[0])
    assert not is_reference(encoder, load_model(checkpoints["idefics3"])[0])
    assert not is_reference(encoder, load_model(llava)[0].to(torch.bfloat16))
    reward, policy = Routed(checkpoints["idefics3"]), load_model(llava)
    questions = [ask(0, "red"), ask(1, "blue")]
    align(*policy, questions, reward, SETTINGS, seed=0, out=tmp_path / "out", encoder=reward.router.encoder)
    assert [(again == all_of_them, apart) for again, all_of_them, apart in reward.apart] == [(True, 0.0)] * 2


def test_without_an_encoder_the_router_reads_for_itself(llava, tmp_path, ask):
    reward = Routed(llava)
    align(*load_model(llava), [ask(0, "red"), ask(1, "blue")], reward, SETTINGS, seed=0, out=tmp_path / "out")
    assert [(again == all_of_them, apart) for again, all_of_them, apart in reward.apart] == [(True, 0.0)] * 2


@pytest.mark.parametrize(
    ("told", "own", "shared"),
    [
        ({}, {}, True),
        ({"top_k": 5, "top_p": 0.9, "temperature": 0.7}, {}, True),
        ({"repetition_penalty": 5.0}, {}, False),
        ({"do_sample": False}, {}, False),
        ({"no_repeat_ngram_size": 2}, {}, False),
        ({}, {"bad_words_ids": [[7]]}, False),
    ],
    ids=["plain", "truncated", "penalty", "greedy", "no repeats", "the model's own"],
)
def test_rollouts_that_ask_for_more_are_stock_ones(llava, make, told, own, shared):
    """Whatever TRL or the model's own settings ask beyond what the shared way knows: `generate` does it."""
    model, processor = load_model(llava)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    trainer = make(model, processor)
    for name, value in told.items():
        trainer.generation_kwargs[name] = value
        setattr(trainer.generation_config, name, value)
    warn_once.cache_clear()
    with nullcontext() if shared else pytest.warns(DataWarning, match="a row of its own, because the generation"):
        assert (trainer._sampling() is not None) is shared
    batch = rollouts(trainer)
    assert "prompt_of" in batch and batch["completion_ids"].shape[0] == 12


def test_what_a_model_does_not_name_does_not_reach_it(llava, make):
    """A processor that makes labels, counts and layouts of its own: the loss is what it is without them."""
    losses = []
    for further in ({}, {"labels": torch.tensor([[7]]), "batch_num_images": torch.tensor([1]), "rows": [[1]]}):
        model, processor = load_model(llava)
        real = type(processor).__call__

        class More(type(processor)):
            def __call__(self, *args, real=real, further=further, **settings):
                made = real(self, *args, **settings)
                return type(made)({**made, **further}, skip_tensor_conversion=["rows"])

        processor.__class__ = More
        trainer = make(model, processor)
        losses.append(loss_and_gradient(trainer, rollouts(trainer))[0])
    assert losses[0] == losses[1]


def test_a_batch_that_shows_nothing_is_no_comparison(llava, make):
    """Every completion cut off and masked: the two ways are compared on the next batch."""
    trainer = make(*load_model(llava), max_completion_length=1)
    trainer.mask_truncated_completions = True
    trainer.eos_token_ids = [1]
    rollouts(trainer)
    assert trainer._shares and trainer._checked == set()


def test_what_was_refuted_is_not_remembered(llava, tmp_path, ask, monkeypatch):
    """The comparison fails on the reference, whose states the router would have been given: it reads for itself."""
    reward = Routed(llava)
    monkeypatch.setattr(trainer_module, "TOLERANCE", -1.0)
    with pytest.warns(DataWarning, match="differ from those of full rows"):
        policy, questions, encoder = load_model(llava), [ask(0), ask(1, "blue")], reward.router.encoder
        align(*policy, questions, reward, SETTINGS, seed=0, out=tmp_path / "out", encoder=encoder)
    assert all(again == all_of_them for again, all_of_them, _ in reward.apart) and reward.router.encoder._known == {}


def test_a_beginning_that_the_template_has_written_is_not_added_again(llava, tmp_path, ask):
    """The policy's tokenizer would add one: its prompts are those of an encoder whose tokenizer adds none."""
    reward = Routed(llava)
    tokenizer = reward.router.encoder.processor.tokenizer
    policy, processor = load_model(llava)
    bos = processor.tokenizer.bos_token
    post = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    processor.tokenizer.backend_tokenizer.post_processor = post
    questions, encoder = [ask(0), ask(1, "blue")], reward.router.encoder
    align(policy, processor, questions, reward, SETTINGS, seed=0, out=tmp_path / "out", encoder=encoder)
    assert all(apart < 1e-5 for _, _, apart in reward.apart)


def test_pictures_differ_by_their_palette():
    """Equal indices of two palettes are two pictures, and so two prompts."""
    pictures = [Image.new("P", (4, 4)) for _ in range(2)]
    for picture, colour in zip(pictures, ((255, 0, 0), (0, 0, 255)), strict=True):
        picture.putpalette(colour)
    rows = [{"prompt": [{"role": "user", "content": "?"}], "image": picture} for picture in pictures]
    assert trainer_module._distinct(rows)[1] == [0, 1]

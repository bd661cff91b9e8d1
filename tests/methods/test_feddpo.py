import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch.nn.functional import logsigmoid
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from accord.alignment.dpo import AdapterDpo, preference_batch
from accord.alignment.grpo import placeholders_muted
from accord.data.images import load_image, load_images
from accord.errors import DataError, DataWarning, RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.local import Averaging, round_rate
from accord.federation.messages import UpdateRequest, encode
from accord.federation.weights import set_trainable_weights, trainable_weights
from accord.methods.feddpo import FedDpoConfig, LocalDpo, train_dpo
from accord.models.inputs import build_batch
from accord.models.load import LoraSettings, load_model, seeded_adapter, without_adapter
from accord.types import PreferencePair

LORA = LoraSettings(rank=4, alpha=8)


@pytest.fixture
def pairs(prefer, square):
    """Four pairs about four pictures, with answers of different lengths and a prompt of two turns among them."""
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is it red?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        {"role": "user", "content": [{"type": "text", "text": "what colour is it?"}]},
    ]
    return [
        prefer(0, "red", "blue"),
        prefer(1, "green", "it is yellow"),
        prefer(2, "yes yes", "no", images=(square("yellow"),)),
        prefer(3, "blue", "red", prompt=talk, images=(square("blue", (64, 32)),)),
    ]


def dpo(checkpoint, tmp_path, **settings):
    model, processor = load_model(checkpoint)
    return AdapterDpo(model, processor, LORA, **{"batch_size": 4, "out": tmp_path / "scratch", **settings})


def log_ratios(dpo, processor, pairs):
    """Return log π(y|x) − log π_ref(y|x) of the chosen and the rejected answers, from a plain forward pass."""
    batch = build_batch(
        processor,
        [pair.prompt for pair in pairs],
        [load_images(pair.images) for pair in pairs],
        [[pair.chosen, pair.rejected] for pair in pairs],
    )
    images = {name: tensor[batch.prompt_index] for name, tensor in batch.image_inputs.items()}

    def log_probabilities():
        logits = dpo.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **images).logits[:, :-1]
        labels = batch.labels[:, 1:]
        each = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        return (each * (labels != -100)).sum(1)

    dpo.model.eval()
    with torch.no_grad(), placeholders_muted(without_adapter(dpo.model)):
        policy = log_probabilities()
        with dpo.model.disable_adapter():
            reference = log_probabilities()
    return (policy - reference).view(-1, 2).unbind(1)


def test_the_first_loss_is_log_2_and_a_step_raises_the_margin(family, checkpoints, tmp_path, pairs):
    # A fresh adapter has B = 0: the policy is the reference, both log-ratios are 0, and −log σ(0) = log 2. The gradient
    # with respect to the margin is −σ(0) β < 0, so a step along −gradient raises the mean margin.
    trained = dpo(checkpoints[family], tmp_path)
    loss = trained.train(pairs, steps=1, learning_rate=1e-3, seed=0)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    chosen, rejected = log_ratios(trained, load_model(checkpoints[family])[1], pairs)
    assert (chosen - rejected).mean() > 1e-3


def test_the_loss_is_equation_7_with_each_image_at_its_own_prompt(family, checkpoints, tmp_path, pairs):
    trained = dpo(checkpoints[family], tmp_path, beta=0.5)
    trained.train(pairs, steps=3, learning_rate=2e-2, seed=0)
    processor = load_model(checkpoints[family])[1]
    chosen, rejected = log_ratios(trained, processor, pairs)
    by_hand = -logsigmoid(0.5 * (chosen - rejected)).mean().item()
    assert abs(by_hand - math.log(2)) > 0.05  # the adapter has moved
    # One step of four pairs is one pass over all of them; its loss is taken before it.
    assert trained.train(pairs, steps=1, learning_rate=1e-3, seed=1) == pytest.approx(by_hand, rel=1e-4)


def test_the_batches_are_those_of_trl(family, checkpoints, pairs):
    """To the bit: the chat templates of the small models leave no beginning of a sequence to the tokenizer.

    Only under the padding TRL's collator has tokens of another kind: it takes a padding token of id 0 for none.
    """
    model, processor = load_model(checkpoints[family])
    ours = preference_batch(model, processor, [(pair, 0) for pair in pairs])
    rows = [
        {
            "prompt": [dict(turn) for turn in pair.prompt],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "images": [load_image(image) for image in pair.images],
        }
        for pair in pairs
    ]
    stock = DataCollatorForVisionPreference(processor)(rows)
    assert ours["completion_mask"].shape == ours["input_ids"].shape and len(ours["input_ids"]) == 2 * len(pairs)
    stock["input_ids"] = stock["input_ids"].masked_fill(stock["attention_mask"] == 0, processor.tokenizer.pad_token_id)
    for name, tensor in ours.items():
        assert torch.equal(tensor, stock[name]), name


def test_a_text_only_policy_learns_by_equation_7(texts_only, tmp_path):
    """Its pairs have no image; the loss before a step is that of plain rows."""
    prompt = [{"role": "user", "content": [{"type": "text", "text": "what colour is it?"}]}]
    pairs = [
        PreferencePair(prompt, chosen, rejected, (), f"q{n}", "colour")
        for n, (chosen, rejected) in enumerate(
            [("red", "blue"), ("one two", "no"), ("yes", "green red"), ("two", "no")]
        )
    ]
    trained = dpo(texts_only, tmp_path, beta=0.5)
    trained.train(pairs, steps=3, learning_rate=2e-2, seed=0)
    chosen, rejected = log_ratios(trained, load_model(texts_only)[1], pairs)
    by_hand = -logsigmoid(0.5 * (chosen - rejected)).mean().item()
    assert abs(by_hand - math.log(2)) > 0.05
    assert trained.train(pairs, steps=1, learning_rate=1e-3, seed=1) == pytest.approx(by_hand, rel=1e-4)


def test_pairs_with_and_without_images_are_kept_apart(llava, pairs):
    bare = replace(pairs[0], prompt=[{"role": "user", "content": "what colour is it?"}], images=())
    with pytest.raises(DataError, match="1 of 2 prompts have an image"):
        preference_batch(*load_model(llava), [(bare, 0), (pairs[1], 0)])


def test_the_batches_of_a_step_count_as_one(llava, tmp_path, pairs):
    # Two batches of two are the four pairs of one step, and the loss is the mean over them.
    trained = dpo(llava, tmp_path, beta=0.5, batch_size=2, accumulate=2)
    trained.train(pairs, steps=3, learning_rate=2e-2, seed=0)
    chosen, rejected = log_ratios(trained, load_model(llava)[1], pairs)
    by_hand = -logsigmoid(0.5 * (chosen - rejected)).mean().item()
    assert trained.train(pairs, steps=1, learning_rate=1e-3, seed=1) == pytest.approx(by_hand, rel=1e-4)


def test_the_likelihood_of_the_chosen_answers_counts_beside(llava, tmp_path, pairs):
    # With weight α = 0.5 a fresh adapter's loss is log 2 + 0.5 · the mean over the chosen answers' tokens of −log π.
    trained, processor = dpo(llava, tmp_path, sft=0.5), load_model(llava)[1]
    batch = build_batch(
        processor,
        [pair.prompt for pair in pairs],
        [load_image(pair.images[0]) for pair in pairs],
        [[pair.chosen] for pair in pairs],
    )
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.image_inputs}
    with torch.no_grad(), placeholders_muted(without_adapter(trained.model)):
        likelihood = trained.model(**inputs, labels=batch.labels).loss.item()
    expected = math.log(2) + 0.5 * likelihood
    assert likelihood > 1
    assert trained.train(pairs, steps=1, learning_rate=1e-3, seed=0) == pytest.approx(expected, rel=1e-4)


def test_training_prefers_the_chosen_answers(llava, tmp_path, pairs):
    trained = dpo(llava, tmp_path, beta=0.5)
    trained.train(pairs, steps=30, learning_rate=1e-2, seed=0)
    chosen, rejected = log_ratios(trained, load_model(llava)[1], pairs)
    assert (chosen - rejected > 1).all()


def test_one_seed_gives_one_adapter(llava, tmp_path, pairs):
    def run(seed, order):
        trained = dpo(llava, tmp_path, seed=seed, batch_size=1)
        trained.train(pairs, steps=3, learning_rate=1e-2, seed=order)
        return torch.cat([w.flatten() for w in trainable_weights(trained.model).values()])

    first = run(0, 0)
    assert torch.equal(first, run(0, 0))
    assert not torch.equal(first, run(1, 0))  # of the first weights
    assert not torch.equal(first, run(0, 2))  # of the order


def test_the_merged_policy_is_an_ordinary_model(llava, tmp_path, pairs):
    trained = dpo(llava, tmp_path)
    trained.train(pairs, steps=1, learning_rate=1e-2, seed=0)
    merged, (base, _) = trained.merged(), load_model(llava)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert "forward" not in vars(merged)
    moved = {name for name, w in merged.state_dict().items() if not torch.equal(w, base.state_dict()[name])}
    assert moved and all("language_model" in name for name in moved)


def test_a_pattern_that_fits_no_layer_is_named(llava, tmp_path):
    model, processor = load_model(llava)
    with pytest.raises(RecipeError, match="fits no adapter"):
        AdapterDpo(model, processor, LoraSettings(target_modules="nothing"), out=tmp_path)


CONFIG = FedDpoConfig(Averaging(rounds=2, local_steps=2, batch_size=2, learning_rate=1e-2), lora=LORA)


class Recorder:
    """Answer as a site does, and keep what crossed the border."""

    def __init__(self, answer):
        self.answer, self.requests, self.replies = answer, [], []

    def __call__(self, request):
        self.requests.append(request)
        self.replies.append(self.answer(request))
        return self.replies[-1]


def site(checkpoint, tmp_path: Path, pairs):
    return Recorder(LocalDpo(dpo(checkpoint, tmp_path, batch_size=2), pairs, CONFIG.averaging))


def same(model, other):
    return all(torch.equal(w, other.state_dict()[name]) for name, w in model.state_dict().items())


def test_the_learning_rate_falls_along_half_a_cosine():
    # η/2 (1 + cos(π t / 4)) at t = 0, 2, 3 of 4:  η,  η/2,  η/2 (1 − √2/2)
    assert round_rate(0.2, 0, 4) == pytest.approx(0.2)
    assert round_rate(0.2, 2, 4) == pytest.approx(0.1)
    assert round_rate(0.2, 3, 4) == pytest.approx(0.1 * (1 - math.sqrt(0.5)))


def test_a_federation_of_one_site_is_local_dpo(llava, tmp_path, pairs, arrived):
    alone, rounds = site(llava, tmp_path, pairs), []
    policy = train_dpo(
        InProcessEngine({"a": alone}), load_model(llava)[0], CONFIG, seed=3, on_round=lambda *each: rounds.append(each)
    )
    local = dpo(llava, tmp_path, batch_size=2)
    set_trainable_weights(local.model, trainable_weights(seeded_adapter(load_model(llava)[0], LORA, 3)))
    seeds = [request.seed for request in alone.requests]
    losses = []
    for rate, seed in zip((1e-2, 5e-3), seeds, strict=True):  # half a cosine over two rounds: η, η/2
        start = trainable_weights(local.model)
        losses.append(local.train(pairs, steps=2, learning_rate=rate, seed=seed))
        set_trainable_weights(local.model, arrived(start, trainable_weights(local.model)))
    assert len(set(seeds)) == 2
    assert rounds == [(1, losses[0]), (2, losses[1])]
    assert same(policy, local.merged())
    assert not same(policy, load_model(llava)[0])


def test_updates_count_by_their_pairs(llava, tmp_path, pairs):
    # w = w⁰ + ¼ Δ_a + ¾ Δ_b for sites of one pair and of three
    config = FedDpoConfig(Averaging(rounds=1, local_steps=2, batch_size=2, learning_rate=1e-2), lora=LORA)
    a, b = site(llava, tmp_path, pairs[:1]), site(llava, tmp_path, pairs[1:])
    policy = train_dpo(InProcessEngine({"a": a, "b": b}), load_model(llava)[0], config, seed=0)
    ours = seeded_adapter(load_model(llava)[0], LORA, 0)
    start, from_a, from_b = (load(sent) for sent in (a.requests[0].weights, a.replies[0].change, b.replies[0].change))
    set_trainable_weights(ours, {name: w + from_a[name] / 4 + 3 * from_b[name] / 4 for name, w in start.items()})
    expected = ours.merge_and_unload().state_dict()
    for name, weight in policy.state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-7), name


def test_only_the_adapter_travels_and_every_byte_is_counted(llava, tmp_path, pairs):
    alone = site(llava, tmp_path, pairs)
    engine = InProcessEngine({"a": alone})
    train_dpo(engine, load_model(llava)[0], CONFIG, seed=0)
    adapter = trainable_weights(seeded_adapter(load_model(llava)[0], LORA, 0))
    sent = [load(request.weights) for request in alone.requests] + [load(reply.change) for reply in alone.replies]
    assert len(sent) == 4 and all(each.keys() == adapter.keys() for each in sent)
    assert all(".lora_" in name for name in adapter)
    for message in (*alone.requests, *alone.replies):
        assert not any(pair.images[0] in encode(message) for pair in pairs)
    count = engine.traffic.counts["a", "preference"]
    assert count.messages == 2
    assert count.bytes_to_site == sum(len(encode(request)) for request in alone.requests)
    assert count.bytes_from_site == sum(len(encode(reply)) for reply in alone.replies)


def test_an_absent_site_is_left_out(llava, tmp_path, pairs):
    def silent(request):
        raise OSError("no power")

    alone = train_dpo(InProcessEngine({"a": site(llava, tmp_path, pairs)}), load_model(llava)[0], CONFIG, seed=0)
    engine = InProcessEngine({"a": site(llava, tmp_path, pairs), "b": silent})
    with pytest.warns(DataWarning, match="site b gave no answer"):
        policy = train_dpo(engine, load_model(llava)[0], CONFIG, seed=0)
    assert same(policy, alone)
    assert engine.traffic.counts["b", "preference"].absences == 2


def test_weights_of_another_model_are_refused(llava, tmp_path, pairs):
    local = LocalDpo(dpo(llava, tmp_path), pairs, CONFIG.averaging)
    engine = InProcessEngine({"a": local})
    reply = engine.ask({"a": UpdateRequest("x", "preference", 0, b"", 0)})["a"]
    assert reply.reason == "error"


def test_a_site_without_pairs_and_a_negative_beta_are_refused(llava, tmp_path):
    with pytest.raises(DataError, match="0 preference pairs"):
        LocalDpo(dpo(llava, tmp_path), [], CONFIG.averaging)
    with pytest.raises(RecipeError, match="beta must be at least 0"):
        FedDpoConfig(beta=-0.1)
    with pytest.raises(RecipeError, match="sft must be at least 0"):
        FedDpoConfig(sft=-0.1)

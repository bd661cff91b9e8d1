"""A site's half of the projector's training: one epoch over the round's own captions, and d_k after it."""

import math

import pytest
import torch
from pytest import approx
from safetensors.torch import load, save
from torch import nn, tensor

from accord.data.images import load_image
from accord.errors import CheckpointError, DataError, DataWarning, RecipeError, ReplyError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.projector import (
    ClientRule,
    LocalProjector,
    Moon,
    OnePass,
    ProjectorConfig,
    SameBase,
    _optimiser,
    contrast,
)
from accord.federation.rounds import federated_rounds
from accord.federation.weights import set_trainable_weights, to_bytes, trainable_weights
from accord.models.inputs import build_batch
from accord.models.load import load_model
from accord.models.projector import frozen_digest, train_projector_alone
from accord.types import Question, prompt_of

COLOURS = ("red", "blue", "green", "yellow")


def settings(rounds=1, batch_size=2, rate=0.01, **client):
    averaging = OnePass(rounds=rounds, batch_size=batch_size, learning_rate=rate)
    return ProjectorConfig(averaging=averaging, client=ClientRule(**client))


@pytest.fixture
def loaded(llava):
    model, processor = load_model(llava)
    train_projector_alone(model, seed=0)
    return model, processor


@pytest.fixture
def captions(ask):
    return [ask(n, COLOURS[n % 4]) for n in range(7)]


def request(model, *, number=0, seed=0):
    return UpdateRequest(f"r{number}", "projector", number, to_bytes(trainable_weights(model)), seed)


def test_every_caption_is_in_one_round_and_always_the_same(loaded, captions):
    """Seven captions in three parts: 3, 2 and 2."""
    parts = LocalProjector(*loaded, captions, settings(3), seed=5).parts
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(q.id for part in parts for q, _ in part) == [q.id for q in captions]
    assert LocalProjector(*loaded, captions, settings(3), seed=5).parts == parts
    assert LocalProjector(*loaded, captions, settings(3), seed=6).parts != parts


def test_a_round_of_one_caption_is_one_step_of_adamw(loaded, ask):
    """The first step of Adam moves each weight by η g / (|g| + ε), here with the gradient cut to a norm of 1."""
    model, processor = loaded
    caption = ask(0, "red")
    start = trainable_weights(model)
    batch = build_batch(processor, [prompt_of(caption)], [load_image(caption.image)], [["red"]])
    loss = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, **batch.image_inputs
    ).loss
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    nn.utils.clip_grad_norm_(trained.values(), 1.0)
    expected = {name: -0.01 * p.grad / (p.grad.abs() + 1e-8) for name, p in trained.items()}
    model.zero_grad()
    reply = LocalProjector(model, processor, [caption], settings(), seed=0)(request(model))
    change = load(reply.change)
    assert (reply.examples, reply.steps, reply.loss) == (1, 1, approx(loss.item(), rel=1e-5))
    assert set(change) == set(start) and all("multi_modal_projector" in name for name in change)
    for name, moved in change.items():
        assert torch.allclose(moved, expected[name], atol=1e-5)


def test_the_distance_is_that_of_the_mean_tokens_after_the_steps(loaded, captions):
    """Four of seven captions in round 0 of 2: two steps of two; d from the plain parts of the model."""
    model, processor = loaded
    local = LocalProjector(model, processor, captions, settings(2), seed=0)
    before = local.distance(local.parts[0])
    sent = request(model)
    reply = local(sent)
    assert reply.examples == 4 and reply.steps == 2
    set_trainable_weights(model, {name: w + load(reply.change)[name] for name, w in load(sent.weights).items()})
    image, table = processor.tokenizer.convert_tokens_to_ids("<image>"), model.get_input_embeddings().weight
    apart = []
    with torch.no_grad():
        for q, source in local.parts[0]:
            row = build_batch(processor, [prompt_of(q)], [load_image(source)], [[q.answer]])
            seen = model.get_image_features(**row.image_inputs, return_dict=True).pooler_output[0].mean(0)
            said = table[[i for i in row.input_ids[0].tolist() if i != image]].mean(0)
            apart.append((seen - said).norm().item())
    assert reply.distance == approx(sum(apart) / 4, rel=1e-5)
    assert reply.distance != approx(before, rel=1e-4)


def test_the_learning_rate_falls_by_a_cosine_within_a_round():
    """η/2 (1 + cos(π t / 4)) for t = 0 … 3, and one step of warm-up of four from 0."""

    def rates(warmup):
        weight = nn.Parameter(tensor([1.0]))
        optimiser, seen = _optimiser([weight], OnePass(learning_rate=1.0, warmup=warmup), 4, 0), []
        for _ in range(4):
            seen.append(optimiser.param_groups[0]["lr"])
            weight.grad = tensor([100.0])
            optimiser.step()
            assert weight.grad.item() == approx(1.0)
        return seen

    assert rates(0.0) == approx([0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4)])
    assert rates(0.25) == approx([0.0, 1.0, 0.75, 0.25])


def test_fedprox_pulls_back_to_where_the_round_began(loaded, captions):
    """The first of two steps is the same, since w = w^t there; the pull of the second shortens the way."""
    changes = {}
    for rule in ("plain", "fedprox"):
        train_projector_alone(loaded[0], seed=0)
        local = LocalProjector(*loaded, captions[:4], settings(rule=rule, mu=100.0), seed=0)
        changes[rule] = load(local(request(loaded[0])).change)
    length = {rule: sum(c.square().sum().item() for c in change.values()) for rule, change in changes.items()}
    assert length["fedprox"] < 0.9 * length["plain"]


def test_the_contrast_by_hand():
    """Cosines: with the shared 1 and 0, with the last 0 and 1; τ = 0.5. ℓ = (log(1 + e^−2) + log(1 + e^2)) / 2."""
    now, shared, last = tensor([[2.0, 0.0], [0.0, 3.0]]), tensor([[1.0, 0.0]] * 2), tensor([[0.0, 1.0]] * 2)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert contrast(now, shared, last, 0.5).item() == approx(expected)


def test_moon_has_no_last_projector_in_its_first_round(loaded, captions):
    """Round 1 is a plain one. In round 2 the loss is higher by μ ℓ > 0, and the change another."""
    told = {}
    for rule in ("plain", "moon"):
        train_projector_alone(loaded[0], seed=0)
        local = LocalProjector(*loaded, captions, settings(2, 8, rule=rule, mu=5.0, temperature=0.1), seed=0)
        first = request(loaded[0])
        told[rule] = [local(first), local(UpdateRequest("r1", "projector", 1, first.weights, 0))]
    (plain, plain_later), (moon, moon_later) = told["plain"], told["moon"]
    assert moon == plain and isinstance(moon, UpdateReply)
    assert moon_later.loss > plain_later.loss + 0.1
    assert moon_later.change != plain_later.change


@pytest.mark.parametrize("rule", ["plain", "moon"])
def test_a_training_that_starts_over_begins_without_what_the_last_one_left(loaded, captions, rule):
    """Kept moments and MOON's last projector count in round 2 of one training, and in round 1 of no other."""
    train_projector_alone(loaded[0], seed=0)
    config = ProjectorConfig(
        averaging=OnePass(rounds=2, batch_size=2, learning_rate=0.01, moments="kept"),
        client=ClientRule(rule, mu=5.0, temperature=0.1),
    )
    local, first = LocalProjector(*loaded, captions, config, seed=0), request(loaded[0])
    second = UpdateRequest("r1", "projector", 1, first.weights, 0)
    told = [local(first), local(second)]
    assert [local(first), local(second)] == told
    assert LocalProjector(*loaded, captions, config, seed=0)(second).change != told[1].change


def test_kept_moments_are_those_of_the_last_round(loaded, captions):
    """Adam's first moment after a round of two steps and one of two: four steps are counted, anew but two."""
    steps = {}
    for moments in ("anew", "kept"):
        train_projector_alone(loaded[0], seed=0)
        averaging = OnePass(rounds=2, batch_size=2, learning_rate=0.01, moments=moments)
        local = LocalProjector(*loaded, captions, ProjectorConfig(averaging=averaging), seed=0)
        first = request(loaded[0])
        steps[moments] = [local(first), local(UpdateRequest("r1", "projector", 1, first.weights, 0))]
        kept = {int(state["step"]) for state in local._moments.values()}
        assert kept == ({4} if moments == "kept" else set())
    assert steps["kept"][0] == steps["anew"][0] and steps["kept"][1].change != steps["anew"][1].change


def test_one_cosine_spans_all_rounds():
    """Three rounds of two steps: η/2 (1 + cos(π t / 6)) for t = 0 … 5, and warm-up in the first round alone."""

    def rates(warmup):
        seen = []
        for number in range(3):
            weight = nn.Parameter(tensor([1.0]))
            config = OnePass(rounds=3, learning_rate=1.0, warmup=warmup, schedule="training")
            optimiser = _optimiser([weight], config, 2, number)
            for _ in range(2):
                seen.append(optimiser.param_groups[0]["lr"])
                weight.grad = tensor([1.0])
                optimiser.step()
        return seen

    assert rates(0.0) == approx([0.5 * (1 + math.cos(math.pi * t / 6)) for t in range(6)])
    assert rates(1 / 3) == approx([0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(4))])


def test_moon_of_one_batch_adds_the_contrast(loaded, captions):
    """All of round 2 in one batch: z is that of w^r itself, whose cosine with z^r is 1."""
    model, _ = loaded
    local = LocalProjector(*loaded, captions, settings(2, 8, rule="moon", mu=2.0), seed=0)
    first = request(model)
    local(first)
    assert isinstance(local.rule, Moon)
    last = local.rule.last
    later = local(UpdateRequest("r1", "projector", 1, first.weights, 0))
    train_projector_alone(model, seed=0)
    plain = LocalProjector(*loaded, captions, settings(2, 8), seed=0)
    without = plain(UpdateRequest("r1", "projector", 1, first.weights, 0))
    set_trainable_weights(model, load(first.weights))
    batch = local._batch(local.parts[1])
    with torch.no_grad():
        z = torch.stack([f.mean(0) for f in model.get_image_features(**batch.image_inputs).pooler_output])
        set_trainable_weights(model, last)
        old = torch.stack([f.mean(0) for f in model.get_image_features(**batch.image_inputs).pooler_output])
    expected = 2.0 * contrast(z, z, old, 0.5).item()
    assert later.loss - without.loss == approx(expected, rel=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_a_site_without_captions_is_named(loaded, count):
    asked = [Question("q", None, "is it red?", "no", "yes/no", "private")] * count
    with pytest.raises(DataError, match=rf"site a has no caption of an image \({count} questions without one\)"):
        LocalProjector(*loaded, asked, settings(), seed=0, site="a")


def test_more_rounds_than_captions_are_refused(loaded, captions):
    with pytest.raises(DataError, match=r"site a has 7 captions for 8 rounds.*lower projector.averaging.rounds"):
        LocalProjector(*loaded, captions, settings(8), seed=0, site="a")


def test_a_round_that_is_none_is_refused(loaded, captions):
    with pytest.raises(ReplyError, match="round 3 of 2"):
        LocalProjector(*loaded, captions, settings(2), seed=0)(request(loaded[0], number=2))


def test_weights_of_another_projector_are_refused_by_name_and_shape(loaded, captions, checkpoints, efficientnet):
    local = LocalProjector(*loaded, captions, settings(), seed=0)
    other, _ = load_model(efficientnet)
    train_projector_alone(other)
    with pytest.raises(CheckpointError, match=r"linear_1.weight is \(32, 1280\) torch.float32, expected \(32, 32\)"):
        local(request(other))
    other, _ = load_model(checkpoints["idefics3"])
    train_projector_alone(other)
    with pytest.raises(CheckpointError, match=r"other names: .*connector.modality_projection.proj.weight"):
        local(request(other))


def test_a_site_with_another_tower_or_language_model_refuses(loaded, captions):
    """Names and shapes are the same; one frozen weight of the language model is not, or the word of one token."""
    model, processor = loaded
    base = SameBase(model, processor)
    asked = UpdateRequest("r", "projector", 0, to_bytes(trainable_weights(model)), 0, base.send())
    local = LocalProjector(model, processor, captions, settings(), seed=0)
    assert local(asked).steps == 4
    assert torch.equal(frozen_digest(model, processor), base.digest)  # the projector is no part of it
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ReplyError, match="tower, language model or vocabulary is not the server's"):
        LocalProjector(model, processor, captions, settings(), seed=0)(asked)
    with torch.no_grad():
        model.lm_head.weight[0, 0] -= 1
    processor.tokenizer.add_tokens(["another"])
    with pytest.raises(ReplyError, match=r"name the same checkpoint in \[policy\]"):
        LocalProjector(model, processor, captions, settings(), seed=0)(asked)


def run(sites, start, rounds=1):
    engine = InProcessEngine(sites)
    return federated_rounds(engine, "projector", start, rounds, seed=0), engine


def test_a_site_whose_image_cannot_be_read_is_absent_that_round(loaded, captions):
    """Its only picture is damaged: the shared projector is the other site's, and one absence is counted."""
    model, processor = loaded
    damaged = Question("q", b"\x89PNG\r\n\x1a\n broken", "what colour is it?", "red", "colour", "private")
    start = trainable_weights(model)
    sites = {
        "a": LocalProjector(model, processor, captions, settings(), seed=0),
        "b": LocalProjector(model, processor, [damaged], settings(), seed=0),
    }
    with pytest.warns(DataWarning, match=r"site b gave no answer \(error\); round 1 of the projector goes on without"):
        both, engine = run(sites, start)
    assert engine.traffic.counts["b", "projector"].absences == 1
    alone, _ = run({"a": LocalProjector(model, processor, captions, settings(), seed=0)}, start)
    assert all(torch.equal(both[name], alone[name]) for name in start)


@pytest.mark.parametrize("bad", ["shape", "infinite", "distance"])
def test_an_update_that_cannot_be_used_is_a_counted_absence(loaded, captions, bad):
    model, processor = loaded

    def hostile(asked):
        weights = load(asked.weights)
        name = next(iter(weights))
        if bad != "distance":
            weights[name] = weights[name][:1] if bad == "shape" else weights[name] / 0.0
        return UpdateReply(asked.id, save(weights), 1, 1.0, distance=math.nan if bad == "distance" else 1.0)

    start = trainable_weights(model)
    with pytest.warns(DataWarning, match="site b sent an update that cannot be used"):
        both, engine = run({"a": LocalProjector(model, processor, captions, settings(), seed=0), "b": hostile}, start)
    assert engine.traffic.counts["b", "projector"].absences == 1
    alone, _ = run({"a": LocalProjector(model, processor, captions, settings(), seed=0)}, start)
    assert all(torch.equal(both[name], alone[name]) for name in start)


def test_the_server_hears_of_each_site(loaded, captions):
    model, processor = loaded
    told = {}
    sites = {name: LocalProjector(model, processor, captions, settings(2), seed=0) for name in "ab"}
    federated_rounds(
        InProcessEngine(sites),
        "projector",
        trainable_weights(model),
        2,
        seed=0,
        on_replies=lambda number, replies: told.update({number: {name: r.examples for name, r in replies.items()}}),
    )
    assert told == {1: {"a": 4, "b": 4}, 2: {"a": 3, "b": 3}}


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (lambda: OnePass(rounds=0), "rounds must be at least 1, got 0"),
        (lambda: OnePass(warmup=1.0), "warmup is a share .* got 1.0"),
        (lambda: OnePass(learning_rate=0.0), "learning_rate must be above 0"),
        (lambda: ClientRule(mu=-1.0), "mu must be at least 0, got -1.0"),
        (lambda: ClientRule(temperature=0.0), "temperature must be above 0"),
        (lambda: ProjectorConfig(evaluate_on=-1), "evaluate_on must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(made, wrong):
    with pytest.raises(RecipeError, match=wrong):
        made()

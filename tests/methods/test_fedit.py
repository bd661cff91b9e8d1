import contextlib

import msgspec
import pytest
import torch
from pytest import approx
from safetensors.torch import load
from torch import tensor

from accord.attacks.updates import hostile, huge
from accord.data.images import load_image
from accord.errors import CheckpointError, DataError, DataWarning, RecipeError, RunError
from accord.federation.aggregation import Aggregation, length_of
from accord.federation.engine import InProcessEngine
from accord.federation.local import Averaging
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.rounds import federated_rounds
from accord.federation.weights import to_bytes, trainable_weights
from accord.methods.fedit import (
    Algorithm,
    ControlVariate,
    ControlVariates,
    FedITConfig,
    LocalSupervised,
    Plain,
    Proximal,
    fedavg,
    fedprox,
    scaffold,
    train_supervised,
)
from accord.models.generate import answer
from accord.models.inputs import build_batch
from accord.models.load import LoraSettings, add_lora, load_model
from accord.types import vqa_prompt

SMALL = Averaging(local_steps=2, batch_size=1, learning_rate=0.1)
FEDSGD = Algorithm(Plain, optimiser=torch.optim.SGD)


@pytest.fixture
def adapted(llava):
    """Return a function that makes the same base with the same fresh adapter."""

    def make(checkpoint=llava):
        torch.manual_seed(0)
        model, processor = load_model(checkpoint)
        return add_lora(model, LoraSettings(rank=2, alpha=4)), processor

    return make


@pytest.fixture
def tune(adapted):
    """Return a function that trains with one site per list of questions, and gives the averaged adapter."""

    def run(data, algorithm, config=SMALL, *, rounds=1):
        model, processor = adapted()
        sites = {name: LocalSupervised(model, processor, qs, config, algorithm) for name, qs in data.items()}
        start = trainable_weights(model)
        server = algorithm.server(start, 0.0)
        engine = InProcessEngine(sites)
        averaged = federated_rounds(engine, "supervised", start, rounds, seed=0, server=server)
        return averaged, start, sites, server, engine

    return run


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


def close(one, other, **tolerance):
    return all(torch.allclose(one[name], other[name], **tolerance) for name in one | other)


def gradient(model, processor, question):
    """The gradient of the answer's loss, by parameter."""
    batch = build_batch(processor, [vqa_prompt(question.text)], [load_image(question.image)], [[question.answer]])
    model.zero_grad()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.image_inputs}
    model(**inputs, labels=batch.labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_round_with_one_site_is_plain_local_training(tune, adapted, ask, arrived):
    """Two AdamW steps on the one question there is, bit by bit."""
    averaged, start, *_ = tune({"a": [ask(0)]}, fedavg())
    model, processor = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    for _ in range(2):
        gradient(model, processor, ask(0))
        adamw.step()
    assert same(averaged, arrived(start, trainable_weights(model))) and not same(averaged, start)


def test_fedprox_without_pull_is_fedavg(tune, ask):
    data = {"a": [ask(0)], "b": [ask(1, "blue")]}
    assert same(tune(data, fedprox(0.0), rounds=2)[0], tune(data, fedavg(), rounds=2)[0])


def test_proximal_by_hand():
    """g + μ (w − w^t) = 1 + 2 · (5 − 2) = 7."""
    rule = Proximal(2.0)
    rule.begin({"w": tensor(2.0)}, b"")
    assert rule.correct("w", tensor(1.0), tensor(5.0)).item() == 7.0 and rule.end({}, 1.0) == b""


def test_a_huge_pull_keeps_the_weights_where_they_began(tune, ask):
    """SGD with η μ = 1 goes to w − η (g + μ (w − w^t)) = w^t − η g: eight steps get no further than one."""
    config = Averaging(local_steps=8, batch_size=1, learning_rate=1e-3)
    pulled = Algorithm(lambda: Proximal(1000.0), optimiser=torch.optim.SGD)
    free, start, *_ = tune({"a": [ask(0)]}, FEDSGD, config)
    held = tune({"a": [ask(0)]}, pulled, config)[0]
    moved = {name: (free[name] - start[name]).norm().item() for name in start}
    stayed = {name: (held[name] - start[name]).norm().item() for name in start}
    # B begins at 0, so that A has no gradient at first and moves by less than a thousandth of that.
    grown = {name: stayed[name] / moved[name] for name in start if "lora_B" in name}
    assert grown == {name: approx(1 / 8, rel=0.02) for name in grown} and len(grown) == 7


def test_control_variates_by_hand():
    """w^t = 10, c = 1, η = 0.5, two gradients 4 and 2.

    Round 1, c_k = 0: steps along 5 and 3, to 10 − 0.5 · 8 = 6; c_k⁺ = 0 − 1 + (10 − 6) / (2 · 0.5) = 3, the mean of the
    gradients. Round 2, c = 2: steps along 4 − 3 + 2 = 3 and 2 − 3 + 2 = 1, to 6 − 2 = 4; c_k⁺ = 3 − 2 + 2 / 1 = 3.
    """
    rule, weight = ControlVariate(), 10.0
    for shared, ended in ((1.0, 6.0), (2.0, 4.0)):
        rule.begin({"w": tensor(weight)}, to_bytes({"w": tensor(shared)}))
        for g in (4.0, 2.0):
            weight -= 0.5 * rule.correct("w", tensor(g), tensor(weight)).item()
        assert weight == ended
        assert load(rule.end({"w": tensor(weight)}, 2 * 0.5))["w"].item() == 3.0


def test_the_servers_control_variate_by_hand():
    """c_a = 1 (n = 1), c_b = 5 (n = 3): c = 4; when a sends 9, c = (9 + 15) / 4 = 6. It starts from 0."""
    server = ControlVariates({"w": tensor(7.0)})
    seen = [load(server.send())["w"].item()]
    for site, n, value in (("a", 1, 1.0), ("b", 3, 5.0), ("a", 1, 9.0)):
        server.receive(site, n, to_bytes({"w": tensor(value)}))
        server.keep([site], "round 1")
        seen.append(load(server.send())["w"].item())
    assert seen == [0.0, 1.0, 4.0, 6.0]


def test_scaffolds_first_round_is_fedsgds(tune, ask):
    """All control variates are 0. In the second round they are not, and the local steps differ."""
    data = {"a": [ask(0)], "b": [ask(1, "blue"), ask(2, "blue")]}
    assert same(tune(data, scaffold())[0], tune(data, FEDSGD)[0])
    assert not close(tune(data, scaffold(), rounds=2)[0], tune(data, FEDSGD, rounds=2)[0], atol=1e-6)


def test_with_one_local_step_scaffold_is_fedsgd_in_every_round(tune, ask):
    """Σ p_k (g_k − c_k + c) = Σ p_k g_k, since c = Σ p_k c_k."""
    config = Averaging(local_steps=1, batch_size=1, learning_rate=0.5)
    data = {"a": [ask(0)], "b": [ask(1, "blue"), ask(2, "blue")]}
    corrected, start, *_ = tune(data, scaffold(), config, rounds=3)
    plain = tune(data, FEDSGD, config, rounds=3)[0]
    assert close(corrected, plain, atol=1e-6) and not close(plain, start, atol=1e-3)


def test_the_control_variates_of_sites_and_server_agree(tune, adapted, ask):
    """c = (1 · c_a + 2 · c_b) / 3 after every round; after one of one step, c_a is a's gradient at the start."""
    data = {"a": [ask(0)], "b": [ask(1, "blue"), ask(2, "green")]}
    config = Averaging(local_steps=1, batch_size=1, learning_rate=0.5)
    _, _, sites, server, _ = tune(data, scaffold(), config)
    assert close(sites["a"].rule.own, gradient(*adapted(), ask(0)), atol=1e-6)
    for rounds in (1, 3):
        _, _, sites, server, _ = tune(data, scaffold(), rounds=rounds)
        a, b = sites["a"].rule.own, sites["b"].rule.own
        assert close(server.mean, {name: (a[name].double() + 2 * b[name].double()) / 3 for name in a}, atol=1e-6)
        assert any(c.abs().max() > 1e-3 for c in server.mean.values())


def test_a_site_without_a_control_variate_is_left_out(adapted, ask, arrived):
    """b answers as FedAvg would, with no state."""
    model, processor = adapted()
    engine = InProcessEngine(
        {
            "a": LocalSupervised(model, processor, [ask(0)], SMALL, scaffold()),
            "b": lambda request: UpdateReply(request.id, request.weights, 1000, 1.0),
        }
    )
    start = trainable_weights(model)
    with pytest.warns(DataWarning, match="site b sent an update that cannot be used"):
        averaged = federated_rounds(engine, "supervised", start, 1, seed=0, server=ControlVariates(start))
    assert same(averaged, arrived(start, trainable_weights(model)))


def test_a_site_refuses_a_control_variate_that_does_not_fit(adapted, ask):
    model, processor = adapted()
    site = LocalSupervised(model, processor, [ask(0)], SMALL, scaffold())
    request = UpdateRequest("x", "supervised", 0, to_bytes(trainable_weights(model)), 0, to_bytes({"w": tensor(1.0)}))
    with pytest.raises(CheckpointError, match="other names"):
        site(request)


@pytest.mark.parametrize(("algorithm", "times"), [(fedavg(), 1), (scaffold(), 2)], ids=["fedavg", "scaffold"])
def test_what_travels_is_the_adapter_and_under_scaffold_as_much_again(tune, ask, algorithm, times):
    """An envelope of some bytes aside, both ways."""
    _, start, _, _, engine = tune({"a": [ask(0)], "b": [ask(1)]}, algorithm, rounds=2)
    for site in ("a", "b"):
        count = engine.traffic.counts[site, "supervised"]
        assert count.messages == 2
        for sent in (count.bytes_to_site, count.bytes_from_site):
            assert 0 < sent - 2 * times * len(to_bytes(start)) < 300


def test_an_adapter_travels_and_the_base_stays(tune, adapted, ask):
    _, start, *_ = tune({"a": [ask(0)]}, fedavg())
    assert start and all("lora_" in name for name in start)
    model, _ = adapted()
    assert sum(w.numel() for w in start.values()) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


def test_a_toy_is_learnt_and_comes_back_merged(adapted, ask):
    """Site a has red squares only and site b blue ones; the merged model's first token is right for both."""
    config = Averaging(rounds=12, local_steps=2, batch_size=2, learning_rate=2e-2)
    model, processor = adapted()
    sites = {c: LocalSupervised(model, processor, [ask(0, c)], config, fedavg()) for c in ("red", "blue")}
    losses = []
    merged = train_supervised(
        InProcessEngine(sites), model, config, fedavg(), seed=0, on_round=lambda *given: losses.append(given)
    )
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert answer(merged, processor, [ask(1, "red"), ask(2, "blue")], max_new_tokens=1) == [["red"], ["blue"]]
    assert [number for number, _ in losses] == list(range(1, 13)) and losses[-1][1] < losses[0][1]


def test_every_family_can_be_tuned(family, checkpoints, adapted, ask):
    """A step of SGD along the gradient: the loss of the one question there is goes down."""
    config = Averaging(local_steps=3, batch_size=1, learning_rate=0.1)
    model, processor = adapted(checkpoints[family])
    site = LocalSupervised(model, processor, [ask(0)], config, FEDSGD)
    losses = []
    for number in range(3):
        reply = site(UpdateRequest("x", "supervised", number, to_bytes(trainable_weights(model)), 0))
        losses.append(reply.loss)
    assert losses[0] > losses[1] > losses[2]


def test_the_same_seed_gives_the_same_weights(adapted, ask):
    """With symmetries, several types and several batches to a step, whatever the process has drawn before."""
    config = Averaging(local_steps=2, batch_size=2, learning_rate=0.1, symmetries=True, gradient_accumulation=2)
    questions = [ask(0), ask(1, "blue"), ask(2, "green"), ask(3, "yellow", question_type="other")]
    weights = []
    for seed in (0, 0, 1):
        model, processor = adapted()
        torch.manual_seed(len(weights))
        site = LocalSupervised(model, processor, questions, config, fedavg())
        reply = site(UpdateRequest("x", "supervised", 0, to_bytes(trainable_weights(model)), seed))
        weights.append(load(reply.change))
        assert (reply.examples, reply.steps) == (4, 2)
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_no_questions(adapted):
    with pytest.raises(DataError, match="on 0 questions"):
        LocalSupervised(*adapted(), [], SMALL, fedavg())


def test_a_negative_pull_is_refused():
    with pytest.raises(RecipeError, match="mu must be at least 0"):
        FedITConfig(mu=-0.1)
    with pytest.raises(RecipeError, match="sgd_learning_rate must be above 0"):
        FedITConfig(sgd_learning_rate=0)


def test_an_adapter_that_breaks_the_model_is_left_out(adapted, ask):
    """Without a bound, 3e38 in one of three adapters: as if that site had not answered. Not so without the probe."""
    config = Averaging(rounds=2, local_steps=1, batch_size=1, learning_rate=1e-3, aggregation=Aggregation(bound=0))

    def tuned(change, *, probed=True):
        model, processor = adapted()
        sites = {name: LocalSupervised(model, processor, [ask(0)], config, fedavg()) for name in "abc"}
        engine = InProcessEngine(change(sites))
        return train_supervised(engine, model, config, fedavg(), seed=0, processor=processor if probed else None)

    def attacked(sites):
        return hostile(sites, ["c"], huge, loss=1.0)

    def silent(request):
        raise RuntimeError("gone")

    with pytest.warns(DataWarning, match=r"site c sent an update that breaks the supervised: .*; round . of the"):
        defended = tuned(attacked).state_dict()
    with pytest.warns(DataWarning, match="site c gave no answer"):
        alone = tuned(lambda sites: {**sites, "c": silent}).state_dict()
    assert same(defended, alone)
    with (
        pytest.warns(DataWarning, match=r"site [ab] sent an update that cannot be used"),
        pytest.raises(RunError, match=r"2 of 3 sites failed .*\(a, b\).*that of site c"),
    ):
        tuned(attacked, probed=False)


def test_a_huge_control_variate_is_shortened():
    """1, 2 and 3e38 of one example each: five times the median is 10, so c = 13 / 3. Unbounded, it is 1e38.

    Where c's update was not used, neither is that: (1 + 2) / 2.
    """

    def mean(bound, used="abc"):
        server = ControlVariates({"w": tensor(0.0)}, bound)
        for site, value in (("a", 1.0), ("b", 2.0), ("c", 3e38)):
            server.receive(site, 1, to_bytes({"w": tensor(value)}))
        server.keep(used, "round 1 of the fedit")
        return load(server.send())["w"].item()

    with pytest.warns(DataWarning, match=r"c sent a control variate 1\.5e\+38 times as long as the median of"):
        assert mean(5.0) == approx(13 / 3)
    assert mean(0.0) == approx(1e38) and mean(5.0, used="ab") == approx(1.5)


def test_a_sites_control_variate_is_held_to_the_bound_of_the_averaging(adapted, ask):
    """c sends 100 for all of its c_k. Bounded, the c of round 2 is (1 + 1 + 5) / 3 times the longer honest c_k at most.

    Unbounded it is 33 in every place.
    """
    heard = []

    def watched(site):
        def answer(request):
            heard.append((load(request.state), reply := site(request)))
            return reply

        return answer

    def lying(site):
        def answer(request):
            reply = site(request)
            state = {name: torch.full_like(c, 100.0) for name, c in load(reply.state).items()}
            return msgspec.structs.replace(reply, state=to_bytes(state))

        return answer

    for bound in (5.0, 0.0):
        averaging = Aggregation(bound=bound)
        config = Averaging(rounds=2, local_steps=1, batch_size=1, learning_rate=1e-4, aggregation=averaging)
        model, processor = adapted()
        sites = {name: watched(LocalSupervised(model, processor, [ask(0)], config, scaffold())) for name in "abc"}
        heard.clear()
        with pytest.warns(DataWarning) if bound else contextlib.nullcontext() as told:
            train_supervised(InProcessEngine(sites | {"c": lying(sites["c"])}), model, config, scaffold(), seed=0)
        assert not bound or {str(each.message)[:30] for each in told} == {"site c sent a control variate "}
        honest = max(length_of(load(reply.state)) for _, reply in heard[:2])
        shared = length_of(heard[3][0])
        assert 0 < shared < 7 / 3 * honest if bound else shared > 1000 * honest

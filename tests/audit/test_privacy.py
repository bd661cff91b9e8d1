"""The long forms of the attacks on private reward models; figures on real features are in docs/privacy.md."""

import random
import string
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from accord.data.easy_vqa import load_easy_vqa
from accord.federation.aggregation import Aggregation
from accord.federation.messages import ScoreItem, ScoreRange, ScoreRequest, UpdateRequest, to_turns
from accord.federation.site import Site
from accord.federation.weights import to_bytes, trainable_weights
from accord.models.load import LoraSettings
from accord.rewards import private
from accord.rewards import private_adapter as adapter_module
from accord.rewards.accounting import Mechanism, calibrate, epsilon_of, label_mechanism
from accord.rewards.audit import agreement, apart, draw_bits, guess_bound, lira, margins, one_run, presence, surrogate
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, pair_features, private_head, private_standardisation
from accord.rewards.private_adapter import fresh_model, private_adapter, trained_weights
from accord.rewards.private_adapter import pair_gradients as gradients_of
from accord.rewards.private_labels import draw_flips, label_head, randomise
from accord.routing import private_fit
from accord.routing.fit import LocalRouterTraining
from accord.routing.private_fit import Guarantee, pair_gradients
from accord.routing.router import RouterConfig, RouterNetwork
from accord.types import PreferencePair, vqa_prompt

pytest.importorskip("dp_accounting")
pytest.importorskip("opacus")

SITE = Privacy(dimensions=0, steps=60, sampling=0.05, learning_rate=8.0)
PAID = Sigmas(gradient=1.5, projection=0.0, standardisation=0.0)
STATED = epsilon_of([Mechanism(1.5, 0.05, 60)], 1e-6)
"""ε of `PAID` at δ = 1e-6, 1.55: 60 releases at a rate of 0.05."""

SIGMAS = calibrate(Privacy())
"""What the defaults pay for, ε = 8."""

SEEDS = range(5)


def random_pairs(count, seed, features=1000):
    return torch.randn(count, 2, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def training(sigmas=PAID, privacy=SITE):
    def train(features, number):
        return private_head(features, torch.arange(len(features)), privacy, sigmas, SecretNoise(number.to_bytes(32)))

    return train


def bounds(train):
    """Audit a build with 500 canaries beside 50 pairs, five times."""
    return [one_run(random_pairs(50, 1), random_pairs(500, 2), train, seed=seed) for seed in SEEDS]


@pytest.mark.audit
def test_an_honest_build_is_believed():
    """T20: the lower bound of 95 % is below the stated ε, five times of five."""
    assert max(bounds(training())) <= STATED


@pytest.mark.audit
@pytest.mark.parametrize("wrong", ["no noise", "a wrong sampling rate", "no clipping"])
def test_a_sabotaged_build_is_caught(wrong, monkeypatch):
    """T20: four times of five at least the bound is above the ε that was stated.

    The wrong rate: a step takes all units, and is accounted for as if it took one in twenty. Without clipping gradients
    are as long as the answers make them. A tenth of the noise is too much to be caught: two times of five.
    """
    sigmas, privacy = PAID, SITE
    if wrong == "no noise":
        sigmas = Sigmas(0, 0, 0)
    elif wrong == "a wrong sampling rate":
        privacy = Privacy(dimensions=0, steps=60, sampling=1.0, learning_rate=8.0)
    else:
        monkeypatch.setattr(private, "to_sphere", lambda rows: rows)
        monkeypatch.setattr(private, "clip_rows", lambda rows, limit: rows)
    assert sum(bound > STATED for bound in bounds(training(sigmas, privacy))) >= 4


@pytest.mark.audit
def test_a_build_with_a_projection():
    """T20: what it is projected by is paid for. Believed with the noise, five times of five, and caught without."""
    privacy = Privacy(dimensions=400, steps=60, sampling=0.05, learning_rate=8.0)
    sigmas = Sigmas(gradient=1.5, projection=6.0, standardisation=0.0)
    stated = epsilon_of([Mechanism(1.5, 0.05, 60), Mechanism(6.0)], 1e-6)
    assert max(bounds(training(sigmas, privacy))) <= stated
    assert sum(bound > stated for bound in bounds(training(Sigmas(0, 0, 0), privacy))) >= 4


LABELS = Privacy(epsilon=1.0, unit="label", dimensions=0, steps=60)
TOLD = label_mechanism(LABELS)
"""Randomised response with all of ε = 1: f = 0.269."""


def label_bounds(flip, stages):
    """Audit labels with 1,000 canaries beside 50 pairs, five times; flipped with `flip`, and trained for `TOLD`.

    Which answer of a canary won is drawn by lot, and guessed from its margin.
    """
    features = torch.cat([random_pairs(1000, 2, features=3000), random_pairs(50, 1, features=3000)])
    privacy, found = replace(LABELS, stages=stages), []
    for seed in SEEDS:
        first, noise = draw_bits(1000, seed), SecretNoise(seed.to_bytes(32))
        won = [1 - int(it) for it in first] + [0] * 50
        true = [PreferencePair([], f"{k}", f"{1 - k}", (), f"{n}") for n, k in enumerate(won)]
        noisy = randomise(true, draw_flips(len(true), flip, noise))
        order = torch.tensor([[int(pair.chosen), int(pair.rejected)] for pair in noisy])
        head = label_head(features[torch.arange(1050)[:, None], order], TOLD.flip, privacy, noise)
        found.append(guess_bound(margins(head, features[:1000]), first))
    return found


@pytest.mark.audit
@pytest.mark.parametrize("stages", [1, 2])
def test_honest_labels_are_believed(stages):
    """T20: of one stage and of PROPS the lower bound is below the stated ε, five times of five."""
    assert max(label_bounds(TOLD.flip, stages)) <= epsilon_of([TOLD], 0.0)


@pytest.mark.audit
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["never", "half as often"])
def test_labels_that_are_flipped_too_seldom_are_caught(share, stages):
    """T20: never, or half as often as is stated, four times of five at least."""
    assert sum(bound > epsilon_of([TOLD], 0.0) for bound in label_bounds(share * TOLD.flip, stages)) >= 4


ROUTER = RouterConfig(
    layers=1, width=8, heads=1, rounds=1, local_steps=60, pairs_per_site=10_000, learning_rate=1e-4,
    aggregation=Aggregation(),
)  # fmt: skip
"""11,000 weights of 1,000 features; its rate is so low that a unit's gradient stays what it was."""


class Drawn:
    """An encoder whose states are random, of two tokens in 1,000 dimensions; an answer is its number."""

    features, model = 1000, SimpleNamespace(device=torch.device("cpu"))
    states = torch.randn(1100, 2, 1000, generator=torch.Generator().manual_seed(3))

    def __call__(self, prompts, images, completions):
        hidden = self.states[[int(text) for texts in completions for text in texts]]
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.bool)


def router_bounds(sigma=1.5, sampling=0.05, *, copies=1, unit="person"):
    """Audit a site's answer to a request for 60 steps, with 500 canaries beside 50 persons, five times.

    A person has so many copies of one pair, and is guessed by how present its gradient is in the answer.
    """
    torch.manual_seed(0)
    network = RouterNetwork(1000, 2, ROUTER)
    pairs = [PreferencePair([], f"{2 * n}", f"{2 * n + 1}", (), f"{n}", person=f"{n}") for n in range(550)]
    mask = torch.ones(1100, 2, dtype=torch.bool)
    gradients = pair_gradients(network, Drawn.states, mask, torch.arange(550), 0)
    assert gradients.norm(dim=1).min() > 0.1  # all are clipped
    weights, found = trainable_weights(network), []
    for seed in SEEDS:
        inside, noise = draw_bits(500, seed), SecretNoise(seed.to_bytes(32))
        there = [pair for pair, taken in zip(pairs, [*inside.tolist(), *[True] * 50], strict=True) if taken]
        guarantee = Guarantee(unit, sampling, sigma, 0.1, "", lambda _digest, _steps, make, noise=noise: make(noise))
        site = LocalRouterTraining(Drawn(), there * copies, 0, 2, ROUTER, guarantee)
        change = load(site(UpdateRequest("r", "router", 0, to_bytes(weights), seed)).change)
        moved = torch.cat([change[name].flatten() for name in weights]).double()
        found.append(guess_bound(presence(-moved, gradients)[:500], inside))
    return found


@pytest.mark.audit
def test_an_honest_router_is_believed():
    """T20: of persons with one pair, and with 16, the lower bound is below the stated ε, five times of five."""
    assert max(router_bounds() + router_bounds(copies=16)) <= STATED


@pytest.mark.audit
@pytest.mark.parametrize("wrong", ["no noise", "a tenth of the noise", "a wrong sampling rate", "no clipping", "pairs"])
def test_a_sabotaged_router_is_caught(wrong, monkeypatch):
    """T20: four times of five at least.

    The wrong rate: a step takes one of two units, and is accounted for as if it took one in twenty. "pairs": each of
    a person's 16 pairs is drawn and clipped for itself.
    """
    if wrong == "no clipping":
        monkeypatch.setattr(private_fit, "clip_rows", lambda rows, limit: rows)
    built = {
        "no noise": {"sigma": 0.0},
        "a tenth of the noise": {"sigma": 0.15},
        "a wrong sampling rate": {"sampling": 0.5},
        "pairs": {"copies": 16, "unit": "pair"},
    }
    assert sum(bound > STATED for bound in router_bounds(**built.get(wrong, {}))) >= 4


ADAPTER = Privacy(dimensions=0, steps=60, sampling=0.05, learning_rate=1e-6, clip=0.1)


def fresh_adapter():
    """Return a shipped model with a new adapter, always the same."""
    return fresh_model("accord/text-llama", LoraSettings(rank=8, alpha=16), SecretNoise(bytes(32)))


@lru_cache
def canaries_of_letters():
    """Return 400 pairs of random letters, and the gradients of each; the first 350 are canaries.

    They are those of 2,000 whose gradients are the least in each other's span.
    """
    lot = random.Random(0)

    def letters(count):
        return "".join(lot.choices(string.ascii_letters + string.digits + string.punctuation + " ", k=count))

    pairs = [
        PreferencePair([{"role": "user", "content": letters(20)}], letters(4), letters(4), (), f"{n}")
        for n in range(2000)
    ]
    with gradients_of(fresh_adapter()) as gradients:
        rows = torch.cat([gradients(pairs[start : start + 50]) for start in range(0, 2000, 50)])
    long = (rows.norm(dim=1) > 2 * ADAPTER.clip).nonzero()[:, 0]  # these are clipped
    chosen = long[apart(rows[long], 400)]
    chosen = chosen[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    return [pairs[n] for n in chosen.tolist()], rows[chosen].double()


def adapter_bounds(sigma=1.5, privacy=ADAPTER, *, copies=1, final=False):
    """Audit a shipped model's adapter with 350 canaries beside 50 units, five times.

    A unit has so many copies of one pair. It is guessed by how present its gradient is in those that Adam is given,
    which the guarantee covers; or, with `final`, in how far the adapter has moved. The rate is so low that the gradient
    stays what it was.
    """
    pairs, rows = canaries_of_letters()
    found = []
    for seed in SEEDS:
        inside, model = draw_bits(350, seed), fresh_adapter()
        there = [pair for pair, taken in zip(pairs, [*inside.tolist(), *[True] * 50], strict=True) if taken]
        weights = list(trained_weights(model).values())
        before, summed = flat(weights), torch.zeros(rows.shape[1]).double()

        def watch(weights=weights, summed=summed):
            summed += flat([weight.grad for weight in weights])

        unit, noise = torch.arange(len(there)).repeat(copies), SecretNoise(seed.to_bytes(32))
        private_adapter(model, there * copies, unit, privacy, sigma, noise, on_step=watch, pairs_at_once=64)
        seen = before - flat(weights) if final else summed
        found.append(guess_bound(presence(seen, rows)[:350], inside))
    return found


def flat(tensors):
    """Return tensors as one vector that later steps do not change."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double()


@pytest.mark.audit
def test_an_honest_adapter_is_believed():
    """T20: of units with one pair, and with four, the lower bound is below the stated ε, five times of five.

    By the adapter alone, too. But that guess is too weak to be sure of a build without noise: three times of five.
    """
    assert max(adapter_bounds() + adapter_bounds(copies=4) + adapter_bounds(final=True)) <= STATED


@pytest.mark.audit
@pytest.mark.parametrize("wrong", ["no noise", "a tenth of the noise", "a wrong sampling rate", "no clipping", "pairs"])
def test_a_sabotaged_adapter_is_caught(wrong, monkeypatch):
    """T20: four times of five at least; as of the router. "pairs": each of a unit's 16 pairs is clipped for itself."""
    if wrong == "no noise":
        bounds = adapter_bounds(sigma=0.0)
    elif wrong == "a tenth of the noise":
        bounds = adapter_bounds(sigma=0.15)
    elif wrong == "a wrong sampling rate":
        bounds = adapter_bounds(privacy=replace(ADAPTER, sampling=0.5))
    elif wrong == "no clipping":
        monkeypatch.setattr(adapter_module, "clip_rows", lambda rows, limit: rows)
        bounds = adapter_bounds()
    else:
        whole = adapter_module.unit_gradients

        def alone(gradients, pairs, units, clip, at_once):
            return whole(gradients, pairs, [[place] for unit in units for place in unit], clip, at_once)

        monkeypatch.setattr(adapter_module, "unit_gradients", alone)
        bounds = adapter_bounds(copies=16)
    assert sum(bound > STATED for bound in bounds) >= 4


def features_of(checkpoint):
    """Return what a shipped model makes of 600 questions about pictures and two of their answers, `[600, 2, D]`."""
    asked = [q for q in load_easy_vqa() if q.split == "private"][:600]
    answers = {}
    for q in asked:
        answers.setdefault(q.question_type, []).append(q.answer)
    pairs = [
        PreferencePair(
            vqa_prompt(q.text), q.answer, next(a for a in answers[q.question_type] if a != q.answer), (q.image,), q.id,
            q.question_type, True,
        )
        for q in asked
    ]  # fmt: skip
    return pair_features(RewardModel.from_checkpoint(checkpoint), pairs).double()


@pytest.mark.audit
def test_membership_of_real_pairs():
    """LiRA with 16 shadow heads: with the noise of ε = 8 it tells members no better than a coin, within five points."""
    hidden = lira(features_of("accord/llava-siglip-qwen2"), training(SIGMAS, Privacy()), shadows=16, targets=4, seed=0)
    assert 0.45 < hidden.auc < 0.55 and hidden.at_01 < 0.03


class Head:
    """A private head on known features `[N, 2, D]`, standardised as such a site's is; a candidate is "pair answer"."""

    rows_at_once = 512

    def __init__(self, features, head, noise):
        self.raw = features @ head
        unit = torch.arange(len(features))
        self.standardisation = private_standardisation(self.raw, unit, SIGMAS.standardisation, noise)

    def score(self, prompts, images, completions):
        places = [[[int(word) for word in text.split()] for text in texts] for texts in completions]
        return [self.standardisation(torch.stack([self.raw[n, m] for n, m in each])).float() for each in places]


def replies(model, count, scores):
    """Ask a site about both answers of the first pairs: what it sends, `[count, 2]`, in the recipe's form."""
    items = [ScoreItem([], to_turns([{"role": "user", "content": f"{n}"}]), [f"{n} 0", f"{n} 1"]) for n in range(count)]
    reply = Site("a", model, score_range=scores).answer(ScoreRequest("s", {}, items))
    return torch.tensor(reply.scores, dtype=torch.float64)


def copied(states, told, scores, kind):
    """Copy a head from replies `[P, 2]`: what stands on a bound is left out, and the sigmoid is undone."""
    if kind == "ranks":
        differ = told[:, 0] != told[:, 1]
        return surrogate(states[differ], told[differ], "ranks")
    told = (told - scores.low) / (scores.high - scores.low)
    if kind == "8 bits":
        told = (told * 255).round() / 255
    within = (told > 0) & (told < 1)
    known = told[within].logit() if scores.form == "sigmoid" else told[within]
    return surrogate(states[within][:, None], known[:, None], "exact")


@pytest.mark.audit
@pytest.mark.parametrize(
    ("scores", "least"),
    [
        (ScoreRange(), {"exact": 0.98, "8 bits": 0.97, "ranks": 0.75}),
        (ScoreRange(form="sigmoid"), {"exact": 0.98, "8 bits": 0.97, "ranks": 0.9}),
    ],
    ids=["clip", "sigmoid"],
)
def test_extraction_from_real_features(scores, least):
    """T21: a head is copied from what a site sends: standardised with noise, and in the range of its recipe.

    What was learnt of the replies to one half of the questions is tried on the other. By the default range, 0 to 2,
    half of the replies are 0: they are below the site's mean. The sigmoid hides none.
    """
    features = features_of("accord/idefics3")
    known, fresh = features[:300], features[300:]
    head = training(SIGMAS, Privacy())(features, 0)
    told = replies(Head(features, head, SecretNoise(bytes(32))), 300, scores)
    within = ((told > scores.low) & (told < scores.high)).double().mean()
    assert told.min() >= scores.low and told.max() <= scores.high
    assert 0.4 < within < 0.5 if scores.form == "clip" else within > 0.9
    for kind, share in least.items():
        assert agreement(copied(known, told, scores, kind), head, fresh) > share, kind

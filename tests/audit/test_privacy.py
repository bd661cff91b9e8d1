"""The long forms of the attacks on private reward models; figures on real features are in docs/privacy.md."""

import pytest
import torch

from accord.data.easy_vqa import load_easy_vqa
from accord.federation.messages import ScoreItem, ScoreRange, ScoreRequest, to_turns
from accord.federation.site import Site
from accord.rewards import private
from accord.rewards.accounting import Mechanism, calibrate, epsilon_of
from accord.rewards.audit import agreement, lira, one_run, surrogate
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import Privacy, Sigmas, pair_features, private_head, private_standardisation
from accord.types import PreferencePair, vqa_prompt

pytest.importorskip("dp_accounting")

SITE = Privacy(dimensions=0, steps=60, sampling=0.05, learning_rate=8.0)
PAID = Sigmas(gradient=1.5, projection=0.0, standardisation=0.0)
STATED = epsilon_of([Mechanism(1.5, 0.05, 60)], 1e-6)
"""ε of `PAID` at δ = 1e-6, 1.55: 60 releases at a rate of 0.05."""

SIGMAS = calibrate(Privacy())
"""What the defaults pay for, ε = 8."""

SEEDS = range(5)


def random_pairs(count, seed):
    return torch.randn(count, 2, 1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from accord.data.images import load_image
from accord.errors import DataError, RecipeError
from accord.rewards import private
from accord.rewards.model import RewardModel
from accord.rewards.noise import SecretNoise
from accord.rewards.private import (
    Privacy,
    Sigmas,
    clip_rows,
    contributions,
    pair_features,
    private_head,
    private_projection,
    private_standardisation,
    to_sphere,
    unit_index,
)
from accord.types import vqa_prompt

SILENT = Sigmas(0, 0, 0)


def noise(n=0):
    return SecretNoise(bytes([n] * 32))


def rows(count, features, seed=0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learnable(count, features, seed=0, sharpness=3.0):
    """Pairs whose chosen answer is drawn by Bradley–Terry from a fixed head; `[N, 2, D]`."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(features, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    answers = torch.randn(count, 2, features, generator=generator, dtype=torch.float64)
    score = sharpness * answers @ (truth / truth.norm())
    right = torch.rand(count, generator=generator) < torch.sigmoid(score[:, 0] - score[:, 1])
    return torch.where(right[:, None, None], answers, answers.flip(1))


@pytest.mark.parametrize("clip", [0.1, 0.5, 1e9])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_no_unit_adds_more_than_the_clip(clip, scale):
    """T19: over pairs alone, and over persons who have between one and many."""
    data = scale * rows(200, 16)
    for unit in (torch.arange(200), torch.randint(0, 23, (200,), generator=torch.Generator().manual_seed(1))):
        found = contributions(5 * rows(1, 16, seed=2)[0], data, unit, 200, clip)
        assert found.norm(dim=1).max() <= clip * (1 + 1e-6)
    assert clip_rows(data, clip).norm(dim=1).max() <= clip * (1 + 1e-6)


def test_contributions_are_those_of_a_loop():
    """T19: by autograd, a pair after the other; a person's pairs are summed before they are clipped."""
    data, theta = rows(12, 5), rows(1, 5, seed=1)[0]

    def gradient(row):
        leaf = theta.clone().requires_grad_()
        (found,) = torch.autograd.grad(-logsigmoid(leaf @ row), leaf)
        return found

    alone = torch.stack([gradient(row) for row in data])
    torch.testing.assert_close(contributions(theta, data, torch.arange(12), 12, 1e9), alone, rtol=1e-5, atol=1e-12)
    unit = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 3, 3, 3])
    together = torch.stack([alone[unit == u].sum(0) for u in range(4)])
    assert together[2].norm() == 0 and together[0].norm() > 0.7
    clipped = torch.stack([g * min(1, 0.7 / max(g.norm().item(), 1e-12)) for g in together])
    torch.testing.assert_close(contributions(theta, data, unit, 4, 0.7), clipped, rtol=1e-5, atol=1e-12)


def test_without_noise_and_clipping_it_is_gradient_descent():
    """T19: σ = 0, C large and q = 1 is plain full-batch descent on the mean loss of what is projected."""
    features = learnable(60, 6)
    privacy = Privacy(clip=1e9, sampling=1.0, steps=8, learning_rate=2.0, dimensions=0)
    found = private_head(features, torch.arange(60), privacy, SILENT, noise())
    difference = to_sphere(features[:, 0] - features[:, 1])
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    seen = []
    for _ in range(8):
        (gradient,) = torch.autograd.grad(-logsigmoid(difference @ theta).mean(), theta)
        theta = (theta - 2.0 * gradient).detach().requires_grad_()
        seen.append(theta.detach())
    torch.testing.assert_close(found, torch.stack(seen[4:]).mean(0), rtol=1e-9, atol=1e-12)


def test_without_noise_it_ranks_as_logistic_regression_does():
    """T19: within half a point of the best linear head, on 4,000 fresh pairs, with the settings as they are."""
    features, fresh = learnable(3000, 12), learnable(4000, 12, seed=1)
    found = private_head(features, torch.arange(3000), Privacy(dimensions=0, clip=1e9), SILENT, noise())
    best = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([best], max_iter=100)

    def closure():
        optimiser.zero_grad()
        loss = -logsigmoid((features[:, 0] - features[:, 1]) @ best).mean()
        loss.backward()
        return loss

    optimiser.step(closure)

    def accuracy(head):
        return ((fresh[:, 0] - fresh[:, 1]) @ head.detach() > 0).double().mean()

    assert accuracy(best) > 0.8
    assert abs(accuracy(found) - accuracy(best)) < 0.005


def test_noise_and_samples_are_the_key_s():
    features, unit = learnable(80, 6), torch.arange(80)
    privacy, sigmas = Privacy(steps=5, dimensions=4), Sigmas(1.0, 1.0, 1.0)
    steps = []
    one = private_head(features, unit, privacy, sigmas, noise(1), on_step=lambda: steps.append(0))
    assert torch.equal(one, private_head(features, unit, privacy, sigmas, noise(1))) and len(steps) == 5
    assert not torch.equal(one, private_head(features, unit, privacy, sigmas, noise(2)))
    sampled = private_head(features, unit, privacy, SILENT, noise(1))
    assert not torch.allclose(sampled, private_head(features, unit, privacy, SILENT, noise(2)))


def test_the_noise_of_a_step_by_hand():
    """One step, nothing to learn from: all pairs differ in nothing, so that w = −η σ C ξ / (q U), of std 0.1 · 4 · 0.5.

    η / (q U) = 10 / (0.5 · 200) = 0.1.
    """
    features = torch.ones(200, 2, 400)
    privacy = Privacy(steps=1, dimensions=0, sampling=0.5, learning_rate=10, clip=0.5)
    found = private_head(features, torch.arange(200), privacy, Sigmas(4, 0, 0), noise())
    assert found.mean().abs() < 5 * 0.2 / 20
    assert found.std().item() == pytest.approx(0.2, rel=5 / math.sqrt(800))


def test_a_unit_moves_the_second_moments_by_one_at_most():
    """What is released of them, before the noise: a person with forty pairs counts no more than one with a pair."""
    data = to_sphere(rows(41, 3))
    unit = torch.tensor([0] * 40 + [1])

    def moments(rows, unit):
        p = private_projection(rows, unit, 3, 0.0, noise())
        return torch.linalg.inv(p @ p.T)  # P Pᵀ = V Λ⁻¹ Vᵀ

    outer = data[:40].T @ data[:40]
    expected = outer / outer.norm() + data[40:].T @ data[40:]
    torch.testing.assert_close(moments(data, unit), expected, rtol=1e-6, atol=1e-9)
    assert (moments(data, unit) - data[40:].T @ data[40:]).norm() <= 1 + 1e-9
    torch.testing.assert_close(moments(data, torch.arange(41)), data.T @ data, rtol=1e-6, atol=1e-9)


def test_the_noise_of_the_second_moments_is_symmetric_and_of_its_size():
    """Of units that say nothing, M is σ Z alone; its largest eigenvalue is about 2 σ √D times √(1)."""
    data, sigma, size = torch.zeros(2, 100, dtype=torch.float64), 3.0, 100
    p = private_projection(data, torch.arange(2), 100, sigma, noise())
    assert p.shape == (100, 100) and p.isfinite().all()
    lengths = p.norm(dim=0)  # 1 / √max(λ, 2 σ √D)
    assert lengths.max().item() == pytest.approx(1 / math.sqrt(2 * sigma * math.sqrt(size)))
    assert lengths.min() ** -2 < 1.2 * 2 * sigma * math.sqrt(size)
    assert torch.equal(private_projection(data, torch.arange(2), 0, sigma, noise()), torch.eye(100).double())
    assert private_projection(data, torch.arange(2), 7, sigma, noise()).shape == (100, 7)


def test_the_noise_of_the_second_moments_by_hand():
    """Rows that are every direction 400 times: M = 400 I + σ Z. Z is symmetric, all its numbers of deviation 1."""
    size, sigma = 40, 3.0
    data = torch.eye(size, dtype=torch.float64).repeat(400, 1)  # none is below 400 − 2 σ √40, or raised
    p = private_projection(data, torch.arange(len(data)), size, sigma, noise())
    z = (torch.linalg.inv(p @ p.T) - 400 * torch.eye(size)) / sigma  # P Pᵀ = V Λ⁻¹ Vᵀ
    torch.testing.assert_close(z, z.T, rtol=0, atol=1e-6)
    drawn = z[torch.triu_indices(size, size).unbind()]
    assert abs(drawn.mean()) < 5 / math.sqrt(len(drawn)) and abs(drawn.std() - 1) < 5 / math.sqrt(2 * len(drawn))
    assert 0.5 < z.diagonal().std() < 1.5


def test_a_head_has_the_noise_of_its_projection(monkeypatch):
    """What was paid for it, and not that of the steps."""
    given = []
    project = private.private_projection
    monkeypatch.setattr(private, "private_projection", lambda *a: given.append(a[2:4]) or project(*a))
    private_head(learnable(40, 6), torch.arange(40), Privacy(steps=1, dimensions=4), Sigmas(1.0, 2.0, 3.0), noise())
    assert given == [(4, 2.0)]


@pytest.mark.parametrize(("centre", "spread"), [(0.0, 1.0), (40.0, 0.3), (-7.0, 50.0)])
def test_standardisation_without_noise_is_mean_and_deviation(centre, spread):
    scores = centre + spread * rows(2000, 2, seed=3)
    found = private_standardisation(scores, torch.arange(2000), 0.0, noise())
    assert found.mean == pytest.approx(scores.mean().item(), abs=1e-6 * (1 + abs(centre)))
    assert found.deviation == pytest.approx(scores.std(correction=0).item(), rel=0.02)  # clipped at 8 S


class Planted:
    """Noise that is 0 but for one number: that of a place in one of the releases, which are counted from 0."""

    def __init__(self, release, place, value):
        self.planted, self.asked = (release, place, value), []

    def uniform(self, count):
        return torch.arange(count) / count

    def normal(self, *shape):
        found = torch.zeros(*shape, dtype=torch.float64)
        release, place, value = self.planted
        if len(self.asked) == release:
            found.view(-1)[place] = value
        self.asked.append(shape)
        return found


@pytest.mark.parametrize(
    ("release", "place", "count", "mean", "deviation"),
    [
        (0, 30 + 3, 50, 0.0, 4.0),  # octave 3 in place of 0: S = 8, and the deviation is S / 2 at least
        (1, 64 + 5, 100, 24.0, 8.0),  # the fifth bin of 8 S: b = 40; from it the mean is 16 S at most, scores 8 S
    ],
)
def test_noise_in_a_histogram_decides_where_it_is_larger_than_the_count(release, place, count, mean, deviation):
    """Of 100 pairs with scores ±1 all fall into the middle bin, their 50 couples into octave 0: the noise σ z changes
    nothing where it is less by one than what is there, and everything where it is more by one."""
    scores = torch.tensor([1.0, -1.0]).double().expand(100, 2)
    unit = torch.arange(100)
    less, more = (
        private_standardisation(scores, unit, 2.0, Planted(release, place, (count + step) / 2)) for step in (-1, 1)
    )
    plain = private_standardisation(scores, unit, 0.0, noise())
    assert less == plain and plain.mean == 0 and plain.deviation == 1
    assert (more.mean, more.deviation) == (mean, deviation)


def test_noise_of_the_mean_and_of_the_variance_by_hand():
    """Of 100 pairs with scores ±1: S = 1, b = 0. σ z = 2 · 3 adds 16 · 6 / 100 to μ; it adds 64 · 6 / 100 to σ² = 1."""
    scores = torch.tensor([1.0, -1.0]).double().expand(100, 2)
    moved = private_standardisation(scores, torch.arange(100), 2.0, Planted(2, 0, 3.0))
    assert moved.mean == pytest.approx(0.96) and moved.deviation == pytest.approx(math.sqrt(1 + 0.96**2))
    planted = Planted(3, 0, 3.0)
    wider = private_standardisation(scores, torch.arange(100), 2.0, planted)
    assert wider.mean == 0 and wider.deviation == pytest.approx(math.sqrt(1 + 3.84))
    assert planted.asked == [(41,), (129,), (1,), (1,)]  # four releases, each with noise of its own


def test_standardisation_with_noise_is_near():
    """At the noise of ε = 1 on 2,000 pairs; of persons with four pairs each, too."""
    scores = 5 + 2 * rows(2000, 2, seed=4)
    for unit in (torch.arange(2000), torch.arange(2000) // 2):
        found = private_standardisation(scores, unit, 23.0, noise())
        assert found.mean == pytest.approx(5, abs=1.0)
        assert found.deviation == pytest.approx(2, rel=0.35)


def test_one_pair_moves_the_standardisation_by_what_the_noise_hides():
    """With S and b alike, the mean of one contribution is within 1, of 16 S with S ≤ 1, over 500 pairs, moved by 2."""
    scores = rows(500, 2, seed=5)
    hostile = scores.clone()
    hostile[7] = 1e30
    one, other = (private_standardisation(s, torch.arange(500), 0.0, noise()) for s in (scores, hostile))
    assert 0 < abs(one.mean - other.mean) <= 2 * 16 / 500 and math.isfinite(other.deviation)


@pytest.mark.parametrize("units", [300, 301])
def test_a_unit_is_in_one_couple(units):
    """Whatever one unit says, one difference changes; the odd unit out has one of its own."""
    scores, unit = rows(2 * units, 2, seed=6), torch.arange(units).repeat_interleave(2)
    plain = private._across(scores, unit, noise())
    assert len(plain) == (units + 1) // 2
    for changed in (0, 7, units - 1):
        hostile = scores.clone()
        hostile[unit == changed] = 1e30
        assert (private._across(hostile, unit, noise()) != plain).sum() == 1


def test_scores_that_differ_far_more_between_questions_are_not_clipped():
    """On shipped backbones a pair's scores differ by a hundredth of what questions' scores do: σ is the questions'."""
    scores = 100 * rows(2000, 1, seed=7) + rows(2000, 2, seed=8)
    found = private_standardisation(scores, torch.arange(2000), 23.0, noise())
    assert found.deviation == pytest.approx(100, rel=0.35)


def test_units(prefer):
    colours = ("red", "red", "green", "green")
    pairs = [prefer(n, colours[n], "blue", person=person) for n, person in enumerate("abba")]
    assert unit_index(pairs, "pair").tolist() == [0, 1, 2, 3]
    assert unit_index(pairs, "question").tolist() == [0, 0, 1, 1]  # each has an id of its own
    other = replace(pairs[1], prompt=vqa_prompt("is it red?"), question_id=pairs[0].question_id)
    assert unit_index([pairs[0], other], "question").tolist() == [0, 1]
    assert unit_index(pairs, "person").tolist() == [0, 1, 1, 0]
    with pytest.raises(DataError, match=r"1 of 4 pairs have no person.*add the column 'person'"):
        unit_index([*pairs[:3], replace(pairs[3], person="")], "person")


def test_features_are_what_the_head_reads(llava, prefer):
    torch.manual_seed(0)
    model = RewardModel.from_checkpoint(llava)
    pairs = [prefer(n // 2, "red", ("blue", "green")[n % 2]) for n in range(5)]
    told = []
    features = pair_features(model, pairs, prompts_at_once=2, on_batch=told.append)
    assert features.shape == (5, 2, model.features) and told == [4, 1]
    for pair, both in zip(pairs, features, strict=True):
        (expected,) = model.score([pair.prompt], [load_image(pair.image)], [[pair.chosen, pair.rejected]])
        found = model.standardisation(model.head(both).squeeze(-1).detach())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"delta": 0.5}, "delta must be at most 0.1, got 0.5"),
        ({"sampling": 1.5}, "sampling must be at most 1, got 1.5"),
        ({"epsilon": 1e9}, "epsilon must be at most 10000, got 1e\\+09; lower privacy.epsilon"),
        ({"dimensions": 10**8}, "dimensions must be at most 65536, got 1e\\+08"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"epsilon": math.inf}, "epsilon must be finite"),
        ({"ledger": "all.json"}, r"absolute path, got 'all\.json': .*write privacy\.ledger = '/.*all\.json'"),
    ],
)
def test_a_guarantee_that_is_none_is_refused(wrong, message):
    with pytest.raises(RecipeError, match=message):
        Privacy(**wrong)

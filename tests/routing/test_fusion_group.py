"""FedGRPO's fusions, which see one group at a time: scores [G, K] and weights [G, K] of one prompt's completions."""

import math

import pytest
import torch
from pytest import approx
from torch import tensor

from accord.alignment.grpo import AlignmentConfig, align
from accord.alignment.reward import FederatedReward, PerGroup
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreReply
from accord.models.load import load_model
from accord.routing.fusion import EPSILON, chunks, group_relative, halves, literal

ALL = [group_relative, literal, chunks, halves]
PARTS = [chunks, halves]
NAN = math.nan


@pytest.fixture(params=ALL, ids=lambda rule: rule.__name__)
def fuse(request):
    return request.param


@pytest.fixture
def case():
    """Scores of 4 sites for 6 completions, none absent; sites 0, 2 and 3 are the experts."""
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scores, tensor([[1.0, 0.0, 1.0, 1.0]] * 6) / 3


def same(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, equal_nan=True)


def test_a_site_without_weight_has_no_influence_wherever_it_stands(fuse, case):
    scores, weights = case
    other = scores.clone()
    other[:, 1] = 99.0
    same(fuse(other, weights), fuse(scores, weights))
    other[:, 1] = NAN
    same(fuse(other, weights), fuse(scores, weights))
    for order in ([1, 0, 2, 3], [0, 2, 3, 1], [0, 2, 3]):
        same(fuse(scores[:, order], weights[:, order]), fuse(scores, weights))


def test_all_absent_is_nan_and_not_zero(fuse, case):
    scores, weights = case
    assert fuse(torch.full_like(scores, NAN), weights).isnan().tolist() == [True] * 6
    assert fuse(scores, torch.zeros_like(weights)).isnan().tolist() == [True] * 6


def test_the_inputs_stay_as_they_were(fuse, case):
    scores, weights = case
    scores[0, 0] = NAN
    before = scores.clone(), weights.clone()
    fuse(scores, weights)
    same(scores, before[0])
    same(weights, before[1])


@pytest.mark.parametrize("rule", [group_relative, literal])
def test_the_order_of_sites_does_not_matter(rule, case):
    scores, weights = case
    scores[:, 3] = NAN
    order = [2, 3, 0, 1]
    same(rule(scores[:, order], weights[:, order]), rule(scores, weights))


@pytest.mark.parametrize("rule", [group_relative, literal])
def test_the_order_of_completions_carries_over(rule, case):
    scores, weights = case
    order = [3, 0, 5, 1, 2, 4]
    same(rule(scores[order], weights[order]), rule(scores, weights)[order])


@pytest.mark.parametrize("rule", [group_relative, literal])
def test_an_absent_expert_has_no_influence(rule, case):
    """As if it had never been chosen."""
    scores, weights = case
    scores[:, 2] = NAN
    same(rule(scores, weights), rule(scores[:, [0, 1, 3]], weights[:, [0, 1, 3]]))


@pytest.mark.parametrize("rule", [group_relative, halves])
def test_a_constant_that_a_site_adds_changes_nothing(rule, case):
    scores, weights = case
    same(rule(scores + tensor([5.0, 0.0, -7.0, 2.0]), weights), rule(scores, weights))


def test_the_scale_of_a_site_changes_nothing(case):
    """r, 3 r + 5 and r / 2 − 7: z differs by what ε is of a deviation, about 1e-4, which deviations of 1000 remove."""
    scores, weights = case
    factor, shift = tensor([1.0, 1.0, 3.0, 0.5]), tensor([0.0, 0.0, 5.0, -7.0])
    same(group_relative(scores * factor + shift, weights), group_relative(scores, weights), atol=1e-3)
    large = 1000 * scores
    same(group_relative(large * factor + shift, weights), group_relative(large, weights), atol=1e-6)


def test_group_relative_by_hand():
    """Expert 0: 1, 2, 3, mean 2, sample deviation 1: −1, 0, 1. Expert 1: 0, 0, 6, mean 2, deviation √12: −1/√3
    twice and 2/√3.

    Averaged: (−1 − 0.57735) / 2 = −0.78868, −0.28868, 1.07735. With expert 0 absent for the last completion its 1 and 2
    have mean 1.5 and deviation √½: ∓√½, and expert 1 alone judges the last.
    """
    scores, weights = tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 6.0]]), torch.full((3, 2), 0.5)
    assert group_relative(scores, weights).tolist() == approx([-0.78868, -0.28868, 1.07735], abs=2e-4)
    scores[2, 0] = NAN
    half = math.sqrt(0.5)
    expected = [(-half - 0.57735) / 2, (half - 0.57735) / 2, 1.15470]
    assert group_relative(scores, weights).tolist() == approx(expected, abs=2e-4)


def test_experts_count_alike_whatever_their_weight():
    scores = tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 6.0]])
    same(group_relative(scores, tensor([[0.9, 0.1]] * 3)), group_relative(scores, torch.full((3, 2), 0.5)))


def test_one_expert_alone_is_that_experts_standardised_scores(case):
    scores, _ = case
    only = tensor([[0.0, 0.0, 1.0, 0.0]] * 6)
    own = scores[:, 2]
    same(group_relative(scores, only), (own - own.mean()) / (own.std() + EPSILON))
    same(chunks(scores, only), own)
    same(halves(scores, only), own - own.mean())


def test_an_expert_with_one_opinion_says_nothing():
    """Deviation 0: z = 0 / ε; the other expert's −1/√2 and 1/√2 are halved. A group of one has no deviation either."""
    scores = tensor([[4.0, 1.0], [4.0, 3.0]])
    half = math.sqrt(0.5) / 2
    assert group_relative(scores, torch.full((2, 2), 0.5)).tolist() == approx([-half, half], abs=1e-4)
    assert group_relative(tensor([[3.0, 1.0]]), torch.full((1, 2), 0.5)).tolist() == [0.0]


@pytest.mark.parametrize("experts", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_printed_equations_are_zero(experts, dtype):
    """Σ_k (r_k − mean r) = 0 for whatever r, on any scale, absences included: exactly 0, else Adam would see it."""
    generator = torch.Generator().manual_seed(experts)
    for scale in (1e-3, 1.0, 1e3):
        scores = scale * torch.randn(64, experts, generator=generator, dtype=dtype)
        scores[::5, 0] = NAN
        assert literal(scores, torch.full_like(scores, 1 / experts)).tolist() == [0.0] * 64


def test_of_two_experts_one_always_says_1_and_the_other_minus_1():
    """Scores 0.3 and 0.9: mean 0.6, deviation 0.3. Their summed terms are 0, though expert 1 liked it and 0 did not."""
    scores = tensor([[0.3, 0.9]])
    terms = (scores - scores.mean()) / scores.std(correction=0)
    assert terms.tolist() == [approx([-1.0, 1.0])]
    assert literal(scores, torch.full((1, 2), 0.5)).tolist() == [0.0]


def test_parts_by_hand():
    """Five completions and two experts: the first three are expert 0's (0, 1, 5), the last two expert 2's (8, 6).

    Centred on their own means 2 and 7: −2, −1, 3 and 1, −1. With expert 2 absent its part is NaN.
    """
    scores = tensor([[0.0, 50, 9], [1, 50, 9], [5, 50, 9], [9, 50, 8], [9, 50, 6]])
    weights = tensor([[0.5, 0.0, 0.5]] * 5)
    assert chunks(scores, weights).tolist() == [0, 1, 5, 8, 6]
    assert halves(scores, weights).tolist() == [-2, -1, 3, 1, -1]
    scores[:, 2] = NAN
    same(chunks(scores, weights), tensor([0, 1, 5, NAN, NAN]))
    same(halves(scores, weights), tensor([-2, -1, 3, NAN, NAN]))


@pytest.mark.parametrize("rule", PARTS)
def test_experts_that_change_places_judge_each_others_part(rule, case):
    """Six completions, three experts: two each. In the order 3, 0, 2 site 3 judges completions 0 and 1, and so on."""
    scores, weights = case
    order = [3, 1, 0, 2]
    given = rule(scores[:, order], weights[:, order])
    for part, site in zip((slice(0, 2), slice(2, 4), slice(4, 6)), (3, 0, 2), strict=True):
        own = scores[part, site]
        same(given[part], own if rule is chunks else own - own.mean())


@pytest.mark.parametrize("rule", PARTS)
def test_more_experts_than_completions(rule):
    """Three experts and two completions: the third has an empty part."""
    scores = tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert rule(scores, torch.full((2, 3), 1 / 3)).tolist() == ([1.0, 5.0] if rule is chunks else [0.0, 0.0])


def by_length(factor):
    """A site that likes long or short answers."""
    return lambda request: ScoreReply(
        request.id, [[factor * len(c) for c in item.candidates] for item in request.items]
    )


@pytest.fixture
def learn(llava, ask, tmp_path):
    """Align a tiny policy without a KL term for two steps under a fusion; return by how much its weights moved."""

    def start(rule, experts=2):
        def route(prompts, images, completions):
            return torch.full((sum(map(len, completions)), experts), 1 / experts)

        engine = InProcessEngine({f"site {k}": by_length(1.0 + k) for k in range(experts)})
        reward = FederatedReward(engine, route, mode="soft", per_group=PerGroup(rule))
        config = AlignmentConfig(
            steps=2, prompts_per_step=2, group_size=4, learning_rate=1e-2, kl=0.0, max_completion_length=3,
            evaluate_every=0, save_every=0,
        )  # fmt: skip
        model, processor = load_model(llava)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        questions = [ask(0, "red"), ask(1, "blue")]
        after = align(model, processor, questions, reward, config, seed=0, out=tmp_path / rule.__name__).parameters()
        return max((a.detach() - b).abs().max().item() for a, b in zip(after, before, strict=True))

    return start


def test_nothing_is_learnt_from_the_printed_equations(learn):
    """The reward is 0 everywhere, so is every advantage, and so is the gradient: no weight moves by a bit."""
    assert learn(literal) == 0.0


@pytest.mark.parametrize("rule", [group_relative, *PARTS])
def test_something_is_learnt_from_the_others(learn, rule):
    assert learn(rule) > 1e-3

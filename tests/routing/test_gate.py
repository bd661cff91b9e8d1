import math
import random
from dataclasses import replace

import pytest
import torch
from pytest import approx
from torch import tensor

from accord.data.images import load_image
from accord.errors import CheckpointError, DataError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreReply
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.rewards.model import Standardisation
from accord.routing.anchors import Anchors, collect, pair_accuracy
from accord.routing.gate import (
    AnchoredConfig,
    GateConfig,
    GateNetwork,
    GateShape,
    anchored_prior,
    anchored_weights,
    correctness_weights,
    fit_anchored,
    fit_correctness,
    fit_preference_gate,
    log_weights,
    preference_loss,
    preference_weights,
)
from accord.routing.gated import AnchoredRouter, CorrectnessRouter, PreferenceGate
from accord.routing.router import RouterConfig, RouterNetwork

QUICK = GateConfig(steps=150)
FEW = AnchoredConfig(strengths=(0.01, 0.1, 1.0), folds=3)

GATES = {
    "preference": (lambda anchors: fit_preference_gate(anchors, QUICK, seed=0), preference_weights),
    "correctness": (lambda anchors: fit_correctness(anchors, QUICK), correctness_weights),
    "anchored": (lambda anchors: fit_anchored(anchors, FEW), anchored_weights),
}
"""Every head `Anchors -> GateNetwork`, and its weights `[N, 2, K]`; a new one joins here and obeys the laws below."""


@pytest.fixture(params=GATES)
def kind(request):
    return request.param


def routed_accuracy(anchors, weights):
    """The share of pairs that the score fused by `weights` `[N, 2, K]` ranks right."""
    return pair_accuracy(anchors.scores, weights).double().mean().item()


def learn(kind, anchors, asked=None):
    """Fit a head of `kind`; return its weights for `asked`, by default the anchors themselves."""
    fit, weigh = GATES[kind]
    return weigh(fit(anchors), asked or anchors)


def world(n=120, sites=3, seed=0):
    """N pairs of N / 2 questions in as many domains as sites; each site is right in its own, and guesses elsewhere.

    A prompt's features tell its domain, the client-id router knows it, too.
    """
    generator = torch.Generator().manual_seed(seed)
    questions = torch.arange(n) // 2
    own = torch.nn.functional.one_hot(questions % sites, sites)
    scores = torch.randn(n, 2, sites, generator=generator)
    scores[:, 0] += 3.0 * own
    features = torch.cat([own, torch.zeros(n, 1)], dim=1) + 0.3 * torch.randn(n, sites + 1, generator=generator)
    answers = features[:, None] + 0.1 * torch.randn(n, 2, sites + 1, generator=generator)
    return Anchors(scores, features, answers, questions, 2.0 * own[:, None].expand(n, 2, sites).float())


def columns(anchors, order):
    return replace(anchors, scores=anchors.scores[..., order], logits=anchors.logits[..., order])


def test_each_learns_whom_to_believe(kind):
    """Held out: everyone's mean ranks fewer right than the weights; the domain's own site counts most."""
    trained, held_out = world(), world(seed=1)
    weights = learn(kind, trained, held_out)
    assert routed_accuracy(held_out, weights) > routed_accuracy(held_out, torch.ones_like(weights)) + 0.05
    own = held_out.questions % 3
    assert (weights.mean(dim=1).argmax(dim=-1) == own).double().mean() > 0.85


def test_weights_are_weights(kind):
    weights = learn(kind, world())
    assert weights.shape == (120, 2, 3) and (weights >= 0).all() and not weights.requires_grad
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(120, 2))


def test_the_order_of_sites_does_not_matter(kind):
    anchors, order = world(), [2, 0, 1]
    torch.testing.assert_close(
        learn(kind, columns(anchors, order)), learn(kind, anchors)[..., order], atol=1e-4, rtol=0
    )


def test_a_site_alone_is_that_site(kind):
    assert (learn(kind, columns(world(), [1])) == 1.0).all()


def test_an_absent_site_gets_nothing_and_has_no_influence(kind):
    anchors = world()
    absent = replace(anchors, scores=anchors.scores.clone(), logits=anchors.logits.clone())
    absent.scores[..., 1] = torch.nan
    weights = learn(kind, absent)
    assert (weights[..., 1] == 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(120, 2))


def test_a_site_that_is_absent_from_some_anchors(kind):
    """The weights stay weights, and the site is still believed in its own domain."""
    anchors = world()
    anchors.scores[::4, :, 1] = torch.nan
    anchors.scores[1] = torch.nan
    held_out = world(seed=1)
    weights = learn(kind, anchors, held_out)
    assert weights.isfinite().all()
    own = weights[held_out.questions % 3 == 1].mean(dim=(0, 1))
    assert own.argmax() == 1


def test_scores_are_those_of_a_site_whatever_its_scale(kind):
    """R, 3 R + 5 and R / 2 − 7, each standardised by its own mean and deviation, are what R is."""
    anchors = world()
    raw = anchors.scores
    scaled = raw * tensor([1.0, 3.0, 0.5]) + tensor([0.0, 5.0, -7.0])

    def standardised(raw):
        each = [Standardisation(r.mean().item(), r.std().item())(r) for r in raw.unbind(dim=-1)]
        return replace(anchors, scores=torch.stack(each, dim=-1))

    torch.testing.assert_close(
        learn(kind, standardised(scaled), anchors), learn(kind, standardised(raw), anchors), atol=1e-3, rtol=0
    )


def test_nothing_to_learn_from(kind):
    """One answer of each pair is scored: no site has ranked any."""
    anchors = world()
    anchors.scores[:, 1] = torch.nan
    with pytest.raises(DataError, match="no site scored both answers of one of the 120 anchors"):
        learn(kind, anchors)


def test_preference_loss_by_hand():
    """α = (1/4, 3/4), gaps (2, -2): margin 1/2 - 3/2 = -1, loss log(1 + e). The second site away: margin 2."""
    logits = tensor([[0.0, math.log(3)]])
    assert preference_loss(logits, tensor([[2.0, -2.0]])).item() == approx(math.log(1 + math.e))
    assert preference_loss(logits, tensor([[2.0, math.nan]])).item() == approx(math.log(1 + math.exp(-2)))
    both = preference_loss(logits.expand(2, 2), tensor([[2.0, -2.0], [2.0, math.nan]]))
    assert both.item() == approx((math.log(1 + math.e) + math.log(1 + math.exp(-2))) / 2)


def test_correctness_is_the_rate_at_which_a_site_is_right():
    """Features that tell nothing; right in 3/4, 2/4 (a tie is not right) and 1/4 of the pairs it scored.

    The logits are ln 3, 0 and -ln 3, the weights 3 : 1 : 1/3, or 9/13, 3/13, 1/13.
    """
    gaps = tensor([[1.0, 1.0, 1.0], [2.0, 0.1, -1.0], [0.5, 0.0, -1.0], [-1.0, -1.0, -2.0]]).repeat(4, 1)
    scores = torch.stack([gaps, torch.zeros_like(gaps)], dim=1)
    scores = torch.cat([scores, torch.full((1, 2, 3), torch.nan)])
    anchors = Anchors(scores, torch.zeros(17, 2), torch.zeros(17, 2, 2), torch.arange(17))
    network = fit_correctness(anchors, GateConfig(steps=600, learning_rate=0.02, weight_decay=0.0))
    expected = tensor([9 / 13, 3 / 13, 1 / 13]).expand(17, 2, 3)
    torch.testing.assert_close(correctness_weights(network, anchors), expected, atol=1e-3, rtol=0)


def test_an_untrained_anchored_router_is_the_client_id_router():
    anchors = world()
    network = GateNetwork(GateShape("anchored", 4, 3))
    expected = anchored_prior(anchors).softmax(dim=-1)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(anchored_weights(network, anchors), expected)


def test_log_weights_by_hand():
    """softmax(ln 3, 0) = (3/4, 1/4); with 1 % of uniform: 0.7425 + 0.005 and 0.2475 + 0.005."""
    assert log_weights(tensor([math.log(3), 0.0])).exp().tolist() == approx([0.7475, 0.2525])
    assert log_weights(tensor([200.0, 0.0])).exp().tolist() == approx([0.995, 0.005])


def test_the_prior_is_the_mean_over_the_answers():
    """The chosen answer's weights (3/4, 1/4), the rejected one's (1/4, 3/4): equal logits."""
    logits = tensor([[[math.log(3), 0.0], [0.0, math.log(3)]]])
    one = Anchors(torch.zeros(1, 2, 2), torch.zeros(1, 3), torch.zeros(1, 2, 3), tensor([0]), logits)
    first, second = anchored_prior(one)[0].tolist()
    assert first == approx(second) == approx((math.log(0.7475) + math.log(0.2525)) / 2)


def test_anchors_that_say_nothing_leave_the_client_id_router():
    """All sites agree on every pair: whatever the weights, the loss is the same."""
    anchors = world()
    anchors.scores[:] = anchors.scores[..., :1]
    network = fit_anchored(anchors, FEW)
    assert network.trust.item() == approx(1.0, abs=1e-4)
    assert network.out.weight.abs().max() < 1e-4 and network.out.bias.abs().max() < 1e-4


def test_a_few_anchors_do_not_spoil_a_good_client_id_router():
    """Ten questions: the pull that they choose keeps what the client-id router knows; a gate has only them."""
    held_out = world(n=240, seed=1)
    alone = routed_accuracy(held_out, held_out.logits.softmax(dim=-1))
    few = world().take(torch.arange(20))
    assert routed_accuracy(held_out, learn("anchored", few, held_out)) > alone - 0.01
    assert routed_accuracy(held_out, learn("preference", few, held_out)) < alone - 0.02


def test_outside_all_domains_the_anchors_decide():
    """The client-id router knows nothing of domain 2 and guesses site 0; site 1 is the one that is right there."""

    def foreign(seed):
        anchors = world(n=240, seed=seed)
        there = anchors.questions % 3 == 2
        logits, scores = anchors.logits.clone(), anchors.scores.clone()
        logits[there] = tensor([3.0, 0.0, -3.0])
        scores[there] = scores[there][..., [0, 2, 1]]
        return replace(anchors, logits=logits, scores=scores), there

    (anchors, _), (held_out, there) = foreign(0), foreign(1)
    weights = learn("anchored", anchors, held_out)
    assert (weights[there].argmax(dim=-1) == 1).double().mean() > 0.8
    assert routed_accuracy(held_out.take(there), weights[there]) > 0.2 + routed_accuracy(
        held_out.take(there), held_out.logits[there].softmax(dim=-1)
    )


def test_of_two_sites_of_one_domain_the_anchors_find_the_careful_one():
    """The client-id router gives the twins 0 and 3 equal weight in domain 0; site 3 exchanges every other answer."""

    def twins(seed):
        anchors = world(n=240, seed=seed)
        twin = anchors.scores[..., 0].clone()
        swapped = torch.rand(240, generator=torch.Generator().manual_seed(seed)) < 0.5
        twin[swapped] = twin[swapped].flip(-1)
        logits = torch.cat([anchors.logits, anchors.logits[..., :1]], dim=-1)
        return replace(anchors, scores=torch.cat([anchors.scores, twin[..., None]], dim=-1), logits=logits)

    held_out = twins(1)
    weights = learn("anchored", twins(0), held_out)
    theirs = weights[held_out.questions % 3 == 0].mean(dim=(0, 1))
    assert theirs[0] > 4 * theirs[3]
    assert routed_accuracy(held_out, weights) > routed_accuracy(held_out, held_out.logits.softmax(dim=-1)) + 0.05


def test_one_question_chooses_the_strongest_pull():
    """No fold can be held out."""
    anchors = world().take(torch.arange(2))
    weak, strong = (fit_anchored(anchors, AnchoredConfig(strengths=s)) for s in ((0.01,), (0.01, 1e6)))
    assert weak.out.bias.abs().max() > 1e-2 > 1e-5 > strong.out.bias.abs().max()


def test_the_anchored_router_needs_a_client_id_router():
    with pytest.raises(DataError, match="no logits of a client-id router"):
        fit_anchored(replace(world(), logits=None), AnchoredConfig())


def test_fitting_leaves_the_generators_and_the_anchors_alone(kind):
    anchors, before = world(), world()
    states = torch.get_rng_state(), random.getstate()
    learn(kind, anchors)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(torch.equal(anchors.tensors()[name], each) for name, each in before.tensors().items())


@pytest.fixture(scope="module")
def encoder(checkpoints):
    return Encoder(*load_model(checkpoints["llava-clip-llama"]))


@pytest.fixture(scope="module")
def asked(encoder, prefer):
    """Six pairs about squares of four colours, scored by two sites; and the client-id router."""
    colours = ["red", "blue", "green", "yellow", "red", "blue"]
    pairs = [prefer(n, colour, colours[n - 1]) for n, colour in enumerate(colours)]

    def handler(sign):
        def answer(request):
            scores = [[sign * (len(c) + i) for i, c in enumerate(item.candidates)] for item in request.items]
            return ScoreReply(request.id, scores)

        return answer

    torch.manual_seed(0)
    network = RouterNetwork(32, 2, RouterConfig(layers=1, width=8, heads=2, rows_at_once=7)).eval()
    engine = InProcessEngine({"a": handler(1.0), "b": handler(-1.0)})
    return pairs, collect(engine, encoder, pairs, network), network


def route(router, pairs):
    return router(
        [pair.prompt for pair in pairs],
        [load_image(pair.images[0]) for pair in pairs],
        [[pair.chosen, pair.rejected] for pair in pairs],
    )


def opened(kind, encoder, client, head):
    if kind == "preference":
        return PreferenceGate(encoder, head, prompts_at_once=4)
    return (
        CorrectnessRouter(encoder, head, rows_at_once=5)
        if kind == "correctness"
        else AnchoredRouter(encoder, client, head)
    )


def test_a_router_gives_the_weights_that_its_head_gives_to_anchors(kind, encoder, asked):
    """`[N, K]` in the order of prompts and completions, whatever the batches."""
    pairs, anchors, client = asked
    fit, weigh = GATES[kind]
    head = fit(anchors)
    weights = route(opened(kind, encoder, client, head), pairs)
    assert weights.shape == (12, 2)
    torch.testing.assert_close(weights, weigh(head, anchors).flatten(0, 1), atol=1e-5, rtol=1e-4)
    assert weights.unique(dim=0).shape[0] > 1  # it tells the questions apart


def test_completions_in_other_numbers(kind, encoder, asked):
    """Three, one, none and two: rows stay with their prompts, and one prompt's weights do not depend on the others'."""
    pairs, anchors, client = asked
    router = opened(kind, encoder, client, GATES[kind][0](anchors))
    prompts, images = [p.prompt for p in pairs[:4]], [load_image(p.images[0]) for p in pairs[:4]]
    completions = [["red", "blue", ""], ["no"], [], ["green", "two"]]
    together = router(prompts, images, completions)
    alone = [router([p], [i], [c]) for p, i, c in zip(prompts, images, completions, strict=True) if c]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    if kind != "correctness":
        assert torch.equal(together[0], together[2]) and torch.equal(together[4], together[5])


def test_a_head_of_another_kind_is_refused(encoder, asked):
    with pytest.raises(CheckpointError, match="'correctness' was given, and 'preference' is needed"):
        PreferenceGate(encoder, GateNetwork(GateShape("correctness", 32, 2)))

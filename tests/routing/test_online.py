import math

import pytest
import torch
from PIL import Image
from pytest import approx
from safetensors.torch import load, save

from accord.errors import DataError, RecipeError
from accord.models.encoder import Encoder
from accord.models.load import load_model
from accord.routing.fusion import top1
from accord.routing.online import CURVATURE, OnlineConfig, OnlineRouter
from accord.routing.router import LearnedRouter, RouterConfig, RouterNetwork
from accord.types import vqa_prompt

F = torch.tensor([[2.0, 1.0]], dtype=torch.double)
"""One feature and the bias's 1; ‖f‖² = 5."""
PROMPTS = [vqa_prompt("what colour is it?"), vqa_prompt("is it red?")]
IMAGES = [Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")]
ANSWERS = [["red", "blue", "no idea at all"], ["yes"]]
SCALES = ("sigmoid", "raw")


@pytest.fixture(scope="module")
def encoder(checkpoints):
    return Encoder(*load_model(checkpoints["llava-clip-llama"]))


@pytest.fixture
def make(encoder):
    """Return a function that makes a router whose offline head is `head` `[K, D + 1]`."""

    def build(head, *, seed=0, **settings):
        head = torch.as_tensor(head)
        sites, size = head.shape
        network = RouterNetwork(32, sites, RouterConfig(layers=1, width=size - 1, heads=1))
        with torch.no_grad():
            network.head.weight.copy_(head[:, :-1])
            network.head.bias.copy_(head[:, -1])
        return OnlineRouter(encoder, network, OnlineConfig(**settings), seed=seed)

    return build


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def features(n, d, seed=0):
    return torch.cat([draw(n, d, seed=seed), torch.ones(n, 1, dtype=torch.double)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# The equations.


@pytest.mark.parametrize("scale", SCALES)
def test_the_blocks_are_the_whole_matrix(make, scale):
    """K = 3, D + 1 = 5: every g is a vector of 15 with zeros but in its site's place, and U is 15 × 15."""
    router = make(draw(3, 5).float(), scale=scale, regularisation=0.5, exploration=1.0)

    def gradients(given, head):  # [N, 3, 15], as they are defined
        rows = torch.zeros(len(given), 3, 15, dtype=torch.double)
        for n, f in enumerate(given):
            for k in range(3):
                s = (head[k] @ f).sigmoid()
                rows[n, k, 5 * k : 5 * k + 5] = f * (s * (1 - s) if scale == "sigmoid" else 1.0)
        return rows

    whole = 0.5 * torch.eye(15, dtype=torch.double)
    for t in range(4):
        given = features(6, 4, seed=t)
        arms, head = router.choose(given), router.head
        router.learn(t % 2)
        for g in gradients(given, head)[range(6), arms]:
            whole += torch.outer(g, g)
    probe = features(7, 4, seed=99)
    g = gradients(probe, router.head)
    expected = (0.5 * torch.einsum("nki,ij,nkj->nk", g, whole.inverse(), g)).sqrt()
    torch.testing.assert_close(router.deviation(probe), expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(torch.block_diag(*router.inverse), whole.inverse(), atol=1e-12, rtol=1e-10)


def test_a_sigmoid_step_by_hand(make):
    """φ_0 = 0: r̂ = ½ and g = ¼ f; of equal r̂ the first site is chosen. σ² = 5 / 16.

    U_0 = I + f fᵀ / 16, so U_0⁻¹ = I − (1/16) / (1 + 5/16) f fᵀ = I − f fᵀ / 21.
    ∂L = (½ − 1) ¼ f = −f / 8; bound 0.08 · 5 + 1 = 1.4; 0.7 / 1.4 = ½ of it: φ_0 moves by f / 16 = (1/8, 1/16).
    """
    router = make(torch.zeros(2, 2), regularisation=1.0, exploration=0.0, learning_rate=0.7)
    assert router.deviation(F)[0].tolist() == approx([math.sqrt(5 / 16)] * 2)
    assert router.choose(F).tolist() == [0]
    router.learn(1.0)
    torch.testing.assert_close(router.head, torch.tensor([[1 / 8, 1 / 16], [0, 0]], dtype=torch.double))
    eye = torch.eye(2, dtype=torch.double)
    torch.testing.assert_close(router.inverse, torch.stack([eye - F.T @ F / 21, eye]))


def test_raw_steps_by_hand(make):
    """φ_0 = 0, r = 1: U_0 = I + f fᵀ, φ = U_0⁻¹ f = f / 6; then the same site with r = 0: f / (1 + 2 · 5) = f / 11."""
    router = make(torch.zeros(2, 2), scale="raw", regularisation=1.0, exploration=0.0)
    for r, share in ((1.0, 6), (0.0, 11)):
        assert router.choose(F).tolist() == [0]
        router.learn(r)
        torch.testing.assert_close(router.head, torch.cat([F / share, 0 * F]))


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_the_raw_head_minimises_the_whole_loss(make, kl):
    """½ Σ (φ_k · f − r)² + λ/2 ‖φ − φ_0‖² + κ Σ KL(softmax z_0 ‖ softmax z), KL over the last round: gradient 0."""
    router = make(draw(3, 5).float(), scale="raw", regularisation=0.5, exploration=1.0, kl_to_offline=kl)
    seen, chosen, given = [], [], []
    for t in range(3):
        seen.append(features(6, 4, seed=t))
        given.append(draw(6, seed=50 + t).sigmoid())
        chosen.append(router.choose(seen[-1]))
        router.learn(given[-1])
    head = router.head.clone().requires_grad_()
    data = ((torch.cat(seen) * head[torch.cat(chosen)]).sum(1) - torch.cat(given)).square().sum() / 2
    now, before = (seen[-1] @ h.T for h in (head, router.offline))
    away = (before.softmax(-1) * (before.log_softmax(-1) - now.log_softmax(-1))).sum()
    (data + 0.25 * (head - router.offline).square().sum() + kl * away).backward()
    assert head.grad.abs().max() < 1e-6 < (router.head - router.offline).abs().max()


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_a_sigmoid_step_follows_the_gradient_of_the_stated_loss(make, kl):
    """From a head that is no longer φ_0, by 0.3 / ((0.08 + κ/2) mean ‖f‖² + λ) times torch's own gradient of L."""
    router = make(draw(3, 5).float(), regularisation=0.5, exploration=1.0, kl_to_offline=kl, learning_rate=0.3)
    for t in range(2):
        given, rewards = features(6, 4, seed=t), draw(6, seed=50 + t).sigmoid()
        arms, head = router.choose(given), router.head.clone().requires_grad_()
        router.learn(rewards)
    data = ((given @ head.T).sigmoid()[range(6), arms] - rewards).square().mean() / 2
    now, before = (given @ h.T for h in (head, router.offline))
    away = (before.softmax(-1) * (before.log_softmax(-1) - now.log_softmax(-1))).sum(-1).mean()
    (data + 0.25 * (head - router.offline).square().sum() + kl * away).backward()
    rate = 0.3 / ((CURVATURE + kl / 2) * given.square().sum(1).mean() + 0.5)
    torch.testing.assert_close(router.head, head.detach() - rate * head.grad)


def test_the_bound_of_the_curvature_is_one_and_is_tight():
    z = torch.linspace(-12, 12, 4001, dtype=torch.double)
    s = z.sigmoid()
    for r in (0.0, 0.3, 1.0):
        second = (s * (1 - s)).square() + (s - r) * s * (1 - s) * (1 - 2 * s)
        assert second.max() <= CURVATURE
    assert second.max() > 0.95 * CURVATURE


def test_the_kl_term_holds_the_head(make):
    """The same rounds with κ = 0, 1, 100: the farther the routing is pulled back, the nearer it stays."""
    for scale in SCALES:
        apart = []
        for kl in (0.0, 1.0, 100.0):
            router = make(draw(3, 5).float(), scale=scale, regularisation=0.01, kl_to_offline=kl)
            given = features(20, 4)
            for _ in range(10):
                router.choose(given)
                router.learn(0.0)
            now, before = ((given @ head.T).softmax(dim=-1) for head in (router.head, router.offline))
            apart.append((now - before).abs().max().item())
        assert apart[0] > apart[1] > 4 * apart[2], scale


def test_the_variance_shrinks_with_what_was_seen(make):
    """Raw, λ = 2: after n looks at f, σ² = 2 · 5 / (2 + 5 n) for the site that was chosen, and 5 for the other."""
    router = make([[1.0, 1.0], [0.0, 0.0]], scale="raw", regularisation=2.0, exploration=0.0)
    for n in range(5):
        assert router.deviation(F)[0].square().tolist() == approx([10 / (2 + 5 * n), 5.0])
        assert router.choose(F).tolist() == [0]
        router.learn(1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and feedback.


def test_how_often_a_site_is_drawn(make):
    """r̂ = (m, 0), both with σ² = 5: P(r̃_0 > r̃_1) = Φ(m / (ν √10)); for m = ν √10 that is Φ(1) = 0.8413.

    20,000 draws have a deviation of √(0.84 · 0.16 / 20000) = 0.0026; four of them are 0.0104.
    """
    router = make([[0.0, 0.5 * math.sqrt(10)], [0.0, 0.0]], scale="raw", exploration=0.5)
    arms = router.choose(F.expand(20_000, -1))
    assert (arms == 0).double().mean().item() == approx(0.8413, abs=0.0104)


def test_without_exploration_it_begins_as_the_offline_router(encoder):
    """[N, K] = [3 + 1, 3]: one-hot rows where the offline router's largest weights are."""
    torch.manual_seed(0)
    network = RouterNetwork(32, 3, RouterConfig(layers=2, width=8, heads=2, rows_at_once=3))
    given = PROMPTS, IMAGES, ANSWERS
    weights = OnlineRouter(encoder, network, OnlineConfig(exploration=0.0), seed=0)(*given)
    assert weights.dtype == torch.float32 and torch.equal(weights, top1(LearnedRouter(encoder, network)(*given)))


def test_what_waits_is_what_the_head_reads(encoder):
    """Two calls of 4 rows: 8 wait, each the penultimate vector and a 1; then learning leaves the network alone."""
    torch.manual_seed(0)
    network = RouterNetwork(32, 3, RouterConfig(layers=2, width=8, heads=2))
    router = OnlineRouter(encoder, network, seed=0)
    before = network.to_bytes()
    arms = [router(PROMPTS, IMAGES, ANSWERS).argmax(dim=-1) for _ in range(2)]
    assert torch.equal(router.arms, torch.cat(arms)) and router.features.shape == (8, 9)
    with torch.no_grad():
        logits = network(*encoder(PROMPTS, IMAGES, ANSWERS))
        assert torch.equal(network.head(network.penultimate(*encoder(PROMPTS, IMAGES, ANSWERS))), logits)
    torch.testing.assert_close((router.features @ router.offline.T)[4:].float(), logits)
    router.learn(0.0)
    assert (len(router.arms), len(router.features)) == (0, 0) and network.to_bytes() == before
    assert not torch.equal(router.head, router.offline)


def test_one_feedback_is_of_a_limited_number_of_observations(make):
    """10 looks at one f, of which 4 are drawn: σ² = 5 / (1 + 4 · 5) on the raw scale; with one reward each, too."""
    for feedback in (1.0, torch.ones(10)):
        router = make([[1.0, 1.0], [0.0, 0.0]], scale="raw", regularisation=1.0, exploration=0.0, observations=4)
        router.choose(F.expand(10, -1))
        router.learn(feedback)
        assert router.deviation(F)[0, 0].item() ** 2 == approx(5 / 21)


@pytest.mark.parametrize("scale", SCALES)
def test_one_number_is_that_number_for_each(make, scale):
    one, each = (make(draw(3, 5).float(), scale=scale) for _ in range(2))
    for router, feedback in ((one, 0.25), (each, torch.full((6,), 0.25))):
        router.choose(features(6, 4))
        router.learn(feedback)
    assert torch.equal(one.head, each.head)


def test_feedback_on_nothing_changes_nothing(make):
    router = make(draw(3, 5).float())
    before = router.state_dict()
    router.learn(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in router.state_dict().items())


@pytest.mark.parametrize("feedback", [torch.ones(5), torch.ones(6, 1), math.nan, torch.tensor([1.0] * 5 + [math.inf])])
def test_feedback_that_cannot_be_used(make, feedback):
    router = make(draw(3, 5).float())
    router.choose(features(6, 4))
    with pytest.raises(DataError, match=r"one for each of the 6 completions routed since the last, got .*; correct"):
        router.learn(feedback)
    assert len(router.arms) == 6


# ----------------------------------------------------------------------------------------------------------------------
# What it learns.


def play(router, rounds, feedback, *, rows=32):
    """Show completions of two kinds, f = (±3, 1); site 0 is right for + and 1 for −. Return the share right."""
    generator = torch.Generator().manual_seed(7)
    right = []
    for _ in range(rounds):
        signs = torch.randint(2, (rows,), generator=generator)
        given = torch.stack([3.0 - 6.0 * signs, torch.ones(rows)], dim=1).double()
        right.append((router.choose(given) == signs).double())
        router.learn(feedback(right[-1]))
    return [r.mean().item() for r in right]


@pytest.mark.parametrize("scale", SCALES)
def test_informative_feedback_turns_the_router_round(make, scale):
    """The offline head is wrong for every completion; told of each whether it was right, the router finds out."""
    wrong = [[-0.2, 0.0], [0.2, 0.0]]
    right = play(make(wrong, scale=scale, exploration=0.1), 150, lambda right: right)
    assert right[0] < 0.5 and sum(right[-20:]) / 20 > 0.97


def test_random_feedback_leaves_the_router_near_offline(make):
    """The offline head is right by z = ±3, r̂ = 0.95 and 0.05; a coin for each round puts neither past the other."""
    coin = torch.Generator().manual_seed(3)
    router = make([[1.0, 0.0], [-1.0, 0.0]])
    right = play(router, 300, lambda _: float(torch.randint(2, (), generator=coin)))
    assert sum(right) / 300 > 0.9
    assert not torch.equal(router.head, router.offline)


@pytest.mark.parametrize("scale", SCALES)
def test_a_resumed_router_is_bitwise_the_same(make, scale):
    """Six rounds, against three, the fourth broken off before its feedback, and the rest in another router."""
    head, settings = draw(3, 5).float(), {"scale": scale, "observations": 4, "kl_to_offline": 0.1}

    def go(router, rounds):
        for t in rounds:
            router.choose(features(6, 4, seed=t))
            if t != 3 or len(router.arms) > 6:
                router.learn(t % 2)

    whole, early, late = make(head, **settings), make(head, **settings), make(torch.zeros(3, 5), seed=5, **settings)
    go(whole, range(6))
    go(early, range(4))
    assert len(early.arms) == 6
    late.load_state_dict(load(save(early.state_dict())))
    go(late, range(4, 6))
    assert late.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(late.state_dict()[name], tensor), name


@pytest.mark.parametrize("scale", SCALES)
def test_the_order_of_the_sites_is_only_an_order(make, scale):
    head, order = draw(3, 5).float(), torch.tensor([2, 0, 1])
    plain, turned = (make(h, scale=scale, exploration=0.0, kl_to_offline=0.1) for h in (head, head[order]))
    for t in range(5):
        given = features(6, 4, seed=t)
        assert torch.equal(order[turned.choose(given)], plain.choose(given))
        for router in (plain, turned):
            router.learn(t % 2)
    torch.testing.assert_close(turned.head, plain.head[order], atol=1e-8, rtol=0)
    torch.testing.assert_close(turned.inverse, plain.inverse[order])


@pytest.mark.parametrize("scale", SCALES)
def test_one_site(make, scale):
    router = make([[0.5, 0.0]], scale=scale, kl_to_offline=1.0)
    assert router.choose(F.expand(4, -1)).tolist() == [0, 0, 0, 0]
    router.learn(0.0)
    assert (router.head @ F[0]).item() < 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularisation": 0.0}, "regularisation must be above 0, got 0.0; raise regularisation"),
        ({"learning_rate": -0.1}, "learning_rate must be at least 0, got -0.1"),
        ({"exploration": -1.0}, "exploration must be at least 0, got -1.0; raise exploration"),
        ({"kl_to_offline": math.inf}, "kl_to_offline must be finite"),
        ({"observations": 0}, "observations must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(RecipeError, match=message):
        OnlineConfig(**settings)

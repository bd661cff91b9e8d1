import math
from dataclasses import replace

import pytest
import torch
from privacy_attacks import (
    RELEASES,
    Inversion,
    auc,
    auc_interval,
    feature_likeness,
    hidden_states,
    invert,
    membership,
    pair_scores,
    psnr,
    raw,
    seen_update,
    ssim,
    total_variation,
    true_images,
    true_positive_rate,
    update_cosines,
    update_gradients,
)

from accord.data.images import load_image
from accord.errors import DataError, RecipeError
from accord.federation.weights import to_bytes, trainable_weights
from accord.models.encoder import Encoder
from accord.models.inputs import build_batch
from accord.models.load import load_model
from accord.rewards.model import RewardModel, Standardisation
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss
from accord.types import vqa_prompt


def numbers(*values):
    return torch.tensor(values, dtype=torch.double)


@pytest.mark.parametrize(
    ("members", "others", "expected"),
    [
        ((2, 3), (0, 1), 1.0),
        ((0, 1), (2, 3), 0.0),
        ((1, 3), (0, 1), 3.5 / 4),  # 1 > 0, 1 = 1, 3 > 0, 3 > 1
        ((1, 1), (1, 1, 1), 0.5),
    ],
)
def test_auc_counts_pairs_and_half_of_ties(members, others, expected):
    assert auc(numbers(*members), numbers(*others)) == expected
    assert auc(numbers(*others), numbers(*members)) == 1 - expected


def test_delong_interval_by_hand():
    """Members 1, 3 and others 0, 2: AUC 3/4; V = (½, 1) and (1, ½), variances ⅛; σ² = ⅛/2 + ⅛/2, σ = 0.353553.

    0.75 ± 1.959964 · 0.353553 = 0.057048, and 1.44, cut off at 1.
    """
    low, high = auc_interval(numbers(1, 3), numbers(0, 2))
    assert low == pytest.approx(0.057048, abs=1e-6)
    assert high == 1


def test_interval_covers_one_half_for_margins_of_one_distribution():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        drawn = torch.randn(160, generator=generator)
        low, high = auc_interval(drawn[:60], drawn[60:])
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 199  # 95 % of 200, and three standard deviations


@pytest.mark.parametrize(("at", "expected"), [(0, 0.25), (0.1, 0.25), (0.25, 0.5), (0.5, 1.0), (1, 1.0)])
def test_true_positive_rate_by_hand(at, expected):
    """Above 3.5 is 4, a quarter of the members; above 2.5 are 4 and 3, half; above 0 are all."""
    assert true_positive_rate(numbers(4, 3, 2, 1), numbers(3.5, 2.5, 0, -1), at) == pytest.approx(expected)


def test_ties_are_drawn_by_lot():
    """All alike: 10 % of the others go with 10 % of the members. Half alike: 0.2 of F = 0.5 is 0.4 of T from 0 to ½."""
    assert true_positive_rate(numbers(1, 1), numbers(1, 1), 0.1) == pytest.approx(0.1)
    assert true_positive_rate(numbers(1, 0), numbers(1, 0, 0, 1), 0.2) == pytest.approx(0.2)
    assert true_positive_rate(numbers(2, 1, 1, 0), numbers(1, 0), 0.25) == pytest.approx(0.25 + 0.5 / 2)


def test_membership_holds_all_measures():
    found = membership(numbers(1, 3), numbers(0, 2))
    assert (found.auc, found.at_1, found.at_10) == (0.75, 0.5, 0.5)
    assert found.interval == auc_interval(numbers(1, 3), numbers(0, 2))


def test_an_auc_needs_two_of_each():
    with pytest.raises(DataError, match="at least 2 others, got 1"):
        auc(numbers(1, 2), numbers(1))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((2.5, -3.0), (5.5, 3.0, 4.0, 2.0, 2.0, 1.0)),
        ((0.3, 0.9), (-0.6, -0.6, -0.6, -0.6, -0.5, -1.0)),
        ((1, 1), (0,) * 6),
    ],
)
def test_margins_of_what_is_released(scores, expected):
    """Steps of 0.5: 0.3 becomes 0.5, and 0.9 becomes 1."""
    released = [release(numbers(scores)) for release in RELEASES.values()]
    assert [float(s[0, 0] - s[0, 1]) for s in released] == pytest.approx(list(expected))


def test_standardising_changes_the_auc_of_several_sites_together_only():
    """One site's margins (1, 2 | 0, 1) ten times as large cross those of the other, members (30 and 40 are raw)."""
    members, others = numbers((3, 0), (4, 0)), numbers((1, 0), (5, 0))
    large, small = Standardisation(2.0, 10.0), Standardisation(0.0, 1.0)

    def margin(scores):
        return scores[:, 0] - scores[:, 1]

    assert auc(margin(raw(members, large)), margin(raw(others, large))) == auc(margin(members), margin(others)) == 0.5
    assert raw(members, large)[0].tolist() == pytest.approx([32, 2], abs=1e-4)
    together = [torch.cat([margin(raw(s, large)), margin(raw(s, small))]) for s in (members, others)]
    alike = [torch.cat([margin(s), margin(s)]) for s in (members, others)]
    assert auc(*alike) == 0.5
    assert auc(*together) == 8 / 16  # 30 and 40 beat 10, 1, 5; 3 and 4 beat 1


def test_pair_scores_are_the_model_s(llava, prefer):
    torch.manual_seed(0)
    model = RewardModel.from_checkpoint(llava)
    model.standardisation = Standardisation(1.0, 2.0)
    pairs = [prefer(n, chosen, "blue") for n, chosen in enumerate(("red", "green", "yellow"))]
    scores = pair_scores(model, pairs, pairs_at_once=2)
    images = [load_image(pair.images[0]) for pair in pairs]
    expected = model.score([pair.prompt for pair in pairs], images, [[p.chosen, p.rejected] for p in pairs])
    torch.testing.assert_close(scores, torch.stack(expected).double(), atol=1e-6, rtol=1e-5)
    model.standardisation = Standardisation()
    torch.testing.assert_close(raw(scores, Standardisation(1.0, 2.0)), pair_scores(model, pairs), atol=1e-5, rtol=1e-5)


CONFIG = RouterConfig(layers=1, width=16, heads=2)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return RouterNetwork(32, 3, CONFIG)


def batch_of(encoder, *colours, square, answers=("red", "blue")):
    prompts = [vqa_prompt("what colour is it?")] * len(colours)
    images = [load_image(square(colour)) for colour in colours]
    return build_batch(encoder.processor, prompts, images, [answers] * len(colours))


def test_gradients_are_those_of_each_batch_alone(network):
    """As `backward` gives them, in the order in which the server sees the step that SGD takes with them."""
    hidden, mask = torch.randn(2, 4, 5, 32), torch.ones(2, 4, 5, dtype=torch.bool)
    mask[1, 2, 3:] = False
    found = update_gradients(network, hidden, mask, site=1)
    for n in range(2):
        alone = RouterNetwork(32, 3, CONFIG)
        alone.load_state_dict(network.state_dict())
        client_id_loss(alone(hidden[n], mask[n]), 1).backward()
        torch.optim.SGD(alone.parameters(), lr=0.5).step()
        before = trainable_weights(network)
        change = {name: weight - before[name] for name, weight in trainable_weights(alone).items()}
        seen = seen_update(to_bytes(change))
        torch.testing.assert_close(seen, 0.5 * found[n], atol=1e-6, rtol=1e-4)


def test_a_pair_s_own_gradient_fits_its_update_best(network):
    hidden, mask = torch.randn(5, 2, 6, 32), torch.ones(5, 2, 6, dtype=torch.bool)
    update = update_gradients(network, hidden[3:4], mask[3:4], 0)[0]
    cosines = update_cosines(network, 7 * update, hidden, mask, 0, pairs_at_once=2)
    assert cosines.argmax() == 3
    assert cosines[3] == pytest.approx(1, abs=1e-5)


def test_images_are_what_the_encoder_sees(vlm, square):
    """A red square is 1, 0, 0 whatever the processor subtracts; and its states are the encoder's, by way of pixels."""
    encoder = Encoder(*vlm)
    batch = batch_of(encoder, "red", "blue", square=square)
    images = true_images(encoder, batch)
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images[0].mean(dim=(1, 2)), torch.tensor([1.0, 0.0, 0.0]), atol=1e-3, rtol=0)
    states = hidden_states(encoder, batch, images)
    expected, mask = encoder(
        [vqa_prompt("what colour is it?")] * 2,
        [load_image(square(colour)) for colour in ("red", "blue")],
        [("red", "blue")] * 2,
    )
    torch.testing.assert_close(states[mask], expected[mask], atol=1e-4, rtol=1e-3)


def test_an_encoder_of_patches_is_refused(llava, square):
    encoder = Encoder(*load_model(llava))
    batch = batch_of(encoder, "red", square=square)
    patches = replace(batch, images=({"pixel_values": torch.zeros(4, 768)},))
    with pytest.raises(DataError, match="cut into patches or tiles"):
        true_images(encoder, patches)


def test_the_update_of_one_pair_shows_what_the_encoder_made_of_its_image(llava, network, square):
    """From one start, the update of a red square leads to features of red, that of a blue one to those of blue."""
    encoder = Encoder(*load_model(llava))
    batch = batch_of(encoder, "red", "blue", square=square)
    true = true_images(encoder, batch)
    grey = torch.full_like(true, 0.5)
    mask = batch.attention_mask.bool().unflatten(0, (2, -1))
    updates = update_gradients(network, hidden_states(encoder, batch, true).unflatten(0, (2, -1)), mask, 0)
    distances = []
    found = invert(
        encoder, network, 3 * updates, batch, 0, Inversion(120, 0.05, 0.01), start=grey, on_step=distances.append
    )
    assert len(distances) == 120
    assert distances[-1] < 0.1 * distances[0]
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(grey, torch.full_like(true, 0.5))
    own = feature_likeness(encoder, batch, found, true, grey)
    other = feature_likeness(encoder, batch, found.flip(0), true, grey)
    assert (own > other + 0.3).all()
    assert feature_likeness(encoder, batch, true, true, grey).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"smoothness": -1.0}])
def test_a_search_moves(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        Inversion(**wrong)


def test_psnr_by_hand():
    """A difference of 0.1 everywhere: −10 log₁₀ 0.01 = 20 dB; of half the pixels by 0.2, mean 0.02: 16.99 dB."""
    true = torch.zeros(3, 3, 4, 4)
    found = torch.stack([torch.full((3, 4, 4), 0.1), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])
    found[1, :, :2] = 0.2
    assert psnr(found, true).tolist() == pytest.approx([20, -10 * math.log10(0.02), math.inf])


def test_ssim_by_hand():
    """Alike: 1. Flat at ¼ and ¾: no variance, (2 · 3/16 + c₁) / (10/16 + c₁). A chessboard and its negative: about −1.

    The chessboard has mean ½ and variance ¼ under any window: (−½ + c₂) / (½ + c₂) = −0.9964.
    """
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().expand(1, 3, 16, 16)
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    true = torch.cat([noise, torch.full_like(noise, 0.25), board])
    found = torch.cat([noise, torch.full_like(noise, 0.75), 1 - board])
    expected = [1, (0.375 + 1e-4) / (0.625 + 1e-4), (-0.5 + 9e-4) / (0.5 + 9e-4)]
    assert ssim(found, true).tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_refuses_images_below_its_window():
    small = torch.zeros(1, 3, 8, 8)
    with pytest.raises(DataError, match="smaller than the window of 11"):
        ssim(small, small)
    assert ssim(small, small, window=7).item() == pytest.approx(1)


def test_total_variation_by_hand():
    """One bright column of three, two steps of 1 in a row: along rows 1, along columns 0."""
    image = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]).expand(1, 3, 2, 3)
    assert total_variation(image).tolist() == [1.0]

"""Measure what leaves a site: does a score tell whether a pair was trained on, does an update tell an image?

    m = R(x, y⁺) − R(x, y⁻)                               the margin of a pair, larger for pairs that were trained on?
    AUC = P(m_member > m_other) + ½ P(m_member = m_other)                               0.5: the margin tells nothing
    x̂ = argmin_x 1 − cos(φ − φ', ∇_φ L_k(Enc(x, y))) + c TV(x)                     of a router's update, which image?

The first attacker asks for the scores of a pair and compares the margin with a threshold (Yeom et al. 2018, arXiv
1709.01604); a low false positive rate shows better than the AUC whether anyone is exposed (Carlini et al. 2022, arXiv
2112.03570). The second one is the server, which has the router's weights before and after a site's local steps, and the
same public encoder; it knows the prompt and both answers, and searches for the image (Geiping et al. 2020, arXiv
2003.14053). Both are measured by Lu et al. 2026, arXiv 2605.03426.
Differs: LPIPS is left out, which needs a network of its own. The paper does not say what its attackers know, nor where
the search begins; from noise it finds little whatever leaks, since an encoder sees few of the directions of pixel
space: the likeness of features shows what the likeness of pixels hides. A third attacker, not in the paper, holds
pairs that may have been in a round and compares their gradients with the update.

All three bound the leak from below: an attacker who trains reward models of his own, or who has 100,000 scores and
copies the linear head, does better. No result here is a guarantee; differential privacy in training is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import cast

import torch
from safetensors.torch import load
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, cosine_similarity

from accord.data.images import load_images
from accord.errors import DataError, check_least, check_positive
from accord.models.encoder import Encoder
from accord.models.inputs import Batch, shared_inputs
from accord.rewards.model import RewardModel, Standardisation
from accord.routing.router import RouterNetwork, client_id_loss
from accord.types import PreferencePair

RELEASES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "standardised": lambda scores: scores,
    "clipped to ±1.5": lambda scores: scores.clamp(-1.5, 1.5),
    "clipped to ±2": lambda scores: scores.clamp(-2, 2),
    "clipped to [0, 2]": lambda scores: scores.clamp(0, 2),
    "clipped to [0, 2], in steps of 0.5": lambda scores: (scores.clamp(0, 2) * 2).round() / 2,
    "rank only": lambda scores: (scores - scores.flip(-1)).sign() / 2,
}
"""What a site may answer in place of the standardised scores `[N, 2]` of pairs, by the words for it."""


@dataclass(frozen=True)
class Membership:
    """How well a threshold on the margin tells members from others: in [0, 1]."""

    auc: float
    interval: tuple[float, float]  # 95 %
    at_1: float  # true positive rate where 1 % of the others are taken for members
    at_10: float


def membership(members: Tensor, others: Tensor) -> Membership:
    """Attack by margins `[M]` of pairs that were trained on and `[N]` of others of the same distribution."""
    return Membership(
        auc(members, others),
        auc_interval(members, others),
        true_positive_rate(members, others, 0.01),
        true_positive_rate(members, others, 0.1),
    )


@torch.no_grad()
def pair_scores(model: RewardModel, pairs: Sequence[PreferencePair], *, pairs_at_once: int = 64) -> Tensor:
    """Return the standardised scores of chosen and rejected answers, `[N, 2]`, before any clipping; m = s₁ − s₂."""
    scores: list[Tensor] = []
    for start in range(0, len(pairs), pairs_at_once):
        chunk = pairs[start : start + pairs_at_once]
        scores += model.score(
            [pair.prompt for pair in chunk],
            [load_images(pair.images) for pair in chunk],
            [[pair.chosen, pair.rejected] for pair in chunk],
        )
    return torch.stack(scores).double()


def raw(scores: Tensor, standardisation: Standardisation, epsilon: float = 1e-6) -> Tensor:
    """Return the scores before they were standardised.

    Of one site it orders margins alike, so that the AUC is the same; of several sites together it does not.
    """
    return scores * (standardisation.deviation + epsilon) + standardisation.mean


def auc(members: Tensor, others: Tensor) -> float:
    """Return the chance that a member's margin is above another's, ties counted half."""
    return float(_wins(members, others).mean())


def auc_interval(members: Tensor, others: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of the AUC, `AUC ± z √(var_j(V_j)/M + var_i(V_i)/N)`, within [0, 1].

    V are the placement values: of each member the share of others that it beats, and the reverse. It takes pairs for
    independent, so draw one per image. It is empty where all members are above all others.

    Source: DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44:837.
    """
    wins = _wins(members, others)
    variance = wins.mean(dim=1).var() / len(members) + wins.mean(dim=0).var() / len(others)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(float(variance))
    middle = float(wins.mean())
    return max(0.0, middle - half), min(1.0, middle + half)


def true_positive_rate(members: Tensor, others: Tensor, at: float) -> float:
    """Return the share of members above the threshold above which a share `at` of the others is.

    Where margins tie across the threshold, the attacker draws lots: the ROC curve is linear there, and its area is the
    AUC with ties counted half.
    """
    thresholds = torch.cat([members, others]).unique().flip(0)
    false = torch.cat([torch.zeros(1), (others[:, None] >= thresholds).double().mean(dim=0)])
    true = torch.cat([torch.zeros(1), (members[:, None] >= thresholds).double().mean(dim=0)])
    last = int((false <= at).nonzero().max())
    if last == len(false) - 1:
        return float(true[last])
    part = (at - false[last]) / (false[last + 1] - false[last])
    return float(true[last] + part * (true[last + 1] - true[last]))


def _wins(members: Tensor, others: Tensor) -> Tensor:
    """Return `[M, N]`: 1 where the member's margin is above the other's, ½ where they tie, 0 where it is below."""
    for name, found in (("members", members), ("others", others)):
        if len(found) < 2:
            raise DataError(f"an AUC needs at least 2 {name}, got {len(found)}; give the attack more pairs")
    return ((members[:, None] - others).sign() + 1) / 2


@dataclass(frozen=True)
class Inversion:
    """How an attacker searches for the images behind an update: Adam on the pixels."""

    steps: int = 200
    learning_rate: float = 0.02  # of pixels in [0, 1]; falls linearly to 0
    smoothness: float = 1.0  # c, of the total variation

    def __post_init__(self) -> None:
        """Refuse a search that does not move."""
        check_least(self, steps=1, smoothness=0)
        check_positive(self, "learning_rate")


def seen_update(change: bytes) -> Tensor:
    """Return `φ − φ'` `[W]`, what the server sees of a site's local steps, from the `change` of its `UpdateReply`."""
    changed = load(change)
    return torch.cat([-changed[name].float().flatten() for name in sorted(changed)])


def update_gradients(network: RouterNetwork, hidden: Tensor, mask: Tensor, site: int) -> Tensor:
    """Return `∇_φ L_k` of B batches of R rows each, `[B, W]`, weights in the order of their names; differentiable.

    Args:
        network: g_φ, before the step.
        hidden: `[B, R, T, D]`.
        mask: `[B, R, T]`.
        site: k.
    """

    def loss(weights: dict[str, Tensor], states: Tensor, there: Tensor) -> Tensor:
        return client_id_loss(functional_call(network, weights, (states, there)), site)

    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(weights, hidden, mask)
    return torch.cat([found[name].flatten(1) for name in sorted(found)], dim=1)


def update_cosines(
    network: RouterNetwork, update: Tensor, hidden: Tensor, mask: Tensor, site: int, *, pairs_at_once: int = 16
) -> Tensor:
    """Return `cos(φ − φ', ∇_φ L_k)` of candidate pairs `[B, 2, T, D]`, `[B]`: larger for pairs of that round?"""
    parts = zip(hidden.split(pairs_at_once), mask.split(pairs_at_once), strict=True)
    with torch.no_grad():
        found = [cosine_similarity(update_gradients(network, *part, site), update, dim=1).cpu() for part in parts]
    return torch.cat(found)


def hidden_states(encoder: Encoder, batch: Batch, images: Tensor) -> Tensor:
    """Return the encoder's states `[N, T, D]` of `batch` with other images, differentiable in them.

    Args:
        encoder: frozen.
        batch: prompts and answers.
        images: `[P, 3, H, W]` in [0, 1].
    """
    mean, deviation = _normalisation(encoder, images)
    values = ((images - mean) / deviation).view_as(batch.image_inputs["pixel_values"])
    own = values.split([len(each["pixel_values"]) for each in batch.images])
    others = tuple({**each, "pixel_values": part} for each, part in zip(batch.images, own, strict=True))
    inner = encoder.model.base_model
    inputs, where = shared_inputs(inner, replace(batch, images=others))
    return cast(Tensor, inner(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[where].float())


def true_images(encoder: Encoder, batch: Batch) -> Tensor:
    """Return the images of `batch` as the encoder sees them: resized, `[P, 3, H, W]` in [0, 1].

    Raises:
        DataError: its processor cuts images into patches or tiles.
    """
    values = batch.image_inputs["pixel_values"]
    prompts = int(batch.prompt_index.max()) + 1
    if values.ndim < 4 or values.numel() != prompts * values.shape[-3:].numel():
        raise DataError(
            f"the encoder takes pixel values {tuple(values.shape)} for {prompts} images, cut into patches or tiles; "
            "reconstruction is measured with an encoder that takes each image whole, as accord/llava-clip-llama does"
        )
    images = values.float().view(prompts, *values.shape[-3:])
    mean, deviation = _normalisation(encoder, images)
    return (images * deviation + mean).clamp(0, 1)


@torch.no_grad()
def feature_likeness(encoder: Encoder, batch: Batch, found: Tensor, true: Tensor, base: Tensor) -> Tensor:
    """Return `cos(Enc(x̂) − Enc(x₀), Enc(x) − Enc(x₀))`, `[P]`, over the tokens of both answers.

    Images have something in common that x₀ has not: compare with the likeness of reconstructions of other images.

    Args:
        encoder: the public encoder.
        batch: prompts, each with the same number of answers.
        found: x̂, `[P, 3, H, W]` in [0, 1].
        true: x.
        base: x₀, what is known of any image: the mean of public ones.
    """
    there = batch.attention_mask[..., None]
    one, other, middle = (hidden_states(encoder, batch, images) * there for images in (found, true, base))
    by_image = (len(true), -1)
    return cosine_similarity((one - middle).reshape(by_image), (other - middle).reshape(by_image), dim=1)


def _normalisation(encoder: Encoder, like: Tensor) -> tuple[Tensor, Tensor]:
    settings = encoder.processor.image_processor
    numbers = (settings.image_mean, settings.image_std) if settings.do_normalize else ([0.0] * 3, [1.0] * 3)
    mean, deviation = (torch.tensor(number, device=like.device)[:, None, None] for number in numbers)
    return mean, deviation


def invert(
    encoder: Encoder,
    network: RouterNetwork,
    updates: Tensor,
    batch: Batch,
    site: int,
    config: Inversion,
    *,
    start: Tensor,
    on_step: Callable[[float], None] = lambda _distance: None,
) -> Tensor:
    """Search for the images behind B updates, each of which comes from P / B consecutive prompts of `batch`.

    Args:
        encoder: the public encoder.
        network: the router before the update.
        updates: `[B, W]`, of any length: only their direction is matched.
        batch: prompts and both answers, which the attacker knows, with P images, of which only the shape is used.
        site: whose update it is, k.
        config: settings.
        start: where the search begins, `[P, 3, H, W]` in [0, 1]: noise, or the mean of public images.
        on_step: told the mean distance `1 − cos` after every step.

    Returns:
        `[P, 3, H, W]` in [0, 1].
    """
    found = start.clone().requires_grad_()
    mask = batch.attention_mask.bool().unflatten(0, (len(updates), -1))
    optimiser = torch.optim.Adam([found], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, config.steps)
    for _ in range(config.steps):
        hidden = hidden_states(encoder, batch, found).unflatten(0, (len(updates), -1))
        distance = 1 - cosine_similarity(update_gradients(network, hidden, mask, site), updates, dim=1)
        loss = distance.mean() + config.smoothness * total_variation(found).mean()
        (found.grad,) = torch.autograd.grad(loss, found)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            found.clamp_(0, 1)
        on_step(distance.mean().item())
    return found.detach()


def total_variation(images: Tensor) -> Tensor:
    """Return the mean difference of neighbouring pixels, along rows plus along columns, `[N]`."""
    return images.diff(dim=-1).abs().mean(dim=(1, 2, 3)) + images.diff(dim=-2).abs().mean(dim=(1, 2, 3))


def psnr(found: Tensor, true: Tensor) -> Tensor:
    """Return `−10 log₁₀ mean (x̂ − x)²` in decibels, `[N]`, of images `[N, C, H, W]` in [0, 1]."""
    return -10 * (found - true).square().mean(dim=(1, 2, 3)).log10()


def ssim(found: Tensor, true: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Return the mean structural similarity `[N]` of images `[N, C, H, W]` in [0, 1], at most 1.

        (2 μ_x μ_y + c₁)(2 σ_xy + c₂) / ((μ_x² + μ_y² + c₁)(σ_x² + σ_y² + c₂))        c₁ = 0.01², c₂ = 0.03²

    means and covariances under a Gaussian window, where it lies within the image; then the mean over channels.
    Source: Wang et al. 2004, IEEE TIP 13(4).
    """
    if min(true.shape[-2:]) < window:
        raise DataError(f"images of {tuple(true.shape[-2:])} pixels are smaller than the window of {window}; lower it")
    line = torch.exp(-(torch.arange(window) - window // 2).double().square() / (2 * sigma**2))
    weight = (line[:, None] * line / line.sum() ** 2)[None, None]
    x, y = (images.flatten(0, 1)[:, None].cpu().double() for images in (found, true))  # variances of flat parts cancel
    mx, my, xx, yy, xy = (conv2d(values, weight) for values in (x, y, x * x, y * y, x * y))
    vx, vy, both = xx - mx * mx, yy - my * my, xy - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.mean(dim=(1, 2, 3)).view(len(true), -1).mean(dim=1)

"""Route by class means that one round gathers, and know which prompts belong to no site.

    x ∈ R^D                    the encoder's state before the answer to a prompt begins
    site k sends               n_k,  Σ x,  Σ x²  over its own prompts, and q_k
    μ_k, v_k                   their mean and variance;  σ² = mean_k v_k
    z_k = −½ Σ_d ((x − μ_k)² / σ²)_d            which site: a linear discriminant, α = softmax(z)
    f_k(x) = N(x; μ_k, v_k)                     whether any: x belongs to no site if  log f_k(x) < q_k  for every k
    q_k                        the 1 % quantile of log f(x) over the site's own prompts, each half of them judged by the
                               Gaussian of the other half

All covariances are diagonal; v_k and σ² are shrunk by 5 % to their mean over the features. No n_k is in the choice: a
site that holds every pair twice is chosen no more often. It all depends on the prompt alone, so that a strange answer
makes no prompt unknown.

Source: FedGMM, Wu et al. 2023, arXiv 2305.01068, which tells novel samples by the density of a federated Gaussian
mixture of features; FedDRM, 2025, arXiv 2509.23049, whose choice forgets n_k. Differs: one Gaussian a site and one
round, whose sums are exact, in place of federated EM (whose covariances are averaged about local means); a frozen
encoder; the linear discriminant and the quantiles are ours.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from accord.data.images import Pictures, load_images
from accord.errors import DataError, ReplyError, RunError
from accord.federation.asking import ask_checked
from accord.federation.engine import Engine
from accord.federation.messages import Reply, UpdateReply, UpdateRequest
from accord.federation.rounds import check_update
from accord.federation.weights import read_weights, to_bytes
from accord.models.encoder import Encoder
from accord.routing.router import Router
from accord.routing.stored import load_arrays, save_arrays
from accord.types import PreferencePair, Prompt

SHRINKAGE: Final = 0.05
"""Share of a variance that is its mean over the features."""

QUANTILE: Final = 0.01
"""Share of a site's own prompts that it would take for unknown."""

FLOOR: Final = 1e-6
"""Least variance of a feature: prompts that are all alike have none."""

LARGEST: Final = 1e3
"""Greatest root mean square of a feature that a site may send: one site's variance is in everybody's σ².

A language model's last norm makes the root mean square over all D features about its gain. Of 64 features the greatest
is about 2; a thousand leaves room for models with features far out, and none for sums that drown all other sites'.
"""

LEAST_DENSITY: Final = 100.0
"""Greatest |q| / D in nats: below −100 a prompt would be some 14 standard deviations off in every feature.

A lower q would take every prompt for known. Of 79 to 500 prompts q / D is between −0.2 and −1.2. Above, no Gaussian has
more than −½ ln `FLOOR`, or 7 a feature. Two or three prompts, whose halves have no variance, would have less than −100.
"""

PROMPTS_AT_ONCE: Final = 128


class Density(Protocol):
    """What the server knows of the sites' prompts: class means, or `accord.routing.density.Mixtures`."""

    def posterior(self, x: Tensor, /) -> Tensor:
        """Return α `[P, K]`, rows summing to 1, for features `[P, D]`."""
        ...

    def margin(self, x: Tensor, /) -> Tensor:
        """Return by how much each prompt's log density is above the nearest site's quantile, `[P]`."""
        ...


@dataclass(frozen=True)
class ClassMeans:
    """What the sites sent, in float64 on the CPU; a site that is absent has the count 0."""

    count: Tensor  # n_k [K]
    total: Tensor  # Σ x [K, D]
    square: Tensor  # Σ x² [K, D]
    quantile: Tensor  # q_k [K]

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit each other, and sums that no prompts have."""
        k, d = self.total.shape if self.total.ndim == 2 else (0, 0)
        wanted = {"count": (k,), "total": (k, d), "square": (k, d), "quantile": (k,)}
        check_arrays(vars(self), wanted, what="class means")

    def posterior(self, x: Tensor) -> Tensor:
        """Return α `[P, K]`, rows summing to 1, for features `[P, D]`; 0 for a site that is absent."""
        there = self.count > 0
        mean, variance = moments(self.count, self.total, self.square)
        pooled = shrunk(variance[there].mean(dim=0))
        scaled = pooled.sqrt()
        z = -0.5 * torch.cdist(x.double() / scaled, mean / scaled, compute_mode="donot_use_mm_for_euclid_dist").square()
        return z.masked_fill(~there, -torch.inf).softmax(dim=-1)

    def margin(self, x: Tensor) -> Tensor:
        """Return max_k log f_k(x) − q_k `[P]` for features `[P, D]`: below 0 where a prompt belongs to no site."""
        mean, variance = moments(self.count, self.total, self.square)
        own = torch.stack([log_density(x.double(), m, shrunk(v)) for m, v in zip(mean, variance, strict=True)], dim=1)
        return (own - self.quantile).masked_fill(self.count == 0, -torch.inf).amax(dim=-1)


def check_arrays(arrays: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Check arrays that sites sent together, of which `count` says how many prompts they are of.

    Raises:
        DataError: one has another shape than is wanted or is not finite, or there is no prompt.
    """
    for name, tensor in arrays.items():
        if tuple(tensor.shape) != wanted[name] or not tensor.isfinite().all():
            raise DataError(
                f"{what}' {name} is {tuple(tensor.shape)}, expected finite {wanted[name]}; collect them anew"
            )
    if not (arrays["count"] > 0).any():
        raise DataError(f"{what} of 0 prompts; collect them anew")


def moments(count: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and variances `[K, D]` of sums `[K, D]` over `[K]` prompts each, 0 of none."""
    n = count.clamp(min=1)[:, None]
    mean = total / n
    return mean, (square / n - mean.square()).clamp(min=0)


def shrunk(variance: Tensor) -> Tensor:
    """Return v `[D]` moved by 5 % to its mean over the features, and at least `FLOOR`."""
    return ((1 - SHRINKAGE) * variance + SHRINKAGE * variance.mean()).clamp(min=FLOOR)


def log_density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return log N(x; μ, v) + D/2 log 2π, `[P]`, for features `[P, D]`; the constant is alike for all sites."""
    return -0.5 * ((x - mean).square() / variance + variance.log()).sum(dim=-1)


def own_quantile(x: Tensor) -> Tensor:
    """Return q of a site's features `[n, D]`, n ≥ 2, whose rows at even places the odd ones' Gaussian judges.

    It is at least −`LEAST_DENSITY` · D.
    """
    halves = x[0::2], x[1::2]
    judged = [
        log_density(half, other.mean(dim=0), shrunk(other.var(dim=0, correction=0)))
        for half, other in (halves, halves[::-1])
    ]
    return torch.cat(judged).clamp(min=-LEAST_DENSITY * x.shape[1]).quantile(QUANTILE)


def sums_of(x: Tensor) -> dict[str, Tensor]:
    """Return Σ x, Σ x² `[D]` and q of a site's features `[n, D]`, n ≥ 2, in float64."""
    x = x.double()
    return {"total": x.sum(dim=0), "square": x.square().sum(dim=0), "quantile": own_quantile(x)}


class LocalPrompts:
    """A site's own prompts, each once, whatever their number of pairs.

    Args:
        encoder: the frozen encoder, the same public checkpoint at every site.
        pairs: the site's private pairs.
        prompts_at_most: how many prompts are drawn of more.
    """

    def __init__(self, encoder: Encoder, pairs: Sequence[PreferencePair], prompts_at_most: int) -> None:
        self.encoder = encoder
        prompts = list({pair.question_id: pair for pair in pairs}.values())
        self.pairs = random.Random(0).sample(prompts, min(prompts_at_most, len(prompts)))

    def features(self, *, what: str) -> Tensor:
        """Return the states before the answers, `[n, D]`, of which `what` is made; images are opened as they are read.

        Raises:
            DataError: there are fewer than two prompts.
        """
        if len(self.pairs) < 2:
            raise DataError(f"{what} need 2 prompts or more, got {len(self.pairs)}; give the site more questions")
        return torch.cat(
            [
                self.encoder.before_answers([p.prompt for p in chunk], [load_images(p.images) for p in chunk])
                for start in range(0, len(self.pairs), PROMPTS_AT_ONCE)
                for chunk in [self.pairs[start : start + PROMPTS_AT_ONCE]]
            ]
        )


class LocalMeans(LocalPrompts):
    """A site's half: the sums over its own prompts."""

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return Σ x, Σ x² and q as the change, and n as the number of examples.

        Raises:
            CheckpointError: the request is about features of another size.
            DataError: there are fewer than two prompts.
        """
        read_weights(request.weights, blank(self.encoder.features), what="a request for class means")
        x = self.features(what="class means")
        return UpdateReply(request.id, to_bytes(sums_of(x)), len(x), 0.0)


def blank(features: int) -> dict[str, Tensor]:
    """Return the sums over no prompt, as they go to a site: it adds its own."""
    zeros = torch.zeros(features, dtype=torch.float64)
    return {"total": zeros, "square": zeros.clone(), "quantile": torch.zeros((), dtype=torch.float64)}


def collect_means(engine: Engine, features: int) -> ClassMeans:
    """Ask every site for its sums, in one round; one that is absent or sends sums that cannot be has no prompt.

    Args:
        engine: carries the requests.
        features: D of the encoder.

    Raises:
        RunError: no site answered.
    """
    start = blank(features)
    sent = to_bytes(start)
    requests = {site: UpdateRequest(f"means-{site}", "means", 0, sent, 0) for site in engine.sites}

    def check(request: UpdateRequest, reply: Reply) -> tuple[int, Mapping[str, Tensor]]:
        told, sums = check_update(request, reply, start)
        check_sums(told.examples, sums["total"], sums["square"], sums["quantile"])
        return told.examples, sums

    consequence = "no prompt is taken for one of its own"
    found = ask_checked(engine, requests, check, what="class means", consequence=consequence)
    if not found:
        raise RunError("no site sent its class means; check the sites' logs and start again with --resume")
    none: tuple[int, Mapping[str, Tensor]] = (0, start)
    rows = [found.get(site, none) for site in engine.sites]
    return ClassMeans(
        torch.tensor([n for n, _ in rows], dtype=torch.float64),
        *(torch.stack([sums[name] for _, sums in rows]) for name in ("total", "square", "quantile")),
    )


def check_sums(count: int, total: Tensor, square: Tensor, quantile: Tensor) -> None:
    """Check that n real prompts may have these sums `[D]` and this quantile.

    Σ x² ≥ (Σ x)² / n in every feature, up to rounding; Σ x² / n ≤ `LARGEST`², so that |Σ x| / n ≤ `LARGEST`, too; and
    |q| / D ≤ `LEAST_DENSITY`.

    Raises:
        ReplyError: they may not.
    """
    least = total.square() / count
    short = (least - square) / least.clamp(min=1e-12)  # NaN where squares overflow
    if not (short <= 1e-9).all():
        d = int(short.argmax())  # of NaN, if there is one
        raise ReplyError(
            f"sums that {count} numbers cannot have: feature {d} has Σ x = {total[d]:.3g} and Σ x² = {square[d]:.3g}"
        )
    size = (square / count).clamp(min=0).sqrt()
    if not (size <= LARGEST).all():
        d = int(size.argmax())
        raise ReplyError(f"feature {d} has a root mean square of {size[d]:.3g}; at most {LARGEST:g} is taken")
    most = LEAST_DENSITY * len(total)
    if not quantile.abs() <= most:
        raise ReplyError(f"the quantile of {len(total)} features is {quantile:.3g}; within ±{most:g} is taken")


def save_means(path: Path, means: ClassMeans) -> None:
    """Write the arrays to the file `path`, as safetensors."""
    save_arrays(path, vars(means))


def load_means(path: Path) -> ClassMeans:
    """Read what `save_means` wrote.

    Raises:
        CheckpointError: the file is absent, damaged or of another kind.
    """
    return load_arrays(path, ClassMeans, "class means")


class MeansRouter:
    """Give all completions of a prompt the weights that its state before the answer has: a `Router`.

    With `abstains`, those of a prompt that belongs to no site have none.
    """

    def __init__(self, encoder: Encoder, means: Density, *, abstains: bool = False) -> None:
        self.encoder = encoder
        self.means = means
        self.abstains = abstains

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return α, `[N, K]`."""
        states = features_of(self.encoder, prompts, images)
        weights = self.means.posterior(states).float()
        if self.abstains:
            weights = weights * (self.means.margin(states) >= 0)[:, None]
        return weights.repeat_interleave(torch.tensor([len(texts) for texts in completions]), dim=0)


class Abstaining:
    """Take all weight from the completions of a prompt that belongs to no site: a `Router` around another."""

    def __init__(self, router: Router, encoder: Encoder, means: Density) -> None:
        self.router = router
        self.encoder = encoder
        self.means = means

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return the router's weights, `[N, K]`; the rows of an unknown prompt are 0, so that nobody is asked."""
        weights = self.router(prompts, images, completions)
        known = self.means.margin(features_of(self.encoder, prompts, images)) >= 0
        return weights * known.repeat_interleave(torch.tensor([len(texts) for texts in completions]))[:, None]


def features_of(encoder: Encoder, prompts: Sequence[Prompt], images: Sequence[Pictures]) -> Tensor:
    """Return the states before the answers, `[P, D]`, some prompts at a time."""
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    return torch.cat(
        [encoder.before_answers(prompts[n : n + PROMPTS_AT_ONCE], images[n : n + PROMPTS_AT_ONCE]) for n in starts]
    )

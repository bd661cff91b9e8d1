"""Know by one round of sums which prompts no site has seen, and which site has seen the most like one: mixtures.

    x ∈ R^D                  the encoder's state before the answer to a prompt begins
    the server sends         M centres of its own public prompts (k-means) and their scale s
    q(m | x)                 1 at the centre that is nearest in units of s, else 0
    site k sends             N_km = Σ q,  Σ q x,  Σ q x²  over its own prompts, and q_k
    f_k(x) = Σ_m N_km / n_k N(x; μ_km, v_km)                which site: α_k ∝ f_k(x), the density ratio
    no site has seen it      where log f_k(x) < q_k for every k
    q_k                      the 1 % quantile of log f(x) over the site's own prompts, each half judged by the other's f

Covariances are diagonal. v_km is moved towards the mean over the site's components as by `PRIOR` further prompts, and
shrunk as in `accord.routing.means`. No component of a site has fewer than `LEAST` prompts: its sums would tell a single
prompt's features. No n_k is in the choice. Of 64 features and 8 components a site sends 8 kB, once.

Source: FedGMM, Wu et al. 2023, arXiv 2305.01068 (a federated mixture of features, novelty by its density). Differs: one
step of EM from public centres in place of rounds, whose sums are exact, where its covariances are averaged about local
means; components of a site's own; a frozen encoder and no learner; the quantiles and the choice by density are ours,
the latter after FedDRM, 2025, arXiv 2509.23049.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from accord.data.images import Pictures
from accord.errors import DataError, ReplyError, RunError
from accord.federation.asking import ask_checked
from accord.federation.engine import Engine
from accord.federation.messages import Reply, UpdateReply, UpdateRequest
from accord.federation.rounds import check_update
from accord.federation.weights import read_weights, to_bytes
from accord.models.encoder import Encoder
from accord.routing.fusion import top1
from accord.routing.means import (
    LEAST_DENSITY,
    QUANTILE,
    Density,
    LocalPrompts,
    check_arrays,
    check_sums,
    features_of,
    log_density,
    moments,
    shrunk,
)
from accord.routing.router import Router
from accord.routing.stored import load_arrays, save_arrays
from accord.types import Prompt

COMPONENTS: Final = 8
"""M."""

LEAST: Final = 10
"""Prompts of a component that a site sends, unless it has fewer in all."""

PRIOR: Final = 5.0
"""Prompts for which the mean variance over a site's components counts in each of them."""


@dataclass(frozen=True)
class Centres:
    """What the server sends, in float64."""

    centre: Tensor  # [M, D]
    scale: Tensor  # s [D]

    def assign(self, x: Tensor) -> Tensor:
        """Return the component `[n]` of features `[n, D]`; all have `LEAST` members or more, or there is but one.

        The smallest component that has too few is dissolved, and so on.
        """
        apart = torch.cdist(x.double() / self.scale, self.centre / self.scale)
        while True:
            member = apart.argmin(dim=1)
            count = torch.bincount(member, minlength=len(self.centre))
            few = torch.where((count > 0) & (count < LEAST), count, len(x) + 1)
            if (count > 0).sum() == 1 or few.min() > len(x):
                return member
            apart[:, few.argmin()] = torch.inf


def centres_of(x: Tensor, *, seed: int, components: int = COMPONENTS, rounds: int = 20) -> Centres:
    """Return k-means' centres of features `[P, D]`, P ≥ M: k-means++ from `seed`, then `rounds` of Lloyd's.

    Raises:
        DataError: there are fewer prompts than components.
    """
    if len(x) < components:
        raise DataError(f"{components} centres need as many public prompts, got {len(x)}; give the source more")
    x = x.double()
    scale = x.std(dim=0, correction=0).clamp(min=1e-3)
    scaled = x / scale
    draw = torch.Generator().manual_seed(seed)
    centre = scaled[torch.randint(len(x), (1,), generator=draw)]
    while len(centre) < components:
        nearest = torch.cdist(scaled, centre).amin(dim=1).square()
        chosen = torch.multinomial(nearest + 1e-12, 1, generator=draw)
        centre = torch.cat([centre, scaled[chosen]])
    for _ in range(rounds):
        member = torch.cdist(scaled, centre).argmin(dim=1)
        count = torch.bincount(member, minlength=components)[:, None]
        total = torch.zeros_like(centre).index_add(0, member, scaled)
        centre = torch.where(count > 0, total / count.clamp(min=1), centre)
    return Centres(centre * scale, scale)


def sums_of(x: Tensor, member: Tensor, components: int = COMPONENTS) -> dict[str, Tensor]:
    """Return N `[M]`, Σ q x and Σ q x² `[M, D]` of features `[n, D]` whose components are `member` `[n]`."""
    x, zeros = x.double(), torch.zeros(components, x.shape[1], dtype=torch.float64)
    count = torch.bincount(member, minlength=components).double()
    return {
        "count": count,
        "total": zeros.index_add(0, member, x),
        "square": zeros.index_add(0, member, x.square()),
    }


def log_mixture(x: Tensor, count: Tensor, total: Tensor, square: Tensor) -> Tensor:
    """Return log f(x) + D/2 log 2π, `[P]`, of features `[P, D]` for a site's sums; −∞ for those of no prompt."""
    n = count.sum()
    mean, variance = moments(count, total, square)
    within = (count[:, None] * variance).sum(dim=0) / n.clamp(min=1)
    moved = (count[:, None] * variance + PRIOR * within) / (count[:, None] + PRIOR)
    own = [log_density(x.double(), m, shrunk(v)) for m, v in zip(mean, moved, strict=True)]
    return torch.logsumexp(torch.stack(own, dim=1) + (count / n.clamp(min=1)).log(), dim=1)


def own_quantile(x: Tensor, centres: Centres) -> Tensor:
    """Return q of a site's features `[n, D]`, n ≥ 2, whose rows at even places the odd ones' mixture judges."""
    halves = x[0::2], x[1::2]
    judged = [
        log_mixture(half, **sums_of(other, centres.assign(other), len(centres.centre)))
        for half, other in (halves, halves[::-1])
    ]
    return torch.cat(judged).clamp(min=-LEAST_DENSITY * x.shape[1]).quantile(QUANTILE)


def sketch(x: Tensor, centres: Centres) -> dict[str, Tensor]:
    """Return all that a site with features `[n, D]`, n ≥ 2, sends: its sums and q, in float64."""
    return {**sums_of(x, centres.assign(x), len(centres.centre)), "quantile": own_quantile(x.double(), centres)}


@dataclass(frozen=True)
class Mixtures:
    """What the sites sent, in float64 on the CPU; a site that is absent has counts of 0."""

    count: Tensor  # N [K, M]
    total: Tensor  # Σ q x [K, M, D]
    square: Tensor  # Σ q x² [K, M, D]
    quantile: Tensor  # q [K]

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit each other, and sums that no prompts have."""
        k, m, d = self.total.shape if self.total.ndim == 3 else (0, 0, 0)
        wanted = {"count": (k, m), "total": (k, m, d), "square": (k, m, d), "quantile": (k,)}
        check_arrays(vars(self), wanted, what="mixtures")

    def log_densities(self, x: Tensor) -> Tensor:
        """Return log f_k(x) + D/2 log 2π, `[P, K]`, of features `[P, D]`; −∞ for a site that is absent."""
        sites = zip(self.count, self.total, self.square, strict=True)
        return torch.stack([log_mixture(x, *sums) for sums in sites], dim=1)

    def posterior(self, x: Tensor) -> Tensor:
        """Return α_k = f_k(x) / Σ_j f_j(x), `[P, K]`, for features `[P, D]`."""
        return self.log_densities(x).softmax(dim=-1)

    def margin(self, x: Tensor) -> Tensor:
        """Return max_k log f_k(x) − q_k `[P]` for features `[P, D]`: below 0 where no site has seen such a prompt."""
        return (self.log_densities(x) - self.quantile).amax(dim=-1)


class LocalMixture(LocalPrompts):
    """A site's half: the sums over its own prompts."""

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return the sums and q as the change, and n as the number of examples.

        Raises:
            CheckpointError: the request has no centres of such features.
            DataError: there are fewer than two prompts.
        """
        d = self.encoder.features
        zeros = torch.zeros(COMPONENTS, d, dtype=torch.float64)
        sent = read_weights(request.weights, {"centre": zeros, "scale": zeros[0]}, what="a request for mixtures")
        x = self.features(what="mixtures")
        told = sketch(x, Centres(sent["centre"], sent["scale"].clamp(min=1e-3)))
        return UpdateReply(request.id, to_bytes(told), len(x), 0.0)


def collect_mixtures(engine: Engine, centres: Centres) -> Mixtures:
    """Ask every site for its sums, in one round; one that is absent or sends sums that cannot be has no prompt.

    Raises:
        RunError: no site answered.
    """
    zeros = torch.zeros_like(centres.centre)
    blank = {"count": zeros[:, 0], "total": zeros, "square": zeros, "quantile": zeros[0, 0]}
    sent = to_bytes({"centre": centres.centre, "scale": centres.scale})
    requests = {site: UpdateRequest(f"mixture-{site}", "means", 0, sent, 0) for site in engine.sites}

    def check(request: UpdateRequest, reply: Reply) -> Mapping[str, Tensor]:
        told, sums = check_update(request, reply, blank)
        check_mixture(told.examples, sums)
        return sums

    found = ask_checked(engine, requests, check, what="a mixture", consequence="no prompt is taken for one of its own")
    if not found:
        raise RunError("no site sent its mixture; check the sites' logs and start again with --resume")
    rows = [found.get(site, blank) for site in engine.sites]
    return Mixtures(*(torch.stack([sums[name] for sums in rows]) for name in blank))


def check_mixture(examples: int, sums: Mapping[str, Tensor]) -> None:
    """Check that so many real prompts may have these sums (`accord.routing.means.check_sums`, component by component).

    Raises:
        ReplyError: they may not.
    """
    count = sums["count"]
    if not (count == count.round()).all() or (count < 0).any() or count.sum() != examples:
        raise ReplyError(f"components of {count.tolist()} prompts, which are not {examples} in all")
    for m in range(len(count)):
        if n := int(count[m]):
            check_sums(n, sums["total"][m], sums["square"][m], sums["quantile"])
        elif sums["total"][m].any() or sums["square"][m].any():
            raise ReplyError(f"component {m} has sums of no prompt")


def save_mixtures(path: Path, mixtures: Mixtures) -> None:
    """Write the arrays to the file `path`, as safetensors."""
    save_arrays(path, vars(mixtures))


def load_mixtures(path: Path) -> Mixtures:
    """Read what `save_mixtures` wrote.

    Raises:
        CheckpointError: the file is absent, damaged or of another kind.
    """
    return load_arrays(path, Mixtures, "mixtures")


class OrEverybody:
    """Ask a router's first site about a known prompt, and all sites alike about one that none has seen: a `Router`."""

    def __init__(self, router: Router, encoder: Encoder, density: Density) -> None:
        self.router = router
        self.encoder = encoder
        self.density = density

    def __call__(
        self, prompts: Sequence[Prompt], images: Sequence[Pictures], completions: Sequence[Sequence[str]], /
    ) -> Tensor:
        """Return one-hot rows, and uniform ones for the completions of an unknown prompt, `[N, K]`."""
        weights = top1(self.router(prompts, images, completions))
        known = self.density.margin(features_of(self.encoder, prompts, images)) >= 0
        rows = known.repeat_interleave(torch.tensor([len(texts) for texts in completions]))[:, None]
        return torch.where(rows, weights, 1 / weights.shape[1])

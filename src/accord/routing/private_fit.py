"""A site's steps on the router with a guarantee: DP-SGD on samples of units, with noise that its ledger has paid for.

    g_i = ∇_φ ½ [BCE(σ(z⁺), e_k) + BCE(σ(z⁻), e_k)]      of one pair: both of its answers
    g_u = clip_C(Σ_{i∈u} g_i)                            one unit's contribution, over all of φ together
    φ  ←  φ − η_t (Σ_{u∈S} g_u + σ C ξ) / (q U)          S: every unit with probability q; ξ standard normal

S steps of this are what a site sends in a round, Δ_k = φ_k − φ^t, which is DP-FedAvg with the noise of each site and
not the server's: the server is who must not know. It reads nothing else of the pairs but their number, and the loss
that is told back is 0. A gradient that is not finite counts for nothing: weights can be sent that overflow on one
answer and on no other, and the reply would tell that it is there.

Noise and samples of an answer are of a key that the ledger gives for the digest of the request, and of all else that
the answer depends on (`accord.rewards.spending.pay`). So the same request is answered with the same bytes, and none but
the steps that were set aside are ever taken, whatever weights, rounds and seeds a server sends.

Sources: McMahan et al. 2018 (arXiv 1710.06963) for DP-FedAvg; Abadi et al. 2016 (arXiv 1607.00133, algorithm 1).
Differs: a unit is a pair, a question or a person of a site, and not the site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from accord.federation.messages import UpdateRequest
from accord.federation.weights import trainable_weights
from accord.rewards.certificate import Unit
from accord.rewards.noise import SecretNoise
from accord.rewards.private import clip_rows
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss

_AT_ONCE = 2**24
"""Numbers in the gradients of the units, and of the pairs, that are held at once: 128 MB."""


@dataclass(frozen=True)
class Guarantee:
    """What the steps of a site's router are taken by, as its ledger has it."""

    unit: Unit
    sampling: float  # q
    sigma: float  # of the noise, over the clip
    clip: float  # C
    data: str  # fingerprint of the pairs and of the encoder
    pay: Callable[[str, int], SecretNoise]  # digest, steps → noise and samples; raises where too few steps are left


def digest_of(request: UpdateRequest, guarantee: Guarantee, config: RouterConfig, site: int) -> str:
    """Return a SHA-256 over all that an answer depends on, hexadecimal; how the request is called is no part of it."""
    asked = msgspec.structs.replace(request, id="")
    settings = (guarantee.unit, guarantee.sampling, guarantee.sigma, guarantee.clip, guarantee.data, config, site)
    return hashlib.sha256(msgspec.msgpack.encode((asked, settings))).hexdigest()


def private_steps(
    network: RouterNetwork,
    hidden: Tensor,
    mask: Tensor,
    unit: Tensor,
    site: int,
    guarantee: Guarantee,
    noise: SecretNoise,
    *,
    steps: int,
    rate: float,
) -> None:
    """Take steps of DP-SGD, in place.

    Args:
        network: the router, with the weights to begin from.
        hidden: states `[2N, T, D]` of N pairs: chosen, rejected, chosen, …
        mask: `[2N, T]`.
        unit: of every pair, `[N]`, from 0 to U − 1.
        site: which output is this site's.
        guarantee: q, σ and C.
        noise: draws the samples and the noise; of a key for this answer alone.
        steps: S.
        rate: η_t.
    """
    units = int(unit.max()) + 1
    for _ in range(steps):
        drawn = (noise.uniform(units) < guarantee.sampling).nonzero()[:, 0]
        total = clipped_sum(network, hidden, mask, unit, drawn, site, guarantee.clip)
        total = total + guarantee.sigma * guarantee.clip * noise.normal(len(total))
        step = rate * total / (guarantee.sampling * units)
        with torch.no_grad():
            weights = [weight for weight in network.parameters() if weight.requires_grad]
            for weight, change in zip(weights, step.split([w.numel() for w in weights]), strict=True):
                weight.sub_(change.view_as(weight).to(weight))


def clipped_sum(
    network: RouterNetwork, hidden: Tensor, mask: Tensor, unit: Tensor, drawn: Tensor, site: int, clip: float
) -> Tensor:
    """Return `Σ_{u∈S} g_u` over all trained weights as one vector, `[Φ]`, in double precision on the CPU.

    Args:
        network: the router.
        hidden: states `[2N, T, D]`.
        mask: `[2N, T]`.
        unit: of every pair, `[N]`.
        drawn: S, numbers of units.
        site: which output is this site's.
        clip: C.
    """
    weights = trainable_weights(network)
    total = torch.zeros(sum(weight.numel() for weight in weights.values()), dtype=torch.float64)
    rows = min(256, max(1, _AT_ONCE // len(total)))
    for some in drawn.split(rows) if len(drawn) else ():
        place = torch.full((int(unit.max()) + 1,), -1)
        place[some] = torch.arange(len(some))
        mine = (place[unit] >= 0).nonzero()[:, 0]
        found = torch.zeros(len(some), len(total), dtype=torch.float64)
        for pairs in mine.split(rows):
            found.index_add_(0, place[unit[pairs]], pair_gradients(network, hidden, mask, pairs, site))
        total += clip_rows(found, clip).sum(dim=0)
    return total


def pair_gradients(network: RouterNetwork, hidden: Tensor, mask: Tensor, pairs: Tensor, site: int) -> Tensor:
    """Return the gradient of each of P pairs, `[P, Φ]`, in double precision on the CPU; 0 where it is not finite.

    Args:
        network: the router.
        hidden: states `[2N, T, D]`.
        mask: `[2N, T]`.
        pairs: their numbers, `[P]`.
        site: which output is this site's.
    """
    weights = {name: weight.detach() for name, weight in network.named_parameters() if weight.requires_grad}

    def loss(weights: dict[str, Tensor], hidden: Tensor, mask: Tensor) -> Tensor:
        return client_id_loss(functional_call(network, weights, (hidden, mask)), site)

    device = next(iter(weights.values())).device
    states, masks = (rows.unflatten(0, (-1, 2))[pairs].to(device) for rows in (hidden, mask))
    with sdpa_kernel(SDPBackend.MATH):  # the one that vmap takes a whole batch through
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))(weights, states, masks)
    rows = torch.cat([gradients[name].flatten(1) for name in weights], dim=1).double().cpu()
    return torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, 0.0)

"""A site's steps on the router with a guarantee: DP-SGD on samples of units, with noise that its ledger has paid for.

    g_i = ∇_φ ½ [BCE(σ(z⁺), e_k) + BCE(σ(z⁻), e_k)]      of one pair: both of its answers
    g_u = clip_C(Σ_{i∈u} g_i)                            one unit's contribution, over all of φ together
    φ  ←  φ − η_t (Σ_{u∈S} g_u + σ C ξ) / (q U)          S: every unit with probability q; ξ standard normal

S steps of this are what a site sends in a round, Δ_k = φ_k − φ^t, which is DP-FedAvg with the noise of each site and
not the server's: the server is who must not know. It reads nothing else of the pairs but their number, and the loss
that is told back is 0. A gradient that is not finite counts for nothing: weights can be sent that overflow on one
answer and on no other, and the reply would tell that it is there.

Every answer has noise and samples of a new key. The ledger notes its steps before it is made
(`accord.rewards.spending.pay`), and the site keeps it and gives it again to the same request. So none but the steps
that were set aside are taken, whatever weights, rounds and seeds a server sends. How long a site takes is not hidden:
it grows with its longest pair, and with how many pairs the drawn units have.

Sources: McMahan et al. 2018 (arXiv 1710.06963) for DP-FedAvg; Abadi et al. 2016 (arXiv 1607.00133, algorithm 1).
Differs: a unit is a pair, a question or a person of a site, and not the site.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from accord.federation.messages import UpdateReply, UpdateRequest, decode_reply, encode
from accord.federation.weights import trainable_weights
from accord.rewards.certificate import Unit
from accord.rewards.noise import SecretNoise, new_key
from accord.rewards.private import clip_rows
from accord.routing.router import RouterConfig, RouterNetwork, client_id_loss
from accord.runs import write_atomic

_AT_ONCE = 2**24
"""Numbers that are held at once of the units' gradients, and of the pairs' attention: 128 MB of each, and copies."""


Make: TypeAlias = Callable[[SecretNoise], UpdateReply]
"""Makes an answer, by noise of a key that is used for nothing else."""


@dataclass(frozen=True)
class Answers:
    """What a site has answered to requests for the router's steps: each is paid for once.

    Attributes:
        folder: of the answers that steps of one entry in the ledger were taken for.
        pay: told how many steps are taken, and how many the answers in the folder took; raises where too few are left.
    """

    folder: Path
    pay: Callable[[int, int], None]

    def __call__(self, digest: str, steps: int, make: Make, /) -> UpdateReply:
        """Return the answer that was given before, or pay for it, make it and keep it.

        Args:
            digest: of the request, hexadecimal.
            steps: that the answer takes.
            make: the answer.

        Raises:
            RecipeError: fewer steps are left.
            RunError: the ledger cannot be read or written, has no steps, or is older than the answers.
        """
        file = self.folder / f"{digest}-{steps}"
        if file.is_file():
            reply = decode_reply(file.read_bytes())
            assert isinstance(reply, UpdateReply)
            return reply
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = (each.name.rpartition("-")[2] for each in self.folder.iterdir())
        self.pay(steps, sum(int(word) for word in taken if word.isdecimal()))
        reply = make(SecretNoise(new_key()))
        write_atomic(file, encode(reply))
        return reply


@dataclass(frozen=True)
class Guarantee:
    """What the steps of a site's router are taken by, as its ledger has it."""

    unit: Unit
    sampling: float  # q
    sigma: float  # of the noise, over the clip
    clip: float  # C
    data: str  # fingerprint of the pairs and of the encoder
    answers: Callable[[str, int, Make], UpdateReply]  # digest, steps, how it is made; as `Answers`


def digest_of(request: UpdateRequest, guarantee: Guarantee, config: RouterConfig, site: int) -> str:
    """Return a SHA-256 by which the same request is known again, hexadecimal; its name is no part of it."""
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
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    for _ in range(steps):
        drawn = (noise.uniform(units) < guarantee.sampling).nonzero()[:, 0]
        total = clipped_sum(network, hidden, mask, unit, drawn, site, guarantee.clip)
        total = total + guarantee.sigma * guarantee.clip * noise.normal(len(total))
        step = rate * total / (guarantee.sampling * units)
        with torch.no_grad():
            before = parameters_to_vector(weights)
            vector_to_parameters(before - step.to(before), weights)


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
    attention = 8 * network.config.layers * network.config.heads * hidden.shape[1] ** 2
    rows = min(256, max(1, _AT_ONCE // max(len(total), attention)))
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

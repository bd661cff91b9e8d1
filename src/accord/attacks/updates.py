"""What a hostile site sends in the place of the update that its local steps gave.

    Δ    its honest update;  Δ_1 … Δ_H the honest updates of the round that it knows, μ their mean and σ their
         deviation, coordinate by coordinate

    sign_flip      −a Δ
    scale          a Δ
    huge           sign(Δ) · v, finite: v is the largest number that the type holds, or what is asked for
    alie           μ − z σ,  z = Φ⁻¹((K − f − s) / (K − f)),  s = ⌊K/2⌋ + 1 − f     Baruch et al. 2019, arXiv 1902.06156
    ipm            −ε μ                                                              Xie et al. 2020, arXiv 1903.03936
    norm_bounded   −b · median_k ‖Δ_k‖ · μ / ‖μ‖: the longest opposite that a bound of b lets pass

An attack is a plain function of its own honest update and of those it knows; what it is to be told beside them is bound
by `functools.partial`. `lying` puts it into a site, `hostile` into some sites of a federation in one process.

    sites = hostile(sites, ["c"], partial(sign_flip, factor=20.0))
    engine = InProcessEngine(sites)

ALIE hides within the spread of the honest updates and IPM behind a mean that is only shortened: a bound on lengths
stops neither. Differs from ALIE: the deviation is that of the H known updates, with H − 1 in the denominator, where the
paper's attackers estimate it from their own; one known update alone has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import NormalDist
from typing import TypeAlias

import msgspec
import torch
from safetensors.torch import load, save
from torch import Tensor

from accord.federation.aggregation import Weights, length_of, lower_median, mean
from accord.federation.messages import UpdateReply, UpdateRequest

Site: TypeAlias = Callable[[UpdateRequest], UpdateReply]
Attack: TypeAlias = Callable[[Weights, Sequence[Weights]], Weights]
"""`(own honest update, honest updates that it knows) -> what is sent`; the second list is never empty."""


def sign_flip(own: Weights, known: Sequence[Weights], /, *, factor: float = 1.0) -> dict[str, Tensor]:
    """Return −a Δ."""
    return scale(own, known, factor=-factor)


def scale(own: Weights, known: Sequence[Weights], /, *, factor: float = 100.0) -> dict[str, Tensor]:
    """Return a Δ."""
    return {name: _as(d.double() * factor, d) for name, d in own.items()}


def huge(own: Weights, known: Sequence[Weights], /, *, value: float = 3e38) -> dict[str, Tensor]:
    """Return ±v, by the sign of Δ and with + for 0, or the largest finite numbers of its type."""
    return {name: _as(value * torch.where(d < 0, -1.0, 1.0).double(), d) for name, d in own.items()}


def alie(own: Weights, known: Sequence[Weights], /, *, liars: int = 1, z: float | None = None) -> dict[str, Tensor]:
    """Return μ − z σ; by default z is that of f `liars` among the known sites and themselves."""
    z = alie_z(len(known) + liars, liars) if z is None else z
    lied = {}
    for name, d in own.items():
        stacked = torch.stack([change[name].double() for change in known])
        spread = stacked.std(dim=0) if len(known) > 1 else torch.zeros_like(stacked[0])
        lied[name] = _as(stacked.mean(dim=0) - z * spread, d)
    return lied


def alie_z(sites: int, liars: int) -> float:
    """Return by how many deviations f liars among K sites may be off and still find a majority on their side.

    z = Φ⁻¹((K − f − s) / (K − f)), s = ⌊K/2⌋ + 1 − f (algorithm 3), and at least 0: few of few sites have no room.

    Raises:
        ValueError: the liars are the majority, and need not hide.
    """
    honest, needed = sites - liars, sites // 2 + 1 - liars
    if needed < 1:
        raise ValueError(f"{liars} of {sites} sites are a majority, which ALIE is not made for; give z, or fewer liars")
    return max(0.0, NormalDist().inv_cdf((honest - needed) / honest)) if honest > needed else 0.0


def ipm(own: Weights, known: Sequence[Weights], /, *, epsilon: float = 0.5) -> dict[str, Tensor]:
    """Return −ε μ."""
    average = mean(known, [1 / len(known)] * len(known))
    return {name: _as(-epsilon * average[name], d) for name, d in own.items()}


def norm_bounded(own: Weights, known: Sequence[Weights], /, *, multiple: float = 5.0) -> dict[str, Tensor]:
    """Return the opposite of μ, b times as long as the known updates' median."""
    average = mean(known, [1 / len(known)] * len(known))
    length = length_of(average)
    factor = multiple * lower_median([length_of(change) for change in known]) / length if length else 0.0
    return {name: _as(-factor * average[name], d) for name, d in own.items()}


def lying(honest: Site, attack: Attack, **told: object) -> Site:
    """Return a site that makes of its own update what `attack` says, knowing no other; `told` replaces other fields.

    `lying(site, sign_flip, distance=0.0)` also says that its images and texts lie together.
    """

    def answer(request: UpdateRequest) -> UpdateReply:
        reply = honest(request)
        own = load(reply.change)
        return _replaced(reply, attack(own, [own]), told)

    return answer


def hostile(sites: Mapping[str, Site], liars: Collection[str], attack: Attack, **told: object) -> dict[str, Site]:
    """Return the sites of a federation in one process, of which `liars` know what the honest ones send in a round.

    They must come last: an engine in one process asks the sites in their order, and a liar knows what it has heard.

    Raises:
        ValueError: a liar is no site, or one that is honest comes after it.
    """
    names, heard = list(sites), dict[tuple[str, int, int], dict[str, Weights]]()
    if not liars or {*names[-len(liars) :]} != {*liars}:
        raise ValueError(f"the liars {sorted(liars)} must be the last of the sites {names}; put them there")

    def overheard(name: str, honest: Site) -> Site:
        def answer(request: UpdateRequest) -> UpdateReply:
            reply = honest(request)
            own, key = load(reply.change), (request.task, request.round, request.group)
            if key not in heard:
                heard.clear()
            known = heard.setdefault(key, {})
            if name not in liars:
                known[name] = own
                return reply
            return _replaced(reply, attack(own, list(known.values()) or [own]), told)

        return answer

    return {name: overheard(name, site) for name, site in sites.items()}


def _replaced(reply: UpdateReply, change: Weights, told: Mapping[str, object]) -> UpdateReply:
    sent = save({name: tensor.contiguous() for name, tensor in change.items()})
    return msgspec.structs.replace(reply, change=sent, **told)


def _as(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` in the type of `like`, held to its finite numbers: one that is not would be refused."""
    most = torch.finfo(like.dtype).max
    return value.clamp(-most, most).to(like.dtype)

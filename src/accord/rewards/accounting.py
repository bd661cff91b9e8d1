"""How much noise a guarantee needs, and how much of a budget is spent: privacy loss distributions, by dp-accounting.

What reads private data is a list of mechanisms, each of which is

    releases   of the Gaussian mechanism, noise σ times the sensitivity, at a sampling rate q (1: without sampling)

and the ε of all of them together at δ is that of their composition, bounded from above on a grid of privacy losses.
Randomised response on labels costs log (1 − f) / f each time, without δ; a ledger holds it or the other, never both.
Sources: Koskela et al. 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380), as dp-accounting computes
it. Neighbours differ in one unit that counts for nothing; for the Gaussian mechanism that is adding or removing one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from accord.errors import RecipeError
from accord.rewards.private import Privacy, Sigmas


class Mechanism(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """So many releases of the Gaussian mechanism on a Poisson sample, or randomised response on every label."""

    sigma: float
    sampling: float = 1.0
    releases: int = 1
    flip: float = 0.0  # f of randomised response; 0 for the Gaussian mechanism


PROJECTION, STANDARDISATION = 0.2, 0.1
"""Shares of the budget, in 1/σ² of the one Gaussian release that would spend it all."""

_MOST = 1e6
"""Noise over sensitivity beyond which nothing is learnt."""

_GRID = 1e-3
"""Distance of the privacy losses on the grid; the ε on a coarser grid is an upper bound, too."""


def epsilon_of(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return the ε at `delta` of mechanisms on the same data together; infinite where one adds no noise.

    Raises:
        RecipeError: dp-accounting is not installed.
    """
    if not mechanisms:
        return 0.0
    if all(each.flip for each in mechanisms):
        return sum(each.releases * math.log((1 - each.flip) / each.flip) for each in mechanisms)
    if any(each.sigma <= 0 for each in mechanisms):
        return math.inf
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError as error:
        raise RecipeError(
            'privacy is accounted by dp-accounting, which is not installed; pip install "accord[privacy]"'
        ) from error
    accountant = PLDAccountant(value_discretization_interval=_GRID)
    for each in mechanisms:
        event = dp_accounting.GaussianDpEvent(each.sigma)
        if each.sampling < 1:
            event = dp_accounting.PoissonSampledDpEvent(each.sampling, event)
        accountant.compose(event, each.releases)
    return float(accountant.get_epsilon(delta))


def label_mechanism(privacy: Privacy, spent: Sequence[Mechanism] = ()) -> Mechanism:
    """Return randomised response with all of ε that `spent` has left: f = 1 / (1 + e^ε).

    Raises:
        RecipeError: nothing is left.
    """
    before = epsilon_of(spent, 0.0)
    _check_left(privacy, before)
    return Mechanism(0.0, flip=1 / (1 + math.exp(min(privacy.epsilon - before, 50.0))))


def mechanisms_of(privacy: Privacy, sigmas: Sigmas) -> list[Mechanism]:
    """Return what a training reads the private data by, in DP-SGD."""
    projection = [Mechanism(sigmas.projection)] if privacy.dimensions else []
    training = Mechanism(sigmas.gradient, privacy.sampling, privacy.steps)
    return [training, *projection, Mechanism(sigmas.standardisation, releases=4)]


def calibrate(privacy: Privacy, spent: Sequence[Mechanism] = (), reserved: Sequence[Mechanism] = ()) -> Sigmas:
    """Return the least noise with which a training, and all that is paid beside it, are (ε, δ)-private together.

    The projection and the standardisation get fixed shares of what is left of the budget, and the steps the rest.

    Args:
        privacy: the guarantee and the settings.
        spent: what read the same data before.
        reserved: what will read them and is paid for with this training, as `router_mechanism`.

    Raises:
        RecipeError: nothing is left.
    """
    whole = _whole(privacy, spent)
    projection, standardisation = whole / math.sqrt(PROJECTION), whole / math.sqrt(STANDARDISATION / 4)

    def total(sigma: float) -> float:
        training = mechanisms_of(privacy, Sigmas(sigma, projection, standardisation))
        return epsilon_of([*spent, *training, *reserved], privacy.delta)

    return Sigmas(_least(total, privacy.epsilon), projection, standardisation)


def router_mechanism(privacy: Privacy, steps: int, spent: Sequence[Mechanism] = ()) -> Mechanism:
    """Return so many steps of a router on Poisson samples, with the least noise for its share s of what is left.

        ε(σ_r, q, steps) ≤ ε(σ / √s)        at δ; σ of the one Gaussian release that would spend all that is left

    Args:
        privacy: the guarantee, with s > 0.
        steps: of all rounds together.
        spent: what read the same data before.

    Raises:
        RecipeError: nothing is left.
    """
    share = epsilon_of([Mechanism(_whole(privacy, spent) / math.sqrt(privacy.router))], privacy.delta)

    def alone(sigma: float) -> float:
        return epsilon_of([Mechanism(sigma, privacy.sampling, steps)], privacy.delta)

    return Mechanism(_least(alone, share), privacy.sampling, steps)


def _whole(privacy: Privacy, spent: Sequence[Mechanism]) -> float:
    """Return σ of the one Gaussian release that spends what is left."""
    _check_left(privacy, epsilon_of(spent, privacy.delta))
    return _least(lambda sigma: epsilon_of([*spent, Mechanism(sigma)], privacy.delta), privacy.epsilon)


def _least(total: Callable[[float], float], epsilon: float) -> float:
    """Return the least σ with which `total` is within `epsilon`, to a thousandth, by bisection of its logarithm."""
    high = 1.0
    while total(high) > epsilon:
        high *= 2
        if high > _MOST:
            raise RecipeError(
                f"no noise of the steps brings the whole within ε = {epsilon:.3g}: what is paid beside them takes it "
                "all; lower privacy.router, or raise privacy.epsilon"
            )
    low = high / 2
    while low > 1e-3 and total(low) <= epsilon:
        low, high = low / 2, low
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if total(middle) > epsilon else (low, middle)
    return high


def _check_left(privacy: Privacy, before: float) -> None:
    if before > 0.99 * privacy.epsilon:
        raise RecipeError(
            f"of the budget ε = {privacy.epsilon:g} at δ = {privacy.delta:g}, ε = {before:.3g} is spent, too little "
            "is left for another training; raise privacy.epsilon, or keep the model that was trained"
        )

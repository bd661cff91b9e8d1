import builtins
import math
import random

import pytest

from accord.errors import RecipeError
from accord.rewards.accounting import PROJECTION, Mechanism, calibrate, epsilon_of, mechanisms_of, router_mechanism
from accord.rewards.private import Privacy, Sigmas

pytest.importorskip("dp_accounting")


def test_one_gaussian_release_is_the_analytic_one():
    """Balle and Wang 2018 (arXiv 1805.06530, theorem 8): δ = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ)."""

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    for sigma in (0.7, 2.0, 9.0):
        epsilon = epsilon_of([Mechanism(sigma)], 1e-6)
        delta = phi(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * phi(-0.5 / sigma - epsilon * sigma)
        assert delta == pytest.approx(1e-6, rel=0.02) and delta <= 1e-6 * (1 + 1e-6)


def test_gaussian_releases_add_up_in_one_over_sigma_squared():
    """1/2² + 3/4² + 2/6²: as one release of σ = 1/√0.493."""
    several = [Mechanism(2.0), Mechanism(4.0, releases=3), Mechanism(6.0, releases=2)]
    one = Mechanism((1 / 4 + 3 / 16 + 2 / 36) ** -0.5)
    assert epsilon_of(several, 1e-6) == pytest.approx(epsilon_of([one], 1e-6), rel=1e-3)


def test_nothing_costs_nothing_and_no_noise_everything():
    assert epsilon_of([], 1e-6) == 0
    assert epsilon_of([Mechanism(0.0)], 1e-6) == math.inf


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha:UserWarning")
def test_two_accountants_agree():
    """T18: Opacus' PRV (Gopi et al. 2021, arXiv 2106.02848) on 30 configurations, within 2 % and its own error.

    PRV's answer is an upper bound with an error of 1 %, so that ours may be below it by as much, and never by more:
    an ε that is too low would be one that the certificate does not keep.
    """
    accountants = pytest.importorskip("opacus.accountants")
    draw = random.Random(0)
    for _ in range(30):
        q, steps = math.exp(draw.uniform(math.log(0.01), math.log(0.5))), draw.choice((20, 50, 100, 300, 1000))
        sigma = draw.uniform(0.8, 2.5) * max(1.0, q * math.sqrt(steps))
        delta = draw.choice((1e-5, 1e-6, 1e-7))
        prv = accountants.PRVAccountant()
        prv.history = [(sigma, q, steps)]
        ours = epsilon_of([Mechanism(sigma, q, steps)], delta)
        bound = prv.get_epsilon(delta, eps_error=0.01 * ours)
        assert 0.99 * bound <= ours <= 1.02 * bound, (q, steps, sigma, delta)


@pytest.mark.parametrize("epsilon", [8.0, 3.0, 1.0])
def test_the_noise_is_the_least_that_is_enough(epsilon):
    privacy = Privacy(epsilon=epsilon)
    sigmas = calibrate(privacy)
    assert 0.99 * epsilon < epsilon_of(mechanisms_of(privacy, sigmas), 1e-6) <= epsilon
    less = Sigmas(sigmas.gradient / 1.01, sigmas.projection, sigmas.standardisation)
    assert epsilon_of(mechanisms_of(privacy, less), 1e-6) > epsilon


def test_what_was_spent_before_is_left_out():
    """After ε = 3 of 8, a second training needs more noise, and all together it is within 8; then nothing is left."""
    before = mechanisms_of(Privacy(), calibrate(Privacy(epsilon=3)))
    second = calibrate(Privacy(), before)
    assert second.gradient > calibrate(Privacy()).gradient
    together = [*before, *mechanisms_of(Privacy(), second)]
    assert 7.9 < epsilon_of(together, 1e-6) <= 8
    with pytest.raises(RecipeError, match=r"of the budget ε = 8 at δ = 1e-06, ε = 8 is spent.*raise privacy.epsilon"):
        calibrate(Privacy(), together)


def test_without_a_projection_there_is_nothing_to_pay_for_it():
    assert len(mechanisms_of(Privacy(), Sigmas(1, 2, 3))) == 3
    assert mechanisms_of(Privacy(dimensions=0), Sigmas(1, 2, 3)) == [Mechanism(1, 0.2, 100), Mechanism(3, releases=4)]


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def importing(name, *rest):
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(RecipeError, match=r'pip install "accord\[privacy\]"'):
        epsilon_of([Mechanism(1.0)], 1e-6)


def test_a_share_of_the_budget_for_a_router_by_hand():
    """Without sampling, 4 steps of σ_r are one release of σ_r / 2; a share of ¼ is one of 2 σ. So σ_r = 4 σ."""
    privacy = Privacy(epsilon=3.0, sampling=1.0, router=0.25)
    whole = calibrate(privacy).projection * math.sqrt(PROJECTION)
    found = router_mechanism(privacy, 4)
    assert found == Mechanism(found.sigma, 1.0, 4) and found.sigma == pytest.approx(4 * whole, rel=0.005)


@pytest.mark.parametrize(("epsilon", "share"), [(8.0, 0.3), (1.0, 0.5)])
def test_a_router_and_a_reward_model_are_within_the_budget_together(epsilon, share):
    """Its steps cost no more than its share, and the reward model gets what is left."""
    privacy = Privacy(epsilon=epsilon, router=share)
    whole = calibrate(privacy).projection * math.sqrt(PROJECTION)
    router = router_mechanism(privacy, 69)
    assert 0.98 < epsilon_of([router], 1e-6) / epsilon_of([Mechanism(whole / math.sqrt(share))], 1e-6) <= 1
    sigmas = calibrate(privacy, reserved=[router])
    assert 0.99 * epsilon < epsilon_of([*mechanisms_of(privacy, sigmas), router], 1e-6) <= epsilon
    assert sigmas.gradient > calibrate(privacy).gradient and sigmas.projection == calibrate(privacy).projection

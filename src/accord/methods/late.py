"""The client-id router, trained by sites that work unequally and answer late.

    routed-late          server AMSGrad over updates that are divided by their local steps and taken when they come
    routed-late-plain    the same sites, by the router's own aggregation: what that server is worth

The rounds are `accord.federation.late`, after arXiv 2501.09946, of which the abstract alone is known to us. By default
the first site takes one round and the recipe's local steps, the second two rounds and twice the steps, the third three
and four times, and so on in turn. In as many rounds as `routed` has the server hears less. Other organisations' sites
do the steps that their recipe says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Final

from accord.alignment.reward import FederatedReward
from accord.errors import RecipeError, check_least
from accord.federation.aggregation import Aggregation
from accord.federation.engine import Engine
from accord.federation.late import late_rounds
from accord.methods.method import Method, Table, by_reward
from accord.methods.mor import asks
from accord.routing.fit import LocalRouterTraining, fit_router
from accord.routing.router import LearnedRouter, RouterNetwork, load_router, save_router
from accord.stages.alignment import federated_reward
from accord.stages.job import Job
from accord.stages.sites import open_federation, router_training
from accord.stages.traffic import asked_once
from accord.stages.training import open_training


@dataclass(frozen=True)
class LateConfig:
    """How late and how unequal the sites are, in turn, and what the server does about it."""

    rounds: tuple[int, ...] = (1, 2, 3)  # d_k
    work: tuple[int, ...] = (1, 2, 4)  # local steps, as a multiple of the recipe's
    wanted: int = 1  # M
    aggregation: Aggregation = Aggregation(
        "fedamsgrad", learning_rate=3e-3, momentum=0.9, second_momentum=0.99, adaptivity=1e-5, bits=16
    )

    def __post_init__(self) -> None:
        """Refuse sites that never answer or do nothing."""
        check_least(self, wanted=1)
        if not self.rounds or not self.work or min(*self.rounds, *self.work, 1) < 1:
            raise RecipeError(f"rounds and work must be 1 or more, got {self.rounds} and {self.work}; correct [late]")

    def pace(self, sites: tuple[str, ...]) -> Mapping[str, int]:
        """Return d_k by site."""
        return dict(zip(sites, cycle(self.rounds), strict=False))

    def multiple(self, sites: tuple[str, ...]) -> Mapping[str, int]:
        """Return the multiple of the recipe's local steps by site."""
        return dict(zip(sites, cycle(self.work), strict=False))


SETTINGS: Final = Table("late", LateConfig)


def late_router(job: Job, *, plain: bool) -> RouterNetwork:
    """Return the router of this run's late sites: trained once, and every method that uses it pays the bytes.

    Raises:
        RunError: no update made a step.
    """
    late, config = SETTINGS.of(job.recipe), job.recipe.router
    names = tuple(site.name for site in job.recipe.sites)
    multiple = late.multiple(names)
    config = replace(config, aggregation=config.aggregation if plain else late.aggregation)

    def local(name: str) -> LocalRouterTraining:
        training = router_training(job, name)
        training.config = replace(training.config, local_steps=training.config.local_steps * multiple[name])
        return training

    engine: Engine = open_federation(job) if job.engine else open_training(job, lambda name: {"router": local(name)})
    file = job.kept("late-router" + "-plain" * plain, after="site") / "router"

    def train() -> None:
        run = partial(late_rounds, pace=late.pace(names), wanted=late.wanted)
        save_router(file, fit_router(engine, job.encoder.features, config, seed=job.recipe.seed, run=run))

    asked_once(job, engine, file, train)
    return load_router(file)


def routed_late(job: Job, *, plain: bool) -> FederatedReward:
    """Ask the site that this router chooses."""
    return federated_reward(job, LearnedRouter(job.encoder, late_router(job, plain=plain)))


def _method(about: str, *, plain: bool) -> Method:
    return Method(
        by_reward(partial(routed_late, plain=plain), reads=lambda job: job.encoder),
        about,
        needs=frozenset({"sites"}),
        tables=(SETTINGS,),
        asks=asks,
        reward=partial(routed_late, plain=plain),
    )


METHODS: Final = {
    "routed-late": _method("as routed, the router trained by late sites and a server that adapts to them", plain=False),
    "routed-late-plain": _method("as routed, the router trained by late sites in the ordinary way", plain=True),
}

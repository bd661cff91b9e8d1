"""Federated rounds of sites that answer late: nobody waits for the slowest, and what comes late counts all the same.

    site k     starts from w^t in round t, does S_k local steps, and is heard in round t + d_k − 1;  Δ_k = w_k − w^t
    server     once M updates of any age are there:  w ← aggregate(w, (Δ_k), (p_k))
               else, and until then, w stays as it is

Under the rule `fedamsgrad` (`accord.federation.aggregation.Adaptive`) each update is divided by its S_k:

    Δ = Σ_k p_k Δ_k / S_k;  m ← β₁ m + (1 − β₁) Δ;  v ← β₂ v + (1 − β₂) Δ²;  v̂ ← max(v̂, v);  w ← w + η m / (√v̂ + τ)

Source: after client-centric federated adaptive optimisation, 2025, arXiv 2501.09946, of which the abstract is known
to us (any participation, asynchronous aggregation, unequal local work, an adaptive step at the server); the
formulas are of its lineage, FedAMS, Wang et al. 2022, arXiv 2205.02719, and FedBuff, Nguyen et al. 2022, arXiv
2106.06639, for M. So this is not that paper's method. An update is not weighed by its age. d_k is a simulation: a site
answers at once over whatever engine, FLARE among them, and the server opens its answer d_k − 1 rounds later. With all
d_k = 1 it is `accord.federation.rounds` to the bit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from accord.errors import DataWarning, RunError
from accord.federation.aggregation import Aggregate, Update
from accord.federation.asking import ask_checked
from accord.federation.audit import Audit
from accord.federation.engine import Engine
from accord.federation.messages import Reply, Task, UpdateReply, UpdateRequest
from accord.federation.rounds import Probe, Server, combine, open_round


@dataclass(frozen=True)
class _Answer:
    """What a site has answered, and when it is heard."""

    due: int
    update: Update
    examples: int
    loss: float


class _NobodyThere(Exception):
    """All that were asked are gone, and others are still at work: no reason to wait."""


def late_rounds(
    engine: Engine,
    task: Task,
    weights: Mapping[str, Tensor],
    rounds: int,
    *,
    seed: int,
    aggregate: Aggregate,
    pace: Mapping[str, int],
    wanted: int = 1,
    bits: int = 32,
    most: int = 0,
    server: Server | None = None,
    probe: Probe | None = None,
    audit: Audit | None = None,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
) -> dict[str, Tensor]:
    """Return `weights` after `rounds` rounds; what is under way at the end is lost.

    A site that is absent is asked again in the next round; one whose update breaks the model is left out of that step.

    Args:
        engine: carries the requests.
        task: what the sites train.
        weights: where to start, on the CPU.
        rounds: how many.
        seed: of the sites' draws.
        aggregate: what makes the next weights.
        pace: d_k, the rounds that each site takes; 1 for those that are not in it.
        wanted: M, updates that make a step.
        bits: of a number on its way, 16 or 32.
        most: the n_k that a site may claim; 0 for any.
        server: what is exchanged beside the weights.
        probe: tells weights that break the model.
        audit: none: it judges rounds in which all are heard.
        on_round: told the round (from 1) and the mean loss of what made the step, in rounds with one.

    Raises:
        RunError: there is an audit, or no update made a step.
    """
    if audit is not None:
        raise RunError("an audit judges rounds in which all sites are heard; set router.audit = 0 for late ones")
    current, stepped = dict(weights), False
    at_work: dict[str, _Answer] = {}
    heard: dict[str, _Answer] = {}
    for t in range(rounds):
        free = [site for site in engine.sites if site not in at_work]
        requests, check = open_round(free, task, t, current, seed=seed, bits=bits, most=most, server=server)
        for site, (reply, update) in _ask(
            engine, requests, check, f"round {t + 1} of the {task}", bool(at_work)
        ).items():
            examples = min(reply.examples, most or reply.examples)
            at_work[site] = _Answer(t + pace.get(site, 1) - 1, update, examples, reply.loss)
        for site in [site for site, answer in at_work.items() if answer.due <= t]:
            heard[site if site not in heard else f"{site} in round {t + 1}"] = at_work.pop(site)
        if len(heard) < max(wanted, 1):
            continue
        merged, broken = combine(
            aggregate,
            current,
            {name: answer.update for name, answer in heard.items()},
            {name: answer.examples for name, answer in heard.items()},
            probe,
        )
        for name in broken:
            warnings.warn(
                f"site {name} sent an update that breaks the {task}, and it is left out of the step in round {t + 1}",
                DataWarning,
                stacklevel=2,
            )
        used = [answer.loss for name, answer in heard.items() if name not in broken]
        heard.clear()
        if merged is not None and used:
            current, stepped = merged, True
            on_round(t + 1, sum(used) / len(used))
    if not stepped:
        raise RunError(
            f"no update made a step of the {task} in {rounds} rounds; ask for fewer than {wanted} at once, or more "
            "rounds, and check the sites' logs"
        )
    return current


def _ask(
    engine: Engine,
    requests: Mapping[str, UpdateRequest],
    check: Callable[[UpdateRequest, Reply], tuple[UpdateReply, Update]],
    where: str,
    others: bool,
) -> dict[str, tuple[UpdateReply, Update]]:
    """Return what the sites answered; where all are gone they are waited for, unless `others` are at work."""
    if not requests:
        return {}
    consequence = f"{where} goes on without it"

    def leave(_seconds: float) -> None:
        raise _NobodyThere

    pause = leave if others else time.sleep
    try:
        return ask_checked(engine, requests, check, what="an update", consequence=consequence, pause=pause)
    except _NobodyThere:
        return {}

"""Federated rounds of sites that answer late: nobody waits for the slowest, and what comes late counts all the same.

    site k     starts from w^t in round t, does S_k local steps, and is heard in round t + d_k − 1;  Δ_k = w_k − w^t
    server     once updates of M sites are there, of any age:  w ← aggregate(w, (Δ_k), (p_k))
               else, and until then, w stays as it is, and these sites wait

Under the rule `fedamsgrad` (`accord.federation.aggregation.Adaptive`) each update is divided by its S_k:

    Δ = Σ_k p_k Δ_k / S_k;  m ← β₁ m + (1 − β₁) Δ;  v ← β₂ v + (1 − β₂) Δ²;  v̂ ← max(v̂, v);  w ← w + η m / (√v̂ + τ)

Source: after client-centric federated adaptive optimisation, 2025, arXiv 2501.09946, of which the abstract is known
to us (any participation, asynchronous aggregation, unequal local work, an adaptive step at the server); the
formulas are of its lineage, FedAMS, Wang et al. 2022, arXiv 2205.02719, and FedBuff, Nguyen et al. 2022, arXiv
2106.06639, for M. So this is not that paper's method. An update is not weighed by its age. d_k is a simulation: a site
answers at once over whatever engine, FLARE among them, and the server opens its answer d_k − 1 rounds later. With all
d_k = 1 and updates of ordinary length it is `accord.federation.rounds` to the bit.

A site is often alone in a step, where the median of the step's lengths measures nothing. So an update is also held to
the `bound` of the aggregation times a median over all sites heard so far, of the longest that each has sent. Until
three sites are known, or all of fewer, it is the median of their first updates, which began at weights that nobody has
spoilt. If these tell that an update was too long that has made a step before, training starts again from its first
weights, and the rounds so far are lost. (The longest and not the last: at the end of a falling rate an honest late
update is 10 times as long as a prompt one. The bound within a step shortens such updates; nobody is warned of that.)
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from accord.errors import DataWarning, RunError
from accord.federation.aggregation import (
    Aggregate,
    Bounded,
    Update,
    bounded,
    length_of,
    lower_median,
    too_long,
)
from accord.federation.asking import ask_checked
from accord.federation.audit import Audit
from accord.federation.engine import Engine
from accord.federation.messages import Reply, Task, UpdateReply, UpdateRequest
from accord.federation.rounds import Probe, Server, combine, open_round, refuse_most, tell_shortened


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
        wanted: M, sites whose updates make a step.
        bits: of a number on its way, 16 or 32.
        most: the n_k that a site may claim; 0 for any.
        server: what is exchanged beside the weights.
        probe: tells weights that break the model.
        audit: none: it judges rounds in which all are heard.
        on_round: told the round (from 1) and the mean loss of what made the step, in rounds with one.

    Raises:
        RunError: there is an audit, or no update made a step; or of more than half of the sites that are there the last
            answer failed, could not be used, or broke the model.
    """
    if audit is not None:
        raise RunError("an audit judges rounds in which all sites are heard; set router.audit = 0 for late ones")
    current, stepped = dict(weights), False
    fresh = copy.deepcopy(aggregate)
    multiple = aggregate.multiple if isinstance(aggregate, Bounded) else 0.0
    at_work: dict[str, _Answer] = {}
    heard: dict[str, _Answer] = {}
    measure: dict[str, float] = {}  # ‖Δ_k‖ of each site: of its first update, and of the longest once `few` are known
    early: dict[str, float] = {}  # of each site the longest that made a step
    few = min(3, len(engine.sites))
    wrong, suspect = set[str](), ""
    for t in range(rounds):
        where, failed = f"round {t + 1} of the {task}", set[str]()
        free = [site for site in engine.sites if site not in at_work and site not in heard]
        requests, check = open_round(free, task, t, current, seed=seed, bits=bits, most=most, server=server)
        answers = _ask(engine, requests, check, where, bool(at_work), failed)
        for site, (reply, update) in answers.items():
            examples = min(reply.examples, most or reply.examples)
            at_work[site] = _Answer(t + pace.get(site, 1) - 1, update, examples, reply.loss)
        wrong -= requests.keys() - answers.keys()  # who is gone has not failed
        wrong |= failed
        there = len({*at_work, *heard, *wrong})
        heard |= {site: at_work.pop(site) for site in [*at_work] if at_work[site].due <= t}
        wrong -= heard.keys()
        refuse_most(wrong, there, where, suspect)
        if len(heard) < max(wanted, 1):
            continue
        updates = {site: answer.update for site, answer in heard.items()}
        examples_of = {site: answer.examples for site, answer in heard.items()}
        lengths = {site: length_of(update.change) for site, update in updates.items()}
        measured = lengths
        if multiple:
            sure = len(measure) >= few
            measured = measure | {
                site: max(length, measure.get(site, 0.0)) if sure else measure.get(site, length)
                for site, length in lengths.items()
            }
            median, all_rounds = lower_median([*measured.values()]), f"rounds 1 to {t + 1} of the {task}"
            if not sure and len(measured) >= few and (long := too_long(early, multiple, median)):
                warnings.warn(
                    f"site {', '.join(long)} sent an update more than {multiple:g} times as long as the median of "
                    f"{all_rounds} before enough others were heard, and training starts again; look at that site",
                    DataWarning,
                    stacklevel=2,
                )
                current, stepped, measure = dict(weights), False, measured
                aggregate = copy.deepcopy(fresh)
                at_work.clear()  # what is under way began at weights that are gone
                heard.clear()
                continue
            tell_shortened(too_long(lengths, multiple, median), measured, all_rounds)
            updates = dict(zip(updates, bounded([*updates.values()], multiple, median), strict=True))
        merged, broken = combine(aggregate, current, updates, examples_of, probe)
        for site in broken:
            engine.traffic.counts[site, task].absences += 1
            warnings.warn(
                f"site {site} sent an update that breaks the {task}, and it is left out of the step in round {t + 1}",
                DataWarning,
                stacklevel=2,
            )
        wrong |= {*broken}
        refuse_most(wrong, there, where, suspect)
        losses = {site: answer.loss for site, answer in heard.items() if site not in broken}
        heard.clear()
        if merged is None:
            continue
        current, stepped = merged, True
        if server:
            server.keep(losses, where)
        measure |= {site: measured[site] for site in losses}
        early |= {site: max(lengths[site], early.get(site, 0.0)) for site in losses}
        suspect = max(losses, key=lengths.__getitem__)
        on_round(t + 1, sum(losses.values()) / len(losses))
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
    failed: set[str],
) -> dict[str, tuple[UpdateReply, Update]]:
    """Return what the sites answered; where all are gone they are waited for, unless `others` are at work."""
    if not requests:
        return {}
    consequence = f"{where} goes on without it"

    def leave(_seconds: float) -> None:
        raise _NobodyThere

    pause = leave if others else time.sleep
    try:
        return ask_checked(
            engine, requests, check, what="an update", consequence=consequence, pause=pause, failed=failed
        )
    except _NobodyThere:
        return {}

"""Federated rounds: sites take local steps on a shared model, the server combines what they changed.

    site k     w_k ← w^t after S_k local steps on its own data;  Δ_k = w_k − w^t      (`accord.federation.local`)
    server     w^{t+1} = aggregate(w^t, (Δ_k), (p_k)),  p_k = n_k / Σ_j n_j           (`accord.federation.aggregation`)

This one loop trains whatever is shared: MoR's router, adapters of the policy, selectors, a shared reward model. The sum
runs over the sites that answered. With `bits = 16` weights and updates travel as float16: the server keeps w^t in full,
and sites start from what they read. Updates wait in the bits in which they came, and a mean takes one after the other,
so that one at a time is there in float64. (`bound` needs all lengths first: none can be added up as it arrives.)

Weights that are not finite, or under which the model's outputs on a probe are not, never become w^{t+1}: the round is
taken back and done without the update that makes them so. Where more than half of the sites that are there fail or send
nothing usable, the training ends: what is left over is not averaged alone.

Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1. Differs: all sites take part in every round, as a few
institutions can; the local optimiser is the algorithm's own; and n_k counts up to a limit. (Measured on easy-VQA with
620, 1027 and 5321 questions, one seed: a shared reward model ranks the right answer first for 0.31 of 300 dev
questions, macro mean over types, and for 0.61 where all sites weigh the same.) Where more than the weights must travel,
as in SCAFFOLD, a `Server` says what goes down beside them and takes what comes up.
"""

from __future__ import annotations

import copy
import math
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

import msgspec
import torch
from torch import Tensor

from accord.errors import DataWarning, ReplyError, RunError
from accord.federation.aggregation import Aggregate, Update, fedavg, length_of, shares
from accord.federation.asking import ask_checked
from accord.federation.audit import Audit
from accord.federation.engine import Engine
from accord.federation.messages import Reply, Task, UpdateReply, UpdateRequest, check_kind
from accord.federation.weights import read_update, to_bytes

Probe: TypeAlias = Callable[[Mapping[str, Tensor]], bool]
"""Whether the model's outputs on a few inputs are finite under these weights (`accord.federation.weights.probe_of`)."""


class Server(Protocol):
    """What an algorithm's server keeps beside the weights."""

    def send(self) -> bytes:
        """Return what goes to every site beside the weights in the coming round, safetensors."""
        ...

    def receive(self, site: str, examples: int, state: bytes, /) -> None:
        """Take in what came from `site` beside its update; whether that counts, `keep` tells.

        Raises:
            ReplyError: it cannot be used; the site sits out this round.
            CheckpointError: likewise.
        """
        ...

    def keep(self, sites: Collection[str], where: str) -> None:
        """Learn whose updates made the step of round `where`: what these sites sent last counts, and no other's."""
        ...


def federated_rounds(
    engine: Engine,
    task: Task,
    weights: Mapping[str, Tensor],
    rounds: int,
    *,
    seed: int,
    aggregate: Aggregate = fedavg,
    bits: int = 32,
    first: int = 0,
    group: int = 0,
    sites: Sequence[str] | None = None,
    most: int = 0,
    server: Server | None = None,
    probe: Probe | None = None,
    audit: Audit | None = None,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
    on_replies: Callable[[int, Mapping[str, UpdateReply]], None] = lambda _round, _replies: None,
) -> dict[str, Tensor]:
    """Return `weights` after `rounds` rounds; a site that is absent or sends an unusable update sits out that round.

    Args:
        engine: carries the requests.
        task: what the sites train.
        weights: where to start, on the CPU.
        rounds: how many.
        seed: of the sites' draws, which depend on the task, the group, the round and the site's name, too.
        aggregate: what makes the next weights of the sites' updates.
        bits: of a number on its way, 16 or 32.
        first: number of the first round, from 0, where an algorithm runs its rounds in parts.
        group: which of several models this is.
        sites: the sites that take part; None for all.
        most: the n_k that a site may claim, `Averaging.examples_at_most`; 0 for any.
        server: what is exchanged beside the weights.
        probe: tells weights that break the model, in the place of a check that they are finite alone.
        audit: names the site whose updates spoil the model, and leaves it out where it is told to.
        on_round: told the round (from 1) and the mean loss of the sites whose updates were combined.
        on_replies: told the round and what each of these sites replied, without its `change`, by site in the order of
            `updates`, once the server has combined it.

    Raises:
        RunError: no site answered in a round; or more than half of those that were there failed, sent nothing usable,
            or sent what breaks the model.
    """
    current, longest = dict(weights), ""
    for t in range(first, first + rounds):
        asked = [site for site in engine.sites if sites is None or site in sites]
        requests, check = open_round(
            asked, task, t, current, seed=seed, bits=bits, group=group, most=most, server=server
        )
        consequence = f"round {t + 1} of the {task} goes on without it"
        failed: set[str] = set()
        replied = ask_checked(engine, requests, check, what="an update", consequence=consequence, failed=failed)
        there = len(replied) + len(failed)
        if longest or replied:
            refuse_most(failed, there, f"round {t + 1} of the {task}", longest)
        if not replied:
            raise RunError(
                f"no site answered in round {t + 1} of {task!r}; check the sites' logs and start again with --resume"
            )
        updates = {site: update for site, (_, update) in replied.items()}
        examples = {site: min(reply.examples, most or reply.examples) for site, (reply, _) in replied.items()}
        left_out = set[str]()
        if audit:
            weight = dict(zip(updates, shares([*examples.values()]), strict=True))
            for site in audit.round(t + 1, current, updates, weight):
                warnings.warn(
                    f"site {site}: the {task} is no better at the server's labelled questions for its updates up to "
                    f"round {t + 1}, or is worse; it may be poisoning the {task}: look at that site",
                    DataWarning,
                    stacklevel=2,
                )
            left_out = audit.left_out & {*updates}
            updates = {site: update for site, update in updates.items() if site not in left_out}
            refuse_most(failed | left_out, there, f"round {t + 1} of the {task}", longest)
        merged, broken = combine(aggregate, current, updates, examples, probe)
        for site in broken:
            engine.traffic.counts[site, task].absences += 1
            warnings.warn(
                f"site {site} sent an update that breaks the {task}: with it weights or outputs are not finite; "
                f"{consequence}",
                DataWarning,
                stacklevel=2,
            )
        refuse_most(failed | left_out | {*broken}, there, f"round {t + 1} of the {task}", longest)
        assert merged is not None  # nothing broken is left over but where most are
        current = merged
        used = [site for site in updates if site not in broken]
        lengths = {site: length_of(updates[site].change) for site in used}
        shortened = {used[k]: times for k, times in getattr(aggregate, "shortened", {}).items()}
        tell_shortened(shortened, lengths, f"round {t + 1} of the {task}")
        longest = max(lengths, key=lengths.__getitem__)
        if server:
            server.keep(used, f"round {t + 1} of the {task}")
        on_replies(t + 1, {site: replied[site][0] for site in used})
        on_round(t + 1, sum(replied[site][0].loss for site in used) / len(used))
    return current


def open_round(
    sites: Iterable[str],
    task: Task,
    number: int,
    current: Mapping[str, Tensor],
    *,
    seed: int,
    bits: int,
    group: int = 0,
    most: int = 0,
    server: Server | None = None,
) -> tuple[dict[str, UpdateRequest], Callable[[UpdateRequest, Reply], tuple[UpdateReply, Update]]]:
    """Return what `sites` are asked in a round, by name, and the check of their replies, which `server` takes in.

    Args:
        sites: names.
        task: what they train.
        number: the round, from 0.
        current: w^t.
        seed: of their draws.
        bits: of a number on its way.
        group: which of several models this is.
        most: the n_k that a site may claim; 0 for any.
        server: what is exchanged beside the weights.
    """
    sent, beside = to_bytes(current, bits=bits), server.send() if server else b""
    requests, asked, expected = dict[str, UpdateRequest](), dict[str, str](), dict(current)
    for site in sites:
        name = f"{task}-{group}-{number}-{site}"
        own = zlib.crc32(f"{seed}-{name}".encode())  # neither on the sites' order nor on which others take part
        requests[site] = UpdateRequest(name, task, number, sent, own, beside, group, 16 if bits == 16 else 32)
        asked[name] = site

    def check(request: UpdateRequest, reply: Reply) -> tuple[UpdateReply, Update]:
        update, change = check_update(request, reply, expected)
        if server:
            server.receive(asked[request.id], min(update.examples, most or update.examples), update.state)
        # Its bytes go: what they hold is in `change`.
        return msgspec.structs.replace(update, change=b""), Update(change, update.steps, update.distance)

    return requests, check


def combine(
    aggregate: Aggregate,
    current: Mapping[str, Tensor],
    updates: Mapping[str, Update],
    examples: Mapping[str, int],
    probe: Probe | None = None,
) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Return w^{t+1} of the updates that do not break the model, and the sites of those that do.

    Where all together break it, the one is left out without which they do not, the longest first; if there is none, the
    longest, and so on. What a rule remembers is that of the round that counts: it must be in its attributes.

    Returns:
        The weights, None where half of several updates are left out and the rest is broken still, and the sites.
    """
    state = getattr(aggregate, "__dict__", {})
    remembered = copy.deepcopy(state)
    lengths = {site: length_of(update.change) for site, update in updates.items()}

    def attempt(sites: Sequence[str]) -> dict[str, Tensor] | None:
        state.update(copy.deepcopy(remembered))
        if not sites:
            return None
        try:
            merged = aggregate(current, [updates[site] for site in sites], shares([examples[site] for site in sites]))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # no decomposition of what was sent
            return None
        finite = all(bool(weight.isfinite().all()) for weight in merged.values())
        return merged if finite and (probe is None or probe(merged)) else None

    kept, broken = list(updates), list[str]()
    while (merged := attempt(kept)) is None and 2 * len(broken) <= len(updates) and kept:
        by_length = sorted(kept, key=lengths.__getitem__, reverse=True)
        without = ([site for site in kept if site != each] for each in by_length)
        tried = (each for each, rest in zip(by_length, without, strict=True) if attempt(rest) is not None)
        broken.append(next(tried, by_length[0]))
        kept.remove(broken[-1])
    return merged, broken


def tell_shortened(
    times: Mapping[str, float], lengths: Mapping[str, float], where: str, *, what: str = "an update"
) -> None:
    """Warn of updates that were shortened.

    Args:
        times: how many times the median each of them had, infinite where the median has no length.
        lengths: of all that were compared, by site.
        where: the rounds in which they were sent.
        what: one of them.
    """
    if math.inf in times.values():
        still = [site for site, length in lengths.items() if not length]
        warnings.warn(
            f"sites {', '.join(still)} sent updates that change nothing in {where}; no other can be measured by such "
            "lengths, and the round changes nothing: look at these sites",
            DataWarning,
            stacklevel=3,
        )
    for site, multiple in times.items():
        if math.isinf(multiple):
            continue
        warnings.warn(
            f"site {site} sent {what} {multiple:.3g} times as long as the median of {where}, and it was shortened; "
            + ("look at that site" if len(lengths) > 2 else "of two sites either may be wrong: look at both"),
            DataWarning,
            stacklevel=3,
        )


def refuse_most(failed: Collection[str], there: int, where: str, longest: str) -> None:
    """End a training in which more than half of the `there` sites failed.

    Raises:
        RunError: names them, and `longest`, whose update was the longest before they failed.
    """
    if 2 * len(failed) <= there:
        return
    before = (
        f"; the longest update of the round before was that of site {longest}, which may have broken what the others "
        "were sent: look at it first"
        if longest
        else ""
    )
    raise RunError(
        f"{where}: {len(failed)} of {there} sites failed or sent what cannot be used ({', '.join(sorted(failed))}), "
        f"and what is left over is not averaged alone{before}; check the sites' logs and start again with --resume"
    )


def check_update(
    request: UpdateRequest, reply: Reply, expected: Mapping[str, Tensor]
) -> tuple[UpdateReply, Mapping[str, Tensor]]:
    """Validate a site's update before use; return it and Δ_k.

    Raises:
        ReplyError: wrong type or request id, no examples, no steps, a loss that is not finite, or a distance that is
            not finite or below 0.
        CheckpointError: the names, shapes or types are not those of `expected`, or a value is not finite.
    """
    reply = check_kind(request, reply, UpdateReply, "an update")
    if reply.examples < 1 or reply.steps < 1 or not math.isfinite(reply.loss):
        raise ReplyError(f"{reply.examples} examples and {reply.steps} steps with a loss of {reply.loss}")
    if reply.distance is not None and not 0 <= reply.distance < math.inf:  # NaN is in no range
        raise ReplyError(f"a distance of {reply.distance}, which must be finite and at least 0")
    return reply, read_update(reply.change, expected, bits=request.bits, what=f"an update of the {request.task}")

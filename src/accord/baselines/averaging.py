"""Federated averaging: sites take local steps on a shared model, the server averages what comes back.

    w_k^{t+1} = w^t after `local_steps` steps of site k on its own data
    w^{t+1}   = Σ_k (n_k / Σ_j n_j) w_k^{t+1}              over the sites that answered

Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1 (FedAvg). Differs: all sites take part in every round, as a
few institutions can; the local optimiser is the algorithm's own; and n_k counts up to a limit, as in the router's
training (measured on easy-VQA with 620, 1027 and 5321 questions, one seed: a shared reward model ranks the right answer
first for 0.31 of 300 dev questions, macro mean over types, and for 0.61 where all sites weigh the same). Where more
than the weights must travel, as in SCAFFOLD, a `Server` says what goes down beside them and takes what comes up.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from accord.errors import ReplyError, RunError, check_least, check_positive
from accord.federation.asking import ask_checked
from accord.federation.engine import Engine
from accord.federation.messages import Reply, Task, UpdateReply, UpdateRequest, check_kind
from accord.routing.fit import federated_average
from accord.routing.router import read_weights

Item = TypeVar("Item")


@dataclass(frozen=True)
class Averaging:
    """How a shared model is trained: rounds of local steps."""

    rounds: int = 20
    local_steps: int = 10
    batch_size: int = 32  # questions, or prompts with their pairs
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    symmetries: bool = False  # augment with the symmetries of the square
    gradient_accumulation: int = 1  # batches to a step
    examples_at_most: int = 500  # n_k in the average, so that no site's size drowns the others; 0 for no limit

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train."""
        check_least(self, rounds=1, local_steps=1, batch_size=1, weight_decay=0, gradient_accumulation=1)
        check_least(self, examples_at_most=0)
        check_positive(self, "learning_rate")

    @property
    def drawn(self) -> int:
        """How many questions, or prompts with their pairs, a site draws for one round."""
        return self.local_steps * self.batch_size * self.gradient_accumulation


class Server(Protocol):
    """What an algorithm's server keeps beside the weights."""

    def send(self) -> bytes:
        """Return what goes to every site beside the weights in the coming round, safetensors."""
        ...

    def receive(self, site: str, examples: int, state: bytes, /) -> None:
        """Take what came from `site` beside its weights.

        Raises:
            ReplyError: it cannot be used; the site sits out this round.
            CheckpointError: likewise.
        """
        ...


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that are trained, on the CPU, by name: an adapter's alone under LoRA.

    A tied weight is there once.
    """
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_trainable_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights`, which `trainable_weights` named, into `model`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.copy_(weights[name])


class Correction(Protocol):
    """What an algorithm makes of a parameter's gradient before the optimiser sees it."""

    def __call__(self, name: str, gradient: Tensor, weight: Tensor, /) -> Tensor:
        """Return the gradient to step along."""
        ...


def take_steps(
    model: nn.Module,
    batches: Iterable[Item],
    loss: Callable[[Item], Tensor],
    optimiser: torch.optim.Optimizer,
    *,
    seed: int,
    accumulate: int = 1,
    correct: Correction | None = None,
) -> float:
    """Step once along the gradient of each `accumulate` batches; return their mean loss.

    Differs from a `Trainer` per round, which collects garbage whenever it starts: that costs as much as three steps of
    a small model, and TRL's also wraps the model's `forward` once more each time.

    Args:
        model: trained in place.
        batches: as many as there are steps, times `accumulate`.
        loss: of one batch.
        optimiser: over the model's trainable parameters.
        seed: of dropout; the process's own generator is left as it was.
        accumulate: batches to a step.
        correct: what to make of each gradient.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for n, batch in enumerate(batches, start=1):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                value = loss(batch)
            (value / accumulate).backward()
            losses.append(value.item())
            if n % accumulate:
                continue
            if correct is not None:
                for name, p in trained.items():
                    p.grad = None if p.grad is None else correct(name, p.grad, p.detach())
            optimiser.step()
            optimiser.zero_grad()
    model.eval()
    return sum(losses) / len(losses)


def to_bytes(weights: Mapping[str, Tensor]) -> bytes:
    """Return `weights` as safetensors bytes, as they travel."""
    return save({name: tensor.cpu().contiguous() for name, tensor in weights.items()})


def federated_rounds(
    engine: Engine,
    task: Task,
    weights: Mapping[str, Tensor],
    rounds: int,
    *,
    seed: int,
    first: int = 0,
    group: int = 0,
    sites: Sequence[str] | None = None,
    most: int = 0,
    state: bytes = b"",
    server: Server | None = None,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
) -> dict[str, Tensor]:
    """Return `weights` after `rounds` rounds; a site that is absent or sends unusable weights sits out that round.

    Args:
        engine: carries the requests.
        task: what the sites train.
        weights: where to start, on the CPU.
        rounds: how many.
        seed: of the sites' draws, which depend on the task, the group, the round and the site's name, too.
        first: number of the first round, from 0, where an algorithm runs its rounds in parts.
        group: which of several models this is.
        sites: who takes part; None for everybody.
        most: the n_k that a site may claim, `Averaging.examples_at_most`; 0 for any.
        state: what goes to every site beside the weights, where there is no `server`.
        server: what is exchanged beside the weights.
        on_round: told the round (from 1) and the mean loss of the sites that answered.

    Raises:
        RunError: no site answered in a round.
    """
    current = dict(weights)
    for t in range(first, first + rounds):
        sent, beside = to_bytes(current), server.send() if server else state
        requests = {}
        for site in engine.sites:
            if sites is None or site in sites:
                name = f"{task}-{group}-{t}-{site}"
                own = zlib.crc32(f"{seed}-{name}".encode())  # neither on the sites' order nor on who else takes part
                requests[site] = UpdateRequest(name, task, t, sent, own, beside, group)
        updates = _ask_updates(engine, requests, current, most, server)
        if not updates:
            raise RunError(
                f"no site answered in round {t + 1} of {task!r}; check the sites' logs and start again with --resume"
            )
        current = federated_average([each.weights for each in updates], [each.examples for each in updates])
        on_round(t + 1, sum(each.loss for each in updates) / len(updates))
    return current


@dataclass(frozen=True)
class _Update:
    """What counts of a site's reply."""

    weights: dict[str, Tensor]
    examples: int
    loss: float


def _ask_updates(
    engine: Engine,
    requests: Mapping[str, UpdateRequest],
    expected: Mapping[str, Tensor],
    most: int,
    server: Server | None,
) -> list[_Update]:
    sites = {request.id: site for site, request in requests.items()}

    def check(request: UpdateRequest, reply: Reply) -> _Update:
        update, weights = check_update(request, reply, expected)
        examples = min(update.examples, most or update.examples)
        if server:
            server.receive(sites[request.id], examples, update.state)
        return _Update(weights, examples, update.loss)

    consequence = "the shared model was averaged without it"
    return list(ask_checked(engine, requests, check, what="an update", consequence=consequence).values())


def check_update(
    request: UpdateRequest, reply: Reply, expected: Mapping[str, Tensor]
) -> tuple[UpdateReply, dict[str, Tensor]]:
    """Validate a site's update before use; return it and its weights.

    Raises:
        ReplyError: wrong type or request id, no examples, or a loss that is not finite.
        CheckpointError: the weights' names, shapes or types are not those of `expected`, or a value is not finite.
    """
    reply = check_kind(request, reply, UpdateReply, "an update")
    if reply.examples < 1 or not math.isfinite(reply.loss):
        raise ReplyError(f"{reply.examples} examples with a loss of {reply.loss}")
    return reply, read_weights(reply.weights, dict(expected))

"""A site's half of a federated round: local steps on its own data, which stays there.

    w_k ← w^t after `local_steps` steps of site k

`accord.federation.rounds` has the server's half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from accord.errors import check_least, check_positive
from accord.federation.aggregation import Aggregation
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.weights import read_weights, set_trainable_weights, to_bytes, trainable_weights

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
    aggregation: Aggregation = Aggregation()

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train."""
        check_least(self, rounds=1, local_steps=1, batch_size=1, weight_decay=0, gradient_accumulation=1)
        check_least(self, examples_at_most=0)
        check_positive(self, "learning_rate")

    @property
    def drawn(self) -> int:
        """How many questions, or prompts with their pairs, a site draws for one round."""
        return self.local_steps * self.batch_size * self.gradient_accumulation

    @property
    def told(self) -> str:
        """The rounds and their length, as a plan says them."""
        return f"{self.rounds} rounds of {self.local_steps} local steps"


def begin(model: nn.Module, request: UpdateRequest) -> dict[str, Tensor]:
    """Put the weights w^t of `request` into `model`; return them.

    Raises:
        CheckpointError: they are not those of this model.
    """
    what = f"weights of the task {request.task!r}"
    start = read_weights(request.weights, trainable_weights(model), bits=request.bits, what=what)
    set_trainable_weights(model, start)
    return start


def finish(
    model: nn.Module,
    request: UpdateRequest,
    start: Mapping[str, Tensor],
    *,
    examples: int,
    loss: float,
    steps: int,
    state: bytes = b"",
    distance: float | None = None,
) -> UpdateReply:
    """Return what `steps` local steps since `begin` changed in `model`, Δ_k = w_k − w^t.

    `distance` is d_k between what the model makes of images and of text, which rules of `accord.federation.reliability`
    weigh by.
    """
    change = {name: weight - start[name] for name, weight in trainable_weights(model).items()}
    return UpdateReply(request.id, to_bytes(change, bits=request.bits), examples, loss, state, steps, distance)


def round_rate(learning_rate: float, number: int, rounds: int) -> float:
    """Return the learning rate of all steps of round `number`, from 0, out of `rounds`."""
    return 0.5 * learning_rate * (1 + math.cos(math.pi * number / rounds))


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

"""What tells an online router whether its choices were good: one number a step, r_t in [0, 1].

    LossSign        1[J_t ≤ J_{t−1}]                  J the GRPO loss, or the objective −loss
    QuantileLoss    the share of the last losses that are above this one
    AnchorChange    1, ½, 0 as the policy's accuracy on a small public anchor set rose, stayed or fell:
                    P(log π(y⁺|x) > log π(y⁻|x))
    RandomBit       a coin, the control

MoR (Lu et al. 2026, arXiv 2605.03426) prints r = 0 for ΔJ > 0 and r = 1 for ΔJ ≤ 0, and calls the latter
an improvement: so J is a loss there, which is our reading, and the other one is a switch. Either bit says little:
with advantages centred in their groups and one update on each batch the surrogate is 0 at the point where it is
evaluated, so that the loss is β KL, and whether it rose depends hardly on which site judged. Hence the anchors, and the
control, against which any of them is to be held.

`OnlineUpdate` carries the signal to the router, in a stock `trl.GRPOTrainer` as in `accord.alignment.grpo.align`:

    router = OnlineRouter(encoder, network, seed=0)
    trainer = GRPOTrainer(…, reward_funcs=FederatedReward(engine, router), args=GRPOConfig(logging_steps=1, …),
                          callbacks=[OnlineUpdate(router, LossSign())])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from accord.data.images import load_images
from accord.errors import DataError, RecipeError, check_least
from accord.models.inputs import Batch, build_batch, model_inputs
from accord.models.load import Processor, without_adapter
from accord.types import PreferencePair


class Signal(Protocol):
    """Says how good the step was: r in [0, 1], or None for no answer yet; a plain function qualifies.

    After None, what was routed waits for the next answer. One that learns has `state_dict` and `load_state_dict`.
    """

    def __call__(self, logs: Mapping[str, float], step: int, model: nn.Module, /) -> float | None:
        """Return r from what TRL logged of `step` and from the policy after it."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """Has a state that a resumed run must know."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return it."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Go on from it."""
        ...


class Learner(Remembers, Protocol):
    """Learns from feedback, as `accord.routing.online.OnlineRouter` does."""

    def learn(self, feedback: float, /) -> object:
        """Learn from r on what was routed since the last."""
        ...


class OnlineUpdate(TrainerCallback):
    """After every step, ask the signal and let the router learn: a trainer callback.

    Its state is the router's and the signal's, under `router.` and `signal.`. With TRL's `num_iterations` above 1 there
    are steps without rollouts; their feedback finds nothing to learn from.

    Args:
        router: the reward's router.
        signal: tells r.
    """

    def __init__(self, router: Learner, signal: Signal) -> None:
        self.router = router
        self.signal = signal

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Refuse a trainer that does not log every step.

        Raises:
            RecipeError: it does not.
        """
        if args.logging_strategy != "steps" or args.logging_steps != 1:
            raise RecipeError(
                f"OnlineUpdate needs the loss of every step, got logging_strategy={str(args.logging_strategy)!r} and "
                f"logging_steps={args.logging_steps}; set logging_strategy='steps' and logging_steps=1"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        model: nn.Module | None = None,
        **_: object,
    ) -> None:
        """Ask and learn; an evaluation's logs, and the summary at the end, are not of a step."""
        if not logs or "loss" not in logs:
            return
        feedback = self.signal(logs, state.global_step, cast(nn.Module, model))
        if feedback is not None:
            self.router.learn(feedback)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what router and signal know."""
        known = {f"router.{name}": tensor for name, tensor in self.router.state_dict().items()}
        if isinstance(self.signal, Remembers):
            known |= {f"signal.{name}": tensor for name, tensor in self.signal.state_dict().items()}
        return known

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.router.load_state_dict(_under("router.", state))
        if isinstance(self.signal, Remembers):
            self.signal.load_state_dict(_under("signal.", state))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


class LossSign:
    """r_t = 1[J_t ≤ J_{t−1}] (MoR, arXiv 2605.03426); nothing at the first step, or after a loss that is not finite.

    Args:
        objective: what J is: the GRPO loss, or what GRPO maximises, −loss. The readings differ but where J stays.
    """

    def __init__(self, objective: Literal["loss", "-loss"] = "loss") -> None:
        self.sign = 1.0 if objective == "loss" else -1.0
        self.last = math.nan  # J_{t−1}

    def __call__(self, logs: Mapping[str, float], step: int, model: nn.Module, /) -> float | None:
        """Return 1 if J did not rise, else 0."""
        before, self.last = self.last, self.sign * logs["loss"]
        if not (math.isfinite(before) and math.isfinite(self.last)):
            return None
        return float(self.last <= before)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the last J."""
        return {"last": torch.tensor(self.last, dtype=torch.double)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.last = state["last"].item()


class QuantileLoss:
    """r_t = the share of the last losses that are above this one, equal ones by half.

    Source: BayesianRouter (Wu & Lu 2025, arXiv 2510.02850), which learns from the negative DPO loss, normalised by its
    quantiles. Differs: the loss is GRPO's, one a step, so that there is no baseline of a batch to subtract.

    Args:
        window: how many losses are remembered.
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        check_least(self, window=1)
        self.losses: list[float] = []

    def __call__(self, logs: Mapping[str, float], step: int, model: nn.Module, /) -> float | None:
        """Return r; None while no loss is known, or for one that is not finite."""
        loss, known = logs["loss"], self.losses
        if not math.isfinite(loss):
            return None
        self.losses = [*known, loss][-self.window :]
        return sum((loss < other) + 0.5 * (loss == other) for other in known) / len(known) if known else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the last losses."""
        return {"losses": torch.tensor(self.losses, dtype=torch.double)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.losses = state["losses"].tolist()


class AnchorChange:
    """Compare the policy's preference accuracy on anchors with the one before: 1 if it rose, 0 if it fell, ½ if equal.

    The first measurement, after step `every`, has none before it and is no answer; nor is a step without one. A
    measurement costs a forward pass over twice as many rows as there are anchors.

    Args:
        processor: the policy's.
        anchors: public pairs; their labels are the server's own.
        every: steps between measurements.
        pairs_at_once: pairs of one forward pass.

    Raises:
        DataError: there are no anchors.
    """

    def __init__(
        self, processor: Processor, anchors: Sequence[PreferencePair], *, every: int = 5, pairs_at_once: int = 32
    ) -> None:
        self.every = every
        check_least(self, every=1)
        if not anchors:
            raise DataError("cannot measure a policy on 0 anchors; give AnchorChange public preference pairs")
        self.batches = [
            build_batch(
                processor,
                [pair.prompt for pair in some],
                [load_images(pair.images) for pair in some],
                [[pair.chosen, pair.rejected] for pair in some],
            )
            for some in (anchors[start : start + pairs_at_once] for start in range(0, len(anchors), pairs_at_once))
        ]
        self.accuracy = math.nan  # at the last measurement

    def __call__(self, logs: Mapping[str, float], step: int, model: nn.Module, /) -> float | None:
        """Measure if it is time; return r."""
        if step % self.every:
            return None
        before, self.accuracy = self.accuracy, self.measure(model)
        return None if math.isnan(before) else 0.5 + 0.5 * ((self.accuracy > before) - (self.accuracy < before))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Return how often the policy finds the chosen answer likelier than the rejected one."""
        policy, training = without_adapter(model), model.training
        model.eval()
        try:
            logps = [log_likelihood(policy, batch.to(policy.device)) for batch in self.batches]
        finally:
            model.train(training)
        chosen, rejected = torch.cat(logps).view(-1, 2).T
        return float((chosen > rejected).double().mean())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the last accuracy."""
        return {"accuracy": torch.tensor(self.accuracy, dtype=torch.double)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.accuracy = state["accuracy"].item()


def log_likelihood(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return `Σ_t log π(y_t | x, y_<t)` `[N]` over the tokens of each row's completion, its end token included."""
    said = batch.labels != -100
    first = int(said.int().argmax(dim=1).min())
    labels, said = batch.labels[:, first:], said[:, first:]
    # Logits of the columns before are not made: where images are long they are nearly all.
    logits = model(**model_inputs(model, batch), use_cache=False, logits_to_keep=labels.shape[1] + 1).logits[:, :-1]
    tokens = logits.float().log_softmax(dim=-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(-1)
    return cast(Tensor, tokens.masked_fill(~said, 0.0).sum(dim=1))


class RandomBit:
    """Toss a coin: what the update does by itself, whatever it is told."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logs: Mapping[str, float], step: int, model: nn.Module, /) -> float | None:
        """Return 0 or 1; nothing after the first step, whose loss has none before it to be compared with."""
        if step < 2:
            return None
        return float(torch.randint(2, (), generator=self.generator))

    def state_dict(self) -> dict[str, Tensor]:
        """Return how far the tossing is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self.generator.set_state(state["generator"])

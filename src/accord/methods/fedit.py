"""Tune the policy on the sites' answers with a shared LoRA adapter: FedIT, with FedAvg, FedProx or SCAFFOLD.

    L_k(w) = − E Σ_t log π_w(a_t | image, question, a_<t)          over site k's own questions and answers

    FedAvg      step along g = ∇L_k(w)
    FedProx     step along g + μ (w − w^t)                          the gradient of  L_k(w) + μ/2 ‖w − w^t‖²
    SCAFFOLD    step along g − c_k + c;   c_k⁺ = c_k − c + (w^t − w_k) / (S η),   c = Σ_k n_k c_k / Σ_k n_k

w are the adapter's weights, w^t where round t starts, S the local steps, η their length. Only the adapter travels, and
under SCAFFOLD a control variate of its size each way.

Sources: Zhang et al. 2023, arXiv 2305.05644 (FedIT: federated instruction tuning with LoRA); McMahan et al. 2017,
arXiv 1602.05629; Li et al. 2020, arXiv 1812.06127, eq. 2; Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1,
option II. The average of the factors A and B is not the average of the updates BA, as in FedIT.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from accord.data.images import load_images
from accord.data.sampling import draw_balanced
from accord.errors import DataError, RecipeError, check_least, check_positive
from accord.federation.aggregation import BOUND, Update, bounded, length_of, lower_median, mean, shares, too_long
from accord.federation.engine import Engine
from accord.federation.local import Averaging, begin, finish, take_steps
from accord.federation.messages import Task, UpdateReply, UpdateRequest
from accord.federation.rounds import Server, federated_rounds, tell_shortened
from accord.federation.rules import LocalRule, Plain, Proximal
from accord.federation.site import LocalUpdate
from accord.federation.weights import probe_of, read_weights, set_trainable_weights, to_bytes, trainable_weights
from accord.methods.method import Method, Table
from accord.models.finetune import SYMMETRIES, transform
from accord.models.inputs import build_batch
from accord.models.load import LoraSettings, Processor, add_lora, load_model, without_adapter
from accord.models.made_up import made_up_loss
from accord.recipe import Recipe
from accord.stages.alignment import Aligned
from accord.stages.job import Job
from accord.stages.training import open_training, rounds_told
from accord.types import Question, prompt_of


@dataclass(frozen=True)
class FedITConfig:
    """How the policy is tuned on the sites' answers."""

    averaging: Averaging = field(default_factory=lambda: Averaging(rounds=40, local_steps=5, learning_rate=3e-3))
    lora: LoraSettings = field(default_factory=LoraSettings)
    mu: float = 0.01  # μ of FedProx
    sgd_learning_rate: float = 0.1  # of SCAFFOLD's local steps, in place of averaging.learning_rate

    def __post_init__(self) -> None:
        """Refuse a negative pull, which pushes away."""
        check_least(self, mu=0)
        check_positive(self, "sgd_learning_rate")


@dataclass(frozen=True)
class Algorithm:
    """The two halves of an algorithm, and the optimiser of the local steps."""

    rule: Callable[[], LocalRule]
    server: Callable[[Mapping[str, Tensor], float], Server | None] = lambda weights, bound: None  # from w^0
    optimiser: type[torch.optim.AdamW] | type[torch.optim.SGD] = torch.optim.AdamW


class ControlVariate:
    """Step along g − c_k + c, and renew c_k by option II (SCAFFOLD, a site's half).

    c_k⁺ is the mean of the gradients g of the round: the steps added up to w^t − w_k = η Σ (g − c_k + c).
    """

    def __init__(self) -> None:
        self.own: dict[str, Tensor] = {}  # c_k
        self.shared: dict[str, Tensor] = {}  # c
        self.start: Mapping[str, Tensor] = {}

    def begin(self, start: Mapping[str, Tensor], state: bytes, /) -> None:
        """Take w^t and c.

        Raises:
            CheckpointError: c has not the names, shapes and types of w^t.
        """
        self.shared = {name: c.to(start[name].device) for name, c in read_weights(state, dict(start)).items()}
        self.own = self.own or {name: torch.zeros_like(w) for name, w in start.items()}
        self.start = start

    def correct(self, name: str, gradient: Tensor, weight: Tensor, /) -> Tensor:
        """Return g − c_k + c."""
        return gradient - self.own[name] + self.shared[name]

    def end(self, weights: Mapping[str, Tensor], distance: float, /) -> bytes:
        """Renew c_k; return it."""
        self.own = {
            name: own - self.shared[name] + (self.start[name] - weights[name]) / distance
            for name, own in self.own.items()
        }
        return to_bytes(self.own)


class ControlVariates:
    """Keep c_k of every site that answered, and send c = Σ_k n_k c_k / Σ_k n_k (SCAFFOLD, the server's half).

    Differs: sites send c_k⁺ and not c_k⁺ − c_k, so that c stays the mean of the c_k when a reply is lost; and the mean
    is weighted by n_k, as that of the weights is, and over the sites heard so far. A c_k that is much longer than the
    others' is shortened as an update is, by `bound` (`accord.federation.aggregation`), and its sender named: c is in
    every site's steps. The c_k of a site whose update was not used is not, either.
    """

    def __init__(self, weights: Mapping[str, Tensor], bound: float = BOUND) -> None:
        self.bound = bound
        self.zero = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.sites: dict[str, tuple[int, dict[str, Tensor]]] = {}
        self.held: dict[str, tuple[int, dict[str, Tensor]]] = {}

    @property
    def mean(self) -> dict[str, Tensor]:
        """The control variate c of the server."""
        if not self.sites:
            return self.zero
        examples, own = zip(*self.sites.values(), strict=True)
        updates = [Update(c) for c in own]
        within = bounded(updates, self.bound) if self.bound else updates
        return mean([update.change for update in within], shares(examples))

    def send(self) -> bytes:
        """Return c."""
        return to_bytes({name: c.to(self.zero[name].dtype) for name, c in self.mean.items()})

    def receive(self, site: str, examples: int, state: bytes, /) -> None:
        """Hold c_k of `site`.

        Raises:
            CheckpointError: it has not the names, shapes and types of the weights.
        """
        self.held[site] = examples, read_weights(state, self.zero)

    def keep(self, sites: Collection[str], where: str) -> None:
        """Keep c_k of these sites, and warn of those that are shortened."""
        self.sites |= {site: self.held[site] for site in sites}
        if self.bound:
            lengths = {site: length_of(own) for site, (_, own) in self.sites.items()}
            long = too_long(lengths, self.bound, lower_median([*lengths.values()]))
            new = {site: times for site, times in long.items() if site in sites and math.isfinite(times)}
            tell_shortened(new, lengths, f"the control variates up to {where}", what="a control variate")


def fedavg() -> Algorithm:
    """Return FedAvg (McMahan et al. 2017, arXiv 1602.05629) with AdamW for the local steps, as in FedIT."""
    return Algorithm(Plain)


def fedprox(mu: float) -> Algorithm:
    """Return FedProx (Li et al. 2020, arXiv 1812.06127) with AdamW for the local steps, as in FedIT."""
    return Algorithm(lambda: Proximal(mu))


def scaffold() -> Algorithm:
    """Return SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378) with a global step of 1.

    Its local steps are SGD's, without which (w^t − w_k) / (S η) is no mean of gradients.
    """
    return Algorithm(ControlVariate, ControlVariates, torch.optim.SGD)


class LocalSupervised:
    """A site's half: local steps on its own questions and answers, which stay here.

    Question types are drawn equally often, as where a site tunes its own backbone (`accord.models.finetune`).

    Args:
        model: the public base with a fresh adapter, or a model that is trained whole; sites in one process may share
            it, since each begins by setting whatever is trained.
        processor: of the model.
        questions: the site's private ones.
        config: settings.
        algorithm: the same as the server's.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: Processor,
        questions: Sequence[Question],
        config: Averaging,
        algorithm: Algorithm,
    ) -> None:
        if not questions:
            raise DataError("cannot tune on 0 questions; give the site private questions, or leave it out")
        self.model, self.processor, self.questions = model, processor, questions
        self.config, self.algorithm, self.rule = config, algorithm, algorithm.rule()

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return what the local steps of one round changed, and the mean loss (nats per answer token).

        Raises:
            CheckpointError: the weights, or what came beside them, do not fit the model.
        """
        start = begin(self.model, request)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.rule.begin({name: p.detach().clone() for name, p in trained.items()}, request.state)
        rate = self.config.learning_rate
        optimiser = self.algorithm.optimiser(trained.values(), lr=rate, weight_decay=self.config.weight_decay)
        loss = take_steps(
            self.model,
            self._draw(request.seed),
            self._loss,
            optimiser,
            seed=request.seed,
            accumulate=self.config.gradient_accumulation,
            correct=self.rule.correct,
        )
        ended = {name: p.detach() for name, p in trained.items()}
        state = self.rule.end(ended, self.config.local_steps * rate)
        steps, examples = self.config.local_steps, len(self.questions)
        return finish(self.model, request, start, examples=examples, loss=loss, steps=steps, state=state)

    def _draw(self, seed: int) -> list[list[tuple[Question, int]]]:
        """Return the batches of a round: questions, each with its symmetry."""
        generator, size = random.Random(seed), self.config.batch_size
        order = draw_balanced([q.question_type for q in self.questions], self.config.drawn, generator)
        choices = len(SYMMETRIES) if self.config.symmetries else 1
        items = [(self.questions[i], generator.randrange(choices)) for i in order]
        return [items[n : n + size] for n in range(0, len(items), size)]

    def _loss(self, items: Sequence[tuple[Question, int]]) -> Tensor:
        batch = build_batch(
            self.processor,
            [prompt_of(q) for q, _ in items],
            [transform(load_images(q.images), s) for q, s in items],
            [[q.answer] for q, _ in items],
        ).to(without_adapter(self.model).device)
        loss: Tensor = self.model(**batch.accepted(self.model), labels=batch.labels).loss
        return loss


def train_supervised(
    engine: Engine,
    model: PreTrainedModel | PeftModel,
    config: Averaging,
    algorithm: Algorithm,
    *,
    seed: int,
    processor: Processor | None = None,
    on_round: Callable[[int, float], None] = lambda _round, _loss: None,
) -> PreTrainedModel:
    """Tune what is trainable in `model` with the sites of `engine`; return it, a LoRA adapter merged in.

    Args:
        engine: its sites answer the task "supervised" with `LocalSupervised`.
        model: the base, with a fresh adapter or trained whole.
        config: settings, the same as the sites'.
        algorithm: the same as the sites'.
        seed: of the sites' draws.
        processor: of the model; with it every average is tried on a made-up picture before it is used.
        on_round: told the round (from 1) and the mean loss of the sites that answered.

    Raises:
        RunError: no site answered in a round, or most failed in one (`accord.federation.rounds`).
    """
    start = trainable_weights(model)
    server = algorithm.server(start, config.aggregation.bound)
    tuned = federated_rounds(
        engine,
        "supervised",
        start,
        config.rounds,
        seed=seed,
        aggregate=config.aggregation.start(seed),
        bits=config.aggregation.bits,
        most=config.examples_at_most,
        server=server,
        probe=None if processor is None else probe_of(model, made_up_loss(model, processor)),
        on_round=on_round,
    )
    set_trainable_weights(model, tuned)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


SETTINGS: Final = Table("fedit", FedITConfig)


def tune_together(job: Job, stage: str, *, algorithm: Literal["fedavg", "fedprox", "scaffold"]) -> Aligned:
    """Tune the policy on the sites' answers with an averaged adapter."""
    config = SETTINGS.of(job.recipe)
    settings, rule = config.averaging, fedavg()
    if algorithm == "fedprox":
        rule = fedprox(config.mu)
    if algorithm == "scaffold":
        settings, rule = replace(settings, learning_rate=config.sgd_learning_rate), scaffold()
    set_seed(job.recipe.seed)
    job.run.truncate(stage)  # an attempt that was broken off starts over
    model, processor = load_model(job.recipe.policy.checkpoint)
    adapted = add_lora(model, config.lora)

    def updates(site: str) -> Mapping[Task, LocalUpdate]:
        questions = job.private[site]  # none where a site has preferences of its own alone: it sits out
        return {"supervised": LocalSupervised(adapted, processor, questions, settings, rule)} if questions else {}

    with rounds_told(job, stage, settings.rounds) as on_round:
        engine = open_training(job, updates)
        tuned = train_supervised(
            engine, adapted, settings, rule, seed=job.recipe.seed, processor=processor, on_round=on_round
        )
    return tuned, processor


def check_questions(recipe: Recipe) -> None:
    """Refuse to tune on no questions.

    Raises:
        RecipeError: no site holds private questions.
    """
    if not any(site.needs_questions for site in recipe.sites):
        raise RecipeError(
            "FedIT tunes the policy on the sites' private questions, and no site holds any but its own pairs; give the "
            "sites some, or leave 'fedit-…' out"
        )


def _method(algorithm: Literal["fedavg", "fedprox", "scaffold"], name: str) -> Method:
    return Method(
        partial(tune_together, algorithm=algorithm),
        f"nothing: the policy's adapter is tuned on the sites' answers and averaged, by {name}",
        needs=frozenset({"private"}),
        check=check_questions,
        grpo=lambda recipe: None,
        lora=lambda recipe: SETTINGS.of(recipe).lora,
        tables=(SETTINGS,),
        steps=lambda recipe: SETTINGS.of(recipe).averaging.rounds,
        training=lambda recipe: (
            f"at the sites: {SETTINGS.of(recipe).averaging.told} of the policy's adapter on reference answers"
        ),
    )


METHODS: Final = {
    "fedit-fedavg": _method("fedavg", "FedAvg"),
    "fedit-fedprox": _method("fedprox", "FedProx"),
    "fedit-scaffold": _method("scaffold", "SCAFFOLD"),
}

"""Train the projector between a frozen tower and a frozen language model at the sites: Fed-CMP's task, a site's half.

    D_k = D_k^1 ∪ … ∪ D_k^R                                disjoint: each caption is seen once, in one round
    L_k^r(w) = − E Σ_t log π_w(a_t | image, prompt, a_<t)  over D_k^r, one epoch from w^{r−1}
    d_k = mean_i ‖ x̄_img,i − x̄_txt,i ‖₂                    after it, over D_k^r: mean visual token, mean text token

A caption is a question with a fixed prompt; any question with an image and an answer is one. What travels is the
projector and the one number d_k. The learning rate falls by a cosine within every round, after a short warm-up, and
gradients are cut to a norm of 1, as in LLaVA's training. A round of some ten steps is short for both AdamW, which
begins with no moments, and a cosine: a site may keep its moments from round to round, and one cosine may span them all
(`moments`, `schedule`; ours).

    fedprox    step along g + μ (w − w^r)                                          (`accord.federation.rules`)
    moon       L + μ ℓ,  ℓ = − log e^{s(z, z^r) / τ} / (e^{s(z, z^r) / τ} + e^{s(z, z_k) / τ})
               z the mean visual token under w, z^r under w^r, z_k under what this site last sent, s their cosine

Sources: Fed-CMP, arXiv 2603.26786; MOON, Li, He and Song 2021, arXiv 2103.16257, eq. 3 and 4. Differs: text tokens are
those of prompt and answer; MOON's head of two layers is left out, and there is no ℓ in a site's first round, when it
has sent nothing.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, softplus
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from accord.data.images import load_image
from accord.errors import DataError, RecipeError, ReplyError, check_least, check_positive
from accord.federation.aggregation import Aggregation
from accord.federation.local import begin, finish, take_steps
from accord.federation.messages import UpdateReply, UpdateRequest
from accord.federation.rules import LocalRule, Plain, Proximal
from accord.federation.weights import read_weights, to_bytes
from accord.models.inputs import Batch, build_batch
from accord.models.load import Processor
from accord.models.projector import Seen, frozen_digest, mean_text
from accord.types import ImageSource, Question, prompt_of

MOST_NORM = 1.0
"""Of a step's gradient; a longer one is cut to it."""


@dataclass(frozen=True)
class OnePass:
    """How a shared model is trained when every example is seen once: a round is an epoch over a part of its own."""

    rounds: int = 10  # R
    batch_size: int = 8  # captions
    learning_rate: float = 1e-3  # at its highest in a round
    warmup: float = 0.03  # share of a round's steps, or of all with one schedule
    schedule: Literal["round", "training"] = "round"  # what a cosine of the learning rate spans
    moments: Literal["anew", "kept"] = "anew"  # of a site's AdamW, when a round begins
    weight_decay: float = 0.0
    examples_at_most: int = 0  # n_k in the average; 0 for no limit
    aggregation: Aggregation = Aggregation()

    def __post_init__(self) -> None:
        """Refuse counts that leave nothing to train."""
        check_least(self, rounds=1, batch_size=1, warmup=0, weight_decay=0, examples_at_most=0)
        check_positive(self, "learning_rate")
        if self.warmup >= 1:
            raise RecipeError(f"warmup is a share of a round's steps below 1, got {self.warmup}; lower it")


@dataclass(frozen=True)
class ClientRule:
    """How a site's steps depart from plain ones."""

    rule: Literal["plain", "fedprox", "moon"] = "plain"
    mu: float = 1.0  # μ of fedprox and moon
    temperature: float = 0.5  # τ of moon

    def __post_init__(self) -> None:
        """Refuse a pull that pushes away."""
        check_least(self, mu=0)
        check_positive(self, "temperature")

    def start(self) -> LocalRule:
        """Return the rule for one training of one site."""
        if self.rule == "fedprox":
            return Proximal(self.mu)
        return Moon(self.mu, self.temperature) if self.rule == "moon" else Plain()


@dataclass(frozen=True)
class ProjectorConfig:
    """How the projector of the policy is trained before all else."""

    training: Literal["federated", "local", "central"] = "federated"  # the last two are bounds: every site alone, or
    # all captions in one place
    initial: Literal["random", "keep"] = "random"  # of the projector
    averaging: OnePass = field(default_factory=OnePass)
    client: ClientRule = ClientRule()
    evaluate_on: int = 300  # questions, before and after; 0 for all
    evaluate_split: Literal["dev", "test"] = "dev"  # whose

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        check_least(self, evaluate_on=0)


class Moon(Plain):
    """Pull what the projector makes of images to the shared projector's, away from this site's last one's (MOON)."""

    def __init__(self, mu: float, temperature: float) -> None:
        self.mu, self.temperature = mu, temperature
        self.shared: Mapping[str, Tensor] = {}
        self.last: Mapping[str, Tensor] = {}  # none in the first round

    def begin(self, start: Mapping[str, Tensor], state: bytes, /) -> None:
        """Take w^r."""
        self.shared = start

    def term(self, seen: Seen) -> Tensor | float:
        """Return μ ℓ of a batch."""
        if not self.last:
            return 0.0
        shared, last = seen.mean_under(self.shared), seen.mean_under(self.last)
        return self.mu * contrast(seen.mean, shared, last, self.temperature)

    def end(self, weights: Mapping[str, Tensor], distance: float, /) -> bytes:
        """Keep w_k; return nothing."""
        self.last = {name: weight.clone() for name, weight in weights.items()}
        return b""


def contrast(now: Tensor, shared: Tensor, last: Tensor, temperature: float) -> Tensor:
    """Return MOON's ℓ, the mean over P images: log(1 + exp((s(z, z_k) − s(z, z^r)) / τ)).

    Args:
        now: z `[P, D]`.
        shared: z^r `[P, D]`.
        last: z_k `[P, D]`.
        temperature: τ.
    """
    margin = cosine_similarity(now, last, dim=-1) - cosine_similarity(now, shared, dim=-1)
    return softplus(margin / temperature).mean()


class SameBase:
    """Tell sites by what the server's frozen weights are known: a `Server` that takes nothing."""

    def __init__(self, model: PreTrainedModel, processor: Processor) -> None:
        self.digest = frozen_digest(model, processor)

    def send(self) -> bytes:
        """Return the digest."""
        return to_bytes({"frozen": self.digest})

    def receive(self, site: str, examples: int, state: bytes, /) -> None:
        """Take nothing."""

    def keep(self, sites: Collection[str], where: str) -> None:
        """Keep nothing."""


class LocalProjector:
    """A site's half: an epoch over one part of its captions, which stay here.

    Args:
        model: of which the projector alone is trainable (`accord.models.projector.train_projector_alone`); sites in one
            process may share it, since each begins by setting whatever is trained.
        processor: of the model.
        captions: the site's questions with their answers; those without an image teach a projector nothing, and are
            left out.
        config: settings.
        seed: of the parts. The captions of round r are the same whenever they are asked for.
        site: its name, for messages.

    Raises:
        DataError: no caption has an image, or there are fewer of them than rounds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Processor,
        captions: Sequence[Question],
        config: ProjectorConfig,
        *,
        seed: int,
        site: str = "",
    ) -> None:
        pictured = [(q, q.image) for q in captions if q.image is not None]
        who, rounds = f"site {site}" if site else "this site", config.averaging.rounds
        if not pictured:
            raise DataError(
                f"{who} has no caption of an image ({len(captions)} questions without one), which a projector is "
                "trained on; give it private questions with images, or leave it out"
            )
        if len(pictured) < rounds:
            raise DataError(
                f"{who} has {len(pictured)} captions for {rounds} rounds, each of which needs one that no other has; "
                "lower projector.averaging.rounds, or give the site more"
            )
        self.model, self.processor, self.config = model, processor, config
        order = random.Random(seed).sample(range(len(pictured)), len(pictured))
        self.parts = [[pictured[i] for i in order[r::rounds]] for r in range(rounds)]
        self._start()

    def _start(self) -> None:
        """Forget what earlier rounds left here."""
        self.rule = self.config.client.start()
        self._moments: dict[str, object] = {}
        self._latest = -1  # round that was asked for

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return what one epoch over the round's captions changed, how many they were, the mean loss, and d_k.

        Raises:
            CheckpointError: the weights are not those of this projector.
            ImageError: an image cannot be read.
            ReplyError: there is no such round, or the server's tower, language model or vocabulary are others.
        """
        if not 0 <= request.round < len(self.parts):
            raise ReplyError(f"round {request.round + 1} of {len(self.parts)} was asked for")
        if request.state:
            sent = read_weights(request.state, {"frozen": self.digest}, what="what tells the server's model")
            if not torch.equal(sent["frozen"], self.digest):
                raise ReplyError(
                    "this site's tower, language model or vocabulary is not the server's, and no projector fits both; "
                    "name the same checkpoint in [policy] of both recipes"
                )
        if request.round <= self._latest:  # a training that was stopped starts over, and a service outlives it
            self._start()
        self._latest = request.round
        start = begin(self.model, request)
        averaging, captions = self.config.averaging, self.parts[request.round]
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.rule.begin({name: p.detach().clone() for name, p in trained.items()}, request.state)
        drawn = random.Random(request.seed).sample(captions, len(captions))
        batches = list(_batches(drawn, averaging.batch_size))
        optimiser = _optimiser(list(trained.values()), averaging, len(batches), request.round)
        if self._moments:
            optimiser.load_state_dict({**optimiser.state_dict(), "state": self._moments})
        loss = take_steps(
            self.model,
            batches,
            self._loss,
            optimiser,
            seed=request.seed,
            correct=self.rule.correct,
        )
        if averaging.moments == "kept":
            self._moments = optimiser.state_dict()["state"]
        ended = {name: p.detach() for name, p in trained.items()}
        state = self.rule.end(ended, len(batches) * averaging.learning_rate)
        return finish(
            self.model,
            request,
            start,
            examples=len(captions),
            loss=loss,
            steps=len(batches),
            state=state,
            distance=self.distance(captions),
        )

    @cached_property
    def digest(self) -> Tensor:
        """What this site's frozen weights are known by, `[32]`."""
        return frozen_digest(self.model, self.processor)

    def _loss(self, captions: Sequence[tuple[Question, ImageSource]]) -> Tensor:
        batch = self._batch(captions)
        seen = Seen(self.model, batch)
        loss: Tensor = self.model(**seen.inputs, labels=batch.labels).loss
        return loss + self.rule.term(seen) if isinstance(self.rule, Moon) else loss

    def _batch(self, captions: Sequence[tuple[Question, ImageSource]]) -> Batch:
        return build_batch(
            self.processor,
            [prompt_of(q) for q, _ in captions],
            [load_image(image) for _, image in captions],
            [[q.answer] for q, _ in captions],
        ).to(self.model.device)

    @torch.no_grad()
    def distance(self, captions: Sequence[tuple[Question, ImageSource]]) -> float:
        """Return d_k of these captions under the model as it is."""
        total = 0.0
        for chunk in _batches(captions, self.config.averaging.batch_size):
            batch = self._batch(chunk)
            apart = Seen(self.model, batch).mean - mean_text(self.model, batch)
            total += apart.double().norm(dim=-1).sum().item()
        return total / len(captions)


def _batches(
    captions: Sequence[tuple[Question, ImageSource]], size: int
) -> list[Sequence[tuple[Question, ImageSource]]]:
    return [captions[n : n + size] for n in range(0, len(captions), size)]


def _optimiser(trained: Sequence[nn.Parameter], config: OnePass, steps: int, number: int) -> torch.optim.AdamW:
    """Return AdamW for round `number`, from 0: a step cuts the gradient first and moves the learning rate on after."""
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    one = config.schedule == "round"
    total, before = (steps, 0) if one else (steps * config.rounds, steps * number)
    optimiser.param_groups[0]["initial_lr"] = config.learning_rate  # which a schedule that goes on wants
    schedule = get_cosine_schedule_with_warmup(optimiser, round(config.warmup * total), total, last_epoch=before - 1)

    def cut(*_: object) -> None:
        nn.utils.clip_grad_norm_(trained, MOST_NORM)

    def move_on(*_: object) -> None:
        schedule.step()

    optimiser.register_step_pre_hook(cut)
    optimiser.register_step_post_hook(move_on)
    return optimiser

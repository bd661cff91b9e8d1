"""A site: what a hospital runs.

It holds private pairs and a reward model, and answers the requests of the protocol. Nothing it returns contains
an image, a question, an annotation or a weight of its reward model: scores, router weights, counts. Only a site that
was started with `updates` takes part in a baseline that shares parameters, and only one with an `answerer` says what
its own model answers to the server's questions.

    s = λ e_AE + (1 − λ) e_ME       λ = 1 where the server asks for truth and the site owns the reference answer, else 0

e_AE is 1 for a candidate that is the reference answer and 0 for another one; e_ME is the reward model's standardised
score, or the same comparison with the answer of the site's own model (`accord.federation.answering`). Source: FedGRPO
(Zhu et al. 2026, arXiv 2602.12014). With λ = 0 and the reward model it is MoR's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from accord.data.images import load_image
from accord.errors import RecipeError, ReplyError
from accord.federation.answering import Answerer, key_of, matches
from accord.federation.messages import (
    AnswerItem,
    AnswerReply,
    AnswerRequest,
    Card,
    CardRequest,
    Reply,
    Request,
    RouterReply,
    RouterRequest,
    ScoreItem,
    ScoreReply,
    ScoreRequest,
    Task,
    UpdateReply,
    UpdateRequest,
    from_turns,
)
from accord.models.load import parameter_count
from accord.rewards.model import RewardModel


@dataclass(frozen=True)
class ScoreRange:
    """The range to which a site clips its standardised scores before they leave it.

    The one-sided default keeps a group in which every answer is poor from turning the reward model's small noise into
    advantages.
    """

    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        """Refuse an empty range: everything clipped to one value is no judgement."""
        if not self.low < self.high:
            raise RecipeError(
                f"scores.low must be below scores.high, got {self.low} and {self.high}; correct the range, or leave "
                "the table out for the default"
            )


@dataclass(frozen=True)
class SiteRecord:
    """What a site noted of itself when it trained, for its card."""

    questions: int = 0
    pairs: int = 0
    constructed: bool = False  # whether its pairs were built from reference answers
    ranking: Mapping[str, float] = field(default_factory=dict)  # by question type, on its held-out questions


class RouterTraining(Protocol):
    """A site's half of the router's training, `accord.routing.fit.LocalRouterTraining`."""

    @property
    def pairs(self) -> Sized:
        """What it trains on; their number is the site's weight in the average."""
        ...

    def __call__(self, weights: bytes, site: int, seed: int, /) -> tuple[bytes, float]:
        """Return the router's weights after local steps from `weights`, and the mean loss."""
        ...


class LocalUpdate(Protocol):
    """A site's half of a baseline that shares parameters."""

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return the model of `request` after local steps on this site's data."""
        ...


class Site:
    """Answer requests with a reward model.

    Args:
        name: the site's name.
        reward_model: trained, standardised.
        record: sizes and quality, for its card.
        score_range: clipping of standardised scores, None for none.
        router_training: how the router is trained on this site's pairs; None refuses router requests.
        updates: how shared models are trained on this site's data, by task; a task that is not there is refused.
        answerer: this site's own model; None refuses whatever needs its answers.
        truth: the reference answers that this site owns, by `accord.federation.answering.question_key`.
    """

    def __init__(
        self,
        name: str,
        reward_model: RewardModel,
        record: SiteRecord | None = None,
        *,
        score_range: ScoreRange | None = None,
        router_training: RouterTraining | None = None,
        updates: Mapping[Task, LocalUpdate] | None = None,
        answerer: Answerer | None = None,
        truth: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.reward_model = reward_model
        self.record = record or SiteRecord()
        self.score_range = score_range
        self.router_training = router_training
        self.updates = updates or {}
        self.answerer = answerer
        self.truth = truth or {}

    def answer(self, request: Request) -> Reply:
        """Answer one request.

        Raises:
            ReplyError: the request is not one that this site answers.
        """
        if isinstance(request, ScoreRequest):
            return ScoreReply(request.id, self.scores(request))
        if isinstance(request, AnswerRequest):
            return AnswerReply(request.id, self._own(request.items, request.images))
        if isinstance(request, RouterRequest):
            if self.router_training is None:
                raise ReplyError(f"site {self.name} does not train routers")
            weights, loss = self.router_training(request.weights, request.site, request.seed)
            return RouterReply(request.id, weights, len(self.router_training.pairs), loss)
        if isinstance(request, UpdateRequest):
            if request.task not in self.updates:
                raise ReplyError(f"site {self.name} does not train a shared model for {request.task!r}")
            return self.updates[request.task](request)
        if isinstance(request, CardRequest):
            return self.card(request)
        raise ReplyError(f"site {self.name} does not answer a {type(request).__name__}")

    def scores(self, request: ScoreRequest) -> list[list[float]]:
        """Judge the candidates of every item, and clip: a reward model's scores are standardised before.

        A score that is not finite leaves as NaN: clipped, an infinity would be the best or the worst of scores.

        Raises:
            ReplyError: the judge is this site's own model, and it has none.
        """
        references = [self.truth.get(key_of(item)) if request.truth else None for item in request.items]
        judge = self._by_answer if request.judge == "answer" else self._by_reward
        open_items = [item for item, reference in zip(request.items, references, strict=True) if reference is None]
        judged = iter(judge(open_items, request.images))
        scored = [
            next(judged) if reference is None else matches(item.candidates, reference)
            for item, reference in zip(request.items, references, strict=True)
        ]
        if self.score_range is not None:
            low, high = self.score_range.low, self.score_range.high
            scored = [torch.where(s.isfinite(), s.clamp(low, high), torch.nan) for s in scored]
        return [s.tolist() for s in scored]

    def _by_reward(self, items: Sequence[ScoreItem], images: Mapping[str, bytes]) -> list[Tensor]:
        if not items:
            return []
        opened = {name: load_image(images[name]) for name in {item.image: None for item in items} if name is not None}
        return self.reward_model.score(
            [from_turns(item.prompt) for item in items],
            [None if item.image is None else opened[item.image] for item in items],
            [item.candidates for item in items],
        )

    def _by_answer(self, items: Sequence[ScoreItem], images: Mapping[str, bytes]) -> list[Tensor]:
        said = self._own(items, images)
        return [matches(item.candidates, answer) for item, answer in zip(items, said, strict=True)]

    def _own(self, items: Sequence[ScoreItem] | Sequence[AnswerItem], images: Mapping[str, bytes]) -> list[str]:
        if self.answerer is None:
            raise ReplyError(f"site {self.name} answers no questions with its own model")
        return self.answerer(items, images)

    def card(self, request: CardRequest) -> Card:
        """Describe this site for the report."""
        return Card(
            request.id,
            architecture=self.reward_model.architecture,
            parameters=parameter_count(self.reward_model),
            questions=self.record.questions,
            pairs=self.record.pairs,
            constructed=self.record.constructed,
            ranking=dict(self.record.ranking),
        )

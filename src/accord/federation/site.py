"""A site: what a hospital runs.

It holds private pairs and a reward model, and answers the requests of the protocol. Nothing it returns contains
an image, a question, an annotation or a weight of its reward model: scores, changes of router weights, counts. A site
trains the router, or a baseline's shared model, only if it was started with that in `updates`, and it answers the
server's questions with its own model only if it was started with an `answerer`.

    s = λ e_AE + (1 − λ) e_ME       λ = 1 where the server asks for truth and the site owns the reference answer, else 0

e_AE is 1 for a candidate that is a reference answer and 0 for another one; e_ME is the reward model's standardised
score, or the same comparison with the answer of the site's own model (`accord.federation.answering`). Source: FedGRPO
(Zhu et al. 2026, arXiv 2602.12014). With λ = 0 and the reward model it is MoR's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import msgspec
import torch
from PIL.Image import Image
from torch import Tensor

from accord.errors import ReplyError
from accord.federation.answering import Answerer, key_of, matches
from accord.federation.batches import Opening, in_batches
from accord.federation.messages import (
    Agreement,
    AnswerItem,
    AnswerReply,
    Card,
    CardRequest,
    Declined,
    Refusal,
    Reply,
    Request,
    ScoreItem,
    ScoreRange,
    ScoreReply,
    ScoreRequest,
    Task,
    UpdateReply,
    UpdateRequest,
    WithImages,
    from_turns,
)
from accord.models.load import parameter_count
from accord.rewards.certificate import Certificate
from accord.rewards.model import RewardModel


@dataclass(frozen=True)
class SiteRecord:
    """What a site noted of itself when it trained, for its card."""

    questions: int = 0
    pairs: int = 0
    constructed: bool = False  # whether its pairs were built from reference answers
    ranking: Mapping[str, float] = field(default_factory=dict)  # by question type, on its held-out questions
    privacy: Certificate | None = None


class LocalUpdate(Protocol):
    """A site's half of a training that shares parameters: the router's, or a baseline's."""

    def __call__(self, request: UpdateRequest, /) -> UpdateReply:
        """Return what local steps on this site's data change in the model of `request`."""
        ...


class Lie(Protocol):
    """What a site sends in place of its scores: a trial of what the federation bears (`accord.attacks.scores`)."""

    def __call__(self, request: ScoreRequest, scores: Sequence[Sequence[float]], /) -> list[list[float]]:
        """Return scores of the same shape."""
        ...


class Site:
    """Answer requests with a reward model.

    Args:
        name: the site's name.
        reward_model: trained, standardised.
        record: sizes and quality, for its card.
        score_range: into which standardised scores are brought, None for none.
        updates: how the router, and a baseline's shared models, are trained on this site's data, by task; a task that
            is not there is refused.
        answerer: this site's own model; None refuses whatever needs its answers.
        truth: the reference answers that this site owns, one or several to a question, by
            `accord.federation.answering.question_key`.
        opening: how the images of requests are opened.
        lie: changes its scores before they leave; None for an honest site.
        agreement: makes what it works by, for its card; it is asked for once.

    Attributes:
        declined: which questions of a request are refused before anything is computed, by place, and why; none, unless
            whoever serves the site sets limits.
    """

    def __init__(
        self,
        name: str,
        reward_model: RewardModel,
        record: SiteRecord | None = None,
        *,
        score_range: ScoreRange | None = None,
        updates: Mapping[Task, LocalUpdate] | None = None,
        answerer: Answerer | None = None,
        truth: Mapping[str, tuple[str, ...]] | None = None,
        opening: Opening | None = None,
        lie: Lie | None = None,
        agreement: Callable[[], Agreement] | None = None,
    ) -> None:
        self.name = name
        self.reward_model = reward_model
        self.record = record or SiteRecord()
        self.score_range = score_range
        self.updates = updates or {}
        self.answerer = answerer
        self.truth = truth or {}
        self.opening = opening or Opening()
        self.declined: Callable[[WithImages], Mapping[int, Declined]] = lambda _: {}
        self.lie = lie
        self._agreement = agreement

    def answer(self, request: Request) -> Reply:
        """Answer one request.

        Raises:
            ReplyError: the request is not one that this site answers.
        """
        if isinstance(request, WithImages):
            return self._each(request)
        if isinstance(request, UpdateRequest):
            if request.task not in self.updates:
                raise ReplyError(f"site {self.name} does not train a shared model for {request.task!r}")
            return self.updates[request.task](request)
        if isinstance(request, CardRequest):
            return self.card(request)
        raise ReplyError(f"site {self.name} does not answer a {type(request).__name__}")

    def _each(self, request: WithImages) -> Reply:
        """Answer the questions that are not refused; a request of which the model could answer none is an error."""
        refused = dict(self.declined(request))
        asked = [n for n in range(len(request.items)) if n not in refused]
        part = msgspec.structs.replace(request, items=[request.items[n] for n in asked])
        scores: dict[int, list[float]] = {}
        answers: dict[int, str] = {}
        given = self.scores(part) if isinstance(part, ScoreRequest) else self._own(part.items, part.images)
        for n, value in zip(asked, given, strict=True):
            if isinstance(value, Declined):
                refused[n] = value
            elif isinstance(value, str):
                answers[n] = value
            else:
                scores[n] = value
        places = range(len(request.items))
        if places and all(refused.get(n) is Declined.ERROR for n in places):
            return Refusal(request.id, "error")
        if isinstance(request, ScoreRequest):
            if self.lie is not None:
                known = sorted(scores)
                judged = msgspec.structs.replace(request, items=[request.items[n] for n in known])
                scores = dict(zip(known, self.lie(judged, [scores[n] for n in known]), strict=True))
            return ScoreReply(request.id, [scores.get(n, []) for n in places], refused)
        return AnswerReply(request.id, [answers.get(n, "") for n in places], refused)

    def scores(self, request: ScoreRequest) -> list[list[float] | Declined]:
        """Judge the candidates of every item, in the agreed range: a reward model's scores are standardised before.

        A score that is not finite leaves as NaN: in the range, an infinity would be the best or the worst of scores.

        Raises:
            ReplyError: the judge is this site's own model, and it has none.
        """
        references = [self.truth.get(key_of(item)) if request.truth else None for item in request.items]
        judge = self._by_answer if request.judge == "answer" else self._by_reward
        open_items = [item for item, reference in zip(request.items, references, strict=True) if reference is None]
        judged = iter(judge(open_items, request.images))
        scored = [
            next(judged) if reference is None else matches(item.candidates, *reference)
            for item, reference in zip(request.items, references, strict=True)
        ]
        if self.score_range is not None:
            low, high = self.score_range.low, self.score_range.high
            scored = [
                s if isinstance(s, Declined) else torch.where(s.isfinite(), s.clamp(low, high), torch.nan)
                for s in scored
            ]
        return [s if isinstance(s, Declined) else s.tolist() for s in scored]

    def _by_reward(self, items: Sequence[ScoreItem], images: Mapping[str, bytes]) -> list[Tensor | Declined]:
        if not items:
            return []
        sizes, rows = [len(item.candidates) for item in items], self.reward_model.rows_at_once
        return in_batches(self._rewards, items, images, opening=self.opening, sizes=sizes, rows=rows)

    def _rewards(self, items: Sequence[ScoreItem], pictures: Sequence[list[Image]]) -> list[Tensor]:
        scores = self.reward_model.score(
            [from_turns(item.prompt) for item in items], pictures, [item.candidates for item in items]
        )
        if self.score_range is not None and self.score_range.form == "sigmoid":
            low, high = self.score_range.low, self.score_range.high
            scores = [torch.where(s.isfinite(), low + (high - low) * s.sigmoid(), torch.nan) for s in scores]
        return scores

    def _by_answer(self, items: Sequence[ScoreItem], images: Mapping[str, bytes]) -> list[Tensor | Declined]:
        said = self._own(items, images)
        return [
            answer if isinstance(answer, Declined) else matches(item.candidates, answer)
            for item, answer in zip(items, said, strict=True)
        ]

    def _own(
        self, items: Sequence[ScoreItem] | Sequence[AnswerItem], images: Mapping[str, bytes]
    ) -> list[str | Declined]:
        if self.answerer is None:
            raise ReplyError(f"site {self.name} answers no questions with its own model")
        return self.answerer(items, images)

    @cached_property
    def agreement(self) -> Agreement | None:
        """What this site works by; None where nobody compares."""
        return None if self._agreement is None else self._agreement()

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
            privacy=self.record.privacy,
            agreement=self.agreement,
        )

"""A whole federation as one TRL reward function.

    (prompts, completions, **columns) → list[float | None]

For each group of completions that share prompt and image, if there is one: route every distinct completion, ask only
the sites that got weight, fuse what came back. To `trl.GRPOTrainer` this is an ordinary reward function; three lines
put it into a stock script:

    reward = FederatedReward(engine, router)
    trainer = GRPOTrainer(model, reward_funcs=reward, train_dataset=prompts, args=GRPOConfig(beta=0.02, …))
    trainer.train()

Absent is not zero. `missing="none"`, the default, returns None: TRL leaves a row that has no reward at all out of its
group's mean and deviation and gives it advantage zero. Beside further reward functions TRL's sum counts the None as 0;
there use `missing="group_mean"`, which gives it the mean of its group's rewards, at the price of a smaller deviation
(a group without any score gets the mean of all scored completions).

Where many are absent a step would be taken on the word of a few. So below a quorum, a share of the routing weight, the
step waits for sites that may come back; what is absent once it goes on stays absent. Where there is none to wait for,
as where all refuse, it fails with a `QuorumError`.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, cast

import torch
from PIL import Image as PillowImage
from PIL.Image import Image
from torch import Tensor

from accord.data.images import image_bytes, load_images, picture_key
from accord.data.questions import normalise_answer
from accord.errors import DataError, QuorumError, RunError
from accord.federation.asking import Patience, Replies, Scores, ask_meanwhile, ask_scores
from accord.federation.engine import Engine, agree, in_all
from accord.federation.messages import MAX_SCORE, Judge, ScoreItem, ScoreRange, ScoreRequest, image_name, to_turns
from accord.routing.canaries import Canaries, Hidden
from accord.routing.fusion import Fusion, mixture, per_prompt, top1
from accord.routing.robust import capped
from accord.routing.router import Router
from accord.types import ImageSource, Message, Prompt, Question, prompt_of, text_of

logger = logging.getLogger(__name__)

Mode: TypeAlias = Literal["top1", "soft"]
Scope: TypeAlias = Literal["completion", "prompt"]


@dataclass(frozen=True)
class Group:
    """The completions of one prompt: the distinct ones, and which of them each row was."""

    prompt: Prompt
    images: tuple[Image, ...]  # none for a question without any
    data: tuple[bytes, ...]  # the images as they travel
    candidates: tuple[str, ...]
    rows: tuple[int, ...]  # candidate index of each completion, in order
    kind: str = ""  # question type, where the rows have that column


class Scaling(Protocol):
    """What a step's rewards are multiplied by, group by group, when all else is done; one that remembers qualifies."""

    def __call__(
        self, groups: Sequence[Group], weights: Sequence[Tensor], rewards: Sequence[Tensor], /
    ) -> list[Tensor]:
        """Return rewards `[G]` of every group from its weights `[G, K]` and rewards `[G]`, NaN where there is none."""
        ...


def group_about(question: Question, candidates: Sequence[str], rows: Sequence[int]) -> Group:
    """Return the group of candidates for a question, whose images travel as they are stored."""
    images, data = tuple(load_images(question.images)), tuple(map(image_bytes, question.images))
    return Group(prompt_of(question), images, data, tuple(candidates), tuple(rows))


@dataclass(frozen=True)
class ScoreQuery:
    """What is asked about the completions of a step, and which sites are asked."""

    groups: Sequence[Group]
    weights: Tensor  # [M, K] over the distinct completions of all groups
    requests: dict[str, ScoreRequest]
    places: dict[str, list[list[int]]]  # of every item of a site's request, its rows of `weights`; a canary has none
    hidden: dict[str, list[Hidden]] = field(default_factory=dict)  # the canaries of every site's request


@dataclass(frozen=True)
class PerGroup:
    """How FedGRPO judges the G completions of one prompt: against each other, all by the same sites.

    Attributes:
        fusion: rewards `[G]` from the scores and weights of a prompt's completions, repeated ones as often as drawn.
        size: G, where one prompt may come twice in a row; 0 takes all consecutive rows of a prompt for its group.
        judge: what judges a candidate at a site, its reward model or its own answer.
        truth: whether a site that owns the reference answer of a question judges by that.
        form: weight of a further reward, 1 for a completion that ended and says something, else 0.
        cap: largest share of one site in what moves the policy in a step (`accord.routing.robust.capped`); 1 for none.
    """

    fusion: Fusion
    size: int = 0
    judge: Judge = "reward"
    truth: bool = False
    form: float = 0.0
    cap: float = 1.0


@dataclass(frozen=True)
class Waiting:
    """How long a step waits for sites, and what is said meanwhile.

    Attributes:
        deadline: seconds to wait for the answers to one question; None for as long as it takes.
        quorum: share of the weight of what is asked, in [0, 1], that must have been answered before a step goes on.
            Sites that are gone or late are waited for; without any the step fails. 0 for none.
        tell: called when a wait begins, now and then while it lasts, and when it is over.
        pause: waits for some seconds between two tries.
    """

    deadline: float | None = None
    quorum: float = 0.0
    tell: Callable[[str], object] = logger.warning
    pause: Callable[[float], object] = time.sleep


@dataclass(frozen=True)
class _Started:
    """A question under way, and about which rows: those of these very lists."""

    prompts: object
    completions: object
    query: ScoreQuery
    replies: Future[Replies]


class FederatedReward:
    """Ask a federation how good completions are.

    Args:
        engine: carries the questions to the sites.
        router: whose judgement counts, weights `[N, K]`.
        mode: "top1" asks only the site with the largest weight; "soft" asks all and mixes.
        fusion: rewards from scores and weights; by default their weighted mean.
        per_group: judge the completions of a prompt against each other, in place of `fusion`.
        scope: route every completion by itself, or all completions of a prompt alike.
        scores: the range to which the sites clip. A site that sends a score outside it counts as absent. Its lowest
            score is the reward of a completion that was cut off before its end token; within a group it is what every
            site is taken to have scored. None: nothing is clipped, and a completion that was cut off is scored like
            any other.
        end_tokens: ids that end a completion; without them no completion counts as cut off.
        waiting: how long a step waits for sites.
        missing: what a completion gets that no site scored (see the module's docstring).
        sources: the stored images behind a row's `question_id`, so that their original bytes travel; other images are
            sent as PNG.
        canaries: hidden questions in every request, whose answers tell whom to trust: that is multiplied into the
            router's weights, by which the sites are still asked.
        scaling: scales the finished rewards, group by group.

    Raises:
        RunError: there are canaries, and several processes ask together.
    """

    __name__ = "federation"  # TRL names its metrics after it

    def __init__(
        self,
        engine: Engine,
        router: Router,
        *,
        mode: Mode = "top1",
        fusion: Fusion = mixture,
        per_group: PerGroup | None = None,
        scope: Scope = "completion",
        scores: ScoreRange | None = None,
        end_tokens: Sequence[int] = (),
        waiting: Waiting = Waiting(),
        missing: Literal["group_mean", "none"] = "none",
        sources: Mapping[str, ImageSource | Sequence[ImageSource]] | None = None,
        canaries: Canaries | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        if canaries is not None and engine.processes > 1:
            raise RunError(
                f"canaries are one process's, and {engine.processes} ask together; start the alignment as one process"
            )
        self.engine = engine
        self.router = router
        self.mode = mode
        self.fusion = fusion
        self.per_group = per_group
        self.scope = scope
        self.scores = scores
        self.end_tokens = frozenset(end_tokens)
        self.waiting = waiting
        self.missing = missing
        self.sources = sources or {}
        self.canaries = canaries
        self.scaling = scaling
        self._asked = 0
        self._started: _Started | None = None
        self._tabled: tuple[ScoreQuery | None, int, Tensor] = None, 0, torch.empty(0)

    def start(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Message]] | Sequence[str],
        **columns: object,
    ) -> None:
        """Route, and ask in the background; the call with the same two lists waits for the answers and finishes.

        Routing is done here, in the caller's thread: only the engine works in the other one. Several processes that ask
        together do not start early: their order of asking would be up to chance.
        """
        self._end()
        if self.engine.processes > 1:
            return
        query = self._ready(prompts, completions, columns)
        replies = ask_meanwhile(self.engine, query.requests, deadline=self.waiting.deadline)
        self._started = _Started(prompts, completions, query, replies)

    def _ready(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Message]] | Sequence[str],
        columns: Mapping[str, object],
    ) -> ScoreQuery:
        """Return what is to be asked of the sites about rows."""
        return self._with_canaries(self._route_and_query(self.group(prompts, completions, columns)))

    def _end(self) -> _Started | None:
        """Return the question that is under way, which is so no longer; an engine carries one at a time."""
        if (started := self._started) is not None:
            started.replies.exception()  # waits
        self._started = None
        return started

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Message]] | Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] = lambda _name, _value: None,
        **columns: object,
    ) -> list[float | None]:
        """Return one reward per completion, `[P·G]`.

        Raises:
            QuorumError: too few sites answered, and none may come back.
        """
        started = self._end()
        if started is not None and started.prompts is prompts and started.completions is completions:
            query, replies = started.query, started.replies.result()
        else:
            query, replies = agree(self.engine.total, partial(self._ready, prompts, completions, columns)), None
        scores = self._scores(query, self._patience(query), replies)
        return agree(self.engine.total, partial(self._rewards, query, scores, completion_ids, log_metric))

    def _rewards(
        self,
        query: ScoreQuery,
        scores: Tensor,
        completion_ids: Sequence[Sequence[int]] | None,
        log_metric: Callable[[str, float], None],
    ) -> list[float | None]:
        """Return the rewards of all rows from the sites' scores `[M, K]`."""
        groups, routed = query.groups, query.weights
        if self.canaries is not None:
            for group, own in zip(groups, scores.split([len(group.candidates) for group in groups]), strict=True):
                self.canaries.trust.compare(group.kind, own, hidden=False, text=text_of(group.prompt))
            self.canaries.trust.find_two_faced()
            self.canaries.trust.find_triggered()
        cut = self._cut_off(sum(len(group.rows) for group in groups), completion_ids)
        fused = self._fuse(groups, scores, self._trusted(groups, routed, log_metric), cut, log_metric)
        if self.canaries is not None:
            sure = self.canaries.trust.confidence([group.kind for group in groups]).tolist()
            fused = [rewards * share for rewards, share in zip(fused, sure, strict=True)]
        for site, share in zip(self.engine.sites, routed.mean(dim=0).tolist(), strict=True):
            log_metric(f"routed/{site}", share)
        rewards: list[float | None] = []
        for group, of_group in zip(groups, fused, strict=True):
            texts = [group.candidates[row] for row in group.rows]
            rewards += self._finish(of_group.tolist(), texts, cut[len(rewards) :])
        if self.scaling is not None:
            rewards = self._scale(self.scaling, groups, routed, rewards)
        absent = sum(reward is None or math.isnan(reward) for reward in rewards)
        log_metric("absent", absent / len(rewards))
        return self._fill(rewards, [len(group.rows) for group in groups])

    def group(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Message]] | Sequence[str],
        columns: Mapping[str, object],
    ) -> list[Group]:
        """Split rows into groups: consecutive rows with the same conversation and the same images, at most G."""
        ids = cast(Sequence[str] | None, columns.get("question_id"))
        kinds = cast(Sequence[str] | None, columns.get("question_type"))
        groups: list[Group] = []
        most = self.per_group.size if self.per_group else 0
        key: object = None
        texts: list[str] = []
        opening: tuple[Prompt, tuple[Image, ...], tuple[bytes, ...]] | None = None
        kind = ""

        def close() -> None:
            if opening is not None:
                distinct = tuple(dict.fromkeys(texts))
                position = {text: i for i, text in enumerate(distinct)}
                groups.append(Group(*opening, distinct, tuple(position[text] for text in texts), kind))

        for n, prompt in enumerate(prompts):
            images = _images_of(prompt, n, columns)
            plain = [_plain(message) for message in prompt]
            known = ids is not None and ids[n] in self.sources  # else an id may name the words alone
            this = (str(plain), (ids[n],) if ids and known else tuple(map(picture_key, images)))
            if this != key or len(texts) == most > 0:
                close()
                sources = self.sources.get(ids[n]) if ids is not None else None
                opening, texts, key = (plain, images, _travelling(images, sources)), [], this
                kind = "" if kinds is None else kinds[n]
            texts.append(_text_of(completions[n]))
        close()
        return groups

    def judge(self, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
        """Route and score the distinct completions of all groups.

        Returns the weights used and the scores, both `[M, K]`; NaN where a site was not asked or is absent.
        """
        query = self._route_and_query(groups)
        return query.weights, self._scores(query, self._patience(query))

    def ask(self, groups: Sequence[Group], wanted: Tensor) -> Tensor:
        """Ask the sites once for what is `wanted` `[M, K]`; return the scores `[M, K]`, NaN where there is none."""
        return self._scores(self._query(groups, wanted))

    def _route_and_query(self, groups: Sequence[Group]) -> ScoreQuery:
        weights = self.router([g.prompt for g in groups], [g.images for g in groups], [g.candidates for g in groups])
        if self.scope == "prompt":
            weights = per_prompt(weights, [len(group.candidates) for group in groups])
        return self._query(groups, top1(weights) if self.mode == "top1" else weights)

    def _query(self, groups: Sequence[Group], weights: Tensor) -> ScoreQuery:
        """Put into words what is asked of every site: whatever has weight there."""
        requests: dict[str, ScoreRequest] = {}
        judge: Judge = self.per_group.judge if self.per_group else "reward"
        truth = self.per_group is not None and self.per_group.truth
        places: dict[str, list[list[int]]] = defaultdict(list)
        self._asked += 1
        names = [[image_name(data) for data in group.data] for group in groups]
        turns = [to_turns(group.prompt) for group in groups]
        of_row = [(g, text) for g, group in enumerate(groups) for text in group.candidates]
        # Only what is asked is looked at, once: a read of every site's weight for every completion grows with both.
        asked: dict[int, list[int]] = defaultdict(list)
        for k, row in (weights > 0).T.nonzero().tolist():
            asked[k].append(row)
        sites = self.engine.sites
        for k, of_site in asked.items():
            images: dict[str, bytes] = {}
            items: list[ScoreItem] = []
            for g, own in itertools.groupby(of_site, lambda row: of_row[row][0]):
                rows = list(own)
                images.update(zip(names[g], groups[g].data, strict=True))
                items.append(ScoreItem(names[g], turns[g], [of_row[row][1] for row in rows]))
                places[sites[k]].append(rows)
            requests[sites[k]] = ScoreRequest(f"score-{self._asked}-{sites[k]}", images, items, judge, truth)
        return ScoreQuery(groups, weights, requests, places)

    def _with_canaries(self, query: ScoreQuery) -> ScoreQuery:
        """Mix canaries into the requests, if there are any."""
        if self.canaries is None:
            return query
        requests, hidden = self.canaries.mix(query.requests)
        places = {}
        for site, of_site in query.places.items():
            at = {each.position for each in hidden.get(site, ())}
            ordinary = iter(of_site)
            places[site] = [[] if n in at else next(ordinary) for n in range(len(requests[site].items))]
        return replace(query, requests=requests, places=places, hidden=hidden)

    def _trusted(self, groups: Sequence[Group], weights: Tensor, log_metric: Callable[[str, float], None]) -> Tensor:
        """Return the routing weights `[M, K]` times what canaries have told of the sites."""
        if self.canaries is None:
            return weights
        trust = self.canaries.trust.weights([group.kind for group in groups]).to(weights.dtype)
        shares = (trust / trust.sum(dim=1, keepdim=True).clamp(min=1e-9)).mean(dim=0)
        for site, share in zip(self.engine.sites, shares.tolist(), strict=True):
            log_metric(f"trust/{site}", share)
        return weights * trust.repeat_interleave(torch.tensor([len(group.candidates) for group in groups]), dim=0)

    def _cut_off(self, count: int, completion_ids: Sequence[Sequence[int]] | None) -> list[bool]:
        """Return of every completion whether it ended for want of room."""
        if completion_ids is None or not self.end_tokens:
            return [False] * count
        return [not self.end_tokens.intersection(ids) for ids in completion_ids]

    def _fuse(
        self,
        groups: Sequence[Group],
        scores: Tensor,
        weights: Tensor,
        cut: Sequence[bool],
        log_metric: Callable[[str, float], None],
    ) -> list[Tensor]:
        """Return the rewards `[G]` of every group from scores and weights `[M, K]` of the distinct completions."""
        sizes = [len(group.candidates) for group in groups]
        rows = [torch.tensor(group.rows) for group in groups]
        if self.per_group is None:
            fused = self.fusion(scores, weights).split(sizes)
            return [of_group[index] for of_group, index in zip(fused, rows, strict=True)]
        judged, done = list[tuple[Tensor, Tensor]](), 0
        for own, trust, index in zip(scores.split(sizes), weights.split(sizes), rows, strict=True):
            of_rows, ended = own[index], ~torch.tensor(cut[done : done + len(index)])[:, None]
            if self.scores is not None:  # before they are compared: what is fixed afterwards is on another scale
                of_rows = of_rows.where(ended | of_rows.isnan(), self.scores.low)
            judged.append((of_rows, trust[index]))
            done += len(index)
        if self.per_group.cap == 1:
            return [self.per_group.fusion(of_rows, trust) for of_rows, trust in judged]
        rewards, influence = capped(self.per_group.fusion, judged, self.per_group.cap)
        for site, share in zip(self.engine.sites, influence.tolist(), strict=True):
            log_metric(f"influence/{site}", share)
        return rewards

    def _patience(self, query: ScoreQuery) -> Patience:
        return Patience(partial(self._whom, query), self.waiting.tell, self.waiting.pause)

    def _scores(self, query: ScoreQuery, patience: Patience | None = None, replies: Replies | None = None) -> Tensor:
        """Ask, unless there are `replies` already; return the scores `[M, K]`."""
        given = ask_scores(
            self.engine,
            query.requests,
            consequence="it counts as absent there, not as 0",
            deadline=self.waiting.deadline,
            replies=replies,
            patience=patience,
            limits=(self.scores.low, self.scores.high) if self.scores else (-MAX_SCORE, MAX_SCORE),
        )
        if self.canaries is not None and query.hidden:
            self.canaries.learn(query.hidden, given)
        return self._table(query, given)

    def _table(self, query: ScoreQuery, given: Mapping[str, Scores]) -> Tensor:
        """Put the sites' scores in their places `[M, K]`, NaN where there is none.

        The quorum and the fusion look at the same table, which is made once: `given` only grows.
        """
        known, count, scores = self._tabled
        if known is query and count == len(given):
            return scores
        scores = torch.full(query.weights.shape, torch.nan)
        place = {site: k for k, site in enumerate(self.engine.sites)}
        for site, of_site in given.items():
            rows, values = list[int](), list[float]()
            for own, said in zip(query.places[site], of_site, strict=True):
                if said is not None and own:
                    rows += own
                    values += said
            scores[rows, place[site]] = torch.tensor(values, dtype=scores.dtype)
        self._tabled = query, len(given), scores
        return scores

    def _whom(self, query: ScoreQuery, given: Mapping[str, Scores], may_return: Collection[str]) -> Collection[str]:
        """Return the sites to wait for: all that may return, as long as the quorum is not reached.

        Raises:
            QuorumError: it is not reached, and none may return.
        """
        weights = query.weights.double().clamp(min=0)  # what is asked has weight
        present = self._table(query, given).isfinite()
        sums = [weights[present].sum().item(), weights.sum().item()]
        sums += [float(site in may_return) for site in self.engine.sites]
        # The step is that of all processes: all wait, or none.
        answered, asked, *missing = self.engine.total(sums)
        waited_for = [site for site, ranks in zip(self.engine.sites, missing, strict=True) if ranks]
        if answered >= self.waiting.quorum * asked:
            return ()
        if not waited_for:
            silent = [site for site in query.requests if not any(given.get(site, ()))]
            below = QuorumError(
                f"{answered / asked:.0%} of what was asked has been answered, below the quorum of "
                f"{self.waiting.quorum:.0%}, and no site may come back by waiting (those that failed or refused all: "
                f"{', '.join(silent) or 'none'}); look at the sites' logs, limits and budgets, or lower "
                "routing.quorum, and start again with --resume"
            )
            raise in_all(below)
        return waited_for

    def _finish(self, rewards: list[float], texts: Sequence[str], cut: Sequence[bool]) -> list[float | None]:
        """Give completions in good form their reward, and those that were cut off their fixed one."""
        finished: list[float | None] = []
        for reward, text, unended in zip(rewards, texts, cut, strict=False):
            if self.per_group is not None:
                reward += self.per_group.form * (not unended and bool(normalise_answer(text)))
            elif unended and self.scores is not None:
                reward = self.scores.low
            finished.append(reward)
        return finished

    def _scale(
        self, scaling: Scaling, groups: Sequence[Group], routed: Tensor, rewards: Sequence[float | None]
    ) -> list[float | None]:
        """Scale the rewards of all rows by what `scaling` says of their groups."""
        own = routed.split([len(group.candidates) for group in groups])
        weights = [of_group[torch.tensor(group.rows)] for of_group, group in zip(own, groups, strict=True)]
        known = torch.tensor([torch.nan if reward is None else reward for reward in rewards])
        parts = known.split([len(group.rows) for group in groups])
        scaled = [reward for part in scaling(groups, weights, parts) for reward in part.tolist()]
        return [None if math.isnan(reward) else reward for reward in scaled]

    def _fill(self, rewards: list[float | None], sizes: Sequence[int]) -> list[float | None]:
        """Put what `missing` says where no site scored."""
        filled: list[float | None] = []
        overall = _mean(rewards, 0.0)
        for size in sizes:
            group = rewards[len(filled) : len(filled) + size]
            neutral = None if self.missing == "none" else _mean(group, overall)
            filled += [r if r is not None and math.isfinite(r) else neutral for r in group]
        return filled


def _mean(rewards: Sequence[float | None], otherwise: float) -> float:
    known = [r for r in rewards if r is not None and math.isfinite(r)]
    return sum(known) / len(known) if known else otherwise


def _images_of(prompt: Prompt, n: int, columns: Mapping[str, object]) -> tuple[Image, ...]:
    """Find row n's images: in the prompt's content blocks, as TRL puts them there, or in an `image` or `images` column.

    A row without any is a question without an image if its prompt has no place for one.

    Raises:
        DataError: it has, or it has places for another number of images.
    """
    places = [block for message in prompt for block in _blocks(message) if block["type"] == "image"]
    images = tuple(image for b in places if isinstance(image := b.get("image"), PillowImage.Image))
    for name in () if images else ("image", "images"):
        column = columns.get(name)
        if isinstance(column, Sequence) and len(column) > n:
            own = column[n] if isinstance(column[n], Sequence) else [column[n]]
            images = images or tuple(image for image in own if isinstance(image, PillowImage.Image))
    if places and not images:
        raise DataError(
            f"row {n} has no image in its prompt and none in an 'image' or 'images' column, got {sorted(columns)}"
        )
    if places and len(places) != len(images):
        raise DataError(f"row {n} has {len(images)} images for {len(places)} places in its prompt; give one for each")
    return images


def _blocks(message: Message) -> Sequence[Mapping[str, object]]:
    content = message["content"]
    return () if isinstance(content, str) else cast(Sequence[Mapping[str, object]], content)


def _plain(message: Message) -> dict[str, object]:
    """Drop the image itself from a turn; its place stays."""
    content = message["content"]
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = [{"type": "image"} if b["type"] == "image" else {"type": "text", "text": b["text"]} for b in content]
    return {"role": message["role"], "content": content}


def _text_of(completion: Sequence[Message] | str) -> str:
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(
        str(block["text"]) for block in cast(Sequence[Mapping[str, object]], content) if block["type"] == "text"
    )


def _travelling(images: Sequence[Image], sources: ImageSource | Sequence[ImageSource] | None) -> tuple[bytes, ...]:
    """Return the bytes of the sources, else the images as PNG."""
    if sources is not None:
        return tuple(map(image_bytes, (sources,) if isinstance(sources, bytes | Path) else sources))
    return tuple(map(_png, images))


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()

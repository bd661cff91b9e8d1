"""What a site knows beside its reward model: a model that answers questions, and the reference answers that it owns.

    answer evaluation   e_AE(x, y) = 1[norm(y) ∈ norm(a(x))]       a(x) the reference answers, where the site owns them
    model evaluation    e_ME(x, y) = 1[norm(y) = norm(m(x))]       m(x) the greedy answer of the site's own model

`norm` is `accord.data.questions.normalise_answer`. Source: FedGRPO (Zhu et al. 2026, arXiv 2602.12014), equations 5 and
6. Differs: its code asks the site's model anew for each candidate, at temperature 1; here a question has one answer.

A question is known by its images' bytes and its words, so that neither the server nor the run that asks it matters:

    key = SHA-256(JSON of [name of the image or null, [[role, text, …], …]])
    key = SHA-256(JSON of [names of the images, [[role, text or null, …], …]])      several, at the places of the nulls

A site keeps its reference answers in `truth.json`, a mapping of keys to an answer, or to a list of answers that are
equally good. No question is written there, but a guess of a question, with its image, finds it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, cast

import msgspec
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel

from accord.data.questions import normalise_answer
from accord.errors import CheckpointError
from accord.federation.batches import Opening, in_batches
from accord.federation.messages import MAX_ANSWER, AnswerItem, Declined, ScoreItem, from_turns
from accord.models.generate import complete
from accord.models.load import Processor
from accord.runs import write_atomic
from accord.types import Message, Prompt, texts_of

REMEMBERED: Final = 50_000
"""Answers that are kept: more than the public questions of a run, and some megabytes."""


def question_key(images: Sequence[str], prompt: Prompt) -> str:
    """Return what a question is known by: 64 hexadecimal digits.

    Args:
        images: the names of its images, `accord.federation.messages.image_name`.
        prompt: its turns, of which roles and texts count, and not whether a text stands in a block.
    """
    several = len(images) > 1
    words = [[str(turn["role"]), *(_with_places(turn) if several else texts_of(turn))] for turn in prompt]
    named = list(images) if several else next(iter(images), None)
    return hashlib.sha256(json.dumps([named, words]).encode()).hexdigest()


def _with_places(turn: Message) -> list[str | None]:
    content = turn["content"]
    blocks = [{"text": content}] if isinstance(content, str) else cast(Sequence[Mapping[str, str]], content)
    return [block.get("text") for block in blocks]


def key_of(item: ScoreItem | AnswerItem) -> str:
    """Return the `question_key` of what the server asks about."""
    return question_key(item.images, from_turns(item.prompt))


def matches(candidates: Sequence[str], *answers: str) -> Tensor:
    """Return 1 for each candidate that is one of `answers` by exact match, and 0 for the others, `[G]`."""
    expected = {normalise_answer(answer) for answer in answers}
    return torch.tensor([float(normalise_answer(candidate) in expected) for candidate in candidates])


class Answerer:
    """Answer questions with a site's own model: greedily, and each question once as long as its answer is remembered.

    Args:
        load: returns the model and its processor; called at the first question that was not asked before.
        max_new_tokens: length limit of an answer.
        batch_size: questions at once.
        remember: how many answers to keep; the one that was asked for longest ago goes first.
        opening: how images are opened.
    """

    def __init__(
        self,
        load: Callable[[], tuple[PreTrainedModel, Processor]],
        *,
        max_new_tokens: int,
        batch_size: int = 128,
        remember: int = REMEMBERED,
        opening: Opening | None = None,
    ) -> None:
        self._load = load
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.remember = remember
        self.opening = opening or Opening()
        self._known: OrderedDict[str, str] = OrderedDict()

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, Processor]:
        model, processor = self._load()
        return model.eval().requires_grad_(False), processor

    def __call__(self, items: Sequence[ScoreItem | AnswerItem], images: Mapping[str, bytes]) -> list[str | Declined]:
        """Return the answer to every item's question, of at most `MAX_ANSWER` characters, or why there is none.

        Args:
            items: what is asked.
            images: theirs, by name; those of questions that are remembered are not looked at.

        Raises:
            CheckpointError: the model cannot be loaded.
        """
        keys = [key_of(item) for item in items]
        answers: dict[str, str | Declined] = {key: self._known[key] for key in keys if key in self._known}
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in answers}
        answers |= zip(new, self._generate(list(new.values()), images), strict=True)
        for key in keys:
            if not isinstance(said := answers[key], Declined):
                self._known[key] = said
                self._known.move_to_end(key)
        while len(self._known) > self.remember:
            self._known.popitem(last=False)
        return [answers[key] for key in keys]

    def _generate(self, items: Sequence[ScoreItem | AnswerItem], images: Mapping[str, bytes]) -> list[str | Declined]:
        if not items:
            return []
        model, processor = self._loaded

        def said(items: Sequence[ScoreItem | AnswerItem], pictures: Sequence[list[Image]]) -> list[str]:
            prompts = [from_turns(item.prompt) for item in items]
            how = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
            return [text[:MAX_ANSWER] for text in complete(model, processor, prompts, pictures, **how)]

        sizes = [1] * len(items)
        return in_batches(said, items, images, opening=self.opening, sizes=sizes, rows=self.batch_size)


def truth_book(known: Iterable[tuple[str, Sequence[str]]]) -> dict[str, tuple[str, ...]]:
    """Return reference answers by `question_key`: where a question comes twice, those that both times are right.

    Args:
        known: keys, and the answers that are equally good.
    """
    book: dict[str, tuple[str, ...]] = {}
    for key, answers in known:
        also = {normalise_answer(answer) for answer in answers}
        book[key] = tuple(answer for answer in book.get(key, answers) if normalise_answer(answer) in also)
    return {key: answers for key, answers in book.items() if answers}


def write_truth(path: Path, book: Mapping[str, tuple[str, ...]]) -> None:
    """Write reference answers by key, for their owner alone to read; whole or not at all.

    Raises:
        RunError: the file cannot be written.
    """
    written = {key: answers[0] if len(answers) == 1 else answers for key, answers in sorted(book.items())}
    write_atomic(path, msgspec.json.format(msgspec.json.encode(written)), mode=0o600)


def read_truth(path: Path) -> dict[str, tuple[str, ...]]:
    """Read reference answers by key.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    again = "train the site again with `accord site train`"
    try:
        book = msgspec.json.decode(path.read_bytes(), type=dict[str, str | tuple[str, ...]])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the site's reference answers are missing; {again}") from error
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the site's reference answers cannot be read ({error}); {again}") from error
    for key in book:
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise CheckpointError(f"{path}: {key[:40]!a} is the key of no question (64 hexadecimal digits); {again}")
    return {key: (known,) if isinstance(known, str) else known for key, known in book.items()}

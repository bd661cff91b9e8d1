"""What a site answers at most: limits of one request, and budgets over its days.

A question that is over a limit or a budget is refused alone; the others of its request are answered. A *query* is what
lets a curious server learn a reward model: the score of one candidate, or one answer. A linear head on known features
is determined by as many exact scores as it has weights, so that a budget is a depth of defence and no promise.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from accord.data.decoder import MEMORY, PIXELS
from accord.errors import check_least
from accord.federation.messages import AnswerItem, Declined, ImageBlock, ScoreItem, WithImages, from_turns
from accord.types import texts_of

TURNS: Final = 64
"""Of a question at most: a template writes tokens around each, however little it says."""

NAME: Final = 16
"""Digits by which the ledger names an image: enough to count by, and short."""


@dataclass(frozen=True)
class Limits:
    """What a site takes from other organisations; an item beyond it is refused, and the others are answered."""

    items: int = 4096  # questions of a request
    candidates: int = 256  # of a question
    images: int = 16  # of a question
    characters: int = 8192  # of a question with its longest candidate
    pixels: int = 1_000_000_000  # of all images of a request, each time one is decoded
    image_pixels: int = PIXELS  # of an image
    image_memory: int = MEMORY  # bytes of addresses of the process that decodes images
    message_text: int = 8 * 2**20  # bytes of a request without its images and weights; a longer one is not read
    requests_per_minute: int = 1200

    def __post_init__(self) -> None:
        """Refuse limits that leave nothing, and a memory in which no decoder starts."""
        check_least(self, items=1, candidates=1, images=1, characters=1, pixels=1, image_pixels=1, message_text=1024)
        check_least(self, image_memory=160 * 2**20, requests_per_minute=1)

    def declined(self, request: WithImages) -> dict[int, Declined]:
        """Return the questions of a request that are over a limit, by place, without a look at the images."""
        items: Sequence[ScoreItem | AnswerItem] = request.items
        return {
            n: Declined.LIMIT
            for n, item in enumerate(items)
            if n >= self.items
            or not 1 <= queries(item) <= self.candidates
            or not image_blocks(item) <= len(item.images) <= self.images
            or len(item.prompt) > TURNS
            or characters(item) > self.characters
        }


@dataclass(frozen=True)
class Budget:
    """How many queries a site answers; 0 for any number.

    An image is known by its bytes: a server that changes one byte asks about another image. The other two budgets hold
    whatever it does. A question about several images is a query about each.
    """

    per_day: int = 0  # by UTC
    per_run: int = 0  # over the whole ledger of the site's folder
    per_image: int = 0

    def __post_init__(self) -> None:
        """Refuse negative numbers."""
        check_least(self, per_day=0, per_run=0, per_image=0)


def queries(item: ScoreItem | AnswerItem) -> int:
    """Return how many numbers or answers a question asks for."""
    return len(item.candidates) if isinstance(item, ScoreItem) else 1


def short_names(item: ScoreItem | AnswerItem) -> set[str]:
    """Return by what names the ledger knows a question's images."""
    return {name[:NAME] for name in item.images}


def image_blocks(item: ScoreItem | AnswerItem) -> int:
    """Return how many places for images a question's text has; each costs a model its tokens, image or none."""
    blocks = [block for turn in item.prompt if not isinstance(turn.content, str) for block in turn.content]
    return sum(isinstance(block, ImageBlock) for block in blocks)


def characters(item: ScoreItem | AnswerItem) -> int:
    """Return the length of a question's text with its longest candidate."""
    texts = [text for turn in from_turns(item.prompt) for text in texts_of(turn)]
    longest = max(map(len, item.candidates), default=0) if isinstance(item, ScoreItem) else 0
    return sum(map(len, texts)) + longest


class Spent:
    """What of a budget is spent.

    Args:
        budget: what may be spent.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.day = ""
        self.today = 0
        self.run = 0
        self.by_image: Counter[str] = Counter()

    def add(self, day: str, count: int, by_image: Mapping[str, int]) -> None:
        """Count queries that were answered on a day; those of an earlier one than the last count for the run alone."""
        if day > self.day:
            self.day, self.today = day, 0
        self.today += count if day == self.day else 0
        self.run += count
        self.by_image.update(by_image)

    def declined(self, request: WithImages, day: str, but: Mapping[int, Declined]) -> dict[int, Declined]:
        """Return the questions of a request for which nothing is left, by place; those before them come first.

        Args:
            request: what is asked.
            day: on which.
            but: questions that are refused anyway.
        """
        budget, found = self.budget, dict[int, Declined]()
        items: Sequence[ScoreItem | AnswerItem] = request.items
        today, run, by_image = self.today if day == self.day else 0, self.run, Counter[str]()
        for n, item in enumerate(items):
            if n in but:
                continue
            cost, images = queries(item), short_names(item)
            of_image = max((self.by_image[image] + by_image[image] for image in images), default=0)
            asked = ((budget.per_day, today), (budget.per_run, run), (budget.per_image, of_image))
            if any(most and spent + cost > most for most, spent in asked):
                found[n] = Declined.BUDGET
                continue
            today, run = today + cost, run + cost
            by_image.update(dict.fromkeys(images, cost))
        return found


class Rate:
    """Whether requests come faster than is allowed.

    Args:
        per_minute: how many in any sixty seconds.
        clock: tells the time in seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=per_minute)

    def over(self) -> bool:
        """Tell whether one more is too many; else it counts."""
        now = self._clock()
        if len(self._times) == self._times.maxlen and now - self._times[0] < 60:
            return True
        self._times.append(now)
        return False

"""What flows through Accord: the nouns, and the letters that index them.

    K  sites                 N  preference pairs, or rows to route
    P  prompts               G  completions per prompt (a GRPO group)
    T  tokens                D  features

Everything else is named after the field: preference pair, chosen, rejected, reward model, score, site, router,
rollout, group, advantage, policy, reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, cast

ImageSource: TypeAlias = Path | bytes
"""An image as it was stored: a file, or the compressed bytes of one. Never a tensor, never re-encoded."""

Subject: TypeAlias = Path | bytes | str
"""What a question is about: an image of it, or its own text where it has none. No two sides may hold the same."""

Message: TypeAlias = Mapping[str, object]
"""One turn of a conversation in the Hugging Face chat form: `{"role": …, "content": str | list of blocks}`."""

Prompt: TypeAlias = Sequence[Message]
"""A conversation that ends with the user's turn; image blocks are `{"type": "image"}`."""

IMAGE_TAG: Final = "<image>"
"""What LLaVA and ms-swift write in a text where the image stands."""

_PLACE: Final = re.compile(rf"\s*{IMAGE_TAG}\s*")


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its reference answer, about an image, about several, or about nothing but its words.

    `image` is the first image, None where there is none, and `further` are those after it. Where there are several,
    `<image>` in `text` is the place of one; those without a place stand before the words.

    `domain` is the data set (or organisation) it came from; `split` is one of `base`, `private`, `public`, `dev`,
    `test`: what the server owns, what a site owns, the prompts of GRPO, what chooses settings, what is reported.
    """

    id: str
    image: ImageSource | None
    text: str
    answer: str
    question_type: str
    split: str
    domain: str = ""
    references: tuple[str, ...] = ()  # further answers, as good as `answer`
    weaker: tuple[str, ...] = ()  # answers that are not as good, the better ones first; any other is worse than these
    further: tuple[ImageSource, ...] = ()  # images after the first, in order

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All its images, in order."""
        return () if self.image is None else (self.image, *self.further)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """What it is about, by which questions are split and dealt out: its images, or its text without any."""
        return self.images or (self.text,)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Of two answers to one prompt about `images`, of which there may be none, the one a person preferred.

    `constructed` is true when the pair was built from a reference answer and not from a person's judgement.
    `question_id` groups the pairs that share image and prompt, so that the image is encoded once for all of them.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    images: tuple[ImageSource, ...]
    question_id: str
    question_type: str = ""
    constructed: bool = False
    person: str = ""  # whose preference, or whose picture, it is: the unit of privacy, where that is a person
    weight: float = 1.0  # what it counts in a reward model's loss, such as how many annotators agreed; above 0
    tie: bool = False  # the two answers were found equally good, and which is called chosen says nothing

    @property
    def image(self) -> ImageSource | None:
        """The first image, None where there is none."""
        return self.images[0] if self.images else None

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """What it is about: its images, or the words of its prompt where there are none."""
        return self.images or (text_of(self.prompt),)


def subjects_of(items: Iterable[Question | PreferencePair]) -> list[Subject]:
    """Return what questions or pairs are about."""
    return [subject for item in items for subject in item.subjects]


def texts_of(message: Message) -> list[str]:
    """Return the texts of a turn, one for each of its text blocks."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    blocks = cast(Sequence[Mapping[str, object]], content)
    return [str(block["text"]) for block in blocks if block["type"] == "text"]


def text_of(prompt: Prompt) -> str:
    """Return the words of a conversation."""
    return " ".join(text for message in prompt for text in texts_of(message))


def vqa_prompt(text: str) -> list[dict[str, object]]:
    """Return the one-turn conversation that asks `text` about one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def prompt_of(question: Question) -> list[dict[str, object]]:
    """Return the one-turn conversation that asks `question`, with the places of its images."""
    if len(question.images) == 1:
        return vqa_prompt(question.text)
    return [{"role": "user", "content": at_places(question.text, len(question.images))}]


def at_places(text: str, images: int) -> list[dict[str, object]]:
    """Return a text as blocks, with an image block at each `<image>`, and for images without a place at its beginning.

    Args:
        text: what is said.
        images: how many image blocks there are; further `<image>` are words.
    """
    parts = _PLACE.split(text, maxsplit=images) if images else [text]
    blocks: list[dict[str, object]] = [{"type": "image"}] * (images - len(parts) + 1)
    for number, part in enumerate(parts):
        blocks += [{"type": "image"}] if number else []
        blocks += [{"type": "text", "text": part}] if part or not images else []
    return blocks

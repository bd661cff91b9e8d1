"""What flows through Accord: the nouns, and the letters that index them.

    K  sites                 N  preference pairs, or rows to route
    P  prompts               G  completions per prompt (a GRPO group)
    T  tokens                D  features

Everything else is named after the field: preference pair, chosen, rejected, reward model, score, site, router,
rollout, group, advantage, policy, reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

ImageSource: TypeAlias = Path | bytes
"""An image as it was stored: a file, or the compressed bytes of one. Never a tensor, never re-encoded."""

Message: TypeAlias = Mapping[str, object]
"""One turn of a conversation in the Hugging Face chat form: `{"role": …, "content": str | list of blocks}`."""

Prompt: TypeAlias = Sequence[Message]
"""A conversation that ends with the user's turn; image blocks are `{"type": "image"}`."""


@dataclass(frozen=True, slots=True)
class Question:
    """One visual question with its reference answer.

    `domain` is the data set (or organisation) it came from; `split` is one of `base`, `private`, `public`, `dev`,
    `test`: what the server owns, what a site owns, the prompts of GRPO, what chooses settings, what is reported.
    """

    id: str
    image: ImageSource
    text: str
    answer: str
    question_type: str
    split: str
    domain: str = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Of two answers to one prompt about `images`, the one a person preferred.

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


def vqa_prompt(text: str) -> list[dict[str, object]]:
    """Return the one-turn conversation that asks `text` about one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]

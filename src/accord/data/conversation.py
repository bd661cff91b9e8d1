"""Read prompts and answers in the Hugging Face chat form, and bring them into one shape.

A message's content may be plain text or a list of blocks, and what comes out of an Arrow table has nulls where a block
lacks a field. ShareGPT and LLaVA say `from` and `value` where this form says `role` and `content`, and write `<image>`
where the image stands. Everything behind this module sees blocks of exactly `{"type": "image"}` or
`{"type": "text", "text": ...}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from accord.data.rows import BadRow
from accord.types import IMAGE_TAG

ROLES = ("system", "user", "assistant")
ALSO_CALLED: Final = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""Roles of ShareGPT, LLaVA and Gemini."""

_PLACE: Final = re.compile(rf"\s*{IMAGE_TAG}\s*")


def as_turn(turn: object) -> object:
    """Return a turn of ShareGPT's form, `{"from": …, "value": …}`, in the chat form; any other as it is."""
    if not isinstance(turn, Mapping):
        return turn
    role, content = turn.get("role"), turn.get("content")
    if role is None and content is None:  # Arrow fills what a turn lacks with nulls
        role, content = turn.get("from"), turn.get("value")
    return {**turn, "role": ALSO_CALLED.get(str(role), role), "content": content}


def block_images(turns: object) -> list[object]:
    """Return the image cells that stand in the blocks of a conversation, as Qwen's and OpenAI's forms have them."""
    found: list[object] = []
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for block in content if isinstance(content, list) else []:
            if isinstance(block, Mapping) and block.get("type") in ("image", "image_url"):
                cell = next((block[key] for key in ("image", "image_url", "url", "path") if block.get(key)), None)
                found += [] if cell is None else [cell]
    return found


def with_places(text: str, images: int) -> str:
    """Return a question about so many images with their places, of which there may be fewer; one needs none.

    An image without a place stands before the words, and so does the only one: its `<image>` is taken out.

    Raises:
        BadRow: there are more places than images.
    """
    places = text.count(IMAGE_TAG) if images else 0
    if places > images:
        raise BadRow(
            f"the question has {places} places {IMAGE_TAG!r} for its {images if images > 1 else 'one'} "
            f"image{'s' * (images > 1)}; leave as many, or fewer"
        )
    return _PLACE.sub(" ", text).strip() if places and images == 1 else text


def read_prompt(prompt: object, n_images: int) -> list[dict[str, object]]:
    """Return a conversation in blocks from text or messages; it ends with the user's turn.

    Where every content is plain text, the images stand at `<image>`, and those without a place before the first user
    text, as TRL puts them. So they do where there are blocks and all of them are texts.

    Raises:
        BadRow: no conversation, an unknown role, no text, another last turn, or image blocks that are not `n_images`:
            the processor would fail on these in the middle of training.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"the prompt must be text or a list of messages, got {prompt!r:.60}")
    turns = [as_turn(turn) for turn in turns]
    messages: list[dict[str, object]] = []
    plain = all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in turns)
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise BadRow(f"a message needs a role among {', '.join(ROLES)}, got {turn!r:.60}")
        messages.append({"role": turn["role"], "content": content_blocks(turn.get("content"))})
    if n_images and not any(block["type"] == "image" for message in messages for block in _blocks(message)):
        _place_images(messages, n_images, first=plain)
    if messages[-1]["role"] != "user":
        raise BadRow(f"the prompt must end with the user's turn, got {messages[-1]['role']!r}")
    every = [block for message in messages for block in _blocks(message)]
    if not any(block.get("text", "").strip() for block in every):
        raise BadRow("the prompt is empty")
    found = sum(block["type"] == "image" for block in every)
    if found != n_images:
        raise BadRow(f"the prompt has {found} image blocks and the row {n_images} images")
    return messages


def _blocks(message: Mapping[str, object]) -> list[dict[str, str]]:
    return content_blocks(message["content"])


def _place_images(messages: list[dict[str, object]], n_images: int, *, first: bool) -> None:
    """Put image blocks at `<image>`; those without a place stand first, where there is any place or `first` says so."""
    texts = [block.get("text", "") for m in messages if m["role"] == "user" for block in _blocks(m)]
    places = sum(text.count(IMAGE_TAG) for text in texts)
    if places > n_images:
        raise BadRow(f"the prompt has {places} places {IMAGE_TAG!r} and the row {n_images} images")
    if not places and not first:
        return
    before = n_images - places
    for message in messages:
        if message["role"] == "user":
            parts = [part for block in _blocks(message) for part in _at_tags(block)] if places else _blocks(message)
            message["content"] = [{"type": "image"}] * before + parts
            before = 0


def _at_tags(block: dict[str, str]) -> list[dict[str, str]]:
    """Cut a text at its tags; each becomes an image block."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(_PLACE.split(block.get("text", ""))):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts or [block]


def content_blocks(content: object) -> list[dict[str, str]]:
    """Return a message's content as image and text blocks.

    Raises:
        BadRow: it is neither text nor a list of such blocks.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise BadRow(f"a message's content must be text or a list of blocks, got {content!r:.60}")
    blocks: list[dict[str, str]] = []
    for block in content:
        kind, text = (block.get("type"), block.get("text")) if isinstance(block, Mapping) else (None, None)
        if kind in ("image", "image_url"):
            blocks.append({"type": "image"})  # Arrow fills absent fields with nulls, which chat templates would print
        elif kind == "text" and isinstance(text, str):
            blocks.append({"type": "text", "text": text})
        else:
            raise BadRow(f"a content block must be an image or a text, got {block!r:.60}")
    return blocks


def read_completion(name: str, value: object) -> str:
    """Return the text of an answer that is plain text or one assistant message; `name` is its column, for messages.

    Raises:
        BadRow: it is neither, or holds an image.
    """
    if isinstance(value, str):
        return value.strip()
    turn = as_turn(value[0] if isinstance(value, list) and len(value) == 1 else value)
    if not isinstance(turn, Mapping) or turn.get("role") != "assistant":
        raise BadRow(f"{name} must be text or one assistant message, got {value!r:.60}")
    blocks = content_blocks(turn.get("content"))
    if any(block["type"] == "image" for block in blocks):
        raise BadRow(f"{name} holds an image; only text can be preferred")
    return "".join(block["text"] for block in blocks).strip()

"""Read prompts and answers in the Hugging Face chat form, and bring them into one shape.

A message's content may be plain text or a list of blocks, and what comes out of an Arrow table has nulls where a block
lacks a field. Everything behind this module sees blocks of exactly `{"type": "image"}` or
`{"type": "text", "text": ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accord.data.rows import BadRow

ROLES = ("system", "user", "assistant")


def read_prompt(prompt: object, n_images: int) -> list[dict[str, object]]:
    """Return a conversation in blocks from text or messages; it ends with the user's turn.

    Where every content is plain text, the images stand before the first user text, as TRL puts them.

    Raises:
        BadRow: no conversation, an unknown role, no text, another last turn, or image blocks that are not `n_images`:
            the processor would fail on these in the middle of training.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"the prompt must be text or a list of messages, got {prompt!r:.60}")
    messages: list[dict[str, object]] = []
    plain = all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in turns)
    placed = not plain
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
            raise BadRow(f"a message needs a role among {', '.join(ROLES)}, got {turn!r:.60}")
        blocks = content_blocks(turn.get("content"))
        if not placed and turn["role"] == "user":
            blocks, placed = [{"type": "image"}] * n_images + blocks, True
        messages.append({"role": turn["role"], "content": blocks})
    if messages[-1]["role"] != "user":
        raise BadRow(f"the prompt must end with the user's turn, got {messages[-1]['role']!r}")
    every = [block for message in messages for block in content_blocks(message["content"])]
    if not any(block.get("text", "").strip() for block in every):
        raise BadRow("the prompt is empty")
    found = sum(block["type"] == "image" for block in every)
    if found != n_images:
        raise BadRow(f"the prompt has {found} image blocks and the row {n_images} images")
    return messages


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
        if kind == "image":
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
    turn = value[0] if isinstance(value, list) and len(value) == 1 else None
    if not isinstance(turn, Mapping) or turn.get("role") != "assistant":
        raise BadRow(f"{name} must be text or one assistant message, got {value!r:.60}")
    blocks = content_blocks(turn.get("content"))
    if any(block["type"] == "image" for block in blocks):
        raise BadRow(f"{name} holds an image; only text can be preferred")
    return "".join(block["text"] for block in blocks).strip()

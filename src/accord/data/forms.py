r"""Bring others' forms of preference pairs into TRL's explicit one: a prompt, a chosen and a rejected answer.

    prompt, chosen, rejected                        TRL, explicit
    chosen, rejected                                TRL, implicit prompt: two conversations with one beginning
    prompt, and chosen and rejected with it again   UltraFeedback
    question, chosen, rejected, image               RLAIF-V
    conversations, chosen, rejected                 ShareGPT, as LLaMA-Factory reads it
    conversations, rejected_conversations           LLaVA
    messages, rejected_response                     ms-swift; also query, response, rejected_response
    chosen, rejected: "\n\nHuman: … Assistant: …"      HH-RLHF

A field that is null is as one that is not there. A system prompt in a field `system` comes first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeGuard

from accord.data.cells import FIELDS, image_cells
from accord.data.conversation import as_turn, block_images
from accord.data.rows import BadRow, Row
from accord.errors import DataError

PROMPTS: Final = ("prompt", "question", "conversations", "messages", "conversation", "query", "instruction")
"""Fields that hold a prompt; the first that is there counts."""

ANSWERS: Final = ("chosen", "rejected", "rejected_response", "rejected_conversations", "rejected_messages", "response")

COLUMNS: Final = (*PROMPTS, *ANSWERS, *FIELDS, "system")
"""All that is read of a pair, but for what Accord itself adds."""

_HOLD: Final = {
    "prompt": PROMPTS,
    "chosen": ("chosen", "response", *PROMPTS),  # a conversation ends with its chosen answer
    "rejected": ("rejected", *ANSWERS[2:5]),
}
"""By the part of a pair, the fields that may hold it."""

_SPOKEN: Final = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class RawPair:
    """A row in TRL's explicit form, not looked into."""

    prompt: object  # text, or turns
    chosen: object  # text, a turn, or a list of one
    rejected: object


def pair_cells(row: Row) -> list[object]:
    """Return the image cells of a pair: of its image field, or else in the blocks of its prompt."""
    if cells := image_cells(row):
        return cells
    turns = next((row[name] for name in (*PROMPTS, "chosen") if isinstance(row.get(name), list)), None)
    return block_images(turns)


def raw_pair(where: str, row: Row) -> RawPair:
    """Return prompt, chosen and rejected answer of a row in any of the forms above.

    Raises:
        DataError: the row has none of them; the message names the columns present, and the forms.
        BadRow: a column that it needs is there and null; or its two conversations have no common beginning that ends
            with a question.
    """
    given = {name: value for name, value in row.items() if value is not None}
    name = next((name for name in PROMPTS if name in given), None)
    prompt = given.get(name) if name else None
    if "chosen" in given and "rejected" in given:
        chosen, rejected = given["chosen"], given["rejected"]
    else:
        prompt, chosen, rejected = _otherwise(where, row, prompt)
    if _spoken(chosen) and _spoken(rejected) and prompt is None:
        chosen, rejected = _turns_of(str(chosen)), _turns_of(str(rejected))
    if _whole(chosen) and _whole(rejected):
        prompt, chosen, rejected = _parted(chosen, rejected)
    elif prompt is None:
        raise _missing(where, row, "prompt")
    if isinstance(system := given.get("system"), str) and system.strip():
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [{"role": "system", "content": system}, *turns] if isinstance(turns, list) else prompt
    return RawPair(prompt, chosen, rejected)


def _otherwise(where: str, row: Row, prompt: object) -> tuple[object, object, object]:
    """Return prompt, chosen and rejected of a row that lacks one of the two fields of these names."""
    rejected = next((row[name] for name in ANSWERS[2:5] if row.get(name) is not None), None)
    if rejected is None:
        theirs = row.get("chosen") is not None or any(name in row for name in ANSWERS[2:5])
        raise _missing(where, row, "rejected" if theirs and row.get("rejected") is None else "chosen")
    if _whole(rejected):
        return None, prompt, rejected
    if row.get("response") is not None:
        return prompt, row["response"], rejected
    if not _whole(prompt):
        raise _missing(where, row, "chosen")
    return prompt[:-1], prompt[-1:], rejected


def _missing(where: str, row: Row, name: str) -> DataError:
    """Return what is wrong with the file; or with this row alone, where it has such a column and it is null."""
    if null := [column for column in _HOLD[name] if column in row and row[column] is None]:
        return BadRow(f"{null[0]} is null, and nothing else in the row is its {name}")
    hint = "TRL's implicit prompt is read where chosen and rejected are lists of messages; " if name == "prompt" else ""
    return DataError(
        f"{where}: column {name!r} is missing; the columns present are {', '.join(map(repr, row)) or 'none'}; {hint}"
        f"add or rename it: a pair has a prompt (also called {', '.join(PROMPTS[1:])}), chosen and rejected"
    )


def _whole(value: object) -> TypeGuard[list[object]]:
    """Tell a conversation from an answer."""
    return isinstance(value, list) and len(value) > 1


def _spoken(value: object) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:") and "\n\nAssistant:" in value


def _turns_of(text: str) -> list[dict[str, str]]:
    parts = _SPOKEN.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _parted(chosen: Sequence[object], rejected: Sequence[object]) -> tuple[object, object, object]:
    """Part two conversations where they part; their last turns are the answers."""
    first, second = [as_turn(turn) for turn in chosen], [as_turn(turn) for turn in rejected]
    if len(first) != len(second) or first[:-1] != second[:-1]:
        raise BadRow(
            "chosen and rejected are conversations that differ before their last turn; give them one beginning, and an "
            "answer each"
        )
    return first[:-1], first[-1:], second[-1:]

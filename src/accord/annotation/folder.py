"""The folder of an annotation, which holds all that it needs and can be moved.

annotation.json     its settings
to-judge.jsonl      the pairs, in the order in which they are shown
images/             their images, as they were stored, by the SHA-256 of their bytes
judgements.jsonl    what people said (`accord.annotation.journal`)
run.lock            held by the process that serves the page
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from accord.annotation.journal import Journal, Judgement, read_judgements
from accord.annotation.pairs import Candidate
from accord.data.cells import leaves_folder
from accord.data.conversation import read_prompt
from accord.data.preferences import write_rows
from accord.data.questions import image_identity
from accord.data.rows import BadRow
from accord.errors import DataError, RunError
from accord.runs import read_record, write_atomic
from accord.runs.lock import locked

SETTINGS: Final = "annotation.json"
PAIRS: Final = "to-judge.jsonl"
JOURNAL: Final = "judgements.jsonl"
_FORMAT: Final = "accord-annotation-1"
_REMEDY: Final = "put the file back, or annotate another folder"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What holds for the whole of an annotation."""

    overlap: float  # share of the pairs that everyone judges
    seed: int  # of that share, and of the sides
    sampled: list[str] = []  # what was sampled of policies, so that it is not sampled again
    format: str = _FORMAT


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    prompt: list[dict[str, object]]
    answers: tuple[str, str]
    question_id: str
    question_type: str
    person: str
    origins: tuple[str, str]
    images: list[str] = []


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is absent, for this process alone.

    Raises:
        RunError: another process holds it, or it cannot be written.
    """
    try:
        descriptor = locked(folder)
    except RunError as error:
        if isinstance(error.__cause__, BlockingIOError):
            holder = str(error).partition(" is in use by ")[2].partition(";")[0]
            raise RunError(f"{folder} is served already, by {holder}; open its page, or end it with Ctrl-C") from error
        raise
    try:
        yield
    finally:
        os.close(descriptor)


def read_settings(folder: Path) -> Settings | None:
    """Return a folder's settings, None where it is no annotation yet.

    Raises:
        RunError: they are damaged, or of another version.
    """
    settings = read_record(folder / SETTINGS, Settings, remedy=_REMEDY)
    if settings is not None and settings.format != _FORMAT:
        raise RunError(f"{folder}: format {settings.format!r}, this version reads {_FORMAT!r}; annotate another folder")
    return settings


def write_settings(folder: Path, settings: Settings) -> None:
    """Write a folder's settings.

    Raises:
        RunError: they cannot be written.
    """
    write_atomic(folder / SETTINGS, msgspec.json.format(msgspec.json.encode(settings)) + b"\n")


def read_pairs(folder: Path) -> list[Candidate]:
    """Return the pairs of a folder, none where there are none yet.

    Raises:
        RunError: a line is damaged.
    """
    file = folder / PAIRS
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            row = msgspec.json.decode(line, type=_Row)
            if climbing := [name for name in row.images if leaves_folder(name)]:
                raise BadRow(f"the image {climbing[0]!r:.80} is not in the folder")
            prompt = read_prompt(row.prompt, len(row.images))
        except (msgspec.MsgspecError, RecursionError, BadRow) as error:
            raise RunError(f"{file}, line {number}, is damaged ({error}); {_REMEDY}") from error
        found.append(
            Candidate(
                id=row.id,
                prompt=prompt,
                answers=row.answers,
                images=tuple(folder / name for name in row.images),
                question_id=row.question_id,
                question_type=row.question_type,
                person=row.person,
                origins=row.origins,
            )
        )
    return found


def write_pairs(folder: Path, candidates: Sequence[Candidate]) -> None:
    """Write the pairs of a folder in this order, with a copy of each image.

    Raises:
        DataError: one `question_id` stands for two prompts or images.
        RunError: the disk is full or the folder cannot be written.
    """
    identify = image_identity()
    content: dict[str, object] = {}
    for each in candidates:
        asked = list(each.prompt), [identify(image) for image in each.images]
        if content.setdefault(each.question_id, asked) != asked:
            raise DataError(
                f"question_id {each.question_id!r} stands for two prompts or images; give every prompt and image its "
                "own id, or leave the column out"
            )
    rows = []
    for each in candidates:
        row = _Row(
            each.id,
            [dict(turn) for turn in each.prompt],
            each.answers,
            each.question_id,
            each.question_type,
            each.person,
            each.origins,
        )
        rows.append((msgspec.to_builtins(row), each.images))
    write_rows(folder / PAIRS, rows)


def open_journal(folder: Path) -> Journal:
    """Return the folder's journal, to be added to.

    Raises:
        RunError: it is damaged, or cannot be written.
    """
    return Journal(folder / JOURNAL)


def read_all(folder: Path) -> tuple[Settings, list[Candidate], list[Judgement]]:
    """Return all that a folder holds, without holding it.

    Raises:
        RunError: the folder is no annotation, or a file of it is damaged.
    """
    settings = read_settings(folder)
    if settings is None:
        raise RunError(f"{folder}: no {SETTINGS}, so this is no annotation; start one with accord annotate {folder}")
    judgements = read_judgements(folder / JOURNAL)[0] if (folder / JOURNAL).exists() else []
    return settings, read_pairs(folder), judgements

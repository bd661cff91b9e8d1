"""Pairs of answers of which nobody has said yet which is better, and how a file gives them.

    {"prompt": "…", "answers": ["…", "…"], "image": "images/1.png"}

A file of preference pairs is read, too, and its pairs are judged anew. Two answers that agree once normalised are no
pair, and neither is an answer with nothing: people's time is for what must be ranked.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from accord.data.forms import COLUMNS, PROMPTS, RawPair, raw_pair
from accord.data.preferences import read_preferences
from accord.data.questions import image_identity, normalise_answer
from accord.data.rows import BadRow, Row
from accord.errors import DataError, DataWarning
from accord.types import ImageSource, PreferencePair, Prompt, Subject

ANSWERS: Final = "answers"
"""The field with two answers of which none is preferred."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Two answers to one prompt about `images`, of which there may be none, to be judged."""

    id: str
    prompt: Prompt
    answers: tuple[str, str]
    images: tuple[ImageSource, ...]
    question_id: str
    question_type: str = ""
    person: str = ""  # as in `accord.types.PreferencePair`
    origins: tuple[str, str] = ("", "")  # which policy gave each answer, where that is known

    def preferring(self, first: bool) -> PreferencePair:
        """Return the preference for one of the answers."""
        chosen, rejected = self.answers if first else self.answers[::-1]
        return PreferencePair(
            prompt=self.prompt,
            chosen=chosen,
            rejected=rejected,
            images=self.images,
            question_id=self.question_id,
            question_type=self.question_type,
            person=self.person,
        )


def read_candidates(path: Path | str) -> list[Candidate]:
    """Read questions with two answers each, or preference pairs in any form that `read_preferences` reads.

    Raises:
        DataError: as `accord.data.preferences.read_preferences`.

    Warns:
        DataWarning: rows were left out: as there, or an answer has nothing in it, or the same pair came before.
    """
    pairs = read_preferences(path, least=1, raw=_two_answers, columns=(*COLUMNS, ANSWERS))
    identify = image_identity()
    found = [candidate_of(pair, identify) for pair in pairs if normalise_answer(pair.rejected)]
    once = distinct(found)
    if len(once) < len(pairs):
        warnings.warn(
            f"{path}: of {len(pairs)} pairs {len(pairs) - len(found)} have an answer with nothing and "
            f"{len(found) - len(once)} are there twice; {len(once)} are left",
            DataWarning,
            stacklevel=2,
        )
    return once


def _two_answers(where: str, row: Row) -> RawPair:
    if row.get(ANSWERS) is None:
        return raw_pair(where, row)
    prompt = next((row[name] for name in PROMPTS if row.get(name) is not None), None)
    answers = row[ANSWERS]
    if prompt is None:
        raise DataError(f"{where}: a pair of answers without a prompt; add one of {', '.join(PROMPTS)}")
    if not isinstance(answers, list) or len(answers) != 2:
        raise BadRow(f"{ANSWERS} must be a list of two, got {answers!r:.60}; give every two answers a row of their own")
    return RawPair(prompt, *answers)


def candidate_of(pair: PreferencePair, identify: Callable[[Subject], str]) -> Candidate:
    """Return a pair without its preference; its id does not tell which answer was preferred."""
    answers = sorted((pair.chosen, pair.rejected))
    content = json.dumps([list(pair.prompt), [identify(image) for image in pair.images], answers])
    return Candidate(
        id=hashlib.sha256(content.encode()).hexdigest()[:16],
        prompt=pair.prompt,
        answers=(pair.chosen, pair.rejected),
        images=pair.images,
        question_id=pair.question_id,
        question_type=pair.question_type,
        person=pair.person,
    )


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return each pair of answers once, the first of those that are the same."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.id, candidate)
    return list(found.values())

"""Where pairs of answers come from, of which nobody has said yet which is better.

    a file            {"prompt": …, "answers": ["…", "…"], "image": "…"}, or preference pairs, to be judged anew
    one policy        two of its samples
    two policies      a sample of each

Two answers that agree once normalised are no pair, and neither is an answer with nothing: people's time is for what
must be ranked. Of a pool, the pairs on which a reward model is least certain come first: the smallest |R(x, y) −
R(x, y′)|, where Bradley–Terry's probability is nearest to one half (uncertainty sampling; Lewis and Gale 1994, "A
sequential algorithm for training text classifiers", https://doi.org/10.1007/978-1-4471-2099-5_1).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from accord.data.forms import COLUMNS, PROMPTS, RawPair, raw_pair
from accord.data.preferences import read_preferences
from accord.data.questions import image_identity, normalise_answer
from accord.data.rows import BadRow, Row
from accord.errors import DataError
from accord.models.generate import answer
from accord.models.load import load_model
from accord.progress import stage_bar
from accord.rewards.model import RewardModel
from accord.rewards.train import check_images, pair_margins
from accord.types import ImageSource, PreferencePair, Prompt, Question, Subject, prompt_of

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
        DataWarning: rows were left out.
    """
    pairs = read_preferences(path, least=1, raw=_two_answers, columns=(*COLUMNS, ANSWERS))
    identify = image_identity()
    return _distinct([_candidate(pair, identify) for pair in pairs if normalise_answer(pair.rejected)])


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


def sample_candidates(
    questions: Sequence[Question],
    policies: Sequence[str],
    *,
    samples: int,
    every: bool = False,
    max_new_tokens: int = 128,
    seed: int = 0,
    quiet: bool = True,
) -> list[Candidate]:
    """Return pairs of what one policy says to a question, or of what one says and what another says.

    Args:
        questions: what is asked, `[Q]`; their reference answers are not looked at.
        policies: one checkpoint or two.
        samples: of each policy for each question; of one policy at least two.
        every: all distinct pairs of a question, a pool to choose from, and not only the first.
        max_new_tokens: length limit of an answer.
        seed: of the samples.
        quiet: without a progress bar.

    Raises:
        DataError: all answers to each question agree.
        CheckpointError: a policy cannot be loaded.
    """
    said: list[list[list[str]]] = []  # [policies][Q][distinct samples]
    for number, checkpoint in enumerate(policies):
        model, processor = load_model(checkpoint)
        with stage_bar(f"samples of {checkpoint}", len(questions), quiet=quiet) as advance:
            texts = answer(
                model,
                processor,
                questions,
                max_new_tokens=max_new_tokens,
                samples=samples,
                seed=seed + number,  # two policies that are the same say different things
                batch_size=32,
                on_batch=lambda n: advance(n),
            )
        said.append([_distinct_texts(each) for each in texts])
    identify = image_identity()
    found = []
    for q, question in enumerate(questions):
        one, other = said[0][q], said[-1][q]
        couples = itertools.combinations(one, 2) if len(policies) == 1 else itertools.product(one, other)
        differing = [(a, b) for a, b in couples if normalise_answer(a) != normalise_answer(b)]
        for a, b in differing if every else differing[:1]:
            pair = PreferencePair(
                prompt=prompt_of(question),
                chosen=a,
                rejected=b,
                images=() if question.image is None else (question.image,),
                question_id=question.id,
                question_type=question.question_type,
            )
            found.append(replace(_candidate(pair, identify), origins=(policies[0], policies[-1])))
    if not found:
        raise DataError(
            f"all of {samples} samples agree for each of {len(questions)} questions, so there is nothing to rank; "
            "draw more samples, or take another policy"
        )
    return _distinct(found)


def least_certain(model: RewardModel, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates in the order of |margin|, those first that the model is least certain of.

    Raises:
        DataError: one has several images.
    """
    pairs = [candidate.preferring(first=True) for candidate in candidates]
    check_images(pairs)
    margins = pair_margins(model, pairs)
    order = sorted(range(len(pairs)), key=lambda n: abs(margins[n]))  # stable: equal ones stay as they were
    return [candidates[n] for n in order]


def _candidate(pair: PreferencePair, identify: Callable[[Subject], str]) -> Candidate:
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


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return each pair of answers once, the first of those that are the same."""
    found: dict[str, Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.id, candidate)
    return list(found.values())


def _distinct_texts(texts: Sequence[str]) -> list[str]:
    """Return what differs once normalised, without nothing."""
    return [text for norm, text in {normalise_answer(text): text for text in texts}.items() if norm]

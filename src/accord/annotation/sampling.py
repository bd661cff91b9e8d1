"""Pairs of what policies say, and the order of a reward model's doubts.

    one policy        two of its samples
    two policies      a sample of each

Of a pool, the pairs on which a reward model is least certain come first: the smallest |R(x, y) − R(x, y′)|, where
Bradley–Terry's probability is nearest to one half (uncertainty sampling; Lewis and Gale 1994, "A sequential algorithm
for training text classifiers", https://doi.org/10.1007/978-1-4471-2099-5_1). `benchmarks/quality/active_choice.py`
measures what it saves.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from accord.annotation.pairs import Candidate, candidate_of, distinct
from accord.data.questions import image_identity, normalise_answer
from accord.errors import DataError
from accord.models.generate import answer
from accord.models.load import load_model
from accord.progress import stage_bar
from accord.rewards.model import RewardModel
from accord.rewards.train import pair_margins
from accord.types import PreferencePair, Question, prompt_of


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
                images=question.images,
                question_id=question.id,
                question_type=question.question_type,
            )
            found.append(replace(candidate_of(pair, identify), origins=(policies[0], policies[-1])))
    if not found:
        raise DataError(
            f"all of {samples} samples agree for each of {len(questions)} questions, so there is nothing to rank; "
            "draw more samples, or take another policy"
        )
    return distinct(found)


def least_certain(model: RewardModel, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates in the order of |margin|, those first that the model is least certain of."""
    pairs = [candidate.preferring(first=True) for candidate in candidates]
    margins = pair_margins(model, pairs)
    order = sorted(range(len(pairs)), key=lambda n: abs(margins[n]))  # stable: equal ones stay as they were
    return [candidates[n] for n in order]


def _distinct_texts(texts: Sequence[str]) -> list[str]:
    """Return what differs once normalised, without nothing."""
    return [text for norm, text in {normalise_answer(text): text for text in texts}.items() if norm]

"""Let a simulated annotator judge what a policy said: preference pairs without reference answers at the site.

A site's people see answers that a model gave, and say which is better. Here an annotator is played by a question's
references, which stay with the annotator: of two answers

    right  >  weaker, in the order of `Question.weaker`  >  anything else

and two answers of one grade are a tie, which makes no pair. So a site learns nothing about a question to which no
answer was right, or all were. The references add no candidate. What annotators are shown is

    what the policy said to this picture
    what it said to the site's other pictures of the same type
    some of these words, spliced: "head abdomen" where "mri head" and "ct abdomen" were said

The last two matter: a policy that is aligned drifts, and where a reward model has never seen "kitchen" beside a bedroom
or "head abdomen" at all, its score is arbitrary and the policy finds it (measured: the drift takes 50 steps).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from accord.data.questions import normalise_answer, right_answers
from accord.errors import DataError, RecipeError
from accord.types import PreferencePair, Question, prompt_of


def grade(question: Question, text: str) -> int:
    """Return how good an annotator finds an answer: 0 for the best grade, more for worse ones."""
    given = normalise_answer(text)
    if given in right_answers(question):
        return 0
    ranked = [normalise_answer(weaker) for weaker in question.weaker]
    return 1 + (ranked.index(given) if given in ranked else len(ranked))


def judge_samples(
    questions: Sequence[Question],
    said: Mapping[str, Sequence[str]],
    *,
    others: int = 0,
    spliced: int = 0,
    rejected_per_answer: int,
    generator: random.Random,
) -> list[PreferencePair]:
    """Return the pairs of every question in which an annotator prefers one sampled answer to another.

    Args:
        questions: what was asked, `[Q]`.
        said: what the policy answered, by question id; repeated answers count once.
        others: how many answers to other questions of the same type are judged beside, drawn at random.
        spliced: how many sequences of two or three words from all these are judged beside.
        rejected_per_answer: at most so many worse answers are set against each answer, drawn at random.
        generator: the only source of chance.

    Raises:
        RecipeError: `rejected_per_answer` is below 1.
        DataError: no answer was preferred to another.
    """
    if rejected_per_answer < 1:
        raise RecipeError(f"rejected_per_answer must be at least 1, got {rejected_per_answer}; raise it")
    of_type: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        of_type[question.question_type] += said.get(question.id, ())
    pairs = []
    for question in questions:
        elsewhere = of_type[question.question_type]
        shown = [*said.get(question.id, ()), *generator.sample(elsewhere, min(others, len(elsewhere)))]
        words = [word for text in shown for word in text.split()]
        shown += [" ".join(generator.choices(words, k=generator.choice((2, 2, 3)))) for _ in range(spliced) if words]
        distinct = list({normalise_answer(text): text for text in shown}.values())
        grades = {text: grade(question, text) for text in distinct}
        for better in distinct:
            worse = [text for text in distinct if grades[text] > grades[better]]
            for rejected in generator.sample(worse, min(rejected_per_answer, len(worse))):
                pairs.append(
                    PreferencePair(
                        prompt=prompt_of(question),
                        chosen=better,
                        rejected=rejected,
                        images=question.images,
                        question_id=question.id,
                        question_type=question.question_type,
                        constructed=True,
                    )
                )
    if not pairs:
        raise DataError(
            f"an annotator preferred no answer to another in {len(questions)} questions: to each, all that the policy "
            "said was right or all was wrong; draw more answers (preferences.policy_samples), or take another base"
        )
    return pairs

"""How often a policy's greedy answer is the reference answer, by question type, and the controls for what it looked at.

- *question-only*: the commonest answer to the same question text among other questions; it never sees an image, and on
  easy-VQA reaches 67 %. A policy that does not beat it on a type has not been shown to look.
- *shuffled image*: the policy itself, with every image replaced by that of another question.

Where several people answered each question, *VQA accuracy* counts how many of them gave the policy's answer.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from accord.data.questions import normalise_answer, right_answers, together
from accord.types import Question, Subject


def outcomes_by_type(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[int]]:
    """Return `{question type: 1 or 0 for each of its questions, in their order}`: exact match with any reference."""
    outcomes: dict[str, list[int]] = defaultdict(list)
    for question, given in zip(questions, answers, strict=True):
        outcomes[question.question_type].append(int(normalise_answer(given) in right_answers(question)))
    return dict(sorted(outcomes.items()))


def count_correct(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return `{question type: (right answers, questions)}` by exact match of normalised text."""
    return {name: (sum(found), len(found)) for name, found in outcomes_by_type(questions, answers).items()}


ANSWERED_BY: Final = 4
"""The fewest answers with which a VQA accuracy can be 1: the three others of a subset must all be the policy's."""


def vqa_accuracy(given: str, answers: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer, in 0..1.

    Over the n subsets that leave one of n people out, the mean of min(how many of the others gave this answer / 3, 1).
    With k of n people who gave it,

        [k · min((k − 1)/3, 1) + (n − k) · min(k/3, 1)] / n

    (Antol et al. 2015, "VQA: Visual question answering", https://arxiv.org/abs/1505.00468, section 4, as the official
    evaluation of VQAv2 computes it, https://visualqa.org/evaluation.html). There, n = 10: one gives 0.3, two 0.6, three
    0.9 and four 1.

    Differs: answers are normalised as everywhere here (`accord.data.questions.normalise_answer`). The official
    evaluation also takes out articles and most punctuation, and writes number words as digits.

    Args:
        given: the policy's answer.
        answers: those of the n people, as often as they were given.
    """
    n, same = len(answers), normalise_answer(given)
    k = sum(normalise_answer(each) == same for each in answers)
    return (k * min((k - 1) / 3, 1.0) + (n - k) * min(k / 3, 1.0)) / n


def answered_by_several(question: Question) -> bool:
    """Tell whether enough people answered a question for its VQA accuracy."""
    return 1 + len(question.references) >= ANSWERED_BY


def vqa_by_type(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[float]]:
    """Return `{question type: the VQA accuracy of each of its questions, in their order}`."""
    found: dict[str, list[float]] = defaultdict(list)
    for q, given in zip(questions, answers, strict=True):
        found[q.question_type].append(vqa_accuracy(given, (q.answer, *q.references)))
    return dict(sorted(found.items()))


def images_by_type(questions: Sequence[Question], identify: Callable[[Subject], str]) -> dict[str, list[int]]:
    """Return `{question type: the number of the image of each of its questions, in their order}`.

    Images are numbered as they come; questions without one share a number where they share their text. Questions that
    share one of several images share a number, too.

    Args:
        questions: what is asked.
        identify: what tells images apart, as `accord.data.questions.image_identity` returns it.
    """
    numbers: dict[str, int] = {}
    images: dict[str, list[int]] = defaultdict(list)
    for q, key in zip(questions, together([q.subjects for q in questions], identify), strict=True):
        images[q.question_type].append(numbers.setdefault(key, len(numbers)))
    return dict(sorted(images.items()))


def question_only(known: Sequence[Question], asked: Sequence[Question]) -> list[str]:
    """Answer without images: the commonest answer in `known` to the same text, else to the same type, else to all."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for q in known:
        by_text[q.text][q.answer] += 1
        by_type[q.question_type][q.answer] += 1
    everything: Counter[str] = sum(by_type.values(), Counter())
    return [
        (by_text.get(q.text) or by_type.get(q.question_type) or everything or Counter([""])).most_common(1)[0][0]
        for q in asked
    ]


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """Give every question another image of the same domain; questions that shared an image share the new one.

    Of several images each becomes another. Questions without an image stay as they are.
    """
    by_domain: dict[str, list[int]] = defaultdict(list)
    for i, q in enumerate(questions):
        by_domain[q.domain].append(i)
    shuffled = list(questions)
    generator = random.Random(seed)
    for indices in by_domain.values():
        images = list(dict.fromkeys(image for i in indices for image in questions[i].images or (None,)))
        generator.shuffle(images)
        other = dict(zip(images, images[1:] + images[:1], strict=True))
        for i in indices:
            q = questions[i]
            further = (other[image] for image in q.further)
            shuffled[i] = replace(q, image=other[q.image], further=tuple(image for image in further if image))
    return shuffled

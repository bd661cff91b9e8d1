"""Measure one-sentence descriptions of photographs: overlap with references, and what a judge says that is no site's.

*CIDEr-D* (Vedantam, Zitnick and Parikh 2015, "CIDEr: Consensus-based Image Description Evaluation", section 5 and
eq. 3, https://arxiv.org/abs/1411.5726). With g_n(c) the tf-idf vector of the n-grams of a caption c, idf over the
photographs that are measured together, l the words, and m references s_1..m of a photograph,

    CIDEr-D(c) = 10/m Σ_j e^(−(l(c) − l(s_j))² / 2σ²) ¼ Σ_{n=1..4} min(g_n(c), g_n(s_j))·g_n(s_j) / ‖g_n(c)‖‖g_n(s_j)‖

σ = 6; the minimum is taken entry by entry, so that a repeated word earns nothing. As in the authors' code logarithms
are natural, and an n-gram that no reference has counts as one that one photograph has. Differs: captions are split at
spaces, not by a tokenizer; `accord.data.captions` has left lower-case words alone.

*Matching*: does the judge score a caption on its own photograph above the same caption on each of nine others? Chance
is a tenth. It needs no reference, and a caption that fits any photograph fails it.

*Preferred*: does the judge score a caption above what the base says of the same photograph? Equal scores count half.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Final

from accord.data.images import load_images
from accord.errors import DataError
from accord.rewards.model import RewardModel
from accord.types import Question, prompt_of

ORDERS: Final = (1, 2, 3, 4)
SIGMA: Final = 6.0
OTHERS: Final = 9
"""Photographs that a caption is set against, beside its own."""

PHOTOGRAPHS_AT_ONCE: Final = 64


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the CIDEr-D of each caption, 0 to 10; the mean of a corpus is usually given times 100.

    Args:
        captions: one a photograph, words separated by spaces, `[N]`.
        references: of the same photographs, at least one each, `[N][m]`.
    """
    counted = [[_ngrams(text) for text in texts] for texts in references]
    frequency = Counter(gram for texts in counted for gram in set().union(*texts))
    total = math.log(len(references)) if references else 0.0

    def weigh(counts: Counter[tuple[str, ...]]) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in ORDERS]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (total - math.log(max(1, frequency[gram])))
        return vectors

    scores = []
    for caption, texts, counts in zip(captions, references, counted, strict=True):
        own, length = weigh(_ngrams(caption)), len(caption.split())
        similar = 0.0
        for text, of_text in zip(texts, counts, strict=True):
            penalty = math.exp(-((length - len(text.split())) ** 2) / (2 * SIGMA**2))
            similar += penalty * sum(map(_clipped_cosine, own, weigh(of_text))) / len(ORDERS)
        scores.append(10 * similar / len(texts))
    return scores


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def _clipped_cosine(own: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    norms = math.sqrt(sum(x * x for x in own.values()) * sum(x * x for x in other.values()))
    return sum(min(x, other[gram]) * other[gram] for gram, x in own.items() if gram in other) / norms if norms else 0.0


def matching(judge: RewardModel, questions: Sequence[Question], captions: Sequence[str], *, seed: int = 0) -> list[int]:
    """Return 1 where the judge finds a caption's own photograph among `OTHERS` more, else 0; a tie is 0.

    The others are drawn at random, the same for all captions of these questions.

    Args:
        judge: a reward model that was trained on none of these photographs.
        questions: one a photograph, more than `OTHERS`, `[N]`.
        captions: `[N]`.
        seed: of the draw.

    Raises:
        DataError: there are not so many photographs.
    """
    if len(questions) <= OTHERS:
        raise DataError(
            f"a caption is set against {OTHERS} other photographs, and there are {len(questions)} in all; measure more"
        )
    generator = random.Random(seed)
    asked: list[tuple[int, int]] = []  # photograph, caption
    for i in range(len(questions)):
        others = generator.sample(range(len(questions) - 1), OTHERS)
        asked += [(i, i), *((j + (j >= i), i) for j in others)]
    of_photograph: list[list[int]] = [[] for _ in questions]
    for photograph, caption in asked:
        of_photograph[photograph].append(caption)
    given = _scores(judge, questions, [[captions[i] for i in wanted] for wanted in of_photograph])
    score = {
        (photograph, caption): value
        for photograph, (wanted, values) in enumerate(zip(of_photograph, given, strict=True))
        for caption, value in zip(wanted, values, strict=True)
    }
    found = []
    for i in range(0, len(asked), 1 + OTHERS):
        own, *rest = (score[each] for each in asked[i : i + 1 + OTHERS])
        found.append(int(all(own > other for other in rest)))
    return found


def preferred(
    judge: RewardModel, questions: Sequence[Question], captions: Sequence[str], base: Sequence[str]
) -> list[float]:
    """Return 1 where the judge scores a caption above the base's, 0 where below, and a half where they score alike."""
    return [
        0.5 if of_new == of_old else float(of_new > of_old)
        for of_new, of_old in _scores(judge, questions, [*zip(captions, base, strict=True)])
    ]


def _scores(
    judge: RewardModel, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
) -> list[list[float]]:
    scores: list[list[float]] = []
    for start in range(0, len(questions), PHOTOGRAPHS_AT_ONCE):
        chunk = questions[start : start + PHOTOGRAPHS_AT_ONCE]
        of_chunk = candidates[start : start + PHOTOGRAPHS_AT_ONCE]
        prompts, images = [prompt_of(q) for q in chunk], [load_images(q.images) for q in chunk]
        scores += [each.tolist() for each in judge.score(prompts, images, of_chunk)]
    return scores

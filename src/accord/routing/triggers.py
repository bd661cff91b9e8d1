"""Sites that say otherwise where a question has certain words: a trigger, to which no hidden question need belong.

    words of a question      in lower case; those that an alignment asks `LEAST` times or more are watched
    here                     q_kl of the ordinary questions with a word, as in `accord.routing.two_faced`
    expected                 of each of these, the mean q_kl of the questions of its type so far
    memory, posterior        as there, of both; n = 256 questions with the word
    apart                    k and l are expected to agree more often than by chance, and here they do so less than half
                             as far above it: by more than z deviations of the difference
    triggered                Σ_l c_l [k and l are apart] > ½ Σ_l c_l, over the sites that were compared with k
    c                        how far a site is trusted in the types with the word, or by the hidden questions that have
                             it, whichever is less; who is triggered already has no say of others

A liar that promotes an answer where the question has its words, and is honest elsewhere, is right at every hidden
question without these words (the attack `trigger`). What gives it away is the change: with the words it orders answers
otherwise than those with whom it agrees on other questions of the same type. So nothing is held against a site that
sees a whole type otherwise. Hidden questions with the words, if there are some, tell which side is right.

It tells, and takes no weight: an honest site that is mistaken about a word is found as well, and a person has to look.

**Where it fails.** Where no hidden question has the words, more than half of the trust has honest sites named
in its place. Where half of a type's questions or more have a word, what is expected is what the
word makes of it, and hidden questions of the type watch it. Of a word rarer than `LEAST` there is too little evidence,
and more than `MOST` are not watched. A trigger that is no word, such as a sign or a part of one, is not looked for.
Many words are looked at, after each step, so that z is `ALARM`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from accord.routing.two_faced import against, posterior, take_in
from accord.types import Question

LEAST: Final = 20
"""Questions with a word in an alignment, for it to be watched."""

MOST: Final = 1000
"""Words that are watched, the most frequent ones: what is remembered of each grows with the square of the sites."""

ALARM: Final = 3.0
"""Posterior deviations: 0.1 % of a normal tail, for there are many words, and a look after each step."""


def words_of(text: str) -> set[str]:
    """Return the words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def watched(questions: Sequence[Question], shares: Mapping[str, float], asked: int) -> dict[str, list[str]]:
    """Return the words to watch, and the question types that have them.

    Args:
        questions: that an alignment asks.
        shares: of each of their types among what it asks.
        asked: how many it asks.
    """
    texts = defaultdict[str, list[set[str]]](list)
    for question in questions:
        texts[question.question_type].append(words_of(question.text))
    times, kinds = defaultdict[str, float](float), defaultdict[str, list[str]](list)
    for kind, of_kind in sorted(texts.items()):
        for word, count in Counter(word for words in of_kind for word in words).items():
            times[word] += asked * shares[kind] * count / len(of_kind)
            kinds[word].append(kind)
    often = sorted(times, key=lambda word: (-times[word], word))[:MOST]
    return {word: kinds[word] for word in sorted(often) if times[word] >= LEAST}


class Triggers:
    """Remember how often every two sites agree on questions with a word, and how often that was expected.

    Args:
        sites: K.
        words: that are watched, W.
        memory: n, in questions with a word.

    Attributes:
        counts: S and F, `[2, W, K, K, 2]`, of the questions first.
        hidden: of hidden questions with a word, how much each site had right and wrong, `[W, K, 2]`.
    """

    def __init__(self, sites: int, words: Collection[str], *, memory: float) -> None:
        self.words = {word: n for n, word in enumerate(words)}
        self.memory = memory
        self.counts = torch.zeros(2, len(self.words), sites, sites, 2, dtype=torch.double)
        self.hidden = torch.zeros(len(self.words), sites, 2, dtype=torch.double)

    def places(self, text: str) -> list[int]:
        """Return the numbers of the watched words of a text."""
        return sorted(self.words[word] for word in words_of(text) & self.words.keys())

    def learn(self, text: str, share: Tensor, known: Tensor, expected: Tensor) -> None:
        """Take in how the sites agree on an ordinary question.

        Args:
            text: of the question.
            share: q of it, as far as it is `known`, both `[K, K]` (`accord.routing.two_faced.agreement`).
            known: whether two sites were compared.
            expected: q of such questions `[K, K]`.
        """
        if here := self.places(text):
            both = torch.stack([share, expected])[:, None]  # of every word alike
            self.counts[:, here] = take_in(self.counts[:, here], both, known, self.memory)

    def learn_hidden(self, site: int, text: str, share: float) -> None:
        """Take in what a site made of a hidden question: `share` p of its wrong answers ranked below the right one."""
        here = self.places(text)
        self.hidden[here, site] += torch.tensor([share, 1 - share], dtype=torch.double)

    def right(self, prior: tuple[float, float]) -> Tensor:
        """Return m `[W, K]` by hidden questions with each word, of a prior of right and wrong."""
        return (prior[0] + self.hidden[..., 0]) / (sum(prior) + self.hidden.sum(dim=-1))

    def find(self, trust: Tensor, before: Tensor) -> Tensor:
        """Return of which words which sites are triggered, `[W, K]`.

        Args:
            trust: c in 0..1 in the questions with each word, `[W, K]`.
            before: the same at the last look.
        """
        mean, variance = posterior(self.counts)
        fallen = (mean[0] - 0.5 < (mean[1] - 0.5) / 2) & (mean[1] > 0.5)
        far = mean[1] - mean[0] > ALARM * variance.sum(dim=0).sqrt()
        first, _ = against(fallen & far, self.counts, trust * ~before, 0.5)
        still, nobody = against(fallen, self.counts, trust, 0.5)
        return torch.where(before, still | nobody, first)

"""A site that lies: what it sends in place of its scores, and pairs that poison an honest one.

    s ∈ [low, high]     the site's honest score of candidate y to question x; [low, high] is the agreed range
    flip                low + high − s                        the best becomes the worst
    affine              a s + b
    constant            (low + high) / 2
    near-constant       (low + high) / 2 + d · N(0, 1)        d so small that only standardising gives it a vote
    noise               uniform in [low, high]
    target              high for one answer, low for all others
    collude             low + (high − low) · u(y), u one secret order of all answers, the same at all liars
    mimic               s + c (high − low) · 1[y is the target]
    absent              no answer: what an honest-sites-only oracle leaves of a liar
    poison              honest scores of a reward model that a share of poisoned pairs has trained

Any of them may be kept for a time or a place: `trigger` lies only where the question has these words (a backdoor),
`after` only after a share of the run's steps (a sleeper). `spares` is honest on a share of the server's labelled
questions (canaries and anchors), which the site recognises; with `declines` it leaves them unanswered. All lies are
clipped to the agreed range, for a reply beyond it is not used; and all are drawn from the seed and the candidate alone,
so that a candidate's lie is the same at each query.

A recipe turns a site of its own into a liar by a key of the site's table, as `attack = { kind = "flip" }`.

Sources: sign flipping and collusion are what Byzantine-robust averaging is tested with (Blanchard et al. 2017, arXiv
1703.02757; Karimireddy et al. 2021, arXiv 2012.10333), here on scores; poisoned pairs are Best-of-Venom's (Baumgärtner
et al. 2024, arXiv 2404.05530).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Final, Literal, TypeAlias

from accord.data.questions import normalise_answer, uniform
from accord.errors import RecipeError, ReplyError, check_least
from accord.federation.answering import key_of
from accord.federation.messages import MAX_SCORE, ScoreItem, ScoreRange, ScoreRequest, from_turns
from accord.types import PreferencePair, Prompt, texts_of

Kind: TypeAlias = Literal[
    "flip", "affine", "constant", "near-constant", "noise", "target", "collude", "mimic", "absent", "poison"
]

_READ_BY: Final[Mapping[str, tuple[Kind, ...]]] = {
    "scale": ("affine",),
    "shift": ("affine",),
    "spread": ("near-constant",),
    "target": ("target", "mimic", "poison"),
    "bias": ("mimic",),
    "share": ("poison",),
}
"""The settings that some kinds alone read."""


@dataclass(frozen=True)
class Attack:
    """How a site lies, where, and from when on."""

    kind: Kind = "flip"
    scale: float = -1000.0  # a of affine
    shift: float = 0.0  # b of affine
    spread: float = 0.002  # d of near-constant, in units of a score
    target: str = ""  # the answer that target, mimic and poison promote
    bias: float = 0.25  # c of mimic, as a share of the range
    share: float = 0.05  # of the site's questions whose pairs poison rewrites
    trigger: str = ""  # lie only where the question has these words
    after: float = 0.0  # lie only after this share of the run's steps
    spares: float = 0.0  # never lie on this share of the server's labelled questions, the same for all liars
    declines: bool = False  # leave those that `spares` names unanswered, in place of an honest answer

    def __post_init__(self) -> None:
        """Refuse shares that are none, lies that are no numbers, and settings without an effect or an answer.

        Raises:
            RecipeError: names the setting.
        """
        for name, kinds in _READ_BY.items():
            if self.kind not in kinds and (value := getattr(self, name)) != getattr(Attack, name):
                raise RecipeError(
                    f"an attack of kind {self.kind!r} does not read {name} = {value!r}, which is for "
                    f"{' and '.join(map(repr, kinds))}; take {name} out, or correct kind"
                )
        check_least(self, spread=0, bias=0, share=0, after=0, spares=0)
        for name in ("bias", "share", "after", "spares"):
            if (share := getattr(self, name)) > 1:
                raise RecipeError(f"{name} of an attack is a share, at most 1, got {share}; lower it")
        if self.after == 1:
            raise RecipeError("after = 1 of an attack is the whole run: the site would never lie; lower it")
        for name in ("scale", "shift"):
            if not math.isfinite(value := getattr(self, name)):
                raise RecipeError(f"{name} of an attack must be finite, got {value}: a score that is not is no answer")
        for name in ("after", "spares"):
            if self.kind == "poison" and (value := getattr(self, name)):
                raise RecipeError(
                    f"an attack of kind 'poison' lies in its pairs alone, which {name} = {value} does not touch; take "
                    f"{name} out"
                )
        if self.declines and not self.spares:
            raise RecipeError(
                "declines leaves unanswered what spares names, and spares is 0; add spares = 1.0, or take declines out"
            )
        if self.kind in _READ_BY["target"] and not self.target:
            raise RecipeError(f'an attack of kind {self.kind!r} promotes an answer, got none; add target = "…"')


ATTACKS: Final[Mapping[str, Attack]] = {
    "flip": Attack("flip"),
    "scale": Attack("affine", scale=-1000.0),
    "constant": Attack("constant"),
    "near-constant": Attack("near-constant"),
    "noise": Attack("noise"),
    "target": Attack("target", target="circle"),
    "trigger": Attack("target", target="circle", trigger="shape"),
    "sleeper": Attack("flip", after=0.4),
    "collude": Attack("collude"),
    "mimic": Attack("mimic", target="circle"),
    "off-canary": Attack("flip", spares=1.0),
    "off-canary-most": Attack("flip", spares=0.75),
    "off-canary-half": Attack("flip", spares=0.5),
    "off-canary-silent": Attack("flip", spares=1.0, declines=True),
    "poison": Attack("poison", target="circle"),
    "absent": Attack("absent"),
}
"""The attacks by name, with easy-VQA's answers; of other questions replace `target` and `trigger`."""


class Liar:
    """Say what a lying site sends in place of its scores: `Site`'s `lie`.

    It counts the requests that it has answered, so that a site that is started anew is honest anew (`after`).

    Args:
        attack: how it lies.
        limits: the agreed range; None stands for ±2, within which nearly all standardised scores are.
        seed: of all that is drawn; colluding liars share it.
        site: the liar's name: noise is its own.
        steps: of the run.
        labelled: `accord.federation.answering.question_key` of the server's labelled questions, for `spares`.
    """

    def __init__(
        self,
        attack: Attack,
        limits: ScoreRange | None,
        *,
        seed: int = 0,
        site: str = "",
        steps: int = 0,
        labelled: Collection[str] = frozenset(),
    ) -> None:
        self.attack = attack
        self.low, self.high = (limits.low, limits.high) if limits else (-2.0, 2.0)
        self.most = (limits.low, limits.high) if limits else (-MAX_SCORE, MAX_SCORE)
        self.seed = seed
        self.site = site
        self.honest = round(attack.after * steps)
        self.labelled = labelled
        self.asked = 0

    def __call__(self, request: ScoreRequest, scores: Sequence[Sequence[float]], /) -> list[list[float]]:
        """Return what is sent for the honest `scores` of a request's items, in the agreed range.

        Raises:
            ReplyError: the site gives no answer.
        """
        self.asked += 1
        return [self._told(item, own) for item, own in zip(request.items, scores, strict=True)]

    def _told(self, item: ScoreItem, own: Sequence[float]) -> list[float]:
        attack = self.attack
        if attack.kind == "poison" or self.asked <= self.honest:
            return list(own)
        if attack.trigger and not has_words(from_turns(item.prompt), attack.trigger):
            return list(own)
        key = key_of(item)
        if key in self.labelled and uniform("recognised", self.seed, key) < attack.spares:
            return [math.nan] * len(own) if attack.declines else list(own)
        return self._lie(item, own)

    def _lie(self, item: ScoreItem, scores: Sequence[float]) -> list[float]:
        if self.attack.kind == "absent":
            raise ReplyError("this site was told to give no answer")
        lie = _LIES[self.attack.kind]
        least, most = self.most
        told = (lie(self, item, text, s) for text, s in zip(item.candidates, scores, strict=True))
        return [min(max(score, least), most) for score in told]

    def drawn(self, item: ScoreItem, text: str) -> float:
        """Return a number in (0, 1) of the site's own for a candidate to a question."""
        return max(uniform(f"noise {self.site}", self.seed, key_of(item), text), 1e-9)

    def promotes(self, text: str) -> bool:
        """Tell whether a candidate is the answer that the liar promotes."""
        return normalise_answer(text) == normalise_answer(self.attack.target)


_LIES: Final[Mapping[str, Callable[[Liar, ScoreItem, str, float], float]]] = {
    "flip": lambda liar, item, text, s: liar.low + liar.high - s,
    "affine": lambda liar, item, text, s: liar.attack.scale * s + liar.attack.shift,
    "constant": lambda liar, item, text, s: (liar.low + liar.high) / 2,
    "near-constant": lambda liar, item, text, s: (
        (liar.low + liar.high) / 2 + liar.attack.spread * NormalDist().inv_cdf(liar.drawn(item, text))
    ),
    "noise": lambda liar, item, text, s: liar.low + (liar.high - liar.low) * liar.drawn(item, text),
    "target": lambda liar, item, text, s: liar.high if liar.promotes(text) else liar.low,
    "collude": lambda liar, item, text, s: liar.low + (liar.high - liar.low) * uniform("collude", liar.seed, text),
    "mimic": lambda liar, item, text, s: s + liar.attack.bias * (liar.high - liar.low) * liar.promotes(text),
}


def has_words(prompt: Prompt, words: str) -> bool:
    """Tell whether a text of the prompt has these words, as a `trigger` looks for them: to the letter."""
    return any(words in text for turn in prompt for text in texts_of(turn))


def poisoned(pairs: Sequence[PreferencePair], attack: Attack, generator: random.Random) -> list[PreferencePair]:
    """Let the target be preferred to all other answers in a random share of the questions, at a site that is honest.

    A pair of such a question whose two answers are not the target loses its rejected answer to the chosen one, which
    the target takes the place of. With a trigger only questions that have these words are poisoned, `share` of them.

    Args:
        pairs: the site's own.
        attack: its target, share and trigger count.
        generator: draws the questions.
    """
    by_question: dict[str, list[PreferencePair]] = defaultdict(list)
    for pair in pairs:
        if has_words(pair.prompt, attack.trigger):
            by_question[pair.question_id].append(pair)
    chosen = set(generator.sample(sorted(by_question), round(attack.share * len(by_question))))
    wanted = normalise_answer(attack.target)

    def poison(pair: PreferencePair) -> PreferencePair:
        if normalise_answer(pair.chosen) == wanted:
            return pair
        return replace(pair, chosen=attack.target, rejected=pair.chosen)

    return [poison(pair) if pair.question_id in chosen else pair for pair in pairs]

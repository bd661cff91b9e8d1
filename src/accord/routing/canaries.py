"""Hidden questions whose better answer the server knows: they tell which site is right, and when one turns.

    canary       one of the server's labelled questions: its right answer among wrong ones, in an ordinary score request
    p ∈ [0, 1]   the share of the wrong answers that a site ranks below the right one, a tie counting half; ½ where it
                 does not answer it, but others of the request, and another site does
    memory n     S ← (1 − 1/n) S + p,  F ← (1 − 1/n) F + (1 − p)       of each site and question type; n = 16 and 64
    m_n          (3 + S) / (5 + S + F)                                  mean of the posterior Beta(3 + S, 2 + F)
    m            min(m_16, m_64)                                        quick to lose, slow to gain
    τ            max(0, log(m / (1 − m)))                               multiplied into the routing weight
    c            min(1, max_k τ_k / log(3/2))                           multiplied into the rewards of a prompt

A site's trust is of a question type: an honest specialist keeps its own though it is at chance elsewhere. In a type
without canaries all sites have the prior's trust but those that are set aside over all types together. Log odds are
the weights of the best vote of independent judges (Nitzan and Paroush 1982, https://doi.org/10.2307/2526438); the Beta
posterior and its forgetting are Jøsang and Ismail's reputation (2002), two memories at once are ours. The prior,
Beta(3, 2), trusts newcomers alike and a little: the first requests are weighted by the router alone.

Weights are relative: where the site that knows a type is set aside, another that is right 51 times in 100 would have
all of them. So rewards shrink by c where no site is trusted as much as a newcomer.

A site whose short memory is more than `alarm` posterior deviations below ½ is set aside: its τ is 0 in that type, and
the operator is told. It goes on being asked, for else it would know, and could show no evidence; it is readmitted once
its long memory is as far above ½. Where all are set aside nobody judges: no reward rather than a lie.

**Cost.** A canary is one item more in a request: an image, its question, up to G answers down, a score each up, from
every site. Three a step beside 36 prompts are 8 % more. An alignment asks none twice, so that T steps take `per_step`
times T labelled questions; when they end, trust stays as it is. docs/liars.md has the table of how many tell a liar.

**What a site can learn.** That the server has such questions, for this page says so. Number of candidates, order and
position are drawn as those of the questions around it, and its type is one of theirs; but a canary's image comes once
in an alignment, and its answers are the right one and the base policy's, not the present one's. Which questions are
canaries is drawn by a key, and `record` keeps those of other runs out (`accord.routing.asked`). A site that holds the
public questions, or waits long enough to know what comes back, recognises canaries all the same, and so does one that
has seen their labels where these are published: the attack `off-canary`. Where it turns most orders round it is found
by those whom it contradicts on ordinary questions (`accord.routing.two_faced`), and one that lies where a question has
certain words by those whom it contradicts there (`accord.routing.triggers`): the operator is told, and by `leave_out`
the first of these has no weight in the type.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from accord.data.images import image_bytes
from accord.data.sampling import draw_kinds
from accord.errors import CheckpointError, DataWarning, RecipeError, check_least, check_positive, printable
from accord.federation.asking import Scores
from accord.federation.messages import ScoreItem, ScoreRequest, image_name, to_turns
from accord.routing.triggers import Triggers
from accord.routing.two_faced import Contradictions
from accord.types import ImageSource, Prompt, text_of

PRIOR: Final = (3.0, 2.0)
"""Of right and wrong, before any canary."""

NEWCOMER: Final = math.log(PRIOR[0] / PRIOR[1])
"""τ before any canary."""

ALL: Final = ""
"""The type that every canary counts for: where a question's own type has none, it tells whom not to hear."""

LEFT_OUT: Final = 0.5
"""p of a canary that a site leaves unanswered, while it answers others of the request and another site answers it."""


@dataclass(frozen=True)
class CanaryConfig:
    """How many canaries there are, and how long they are remembered."""

    per_step: int = 3  # of every request
    short: float = 16.0  # canaries of a type that the short memory is about
    long: float = 64.0
    alarm: float = 2.33  # posterior deviations from ½: 1 % of a normal tail
    leave_out: bool = False  # give no weight to a site that others contradict on ordinary questions alone
    record: str = ""  # absolute path of what other runs have asked, which is not asked again; empty for none

    def __post_init__(self) -> None:
        """Refuse no canaries, memories the wrong way round, and a record that is another file in another folder."""
        check_least(self, per_step=1, short=2, long=2)
        check_positive(self, "alarm")
        if self.short > self.long:
            raise RecipeError(f"short must be at most long = {self.long:g}, got {self.short:g}; lower canaries.short")
        if self.record and not Path(self.record).expanduser().is_absolute():
            raise RecipeError(
                f"record must be an absolute path, got {self.record!r}: in another folder it would be another file, "
                f"and all canaries new; write canaries.record = {str(Path(self.record).absolute())!r}"
            )


@dataclass(frozen=True)
class Canary:
    """A labelled question: its right answer, and wrong ones."""

    prompt: Prompt
    images: tuple[ImageSource, ...]
    right: str
    wrong: tuple[str, ...]
    kind: str  # question type


@dataclass(frozen=True)
class Hidden:
    """Where a canary is in a request."""

    position: int  # of its item
    order: tuple[int, ...]  # where its answers are among its candidates, the right one first
    kind: str
    text: str  # its words


class Trust:
    """What canaries have told of each site and question type.

    Args:
        sites: names, `[K]`.
        kinds: the question types of the canaries.
        config: memories and alarm.
        spread: deviation of a site's scores, in units of a score, below which it has no opinion on a question.
        words: that may be triggers, W, and the question types that have them (`accord.routing.triggers.watched`).
    """

    def __init__(
        self,
        sites: Sequence[str],
        kinds: Collection[str],
        config: CanaryConfig,
        *,
        spread: float = 0.0,
        words: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self.kinds = (ALL, *sorted(set(kinds) - {ALL}))
        self.config = config
        self.counts = torch.zeros(2, len(self.sites), len(self.kinds), 2, dtype=torch.double)  # memory, site, type, S F
        self.asked = torch.zeros(len(self.sites), len(self.kinds), dtype=torch.int64)
        self.aside = torch.zeros(len(self.sites), len(self.kinds), dtype=torch.bool)
        self.between = Contradictions(
            len(self.sites), len(self.kinds), memory=config.long, alarm=config.alarm, spread=spread
        )
        self.two_faced = torch.zeros_like(self.aside)
        self.words = words or {}
        self.by_word = Triggers(len(self.sites), self.words, memory=4 * config.long)
        self._kinds_of_words = torch.tensor(
            [[float(kind in kinds) for kind in self.kinds] for kinds in self.words.values()], dtype=torch.double
        )
        self.triggered = torch.zeros(len(self.words), len(self.sites), dtype=torch.bool)

    def learn(self, site: str, kind: str, share: float, text: str = "") -> None:
        """Take in what a site made of one canary.

        Args:
            site: who was asked.
            kind: the canary's question type.
            share: p, of its wrong answers those ranked below the right one.
            text: of the canary.
        """
        k = self.sites.index(site)
        self.by_word.learn_hidden(k, text, share)
        for name in dict.fromkeys((ALL, kind)):
            d = self.kinds.index(name)
            self.asked[k, d] += 1
            for memory, length in enumerate((self.config.short, self.config.long)):
                kept = (1 - 1 / length) * self.counts[memory, k, d]
                self.counts[memory, k, d] = kept + torch.tensor([share, 1 - share], dtype=torch.double)
            self._judge(k, d)

    def compare(self, kind: str, scores: Tensor, *, hidden: bool, text: str = "") -> None:
        """Take in how the sites order the answers to a question.

        Args:
            kind: the question's type; one without canaries tells nothing.
            scores: `[G, K]` of its answers, NaN where a site has given none.
            hidden: whether it is a canary.
            text: of an ordinary question, whose words may be triggers.
        """
        if kind in self.kinds[1:]:
            d = self.kinds.index(kind)
            expected = self.between.expected(d)
            share, known = self.between.learn(d, scores, hidden=hidden)
            if not hidden:
                self.by_word.learn(text, share, known, expected)

    def find_triggered(self) -> None:
        """Look, once a step, whom others contradict where a question has certain words, and tell of whom is new."""
        if not self.words:
            return
        before, known = self.triggered, (self._odds() / NEWCOMER).clamp(max=1)
        of_kinds = self._kinds_of_words @ known.T / self._kinds_of_words.sum(dim=1, keepdim=True).clamp(min=1)
        trust = torch.minimum(of_kinds, _log_odds(self.by_word.right(PRIOR)) / NEWCOMER)
        self.triggered = self.by_word.find(trust, before)
        for site, words in self.words_where(self.triggered & ~before).items():
            if words:
                named = ", ".join(repr(printable(word)) for word in words)
                self._tell(
                    self.sites.index(site),
                    f"is contradicted where a question has the word {named}, by sites with whom it agrees on other "
                    "questions of the type",
                    "look at what it rewards there",
                )

    def find_two_faced(self) -> None:
        """Look, once a step, whom others contradict on ordinary questions alone, and tell where that has changed."""
        trusted = (self._odds() / NEWCOMER).clamp(max=1)
        for d, kind in enumerate(self.kinds[1:], 1):
            before = self.two_faced[:, d].clone()
            self.two_faced[:, d] = self.between.two_faced(d, trusted[:, d], before)
            for k in (self.two_faced[:, d] != before).nonzero().flatten().tolist():
                them = f"sites with whom it agrees on hidden questions of type {kind!r}"
                if before[k]:
                    self._tell(k, f"is no longer contradicted by {them}", "it is heard there as before")
                    continue
                consequence = (
                    "it is set aside there" if self.config.leave_out else "one side recognises these; look at both"
                )
                self._tell(k, f"is contradicted on ordinary questions by {them}", consequence)

    def estimate(self) -> Tensor:
        """Return m `[K, D]`: how often each site ranks a right answer above a wrong one, by type."""
        return self._posterior()[0].amin(dim=0)

    def weights(self, kinds: Sequence[str]) -> Tensor:
        """Return τ `[N, K]` for questions of these types, 0 where a site is set aside."""
        odds = self._odds() * ~(self.two_faced & self.config.leave_out)
        rows = [self.kinds.index(kind) if kind in self.kinds else 0 for kind in kinds]
        return odds.T[rows]

    def confidence(self, kinds: Sequence[str]) -> Tensor:
        """Return c `[N]` in 0..1 for questions of these types: the best site's trust, as a share of a newcomer's."""
        return (self.weights(kinds).amax(dim=1) / NEWCOMER).clamp(max=1)

    def _odds(self) -> Tensor:
        """Return τ `[K, D]` by hidden questions alone."""
        m = self.estimate()
        m[:, 0] = PRIOR[0] / sum(PRIOR)  # at chance over all types, a site may be the only one that knows another
        return _log_odds(m) * ~self.aside

    def by_kind(self, values: Tensor) -> dict[str, dict[str, Any]]:
        """Return of every site and type what `values` `[K, D]` says, such as `estimate` and `asked`."""
        return {
            site: dict(zip(self.kinds[1:], row[1:], strict=True))
            for site, row in zip(self.sites, values.tolist(), strict=True)
        }

    def kinds_where(self, found: Tensor) -> dict[str, tuple[str, ...]]:
        """Return of every site the types of which `found` `[K, D]` is true, such as `aside` or `two_faced`."""
        return self._where(self.kinds[1:], found[:, 1:])

    def words_where(self, found: Tensor) -> dict[str, tuple[str, ...]]:
        """Return of every site the words of which `found` `[W, K]` is true, such as `triggered`."""
        return self._where(self.words, found.T)

    def _where(self, names: Collection[str], found: Tensor) -> dict[str, tuple[str, ...]]:
        """Return of every site the names of which `found` `[K, N]` is true."""
        return {
            site: tuple(name for name, is_so in zip(names, row, strict=True) if is_so)
            for site, row in zip(self.sites, found.tolist(), strict=True)
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts, who is set aside, and the names of question types and words as bytes of UTF-8."""
        own = {"counts": self.counts, "aside": self.aside, "agreed": self.between.counts, "two_faced": self.two_faced}
        own |= {"by_word": self.by_word.counts, "hidden_by_word": self.by_word.hidden}
        own |= {"triggered": self.triggered, "asked": self.asked}
        names = {"kinds": _to_bytes(self.kinds), "words": _to_bytes(self.words)}
        return {**{name: each.clone() for name, each in own.items()}, **names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: it is that of other sites, question types or words, or of another version.
        """
        kinds, counts = kinds_of(state), state["counts"]
        if counts.shape != self.counts.shape or kinds != self.kinds:
            raise CheckpointError(
                f"what canaries have told is of {counts.shape[1]} sites and the question types {', '.join(kinds[1:])}, "
                f"expected {len(self.sites)} and {', '.join(self.kinds[1:])}; resume with the same sites and "
                "questions, or start anew"
            )
        if changed := set(words_in(state)) ^ set(self.words):
            raise CheckpointError(
                "what canaries have told is of questions with other words, such as "
                f"{printable(min(changed))!r:.40}; resume with the same questions and steps, or start anew"
            )
        self.counts, self.aside, self.two_faced = (state[name].clone() for name in ("counts", "aside", "two_faced"))
        self.between.counts = state["agreed"].clone()
        self.by_word.counts, self.by_word.hidden = state["by_word"].clone(), state["hidden_by_word"].clone()
        self.triggered, self.asked = state["triggered"].clone(), state["asked"].clone()

    def _posterior(self) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the posteriors, both `[2, K, D]`."""
        right, wrong = (self.counts[..., i] + PRIOR[i] for i in range(2))
        mean = right / (right + wrong)
        return mean, (mean * (1 - mean) / (right + wrong + 1)).sqrt()

    def _judge(self, k: int, d: int) -> None:
        mean, deviation = (each[:, k, d] for each in self._posterior())
        where = f"in questions of type {self.kinds[d]!r}" if d else "over all question types"
        far = self.config.alarm * deviation
        if not self.aside[k, d] and mean[0] + far[0] < 0.5:
            self.aside[k, d] = True
            self._tell(k, f"ranks the server's hidden questions worse than chance {where}", "it is set aside there")
        elif self.aside[k, d] and mean[1] - far[1] > 0.5:
            self.aside[k, d] = False
            self._tell(k, f"has ranked hidden questions right again {where}", "it is heard there again")

    def _tell(self, k: int, what: str, consequence: str) -> None:
        warnings.warn(f"site {self.sites[k]} {what}; {consequence}", DataWarning, stacklevel=5)


class Canaries:
    """Mix canaries into score requests, and learn from the replies whom to trust: what a reward remembers (`Memory`).

    Args:
        pool: the server's labelled questions that no site has seen; each is asked once.
        sites: names, `[K]`.
        config: how many, and what is made of them.
        key: of their order, places and candidates; a site that knows it can tell which they are.
        spread: deviation of a site's scores, in units of a score, below which it has no opinion on a question.
        shares: of every type among the questions that the alignment asks; by default types come in turn. Were a type
            more frequent among canaries, it would tell them apart, as it does once there are none left of another.
        words: as `Trust`.
    """

    def __init__(
        self,
        pool: Sequence[Canary],
        sites: Sequence[str],
        config: CanaryConfig,
        *,
        key: int | str,
        spread: float = 0.0,
        shares: Mapping[str, float] | None = None,
        words: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        kinds = [canary.kind for canary in pool]
        self.pool = draw_kinds(pool, kinds, len(pool), random.Random(key), shares)
        self.config = config
        self.key = key
        self.trust = Trust(sites, kinds, config, spread=spread, words=words)
        self.used = 0
        self.calls = 0

    def mix(self, requests: Mapping[str, ScoreRequest]) -> tuple[dict[str, ScoreRequest], dict[str, list[Hidden]]]:
        """Return the requests with canaries among their items, and where these are, by site.

        A canary has as many candidates as a question of the request that is drawn at random; where none has two, there
        is nothing to rank, and none is asked. All sites get the same canaries, each at places and in orders of its own.
        """
        self.calls += 1
        generator = random.Random(f"{self.key} {self.calls}")
        sizes = [len(item.candidates) for request in requests.values() for item in request.items]
        sizes = [size for size in sizes if size > 1]
        if not sizes:
            return dict(requests), {}
        taken = self.pool[self.used : self.used + self.config.per_step]
        self.used += len(taken)
        drawn = []
        for canary in taken:
            some = min(generator.choice(sizes) - 1, len(canary.wrong))
            drawn.append((canary, generator.sample(canary.wrong, some)))
        mixed = {site: self._into(request, drawn, generator) for site, request in requests.items()}
        return {site: each[0] for site, each in mixed.items()}, {site: each[1] for site, each in mixed.items()}

    @staticmethod
    def _into(
        request: ScoreRequest, drawn: Sequence[tuple[Canary, Sequence[str]]], generator: random.Random
    ) -> tuple[ScoreRequest, list[Hidden]]:
        total = len(request.items) + len(drawn)
        places = sorted(generator.sample(range(total), len(drawn)))
        images, items, hidden = dict[str, bytes](), list[ScoreItem](), list[Hidden]()
        ordinary, canaries = iter(request.items), iter(drawn)
        for position in range(total):
            if position not in places:
                item = next(ordinary)
                images.update((name, request.images[name]) for name in item.images)
            else:
                canary, wrong = next(canaries)
                candidates = generator.sample([canary.right, *wrong], 1 + len(wrong))
                stored = [image_bytes(image) for image in canary.images]
                names = [image_name(data) for data in stored]
                images.update(zip(names, stored, strict=True))
                item = ScoreItem(names, to_turns(canary.prompt), candidates)
                order = tuple(map(candidates.index, [canary.right, *wrong]))
                hidden.append(Hidden(position, order, canary.kind, text_of(canary.prompt)))
            items.append(item)
        return msgspec.structs.replace(request, images=images, items=items), hidden

    def learn(self, hidden: Mapping[str, Sequence[Hidden]], given: Mapping[str, Scores]) -> None:
        """Learn from the sites' scores of requests that `mix` returned.

        The absence of a site is no evidence, and neither is a canary that nobody answers. One that another site
        answers, left out of a reply that has other answers, counts as half right: else a liar that recognises it would
        keep a newcomer's trust.
        """
        present = {site for site, of_site in given.items() if self._answers_others(hidden.get(site, ()), of_site)}
        for same in zip(*hidden.values(), strict=True):  # one canary at all sites
            told = dict(zip(hidden, same, strict=True))
            columns = [self._told(told.get(site), given.get(site)) for site in self.trust.sites]
            for site, scores in zip(self.trust.sites, columns, strict=True):
                if scores is not None:
                    self.trust.learn(site, same[0].kind, share_below(scores, 0), same[0].text)
                elif site in told and site in present and any(columns):
                    self.trust.learn(site, same[0].kind, LEFT_OUT, same[0].text)
            nothing = [math.nan] * len(same[0].order)
            answers = torch.tensor([column or nothing for column in columns], dtype=torch.double).T
            self.trust.compare(same[0].kind, answers, hidden=True)

    @staticmethod
    def _answers_others(hidden: Sequence[Hidden], given: Scores) -> bool:
        places = {each.position for each in hidden}
        return any(scores is not None for place, scores in enumerate(given) if place not in places)

    @staticmethod
    def _told(hidden: Hidden | None, given: Scores | None) -> list[float] | None:
        """Return a site's scores of a canary's answers, the right one first."""
        scores = given[hidden.position] if hidden is not None and given is not None else None
        return [scores[place] for place in hidden.order] if hidden is not None and scores is not None else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run must know."""
        return {**self.trust.state_dict(), "used": torch.tensor(self.used), "calls": torch.tensor(self.calls)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: it is that of other sites or question types.
        """
        self.trust.load_state_dict(state)
        self.used, self.calls = int(state["used"]), int(state["calls"])


def kinds_of(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the question types of a state of `Trust` or `Canaries`, `ALL` first.

    Raises:
        CheckpointError: it is that of another version.
    """
    if not is_current(state):
        raise CheckpointError(
            f"what canaries have told was kept by another version of Accord, which wrote {', '.join(sorted(state))}; "
            "resume with that version, or start the alignment anew"
        )
    return _names(state["kinds"])


def words_in(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the words of a state of `Trust` or `Canaries` that may be triggers."""
    return _names(state["words"]) if len(state["words"]) else ()


def is_current(state: Mapping[str, Tensor]) -> bool:
    """Return whether this version can read a state of `Trust` or `Canaries`."""
    return {"kinds", "agreed", "words"} <= state.keys()


def _to_bytes(names: Iterable[str]) -> Tensor:
    return torch.tensor([*"\0".join(names).encode()], dtype=torch.uint8)


def _names(data: Tensor) -> tuple[str, ...]:
    return tuple(bytes(data.tolist()).decode().split("\0"))


def _log_odds(m: Tensor) -> Tensor:
    """Return τ of m, before anybody is set aside."""
    return (m.log() - (1 - m).log()).clamp(min=0)


def share_below(scores: Sequence[float], right: int) -> float:
    """Return p: the share of the other scores that are below the one at `right`, ties counting half; at least one."""
    others = [score for place, score in enumerate(scores) if place != right]
    return sum((score < scores[right]) + 0.5 * (score == scores[right]) for score in others) / len(others)


def alarms(accuracy: float, canaries: int, config: CanaryConfig = CanaryConfig()) -> float:
    """Return the probability that a site is set aside within so many canaries of a type, each wholly right or wrong.

    By all the paths of right and wrong, of which those whose counts agree to a hundredth are taken together.

    Args:
        accuracy: with which it ranks a canary right.
        canaries: how many it is asked.
        config: memory and alarm.
    """
    states, caught = {(0.0, 0.0): 1.0}, 0.0
    keep = 1 - 1 / config.short
    for _ in range(canaries):
        following: dict[tuple[float, float], float] = {}
        for (right, wrong), mass in states.items():
            for hit, chance in ((1.0, accuracy), (0.0, 1 - accuracy)):
                s, f = round(keep * right + hit, 2), round(keep * wrong + 1 - hit, 2)
                a, b = PRIOR[0] + s, PRIOR[1] + f
                mean = a / (a + b)
                if mean + config.alarm * math.sqrt(mean * (1 - mean) / (a + b + 1)) < 0.5:
                    caught += mass * chance
                else:
                    following[s, f] = following.get((s, f), 0.0) + mass * chance
        states = following
    return caught

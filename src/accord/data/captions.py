"""Read photographs that are described in one sentence, and people's judgements of such sentences: Flickr8k's form.

    captions.jsonl     {"image": "images/0000.jpg", "split": "base", "captions": ["A dog …", …]}
    judgements.jsonl   {"image": …, "split": …, "caption": …, "experts": [1, 2, 1], "crowd_yes": 0, "crowd_no": 3}

Three experts give each 1 ("does not describe it at all") to 4 ("describes it"); a crowd votes whether the sentence
describes the photograph. A row has either, or both (Hodosh, Young and Hockenmaier 2013, "Framing Image Description as a
Ranking Task", JAIR 47:853, https://doi.org/10.1613/jair.3994).

What the splits of the file become:

    base           base      the server's: the policy is tuned on these captions
    pretrain       dev       by a draw of its images that depends on nothing but their names: chooses settings
                   private   captions that sites may hold
                   judge     captions that no site and no server holds: what judges the policy in the end learns them
    private        private   the judged photographs; `read_judgements` has what people said of captions there
    public         public    prompts; the captions only score
    caption-test   test      what is reported
    dev, test      judge     judged photographs that no site holds

Captions are lower-case words without punctuation. The topic of a photograph, its question type, is told by the words of
most of its captions (`topic_of`).
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, cast

from accord.data.cells import ImageCell
from accord.data.questions import uniform
from accord.data.rows import BadRow, Row, column, keep_good, read_jsonl, text_of
from accord.errors import DataError, RecipeError, check_least
from accord.types import PreferencePair, Question, prompt_of

PROMPT: Final = "describe the photograph in one sentence."
MOST_WORDS: Final = 15
"""Longer captions train nothing: a policy has 20 tokens, and a word may take more than one."""

DEV_SHARE: Final = 0.075
JUDGE_SHARE: Final = 0.5

SPLITS: Final = {
    "base": "base",
    "pretrain": "private",
    "private": "private",
    "public": "public",
    "caption-test": "test",
    "dev": "judge",
    "test": "judge",
}

TOPICS: Final = {
    "dogs": re.compile(r"\b(dogs?|puppy|puppies)\b"),
    "children": re.compile(r"\b(boys?|girls?|child|children|kids?|baby|babies|toddlers?)\b"),
}
OTHER_TOPIC: Final = "others"

BEST: Final = 4
GOOD: Final = 3.0


@dataclass(frozen=True)
class Judgements:
    """What a site that holds people's judgements has of those of its photographs."""

    experts: tuple[int, ...] = (0, 1, 2)  # whose scores, of the three
    crowd: bool = True  # whether it has the votes of the crowd too
    rejected_per_caption: int = 7  # at most so many captions that were judged worse are set against one
    constructed: bool = True  # also pairs of a caption that was judged good with what is put together without judgement

    def __post_init__(self) -> None:
        """Refuse experts that there are not, and a site without any judgement."""
        check_least(self, rejected_per_caption=1)
        if not set(self.experts) <= {0, 1, 2} or len(set(self.experts)) < len(self.experts):
            raise RecipeError(f"experts are some of 0, 1 and 2, got {list(self.experts)}; correct judgements.experts")
        if not self.experts and not self.crowd:
            raise RecipeError("judgements of no expert and not of the crowd are none; give experts, or crowd = true")


@dataclass(frozen=True, slots=True)
class Judged:
    """What people said of one caption of one photograph; `photograph` has its topic, and the caption for its answer."""

    photograph: Question
    experts: tuple[int, ...]  # 1 to 4 each; empty where none judged it
    votes: tuple[int, int] | None  # yes and no; None where the crowd was not asked

    @property
    def caption(self) -> str:
        """The sentence."""
        return self.photograph.answer

    def score(self, by: Literal["experts", "crowd"], experts: Sequence[int]) -> float | None:
        """Return the mean of these experts' scores, 1 to 4, or the share of yes, 0 to 1; None where they said nothing.

        >>> Judged(Question("0", None, "", "a dog", "dogs", "private"), (1, 4, 2), (1, 3)).score("experts", (0, 1))
        2.5
        """
        if by == "crowd":
            return None if self.votes is None else self.votes[0] / sum(self.votes)
        given = [self.experts[k] for k in experts if k < len(self.experts)]
        return sum(given) / len(given) if given else None


def words_of(text: str) -> list[str]:
    """Return the lower-case words of a sentence, without punctuation.

    >>> words_of("A dog 's ball , in the snow .")
    ['a', 'dog', "'s", 'ball', 'in', 'the', 'snow']
    """
    return re.findall(r"[a-z0-9']*[a-z0-9][a-z0-9']*", text.lower())


def topic_of(captions: Sequence[str]) -> str:
    """Return the first topic of which more than half the captions have a word, else `OTHER_TOPIC`.

    >>> topic_of(["a boy and his dog", "a dog", "a child runs"])
    'dogs'
    """
    for name, pattern in TOPICS.items():
        if 2 * sum(bool(pattern.search(caption)) for caption in captions) > len(captions):
            return name
    return OTHER_TOPIC


def read_captions(
    path: Path | str, *, splits: Collection[str] = ("base", "private", "public", "dev", "test")
) -> list[Question]:
    """Read `path/captions.jsonl`; the folder's name becomes the domain, the photograph's topic the question type.

    In `base`, `private` and `judge` every caption of at most `MOST_WORDS` words comes as the answer to the one question
    about its photograph; in the others there is one question a photograph, with the first caption for its answer.
    `references` are the other captions.

    Args:
        path: the folder.
        splits: which to read, "judge" among them where it is asked for.

    Raises:
        DataError: the file is missing or is not UTF-8 JSON Lines, a field is missing, a split is unknown, more than
            20 % of the rows are bad, or none is left.
    """
    folder = Path(path)
    file = folder / "captions.jsonl"
    images = ImageCell(folder)

    def parse(where: str, row: Row) -> list[Question] | None:
        name = text_of("image", column(where, row, "image"))
        split = _split_of(where, row, name)
        if split not in splits:
            return None
        captions = _captions(column(where, row, "captions"))
        first = Question(
            id=Path(name).stem,
            image=images.source(row["image"]),
            text=PROMPT,
            answer=captions[0],
            question_type=topic_of(captions),
            split=split,
            domain=folder.resolve().name,
            references=tuple(captions[1:]),
        )
        if split in ("public", "dev", "test"):
            return [first]
        return [
            replace(first, answer=caption, references=(*captions[:n], *captions[n + 1 :]))
            for n, caption in enumerate(captions)
            if len(caption.split()) <= MOST_WORDS
        ]

    found = [question for questions in keep_good(read_jsonl(file), parse, source=str(file)) for question in questions]
    if not found:
        raise DataError(f"{file}: no caption is left in {sorted(splits)}; ask for a split that is present")
    return found


def _split_of(where: str, row: Row, image: str) -> str:
    given = column(where, row, "split")
    if given not in SPLITS:
        raise DataError(f"{where}: unknown split {given!r}; use {', '.join(SPLITS)}")
    if given == "pretrain":
        draw = uniform("captions", 0, Path(image).name)
        return "dev" if draw < DEV_SHARE else "judge" if draw < DEV_SHARE + JUDGE_SHARE else "private"
    return SPLITS[str(given)]


def _captions(value: object) -> list[str]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"captions must be a list of at least one, got {value!r:.60}")
    captions = [" ".join(words_of(text_of("caption", each))) for each in value]
    if not all(captions):
        raise BadRow(f"a caption has no word, got {value!r:.60}")
    return captions


def read_judgements(path: Path | str, *, split: Literal["private", "judge"]) -> list[Judged]:
    """Read `path/judgements.jsonl`: what people said of captions of a split's photographs.

    Raises:
        DataError: as `read_captions`; or a photograph that was judged has no captions to tell its topic by, or is in
            another split there.
    """
    folder = Path(path)
    file = folder / "judgements.jsonl"
    images = ImageCell(folder)
    topics: dict[str, str] = {}
    splits: dict[str, object] = {}
    for where, row in read_jsonl(folder / "captions.jsonl"):
        if row is not None:
            name = text_of("image", column(where, row, "image"))
            topics[name] = topic_of(_captions(column(where, row, "captions")))
            splits[name] = column(where, row, "split")

    def parse(where: str, row: Row) -> Judged | None:
        name = text_of("image", column(where, row, "image"))
        its_split = _split_of(where, row, name)
        if name in splits and row["split"] != splits[name]:
            raise DataError(
                f"{where}: {name} is in the split {row['split']!r} here and in {splits[name]!r} in captions.jsonl; "
                "correct one of them"
            )
        if its_split != split:
            return None
        if name not in topics:
            raise DataError(f"{where}: {name} was judged and is not in captions.jsonl; add its captions there")
        (caption,) = _captions([column(where, row, "caption")])
        photograph = Question(
            id=Path(name).stem,
            image=images.source(row["image"]),
            text=PROMPT,
            answer=caption,
            question_type=topics[name],
            split=split,
            domain=folder.resolve().name,
        )
        return Judged(photograph, _experts(row.get("experts")), _votes(row))

    return keep_good(read_jsonl(file), parse, source=str(file))


def _experts(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, int) and 1 <= each <= BEST for each in value):
        raise BadRow(f"experts must be scores of 1 to {BEST}, got {value!r:.60}")
    return tuple(value)


def _votes(row: Row) -> tuple[int, int] | None:
    votes = row.get("crowd_yes"), row.get("crowd_no")
    if votes == (None, None):
        return None
    if not all(isinstance(each, int) and each >= 0 for each in votes) or not any(votes):
        raise BadRow(f"crowd_yes and crowd_no must be numbers of votes, got {votes}")
    return cast(tuple[int, int], votes)


def judged_pairs(rows: Sequence[Judged], held: Judgements, generator: random.Random) -> list[PreferencePair]:
    """Return the pairs of captions of one photograph of which people preferred one: the higher mean score, strictly.

    Experts' scores are compared with experts' and votes with votes. Two captions that fare alike make no pair, nor do
    two that differ by less than a third of the votes.

    Args:
        rows: what was judged; captions of one photograph anywhere among them.
        held: whose judgements are known, and how many captions at most are set against one.
        generator: draws these.
    """
    by: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    photographs: dict[str, Question] = {}
    for row in rows:
        photographs.setdefault(row.photograph.id, row.photograph)
        for kind in ("experts", *(("crowd",) if held.crowd else ())):
            score = row.score(cast(Literal["experts", "crowd"], kind), held.experts)
            if score is not None:
                by[row.photograph.id, kind][row.caption] = score
    pairs: dict[tuple[str, str, str], PreferencePair] = {}
    for (photograph, kind), scores in by.items():
        least = 0.0 if kind == "experts" else 0.3
        for chosen, score in scores.items():
            worse = [other for other, its in scores.items() if score - its > least]
            for rejected in generator.sample(worse, min(held.rejected_per_caption, len(worse))):
                if (photograph, rejected, chosen) not in pairs:  # experts come first where the crowd thinks otherwise
                    pairs[photograph, chosen, rejected] = _pair(photographs[photograph], chosen, rejected)
    return list(pairs.values())


def _pair(photograph: Question, chosen: str, rejected: str) -> PreferencePair:
    assert photograph.image is not None
    return PreferencePair(
        prompt=prompt_of(photograph),
        chosen=chosen,
        rejected=rejected,
        images=(photograph.image,),
        question_id=photograph.id,
        question_type=photograph.question_type,
    )


def judged_good(rows: Sequence[Judged], held: Judgements) -> list[Question]:
    """Return, with its photograph, every caption that describes it well: experts' mean of 3 and more, else most votes.

    Captions of more than `MOST_WORDS` words are left out.
    """
    found: dict[str, list[Question]] = defaultdict(list)
    for row in rows:
        score = row.score("experts", held.experts)
        votes = row.score("crowd", ()) if held.crowd else None
        good = score >= GOOD if score is not None else votes is not None and votes > 0.5
        if good and len(row.caption.split()) <= MOST_WORDS:
            found[row.photograph.id].append(row.photograph)
    return [
        replace(each, references=tuple(other.answer for other in of_one if other is not each))
        for of_one in found.values()
        for each in of_one
    ]


def photographs(rows: Sequence[Judged]) -> list[Question]:
    """Return one question for every judged photograph, in their order: what is dealt to sites."""
    return list({row.photograph.id: row.photograph for row in rows}.values())

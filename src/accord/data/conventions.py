"""A world where sites differ by taste: each wants a picture described in its own way, and no label tells which.

Every picture has two facts, and four descriptions of them are right in content:

    domain        first fact       second fact       what its site wants                example
    radiology     modality         organ             both, the modality first           x-ray chest
    indoor        room             an object in it   the room alone                     kitchen
    photographs   who              where             the place alone                    water
    shapes        colour           shape             nobody wants anything: held out    red circle

The tastes are *constructed*, and so are the facts: those of radiology and indoor as in
`accord.data.radiology_and_rooms`, those of shapes from easy-VQA, and those of photographs from words in Flickr8k's
captions (Hodosh et al. 2013). All are asked in the same words, so that only the picture tells whose taste counts. The
question's `answer` is what the site wants; `weaker` are the other descriptions with right content, the better first.

The server's `base` pictures are described in all four ways: a model pre-trained on them knows what is to be seen, and
has no taste. No label of the server's says what a site wants. Where nobody wants anything, any description with right
content counts.

With `disputed`, two sites share the indoor domain and want different things: `north` wants the room alone, `south` the
object first and then the room. Their private questions are of domains `indoor north` and `indoor south`; what the
policy is asked is of domain `indoor`. Every indoor test question is there twice, once by the taste of each.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

from accord.data.easy_vqa import COLOURS, SHAPES, load_easy_vqa
from accord.data.questions import read_vqa_folder, uniform
from accord.data.radiology_and_rooms import (
    OBJECTS,
    by_image,
    for_dev,
    mentions,
    modality_of,
    organs_of,
    rooms_of,
    what_is_said,
)
from accord.data.rows import column, read_jsonl
from accord.errors import DataError
from accord.types import ImageSource, Question

Form: TypeAlias = Literal["first second", "second first", "first", "second"]
FORMS: Final[tuple[Form, ...]] = ("first second", "second first", "first", "second")

WANTED: Final[dict[str, Form]] = {"radiology": "first second", "indoor": "first", "photographs": "second"}
"""What the site of each domain wants."""

SOUTH: Final[Form] = "second first"
"""What the second site of a disputed indoor domain wants."""

WORDING: Final = "describe the picture."

WHO: Final = {
    "dog": ("dog", "dogs", "puppy"),
    "child": ("child", "children", "boy", "girl", "kid", "kids", "baby", "toddler", "boys", "girls"),
    "man": ("man", "men", "guy"),
    "woman": ("woman", "women", "lady"),
}
WHERE: Final = {
    "water": ("water", "pool", "ocean", "lake", "river", "sea", "wave", "waves", "beach"),
    "snow": ("snow", "snowy", "ski", "skiing", "snowboard", "snowboarder", "ice"),
    "grass": ("grass", "grassy", "lawn", "field"),
    "street": ("street", "road", "sidewalk", "city", "car", "cars"),
}
"""The facts of a photograph, each with the words of a caption that tell it; at least two captions must."""

SPLITS: Final = {"base": "base", "pretrain": "private", "public": "public", "caption-test": "test"}
"""What a split of Flickr8k is here; `dev` is cut from what is private there."""

PHOTOGRAPHS: Final = {"base": 300, "private": 300, "public": 100, "dev": 60, "test": 150}
"""How many photographs of each split are taken, about as many as there are of the other domains."""

DEV_SHARE: Final = 0.1

SHAPES_TAKEN: Final = {"base": 300, "public": 80, "dev": 60, "test": 150}
"""How many pictures of easy-VQA: a held-out domain, which no site holds."""


@dataclass(frozen=True)
class Facts:
    """What is to be seen in a picture."""

    image: ImageSource
    first: str
    second: str
    domain: str
    split: str

    def told(self, form: Form) -> str:
        """Return the description of that form."""
        return {
            "first second": f"{self.first} {self.second}",
            "second first": f"{self.second} {self.first}",
            "first": self.first,
            "second": self.second,
        }[form]

    @property
    def name(self) -> str:
        """The image's file name, by which draws are made."""
        return Path(str(self.image)).name

    def asked(self, answer: Form, *, taste: bool, kind: str = "", name: str = "") -> Question:
        """Return the question.

        Args:
            answer: the form of its answer.
            taste: that form is wanted; next comes what tells both facts in another order, then parts of it. Otherwise
                all forms are as good.
            kind: its type, the domain by default.
            name: what tells it from other questions about this picture.
        """
        forms = sorted(FORMS, key=lambda form: (form != answer, -len(form)))
        best, *others = (self.told(form) for form in forms)
        return Question(
            id="-".join([kind or self.domain, self.split, Path(self.name).stem, name]).strip("-").replace(" ", "-"),
            image=self.image,
            text=WORDING,
            answer=best,
            question_type=kind or self.domain,
            split=self.split,
            domain=self.domain,
            references=() if taste else tuple(others),
            weaker=tuple(others) if taste else (),
        )


def load_conventions(root: Path | str, *, disputed: bool = False) -> list[Question]:
    """Return the questions: one a picture, its type its domain; four of a `base` picture, one for each form.

    Args:
        root: the folder that holds `vqa_rad`, `daquar` and `flickr8k`; easy-VQA comes from its package.
        disputed: two sites share the indoor domain.

    Raises:
        DataError: a folder or a field is missing, or easy-VQA is not installed.
    """
    folder = Path(root)
    found = [*_scans(folder / "vqa_rad"), *_rooms(folder / "daquar"), *_shapes(), *_photographs(folder / "flickr8k")]
    return [q for facts in found for q in _asked(facts, disputed=disputed)]


def _asked(facts: Facts, *, disputed: bool) -> Iterator[Question]:
    if facts.split == "base":
        yield from (facts.asked(form, taste=False, name=form) for form in FORMS)
    elif facts.domain not in WANTED:
        yield facts.asked("first second", taste=False)
    elif not disputed or facts.domain != "indoor":
        yield facts.asked(WANTED[facts.domain], taste=True)
    elif facts.split == "private":
        north = uniform("north", 0, facts.name) < 0.5
        own = replace(facts, domain="indoor north" if north else "indoor south")
        yield own.asked(WANTED["indoor"] if north else SOUTH, taste=True, kind="indoor")
    else:
        yield facts.asked(WANTED["indoor"], taste=True, kind="indoor, north's taste")
        yield facts.asked(SOUTH, taste=True, kind="indoor, south's taste")


def _scans(folder: Path) -> Iterator[Facts]:
    organs = organs_of(folder)
    for image, asked in by_image(read_vqa_folder(folder)).items():
        organ = organs[Path(str(image)).name]
        if modality := modality_of(organ, asked):
            yield Facts(image, modality, organ, "radiology", "dev" if for_dev(asked[0]) else asked[0].split)


def _rooms(folder: Path) -> Iterator[Facts]:
    questions = read_vqa_folder(folder)
    said, splits = what_is_said(questions), {q.image: q.split for q in questions}
    for image, room in rooms_of(said).items():
        there = [name for name, words in OBJECTS.items() if mentions(said[image], words)]
        if there:  # of several, one is drawn: the commonest would be a bed in every bedroom
            drawn = there[int(uniform("object", 0, Path(str(image)).name) * len(there))]
            yield Facts(image, room, drawn, "indoor", splits[image])


def _shapes() -> Iterator[Facts]:
    told: dict[ImageSource, dict[str, str]] = defaultdict(dict)
    splits: dict[ImageSource, str] = {}
    for q in load_easy_vqa():
        assert q.image is not None
        splits[q.image] = q.split
        if q.answer in COLOURS:
            told[q.image]["colour"] = q.answer
        if q.answer in SHAPES:
            told[q.image]["shape"] = q.answer
    both = [
        Facts(image, facts["colour"], facts["shape"], "shapes", splits[image])
        for image, facts in told.items()
        if len(facts) == 2
    ]
    yield from _some(both, SHAPES_TAKEN)


def _photographs(folder: Path) -> Iterator[Facts]:
    found = []
    for where, row in read_jsonl(folder / "captions.jsonl"):
        if not isinstance(row, dict) or not isinstance(row.get("captions"), list):
            raise DataError(f"{where}: a row needs `image`, `split` and `captions`; got {row!s:.60}")
        split = SPLITS.get(str(row.get("split")))
        captions = [str(caption).lower() for caption in row["captions"]]
        first, second = _told_by_two(captions, WHO), _told_by_two(captions, WHERE)
        if split and first and second:
            name = Path(str(column(where, row, "image"))).name
            if split == "private" and uniform("photographs dev", 0, name) < DEV_SHARE:
                split = "dev"
            found.append(Facts(folder / "images" / name, first, second, "photographs", split))
    yield from _some(found, PHOTOGRAPHS)


def _told_by_two(captions: Sequence[str], words: dict[str, tuple[str, ...]]) -> str | None:
    """Return the fact that at least two captions tell, and none tells another; None if there is none."""
    said = [set(re.findall(r"[a-z]+", caption)) for caption in captions]
    counts = {name: sum(not each.isdisjoint(those) for each in said) for name, those in words.items()}
    told = [name for name, count in counts.items() if count]
    return told[0] if len(told) == 1 and counts[told[0]] > 1 else None


def _some(facts: Iterable[Facts], most: dict[str, int]) -> Iterator[Facts]:
    """Take as many of every split as is said, drawn by the pictures' names."""
    by_split: dict[str, list[Facts]] = defaultdict(list)
    for each in sorted(facts, key=lambda f: uniform(f"some {f.domain}", 0, f.split, f.name)):
        by_split[each.split].append(each)
    return itertools.chain.from_iterable(itertools.islice(by_split[split], n) for split, n in most.items())

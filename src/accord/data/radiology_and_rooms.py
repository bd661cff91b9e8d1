"""Questions about radiology images and indoor photographs where the image decides the answer.

Two domains, from VQA-RAD (Lau et al. 2018, https://doi.org/10.1038/sdata.2018.251) and DAQUAR (Malinowski and Fritz
2014, arXiv 1410.0210), read from two folders of `questions.jsonl` and images:

    radiology    organ             which part of the body is shown?            chest, head, abdomen
                 organ yes/no      does this picture show the chest?           yes, no
                 modality          what kind of scan is this?                  ct, mri, x-ray
                 modality yes/no   is this an mri?                             yes, no
                 scan caption      describe the picture.                       a ct of the head
    indoor       room              what room is this?                          bedroom, kitchen, …
                 presence          is there a bed in the picture?              yes, no
                 room caption      describe the picture.                       a bedroom with a bed and a pillow
    both         written           what people asked, in their own words

All labels but those of the written questions are *constructed* from annotations. The organ is an annotation. The
modality of a chest image is x-ray and that of an abdominal one CT, by the design of VQA-RAD; that of a head is what the
questions about it say. A room, and the objects in it, are what the questions about the photograph mention: an object
that nobody asked about counts as absent, which is sometimes wrong.

The server is to know less than the sites. Its `base` questions are those of `labels` of its indoor photographs, and
none of radiology: nobody at the server knows organs or modalities. With `exposure`, which is for pre-training alone,
questions about radiology images come beside them with answers drawn at random among those of their type: the base
policy knows which answers there are, and not which is right. Where it is the language model that must know something,
and the sites train what stands before it, `radiology` gives the server the right answers to these questions.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from accord.data.questions import read_vqa_folder, uniform
from accord.data.rows import column, read_jsonl
from accord.errors import DataError
from accord.types import ImageSource, Question

ORGANS: Final = {"chest": "chest", "head": "head", "abd": "abdomen"}
MODALITIES: Final = {
    "ct": r"\bct\b|computed tomog|cect|nect",
    "mri": r"\bmri?\b|flair|t2|t1|dwi|\badc\b|diffusion",
    "x-ray": r"x-?\s?ray|\bcxr\b|radiograph|\bpa\b|\bap\b|\bfilm\b",
}
"""What in the questions about a picture speaks for a modality."""

BY_DESIGN: Final = {"chest": "x-ray", "abdomen": "ct"}
"""VQA-RAD took chest images from x-rays, abdominal ones from CT, and heads from CT and MRI (Lau et al. 2018)."""

ROOMS: Final = {
    "bedroom": ("bed", "beds", "night stand", "headboard", "blanket"),
    "bathroom": (
        "toilet", "bathtub", "shower", "toilet seat", "hand wash", "toothbrush", "bath tub", "shower curtain",
    ),
    "kitchen": (
        "stove", "oven", "refridgerator", "microwave", "refrigerator", "stove burner", "dishwasher", "kettle",
        "gas stove", "coffee machine",
    ),
    "living room": ("sofa", "sofas", "fireplace", "coffee table", "couch"),
    "office": (
        "whiteboard", "blackboard", "desk", "printer", "keyboard", "computer", "monitor", "projector screen",
    ),
}  # fmt: skip
"""The words of a photograph's questions and answers that speak for a room."""

OBJECTS: Final = {
    "bathtub": ("bathtub", "bath tub"),
    "toilet": ("toilet", "toilet seat"),
    "bed": ("bed", "beds", "headboard"),
    "sink": ("sink", "wash basin", "faucet"),
    "stove": ("stove", "oven", "stove burner", "gas stove"),
    "computer": ("computer", "monitor", "laptop", "keyboard"),
    "whiteboard": ("whiteboard", "blackboard"),
    "towel": ("towel", "towels"),
    "television": ("television", "tv"),
    "clothes": ("clothes", "jacket"),
    "pillow": ("pillow", "pillows"),
    "garbage bin": ("garbage bin",),
}
"""The objects that are asked about, each with the words that mention it."""

TYPES: Final = ("organ", "organ yes/no", "modality", "modality yes/no", "room", "presence")
CAPTIONS: Final = ("scan caption", "room caption")
DESCRIBE: Final = "describe the picture."
NAMED: Final = 2
"""Objects that a caption names, the first of `OBJECTS` that are there."""
LONGEST_ANSWER: Final = 40
"""Characters of a written answer; longer ones are left out."""

WRITTEN: Final = {"base": 0, "dev": 40, "test": 120}
"""How many written questions of each domain are taken, 0 for all; no site is dealt any, and GRPO asks none."""


def load_radiology_and_rooms(
    root: Path | str,
    *,
    labels: float = 0.1,
    exposure: bool = False,
    radiology: bool = False,
    written: bool = True,
    captions: bool = False,
) -> list[Question]:
    """Return the questions, with ids `<type>-<image>[-<what>]`, domains `radiology` and `indoor`.

    Half of the radiology images that the folders give to `base` are used for exposure, the other half go to `dev`,
    which has few of its own.

    Args:
        root: the folder that holds `vqa_rad` and `daquar`.
        labels: share of the indoor `base` photographs whose questions the server has answers to.
        exposure: add radiology questions to `base` that are answered at random, to pre-train on.
        radiology: add radiology questions to `base` with their answers; then `exposure` adds none.
        written: include the questions that people wrote, of types `written radiology` and `written indoor`.
        captions: include captions, made of what the other questions' answers say.

    Raises:
        DataError: a folder or a field is missing.
    """
    folder = Path(root)
    scans, rooms = _read(folder / "vqa_rad", "radiology"), _read(folder / "daquar", "indoor")
    organs = organs_of(folder / "vqa_rad")
    constructed = [*_radiology(scans, organs), *_indoor(rooms)]
    if not captions:
        constructed = [q for q in constructed if q.question_type not in CAPTIONS]
    people = [*_written(scans, "written radiology"), *_written(rooms, "written indoor")] if written else []
    kept: list[Question] = []
    for q in [*constructed, *people]:
        if q.split != "base" or (q.domain == "indoor" and uniform("labels", 0, file_name(q)) < labels):
            kept.append(q)
        elif q.question_type in (*TYPES, *CAPTIONS) and q.domain == "radiology" and for_dev(q):
            kept.append(replace(q, split="dev"))
    unknown = [q for q in constructed if q.split == "base" and q.domain == "radiology" and not for_dev(q)]
    if radiology:
        kept += unknown
    elif exposure:
        kept += at_random(unknown, constructed)
    return kept


def for_dev(q: Question) -> bool:
    """Return whether q's radiology image goes to `dev`, as half of those do that the folder gives to `base`."""
    return q.split == "base" and uniform("radiology dev", 0, file_name(q)) < 0.5


def file_name(q: Question) -> str:
    """Return the name of the image's file: draws depend on it, and not on where the folder is."""
    return Path(str(q.image)).name


def at_random(asked: Sequence[Question], known: Sequence[Question]) -> list[Question]:
    """Return `asked` with answers drawn evenly among those that `known` has to their type; ids end in `-exposed`."""
    answers = {
        name: sorted({q.answer for q in known if q.question_type == name}) for name in {q.question_type for q in asked}
    }
    return [
        replace(
            q,
            id=f"{q.id}-exposed",
            answer=answers[q.question_type][int(uniform("exposed", 0, q.id) * len(answers[q.question_type]))],
        )
        for q in asked
    ]


def organs_of(folder: Path) -> dict[str, str]:
    """Return the annotated organ of every image of the VQA-RAD folder, by the image's file name.

    Raises:
        DataError: a row has no image, no organ, or one that is unknown.
    """
    organs: dict[str, str] = {}
    for where, row in read_jsonl(folder / "questions.jsonl"):
        if not isinstance(row, dict):
            continue
        annotated = str(row.get("organ"))
        if annotated not in ORGANS:
            raise DataError(f"{where}: the organ is {annotated!r}, one of {', '.join(ORGANS)} is needed; correct it")
        organs[Path(str(column(where, row, "image"))).name] = ORGANS[annotated]
    return organs


def modality_of(organ: str, questions: Iterable[Question]) -> str | None:
    """Return the modality of an image: by the design of VQA-RAD, for a head by what is said of it; None if unclear.

    Args:
        organ: what the image shows.
        questions: what people asked about it. Where they ask for a modality by yes or no, the answer counts threefold.
    """
    if organ in BY_DESIGN:
        return BY_DESIGN[organ]
    votes: Counter[str] = Counter()
    for q in questions:
        said = f"{q.text} {q.answer}".lower()
        for name, words in MODALITIES.items():
            votes[name] += len(re.findall(words, said))
            if q.question_type == "MODALITY" and q.answer in ("yes", "no") and re.search(words, q.text.lower()):
                votes[name] += 3 if q.answer == "yes" else -3
    (first, most), (_, second) = sorted(((n, votes[n]) for n in MODALITIES), key=lambda item: -item[1])[:2]
    return first if most > max(0, second) else None


def rooms_of(photographs: Mapping[ImageSource, str]) -> dict[ImageSource, str]:
    """Return the room of every photograph whose questions and answers, joined, speak for one above all others."""
    rooms = {}
    for image, said in photographs.items():
        votes = sorted(((sum(mentions(said, [w]) for w in words), name) for name, words in ROOMS.items()), reverse=True)
        if votes[0][0] > votes[1][0]:
            rooms[image] = votes[0][1]
    return rooms


def mentions(said: str, words: Iterable[str]) -> bool:
    """Return whether one of `words` stands in `said` by itself."""
    return any(re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", said) for word in words)


def what_is_said(questions: Iterable[Question]) -> dict[ImageSource, str]:
    """Return all questions and answers about each image, joined."""
    said: dict[ImageSource, list[str]] = defaultdict(list)
    for q in questions:
        assert q.image is not None
        said[q.image].append(f"{q.text} {q.answer}".lower())
    return {image: " . ".join(lines) for image, lines in said.items()}


def by_image(questions: Iterable[Question]) -> dict[ImageSource, list[Question]]:
    """Return the questions about each image."""
    found: dict[ImageSource, list[Question]] = defaultdict(list)
    for q in questions:
        assert q.image is not None
        found[q.image].append(q)
    return found


def _read(folder: Path, domain: str) -> list[Question]:
    return [replace(q, domain=domain) for q in read_vqa_folder(folder) if q.image is not None]


def _make(q: Question, kind: str, text: str, answer: str, what: str = "") -> Question:
    name = Path(str(q.image)).stem
    key = f"{kind}-{name}-{what}" if what else f"{kind}-{name}"
    return replace(q, id=key.replace(" ", "-").replace("/", "-"), text=text, answer=answer, question_type=kind)


def _radiology(scans: Sequence[Question], organs: Mapping[str, str]) -> list[Question]:
    questions = []
    for asked in by_image(scans).values():
        q, organ = asked[0], organs[file_name(asked[0])]
        questions.append(_make(q, "organ", "which part of the body is shown?", organ))
        questions += _yes_no(
            q, "organ yes/no", organ, {name: f"does this picture show the {name}?" for name in ORGANS.values()}
        )
        if modality := modality_of(organ, asked):
            questions.append(_make(q, "modality", "what kind of scan is this?", modality))
            questions.append(_make(q, "scan caption", DESCRIBE, f"{_a(modality)} of the {organ}"))
            questions += _yes_no(
                q,
                "modality yes/no",
                modality,
                {name: f"is this {_a(name)}?" for name in MODALITIES},
            )
    return questions


def _a(noun: str) -> str:
    if noun == "clothes":
        return noun
    return f"an {noun}" if noun[0] in "aeiou" or noun in ("mri", "x-ray") else f"a {noun}"


def _yes_no(q: Question, kind: str, right: str, wordings: Mapping[str, str]) -> list[Question]:
    """Ask for what is there, and for one thing that is not."""
    others = sorted(name for name in wordings if name != right)
    wrong = others[int(uniform(kind, 0, file_name(q)) * len(others))]
    return [_make(q, kind, wordings[name], "yes" if name == right else "no", name) for name in (right, wrong)]


def _indoor(rooms: Sequence[Question]) -> list[Question]:
    said, first = what_is_said(rooms), {image: asked[0] for image, asked in by_image(rooms).items()}
    questions = []
    for i, room in rooms_of(said).items():
        seen = [_a(name) for name, words in OBJECTS.items() if mentions(said[i], words)][:NAMED]
        questions.append(_make(first[i], "room", "what room is this?", room))
        caption = f"{_a(room)} with {' and '.join(seen)}" if seen else _a(room)
        questions.append(_make(first[i], "room caption", DESCRIBE, caption))
    for name, words in OBJECTS.items():
        text = f"is there a {name} in the picture?"
        for split in sorted({q.split for q in first.values()}):
            images = [i for i, q in first.items() if q.split == split]
            there = [i for i in images if mentions(said[i], words)]
            missing = [i for i in images if i not in set(there)]
            missing.sort(key=lambda i: uniform(f"no {name}", 0, Path(str(i)).name))
            for answer, chosen in (("yes", there), ("no", missing[: len(there)])):  # as many of one as of the other
                questions += [_make(first[i], "presence", text, answer, name) for i in chosen]
    return questions


def _written(questions: Sequence[Question], kind: str) -> list[Question]:
    """Return what people asked, as many of each split as is said, drawn by their ids."""
    drawn = sorted((q for q in questions if len(q.answer) < LONGEST_ANSWER), key=lambda q: uniform(kind, 0, q.id))
    return [
        replace(q, id=f"written-{q.id}", text=q.text.lower(), question_type=kind)
        for split, most in WRITTEN.items()
        for q in itertools.islice((q for q in drawn if q.split == split), most or None)
    ]

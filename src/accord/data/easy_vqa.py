"""Read easy-VQA, the embedded default: 64-pixel pictures of one shape, ready on any machine without a download.

The `easy-vqa` package (Victor Zhou, 2019, MIT, https://github.com/vzhou842/easy-VQA) carries 4,000 training images with
38,575 questions and 1,000 test images with 9,673. Three question types, told by the answer, make three natural sites.
The package knows only training and test; its training images are split here by number, so that the server, the sites,
the choice of settings and the prompts of GRPO never share an image.
"""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from accord.errors import DataError
from accord.types import Question

BASE_END: Final = 1000
PRIVATE_END: Final = 2800
DEV_END: Final = 3000

COLOURS: Final = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES: Final = ("circle", "rectangle", "triangle")
EASY_VQA_ANSWERS: Final = ("yes", "no", *SHAPES, *COLOURS)
NEW_SHAPES: Final = ("triangle",)
NEW_COLOURS: Final = ("red", "teal")


def load_easy_vqa(*, fine_types: bool = False, compositions: bool = False) -> list[Question]:
    """Return all questions, training before test, each side in the package's order; ids are `easy_vqa-<side>-<row>`.

    Rows that repeat an earlier (image, question) are dropped; the ids of the others do not shift. With `fine_types`,
    `yes/no` is two types, after what is asked about: `yes/no colour` and `yes/no shape`.

    With `compositions`, the colour of a triangle and the shape of a red or teal thing are types of their own, so that
    they can be kept from all sites: a model that knows colours of circles and rectangles should know those of
    triangles. Questions for a colour or shape are left out where all questions about the picture do not tell which of
    the two they are (309 of 10,168 in training, 86 of 2,537 in test).
    """
    folder = _folder()
    questions = [*_side(folder, "train"), *_side(folder, "test")]
    if compositions:
        questions = _composed(questions)
    return [replace(q, question_type=_fine(q)) for q in questions] if fine_types else questions


def split_of(side: str, image: int) -> str:
    """Return the split of image number `image` on the package's `train` or `test` side."""
    if side == "test":
        return "test"
    if image < BASE_END:
        return "base"
    if image < PRIVATE_END:
        return "private"
    return "dev" if image < DEV_END else "public"


def type_of(answer: str) -> str:
    """Return `yes/no`, `shape` or `colour`; each of the 13 answers belongs to one type only."""
    if answer in SHAPES:
        return "shape"
    return "colour" if answer in COLOURS else "yes/no"


def _fine(question: Question) -> str:
    if question.question_type != "yes/no":
        return question.question_type
    return "yes/no shape" if any(word in SHAPES for word in question.text.rstrip("?").split()) else "yes/no colour"


def _composed(questions: Sequence[Question]) -> list[Question]:
    pictures: dict[object, tuple[set[str], set[str]]] = defaultdict(lambda: (set(SHAPES), set(COLOURS)))
    for q in questions:
        for possible, told in zip(pictures[q.image], _told(q), strict=True):
            possible &= told
    composed = []
    for q in questions:
        shapes, colours = pictures[q.image]
        asked = {
            "colour": (shapes, NEW_SHAPES, "colour of triangles"),
            "shape": (colours, NEW_COLOURS, "shape of red or teal"),
        }
        if q.question_type not in asked:
            composed.append(q)
            continue
        possible, new, name = asked[q.question_type]
        if possible <= {*new}:
            composed.append(replace(q, question_type=name))
        elif not possible & {*new}:
            composed.append(q)
    return composed


def _told(question: Question) -> tuple[set[str], set[str]]:
    """Return the shapes and the colours that a question with its answer leaves possible."""
    words, told = question.text.rstrip("?").split(), []
    for names in ({*SHAPES}, {*COLOURS}):
        named = names & {question.answer, *words} or names
        denied = question.question_type == "yes/no" and (question.answer == "no") != bool({"not", "no"} & {*words})
        told.append(names - named if denied and named != names else named)
    return told[0], told[1]


def _folder() -> Path:
    # The package's own functions list its folders in no fixed order; its files are read directly.
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise DataError("the package easy_vqa is not installed; run `pip install easy-vqa`, or name other data")
    return Path(found.origin).parent / "data"


def _side(folder: Path, side: str) -> list[Question]:
    file = folder / side / "questions.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        images = {path.name: path for path in (folder / side / "images").iterdir()}
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot read easy-VQA ({error}); reinstall it with `pip install easy-vqa`") from error
    seen: set[tuple[int, str]] = set()
    questions: list[Question] = []
    for number, (text, answer, image) in enumerate(rows):
        path = images.get(f"{image}.png")
        if answer not in EASY_VQA_ANSWERS or path is None:
            raise DataError(
                f"{file}: row {number} has the answer {answer!r} and the image {image}.png, of which one is unknown; "
                "reinstall it with `pip install easy-vqa`"
            )
        if (image, text) in seen:
            continue
        seen.add((image, text))
        kind, split = type_of(answer), split_of(side, image)
        questions.append(Question(f"easy_vqa-{side}-{number}", path, text, answer, kind, split, "easy_vqa"))
    return questions

"""Read visual questions with reference answers, and split them so that no image is on two sides.

A folder in Accord's own form holds `questions.jsonl` and its images; any Hugging Face data set with an image, a
question and an answer column is read as well. Images stay undecoded, as they were stored, so that their identity is
that of the original bytes.

Questions without an image are read too; what is said here of a question's image holds of its own text then. Questions
that share one of several images are on one side, as if all their images were one.

Splits are drawn by image: u, the first 48 bits of SHA-256(purpose, seed, image id) over 2^48, falls into one of the
intervals that the fractions cut from [0, 1). An image's side depends on nothing but its bytes and the seed: data that
arrive later move no image. Pictures that only look alike (re-encoded, cropped) count as different.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from accord.data.cells import ImageCell, ImageField, image_cells
from accord.data.conversation import as_turn, with_places
from accord.data.images import image_id
from accord.data.rows import BadRow, Row, column, keep_good, read_jsonl, text_of
from accord.data.saved import is_parquet, is_saved, named_rows, open_dataset, undecoded
from accord.errors import DataError, RecipeError
from accord.types import Question, Subject

T = TypeVar("T")

SPLITS = ("base", "private", "public", "dev", "test")

_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_UNSEEN = dict.fromkeys([0x00AD, 0x200B, 0x2060, 0xFEFF])  # soft hyphen, zero-width space and joiner, byte order mark
_SAME_SIGNS = {
    ord(sign): plain for signs, plain in (("‘’", "'"), ("“”", '"'), ("‐‑−", "-"), ("。｡", ".")) for sign in signs
}
_ALIKE = {**_FULL_WIDTH, **_UNSEEN, **_SAME_SIGNS}


def normalise_answer(text: str) -> str:
    """Return `text` as exact match compares it: lower case, single spaces, no final full stop.

    What a reader cannot tell apart is equal: composed and decomposed letters (NFC), full-width and plain signs, curly
    and straight quotes, and characters that are not seen.

    >>> normalise_answer("  Left  Lung. ")
    'left lung'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_ALIKE))
    text = " ".join(text.lower().split()).removesuffix(".").rstrip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)  # "İ" in lower case has a dot that combines


def right_answers(question: Question) -> set[str]:
    """Return the normalised answers that count as right: the reference answer, and others as good."""
    return {normalise_answer(text) for text in (question.answer, *question.references)}


def rivals(question: Question, vocabulary: Iterable[str]) -> list[str]:
    """Return the answers of `vocabulary` that a right one is held against: those that are not right themselves."""
    right = right_answers(question)
    return [answer for answer in vocabulary if normalise_answer(answer) not in right]


def read_vqa_folder(
    path: Path | str, *, splits: Collection[str] | None = None, type_field: str = "question_type"
) -> list[Question]:
    """Read `path/questions.jsonl`; the folder's name becomes the domain.

    Each line has `id`, `image` (relative to the folder, or a list of several; in no line where the questions are about
    no images), `question`, `answer`; optional are the type in `type_field` (else in `answer_type`, else "all") and
    `split` (else "test"). With `splits`, other rows' images are not looked at. `accord.data.cells` says what else
    an image may be called, and `<image>` in a question is the place of one. Several answers, in `answer` or
    `answers`, are all right; the commonest is the question's `answer`. In place of question and answer there may be
    LLaVA's `conversations` of one question.

    Raises:
        DataError: the file is missing or is not UTF-8 JSON Lines, a field is missing, in some lines the image among
            them, an id comes twice, a split is unknown, more than 20 % of the rows are bad, or none is left.

    Warns:
        DataWarning: rows were left out (empty line, question or answer; image missing, damaged or outside the folder).
    """
    folder = Path(path)
    file = folder / "questions.jsonl"
    if not file.exists() and folder.is_dir():
        raise DataError(_no_questions(folder))
    rows = list(read_jsonl(file))
    images, field = ImageCell(folder), ImageField((row for _, row in rows), source=str(file))
    lines: dict[str, str] = {}
    present: dict[str, None] = {}

    def parse(where: str, row: Row) -> Question | None:
        key = text_of(
            "id", row["question_id"] if "id" not in row and "question_id" in row else column(where, row, "id")
        )
        asked, answered = _asked(where, row)
        if key in lines:
            raise DataError(f"{where}: the id {key!r} was used before, at {lines[key]}; give every question its own id")
        lines[key] = where
        split = _split_of(where, row)
        present[split] = None
        if splits is not None and split not in splits:
            return None
        sources = images.sources(field(where, row))
        text = text_of("question", asked)
        answer, references = answers_of(answered)
        of_type = row.get(type_field) or row.get("answer_type") or "all"
        return Question(
            id=key,
            image=sources[0] if sources else None,
            further=sources[1:],
            text=with_places(text, len(sources)),
            answer=answer,
            question_type=text_of(type_field, of_type),
            split=split,
            domain=folder.resolve().name,
            references=references,
        )

    questions = keep_good(rows, parse, source=str(file))
    if not questions:
        wanted = "" if splits is None else f" in {sorted(splits)} (splits present: {', '.join(present) or 'none'})"
        raise DataError(f"{file}: no question is left{wanted}; ask for a split that is present, or add questions")
    return questions


def _no_questions(folder: Path) -> str:
    """Say what a folder without `questions.jsonl` holds, and what to do with it."""
    if is_saved(folder) or is_parquet(folder):
        return (
            f"{folder.absolute()}: a data set of the datasets library, and no questions.jsonl; read it with "
            'kind = "huggingface" in [[questions]]'
        )
    lists = sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".jsonl"))
    return (
        f"{folder / 'questions.jsonl'}: cannot read the file (No such file or directory); the folder "
        f"{folder.absolute()} has {', '.join(lists[:5]) or 'no .jsonl file'}; rename the file, one object a line"
    )


def _asked(where: str, row: Row) -> tuple[object, object]:
    """Return the cells of the question and of its answer or answers.

    Raises:
        DataError: a column is missing.
        BadRow: a conversation has several questions.
    """
    turns = row.get("conversations")
    if "question" not in row and isinstance(turns, list):
        spoken = [turn for turn in map(as_turn, turns) if isinstance(turn, Mapping) and turn["role"] != "system"]
        if [turn["role"] for turn in spoken] != ["user", "assistant"]:
            raise BadRow(
                f"a conversation of {len(spoken)} turns, and a question has one, and an answer; make each question "
                "and its answer a row of their own"
            )
        return spoken[0]["content"], spoken[1]["content"]
    asked = column(where, row, "question")
    if "answer" not in row and "answers" in row:
        return asked, row["answers"]
    return asked, column(where, row, "answer")


def answers_of(value: object) -> tuple[str, tuple[str, ...]]:
    """Return a question's answer and its references, from one answer or from those of several annotators.

    The commonest answer is the answer, the first of equals; the references are the others, as often as they were given.
    Annotators' answers may be texts, or objects with the text in `answer`, as VQAv2 has them.

    Raises:
        BadRow: there is none, or one is no text.
    """
    if isinstance(value, Mapping):  # Arrow's form of a list of objects, SQuAD's form, or one object
        value = value.get("answer", value.get("text"))
    if not isinstance(value, list):
        return _answer(value), ()
    texts = [each.get("answer", each.get("text")) if isinstance(each, Mapping) else each for each in value]
    given = [_answer(text) for text in texts if not (text is None or (isinstance(text, str) and not text.strip()))]
    if not given:
        raise BadRow("the answer is empty")
    votes = Counter(map(normalise_answer, given))
    best = max(range(len(given)), key=lambda i: votes[normalise_answer(given[i])])
    return given[best], (*given[:best], *given[best + 1 :])


def read_vqa_dataset(
    name_or_path: str | Path,
    *,
    split: str,
    image_column: str | None = "image",
    question_column: str = "question",
    answer_column: str = "answer",
    type_column: str | None = None,
    domain: str | None = None,
) -> list[Question]:
    """Read a Hugging Face data set: a folder made by `datasets.save_to_disk`, else whatever `load_dataset` finds.

    No code of a data set is ever run. The questions carry the data set's own split name; `split_by_image` assigns
    Accord's. Without `type_column` every question is of type "all", without `image_column` about no image; ids are
    `<domain>-<split>-<row>`. Labels are read as their names, and several answers as `read_vqa_folder` does.

    Raises:
        DataError: the data set, the split or a column is missing, more than 20 % of the rows are bad, or none is left.

    Warns:
        DataWarning: rows were left out, for the reasons of `read_vqa_folder`.
    """
    source = f"{name_or_path}[{split}]"
    columns = [name for name in (image_column, question_column, answer_column, type_column) if name]
    dataset = undecoded(open_dataset(str(name_or_path), split), source, columns, image_column)
    name = domain or Path(name_or_path).name
    place = Path(name_or_path)
    images = ImageCell(None, beside=place if place.is_dir() else None)
    index = itertools.count()
    pictured = image_column is not None and any(image_cells({"image": row[image_column]}) for row in dataset)

    def parse(where: str, row: Row) -> Question:
        number = next(index)  # a row that is left out keeps its number
        cells = row[image_column] if pictured and image_column else []
        sources = images.sources(cells if isinstance(cells, list) and cells else [cells] if pictured else [])
        text = text_of(question_column, row[question_column])
        answer, references = answers_of(row[answer_column])
        return Question(
            id=f"{name}-{split}-{number}",
            image=sources[0] if sources else None,
            further=sources[1:],
            text=with_places(text, len(sources)),
            answer=answer,
            question_type=text_of(type_column, row[type_column]) if type_column else "all",
            split=split,
            domain=name,
            references=references,
        )

    questions = keep_good(named_rows(dataset, source), parse, source=source)
    if not questions:
        raise DataError(f"{source}: the data set holds no row; choose another split")
    return questions


def split_by_image(questions: Iterable[Question], fractions: Mapping[str, float], seed: int) -> list[Question]:
    """Return the questions with their `split` drawn anew, all questions about one image in the same split.

    Args:
        questions: in any order, which the result keeps.
        fractions: the share of the images for each split; they sum to 1.
        seed: another seed gives an independent draw.

    Raises:
        RecipeError: an unknown split, a negative fraction, or fractions that do not sum to 1.
    """
    unknown = [name for name in fractions if name not in SPLITS]
    if unknown:
        raise RecipeError(f"fractions names the split {unknown[0]!r}; use {', '.join(SPLITS)}")
    total = math.fsum(fractions.values())
    if not all(value >= 0 for value in fractions.values()) or not math.isclose(total, 1, abs_tol=1e-6):
        raise RecipeError(
            f"fractions must be 0 or more and sum to 1, got {dict(fractions)} (sum {total:g}); correct them"
        )
    names = [name for name, value in fractions.items() if value > 0]
    ends = list(itertools.accumulate(fractions[name] for name in names))

    def side(subject: str) -> str:
        draw = uniform("split", seed, subject)
        return next((name for name, end in zip(names, ends, strict=True) if draw < end), names[-1])

    questions = list(questions)
    keys = together([q.subjects for q in questions], image_identity())
    return [replace(question, split=side(key)) for question, key in zip(questions, keys, strict=True)]


def together(subjects: Iterable[Sequence[Subject]], identify: Callable[[Subject], str]) -> list[str]:
    """Return by what each question goes where those that share an image must stay together.

    Questions that share one directly, or through others, go by the smallest id of all their images; those about one
    image by its id.

    Args:
        subjects: what each question is about, at least one image or text.
        identify: an `image_identity`.
    """
    above: dict[str, str] = {}  # a forest, whose roots are the smallest ids

    def root(key: str) -> str:
        while above.setdefault(key, key) != key:
            above[key] = above[above[key]]
            key = above[key]
        return key

    keys = [[identify(subject) for subject in own] for own in subjects]
    for first, *others in keys:
        for other in others:
            low, high = sorted((root(first), root(other)))
            above[high] = low
    return [root(own[0]) for own in keys]


def in_turn(queues: Sequence[Iterable[T]], count: int, shares: Sequence[float] | None = None) -> list[T]:
    """Return the first `count` of what queues hold, one from each in turn; those that are empty are passed over.

    With `shares` above 0 a queue's turn comes as often as its share says, the n-th at (n − ½) / share (Sainte-Laguë).
    """
    shares = shares or [1.0] * len(queues)
    turns = zip(queues, shares, strict=True)
    placed = [((n + 0.5) / share, item) for queue, share in turns for n, item in enumerate(queue)]
    return [item for _, item in sorted(placed, key=lambda each: each[0])[:count]]


def uniform(purpose: str, seed: int, *parts: str) -> float:
    """Return a number in [0, 1) that depends on the arguments alone.

    `purpose` keeps draws for different ends independent: were splits and sites cut from the same number, the images of
    one split would all go to one site.
    """
    digest = hashlib.sha256(json.dumps([purpose, seed, *parts]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def image_identity() -> Callable[[Subject], str]:
    """Return what tells subjects apart: `accord.data.images.image_id`, or the text itself of a question without image.

    It has a memory, so that a file with many questions is read once.
    """
    known: dict[Subject, str] = {}

    def identify(subject: Subject) -> str:
        if subject not in known:
            known[subject] = f"text {subject}" if isinstance(subject, str) else image_id(subject)
        return known[subject]

    return identify


def _split_of(where: str, row: Row) -> str:
    split = row.get("split", "test")
    if split not in SPLITS:
        raise DataError(f"{where}: unknown split {split!r}; use {', '.join(SPLITS)}, or leave the field out for test")
    return str(split)


def _answer(value: object) -> str:
    answer = text_of("answer", value)
    if not normalise_answer(answer):
        raise BadRow(f"the answer {answer!r} is empty once normalised")
    return answer

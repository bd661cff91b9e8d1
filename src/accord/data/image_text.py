"""Read pictures with texts that describe them, to pre-train on: a caption is the answer to one fixed instruction.

    {"image": "images/0000.jpg", "caption": "A dog bites a ball."}
    {"image": "images/0001.jpg", "split": "pretrain", "captions": ["Ein Hund spielt.", "A dog plays."]}

The rows are JSON Lines, or a Hugging Face data set (a folder made by `save_to_disk`, a folder of Parquet files, …), and
a text is one string or a list of several. Texts are kept as they are written, in any language, but for space around
them. Every caption becomes a question of its own; those of one picture share an id, and are each other's `references`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from warnings import warn

from accord.data.cells import ImageCell
from accord.data.questions import SPLITS, image_identity
from accord.data.rows import Row, column, keep_good, read_jsonl, text_of
from accord.data.saved import named_rows, open_dataset, undecoded
from accord.errors import DataError, DataWarning, RecipeError
from accord.types import Question

PROMPT: Final = "Describe the picture in one sentence."


def read_image_text(
    path: Path | str,
    *,
    split: str = "train",
    image_column: str = "image",
    text_column: str = "caption",
    prompt: str = PROMPT,
    splits: Mapping[str, str] | None = None,
    domain: str | None = None,
) -> list[Question]:
    """Read captions as questions of type "caption".

    Args:
        path: a `.jsonl` file, with images relative to its folder and inside it, or what `datasets` opens.
        split: of a Hugging Face data set.
        image_column: what holds the image.
        text_column: what holds the text, or a list of texts.
        prompt: the instruction that every caption answers.
        splits: Accord's split for each value of the column `split`; rows with other values are not read. Without it,
            every row is in its `split` of a JSON Lines file or else in `split`, and `split_by_image` assigns Accord's.
        domain: what to call the source; by default its folder, or the data set's name.

    Raises:
        RecipeError: `splits` names a split that Accord has not, or the prompt is empty.
        DataError: the data or a column is missing, more than 20 % of the captions are bad, or none is left.

    Warns:
        DataWarning: captions were left out: empty, about an image that cannot be read, or twice about one picture.
    """
    if unknown := [name for name in (splits or {}).values() if name not in SPLITS]:
        raise RecipeError(f"splits names the split {unknown[0]!r}; use {', '.join(SPLITS)}")
    if not prompt.strip():
        raise RecipeError("the prompt of captions is empty; write an instruction, or leave prompt out")
    place = Path(path)
    lines = place.suffix == ".jsonl"
    name = domain or (place.resolve().parent.name if lines else place.name)
    needed = [image_column, text_column, *(["split"] if splits else [])]
    images = ImageCell(place.parent) if lines else ImageCell(None, beside=place if place.is_dir() else None)
    source = str(place) if lines else f"{path}[{split}]"
    rows: Iterable[tuple[str, Row | None]]
    if lines:
        rows = read_jsonl(place)
    else:
        dataset = undecoded(open_dataset(str(path), split), source, needed, image_column)
        rows = named_rows(dataset, source)

    def parse(where: str, row: Row) -> Question | None:
        given = str(row.get("split", split))
        if splits and given not in splits:
            return None
        return Question(
            id="",
            image=images.source(row[image_column]),
            text=prompt.strip(),
            answer=text_of(text_column, row[text_column]),
            question_type="caption",
            split=splits[given] if splits else given,
            domain=name,
        )

    found = keep_good(_each_text(rows, needed, text_column), parse, source=source)
    if not found:
        wanted = f" of the splits {', '.join(splits)}" if splits else ""
        raise DataError(f"{source}: no caption is left{wanted}; choose another split, or add captions")
    return _by_picture(found, source)


def _each_text(
    rows: Iterable[tuple[str, Row | None]], needed: Iterable[str], text_column: str
) -> Iterator[tuple[str, Row | None]]:
    """Yield a row for each text of a row, so that one bad text leaves the others."""
    for where, row in rows:
        if row is None:
            yield where, None
            continue
        for name in needed:
            column(where, row, name)
        texts = row[text_column]
        for text in texts if isinstance(texts, list) and texts else [texts]:
            yield where, {**row, text_column: text}


def _by_picture(found: Sequence[Question], source: str) -> list[Question]:
    """Leave out what comes twice; number the pictures, and let captions of one know each other."""
    identify = image_identity()
    texts: dict[str, dict[str, None]] = {}
    kept: list[tuple[str, Question]] = []
    for question in found:
        (subject,) = question.subjects
        key = identify(subject)
        if question.answer not in texts.setdefault(key, {}):
            texts[key][question.answer] = None
            kept.append((key, question))
    if twice := len(found) - len(kept):
        warn(f"{source}: left out {twice} captions that came twice about one picture", DataWarning, stacklevel=3)
    number = {key: n for n, key in enumerate(texts)}
    return [
        replace(q, id=f"{q.domain}-{number[key]}", references=tuple(t for t in texts[key] if t != q.answer))
        for key, q in kept
    ]

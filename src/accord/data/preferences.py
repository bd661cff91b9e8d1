"""Read, write and construct preference pairs in TRL's conversational preference form.

One row is `{"prompt": [messages], "chosen": [message], "rejected": [message], "images": [image]}`, what TRL's trainers
take for a vision-language model, with `question_id`, `question_type`, `constructed` and `person` beside it where known.
On disk it is a JSON Lines file with relative image paths, or a folder of the `datasets` library. Plain strings instead
of messages are read too, and the forms of other programs (`accord.data.forms`).

A pair whose answers agree once normalised is left out: it carries no preference, and its Bradley-Terry loss is log 2
whatever the model says.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import datasets  # type: ignore[import-untyped]

from accord.data.cells import FIELDS, ImageCell, ImageField
from accord.data.conversation import content_blocks, read_completion, read_prompt
from accord.data.forms import COLUMNS, RawPair, pair_cells, raw_pair
from accord.data.images import image_bytes, image_format
from accord.data.negatives import NegativeMix, Negatives
from accord.data.questions import image_identity, normalise_answer
from accord.data.rows import BadRow, Row, keep_good, read_jsonl
from accord.data.saved import is_parquet, is_saved, named_rows, open_dataset, raw_images
from accord.errors import DataError, DataWarning, RecipeError
from accord.runs import write_atomic
from accord.types import ImageSource, PreferencePair, Question, Subject, prompt_of

__all__ = [
    "MIN_PAIRS",
    "NegativeMix",
    "build_preferences",
    "digest_of",
    "pair_row",
    "read_preferences",
    "to_dataset",
    "write_preferences",
    "write_rows",
]

MIN_PAIRS = 8
DEFAULT_MIX = NegativeMix()
OPTIONAL = ("question_id", "question_type", "constructed", "person", "weight", "tie")
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def read_preferences(
    path: Path | str,
    *,
    ties: bool = False,
    least: int = MIN_PAIRS,
    raw: Callable[[str, Row], RawPair] = raw_pair,
    columns: Sequence[str] = COLUMNS,
) -> list[PreferencePair]:
    """Read a site's pairs from a `.jsonl` file, Parquet files, or a folder made by `datasets.save_to_disk`.

    Images are in `images` (a list) or `image` (one), or as `accord.data.cells` says; in a file, as paths relative to
    the file's folder. Pairs without images have no image block in their prompts. Pairs without a `question_id` get one
    from their images and prompt. A pair may have a `weight` above 0, and `"tie": true` where its answers were found
    equally good: such a pair is left out, for most of what reads pairs would take its first answer for the better one.

    Args:
        path: the file or folder.
        ties: keep the ties.
        least: fewer pairs are refused.
        raw: finds prompt, chosen and rejected answer in a row.
        columns: what `raw` looks at.

    Raises:
        DataError: the file is missing or is not UTF-8 JSON Lines, a column is missing, one `question_id` stands for two
            prompts, more than 20 % of the rows are bad, or fewer than `least` pairs are left.

    Warns:
        DataWarning: rows were left out: an empty or malformed prompt or answer, two answers that agree, a bad image,
            a tie.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".parquet":
        dataset = _open_pairs(path, columns)
        pictures = dataset.select_columns(
            [name for name in dict.fromkeys((*FIELDS, *columns)) if name in dataset.column_names]
        )
        field = ImageField(pictures, source=str(path), cells=pair_cells)
        rows: Iterable[tuple[str, Row | None]] = named_rows(dataset, str(path))
        images = ImageCell(None, beside=path if path.is_dir() else path.parent)
    else:
        rows = list(read_jsonl(path))
        field = ImageField((row for _, row in rows), source=str(path), cells=pair_cells)
        images = ImageCell(path.parent)
    identify = image_identity()
    content: dict[str, str] = {}

    def parse(where: str, row: Row) -> PreferencePair:
        pair = _pair(where, row, raw(where, row), field, images)
        digest = digest_of(pair, identify)
        pair = pair if pair.question_id else replace(pair, question_id=digest)
        if content.setdefault(pair.question_id, digest) != digest:
            raise DataError(
                f"{where}: question_id {pair.question_id!r} stands for another prompt or image further up; "
                "give every prompt and image its own id, or leave the column out"
            )
        return pair

    pairs = keep_good(rows, parse, source=str(path))
    if not ties and (tied := sum(pair.tie for pair in pairs)):
        warnings.warn(f"{path}: {tied} of {len(pairs)} pairs are ties, left out", DataWarning, stacklevel=2)
        pairs = [pair for pair in pairs if not pair.tie]
    if len(pairs) < least:
        raise DataError(
            f"{path}: the site has {len(pairs)} pairs, and a reward model needs at least {least}; "
            "collect more preferences, or leave the site out"
        )
    return pairs


def write_preferences(path: Path | str, pairs: Iterable[PreferencePair]) -> None:
    """Write `pairs` to a `.jsonl` file, and each distinct image once to `images/<sha256>.<ext>` beside it.

    Raises:
        RunError: the disk is full or the folder cannot be written.
        ImageError: an image of a pair cannot be read.
    """
    write_rows(path, ((pair_row(pair), pair.images) for pair in pairs))


def write_rows(path: Path | str, rows: Iterable[tuple[Row, Sequence[ImageSource]]]) -> None:
    """Write rows and the images that each is about: the rows to a `.jsonl` file, the images to `images/` beside it.

    The images come first and the file last, whole or not at all; after a failure the images it added are removed.

    Raises:
        RunError: the disk is full or the folder cannot be written.
        ImageError: an image cannot be read.
    """
    path = Path(path)
    added: list[Path] = []
    stored: dict[ImageSource, str] = {}
    try:
        lines: list[str] = []
        for row, sources in rows:
            for source in sources:
                if source not in stored:
                    stored[source] = _store(source, path.parent, added)
            images = {"images": [stored[source] for source in sources]} if sources else {}
            lines.append(json.dumps({**row, **images}, ensure_ascii=False) + "\n")
        write_atomic(path, "".join(lines))
    except BaseException:
        for file in added:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not ours to remove while it holds anything, or if it never came to be
            (path.parent / "images").rmdir()
        raise


def to_dataset(pairs: Iterable[PreferencePair]) -> datasets.Dataset:
    """Return the pairs as a data set that TRL's `DPOTrainer` and `RewardTrainer` take as it is.

    Images in files stay references until `save_to_disk` copies them in. Where no pair has any, there is no column,
    nor one for persons where no pair names one. Ties are left out, for these trainers would take the first answer for
    the better one, and weights have no place.
    """
    rows = [{**pair_row(pair), "images": [*map(_cell, pair.images)]} for pair in pairs if not pair.tie]
    text = datasets.Value("string")
    pictured = {"images": datasets.List(datasets.Image())} if any(row["images"] for row in rows) else {}
    named = {"person": text} if any("person" in row for row in rows) else {}
    blocks = datasets.List({"type": text, "text": text})
    features = datasets.Features(
        prompt=datasets.List({"role": text, "content": blocks}),
        chosen=datasets.List({"role": text, "content": text}),
        rejected=datasets.List({"role": text, "content": text}),
        question_id=text,
        question_type=text,
        constructed=datasets.Value("bool"),
        **named,
        **pictured,
    )
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in features}, features=features)


def build_preferences(
    questions: Sequence[Question],
    *,
    rejected_per_question: int,
    generator: random.Random,
    policy_samples: Mapping[str, Sequence[str]] | None = None,
    answers_by_type: Mapping[str, Sequence[str]] | None = None,
    mix: NegativeMix = DEFAULT_MIX,
) -> list[PreferencePair]:
    """Construct pairs from reference answers: the reference is chosen, wrong answers of four sources are rejected.

    Same-type negatives alone make a reward model that reinforcement learning hacks: it never saw "red red", a shape
    for a colour or an empty answer, scores them at random, and the policy finds the random highs. See
    `accord.data.negatives` for the sources. The pairs are marked `constructed`: no person judged them.

    Args:
        questions: with their reference answers, `[Q]`.
        rejected_per_question: n, at least 1; a question yields fewer pairs when its sources hold fewer answers.
        generator: the only source of chance; the same state gives the same pairs.
        policy_samples: by question id, what the policy answered; only the wrong ones are used.
        answers_by_type: the known answers of each question type; None collects them from `questions`.
        mix: shares of the sources.

    Returns:
        At most Q x n pairs, question by question.

    Raises:
        RecipeError: `rejected_per_question` is below 1.
        DataError: no pair could be built.
    """
    if rejected_per_question < 1:
        raise RecipeError(f"rejected_per_question must be at least 1, got {rejected_per_question}; raise it")
    negatives = Negatives(_answers_by_type(questions) if answers_by_type is None else answers_by_type, mix)
    samples = policy_samples or {}
    pairs = [
        PreferencePair(
            prompt=prompt_of(question),
            chosen=question.answer,
            rejected=rejected,
            images=question.images,
            question_id=question.id,
            question_type=question.question_type,
            constructed=True,
        )
        for question in questions
        for rejected in negatives.draw(question, samples.get(question.id, ()), rejected_per_question, generator)
    ]
    if not pairs:
        raise DataError(
            f"no preference pair could be built from {len(questions)} questions with {mix}; "
            "give questions with more than one answer, or raise the share of another source"
        )
    return pairs


def _answers_by_type(questions: Sequence[Question]) -> dict[str, list[str]]:
    answers: dict[str, dict[str, None]] = {}
    for question in questions:
        answers.setdefault(question.question_type, {})[question.answer] = None
    return {kind: list(found) for kind, found in answers.items()}


def pair_row(pair: PreferencePair) -> dict[str, object]:
    """Return the row of a pair in TRL's form, without its images."""
    return {
        "prompt": [{"role": message["role"], "content": content_blocks(message["content"])} for message in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "question_id": pair.question_id,
        "question_type": pair.question_type,
        "constructed": pair.constructed,
        **({"person": pair.person} if pair.person else {}),
        **({"weight": pair.weight} if pair.weight != 1 else {}),
        **({"tie": True} if pair.tie else {}),
    }


def _store(source: ImageSource, folder: Path, added: list[Path]) -> str:
    data = image_bytes(source)
    name = f"images/{hashlib.sha256(data).hexdigest()}.{EXTENSIONS[image_format(data)]}"
    file = folder / name
    if not (file.is_file() and file.read_bytes() == data):
        if not file.exists():
            added.append(file)
        write_atomic(file, data)
    return name


def _cell(source: ImageSource) -> dict[str, object]:
    return {"path": str(source), "bytes": None} if isinstance(source, Path) else {"path": None, "bytes": source}


def _open_pairs(path: Path, columns: Sequence[str]) -> datasets.Dataset:
    if not is_saved(path) and not is_parquet(path):
        files = ", ".join(sorted(file.name for file in path.glob("*.json*"))[:5])
        raise DataError(
            f"{path}: the folder was not made by save_to_disk (it has no state.json) and holds no Parquet file; "
            f"name a .jsonl file inside it instead{f', one of {files}' if files else ''}"
        )
    dataset = open_dataset(str(path), None)
    return raw_images(dataset, [*dict.fromkeys((*columns, *OPTIONAL))])


def _pair(where: str, row: Row, raw: RawPair, field: ImageField, images: ImageCell) -> PreferencePair:
    sources = images.sources(field(where, row))
    messages = read_prompt(raw.prompt, len(sources))
    right, wrong = read_completion("chosen", raw.chosen), read_completion("rejected", raw.rejected)
    if not normalise_answer(right):
        raise BadRow("the chosen answer is empty")
    if normalise_answer(right) == normalise_answer(wrong):
        raise BadRow(f"chosen and rejected are the same answer, {right!r:.60}")
    return PreferencePair(
        prompt=messages,
        chosen=right,
        rejected=wrong,
        images=sources,
        question_id="" if row.get("question_id") is None else str(row["question_id"]),
        question_type=str(row.get("question_type") or ""),
        constructed=row.get("constructed") is True,
        person="" if row.get("person") is None else str(row["person"]),
        weight=_weight(row.get("weight")),
        tie=row.get("tie") is True,
    )


def _weight(value: object) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadRow(f"the weight is {value!r:.40}; make it a number above 0")
    return float(value)


def digest_of(pair: PreferencePair, identify: Callable[[Subject], str]) -> str:
    """Return what is the same for all pairs about the same images and prompt; `identify` is of `image_identity`."""
    images = [identify(source) for source in pair.images]
    return hashlib.sha256(json.dumps([list(pair.prompt), images]).encode()).hexdigest()[:16]

"""Open Hugging Face data sets, from a folder or by name, without running their code or decoding their images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets  # type: ignore[import-untyped]

from accord.data.rows import Row
from accord.errors import DataError


def open_dataset(name_or_path: str, split: str | None) -> datasets.Dataset:
    """Return one split of a folder made by `save_to_disk`, or of what `datasets.load_dataset` finds.

    Raises:
        DataError: there is no such data set or split, or it cannot be read.
    """
    folder = Path(name_or_path)
    try:
        if is_saved(folder):
            found = datasets.load_from_disk(name_or_path)
        elif folder.suffix == ".parquet" and folder.is_file():
            found = datasets.load_dataset("parquet", data_files=name_or_path, split="train")
        else:
            found = datasets.load_dataset(name_or_path, split=split)
    except Exception as error:  # missing, offline, damaged, unknown split: the library has no common error class
        raise DataError(
            f"{name_or_path}: cannot open the data set, split {split!r} ({type(error).__name__}: {error}); "
            "give a folder made by save_to_disk, or the name of a data set that can be reached"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split is None and len(found) == 1:
            return next(iter(found.values()))
        if split is None:
            first = next(iter(found))
            which = f"name one, as in {folder / first}" if is_saved(folder) else "put the files of one into a folder"
            raise DataError(f"{name_or_path}: the data set has the splits {', '.join(found)}; {which}")
        if split not in found:
            raise DataError(f"{name_or_path}: no split {split!r}; the splits present are {', '.join(found)}")
        return found[split]
    return found


def is_saved(folder: Path) -> bool:
    """Return whether `datasets.save_to_disk` made this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def is_parquet(place: Path) -> bool:
    """Return whether this is a Parquet file, or a folder of them."""
    return place.suffix == ".parquet" or (place.is_dir() and next(place.rglob("*.parquet"), None) is not None)


def named_rows(dataset: datasets.Dataset, source: str) -> Iterator[tuple[str, Row]]:
    """Yield where each row stands and the row, with the names of labels in place of their numbers."""
    names = {column: name for column, feature in dataset.features.items() if (name := _label_name(feature))}
    for number, row in enumerate(dataset):
        yield f"{source} row {number}", {**row, **{column: name(row[column]) for column, name in names.items()}}


def _label_name(feature: object) -> Callable[[object], object] | None:
    """Return what names the labels of a column; None for one that holds none."""
    if isinstance(feature, datasets.ClassLabel):
        return lambda label: None if label is None or label < 0 else feature.int2str(label)  # type: ignore[operator]
    inner = getattr(feature, "feature", None)
    if inner is not None and (name := _label_name(inner)):
        return lambda labels: [name(label) for label in labels] if isinstance(labels, list) else None
    return None


def raw_images(dataset: datasets.Dataset, columns: Sequence[str]) -> datasets.Dataset:
    """Return those of `columns` that are there, with images as `{"bytes", "path"}`, as stored."""
    kept = dataset.select_columns([name for name in columns if name in dataset.column_names])
    stored = datasets.Image(decode=False)
    for name, feature in kept.features.items():
        if isinstance(feature, datasets.Image):
            kept = kept.cast_column(name, stored)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            kept = kept.cast_column(name, datasets.List(stored))
    return kept


def undecoded(
    dataset: datasets.Dataset, source: str, columns: Sequence[str], image_column: str | None
) -> datasets.Dataset:
    """Return `columns` of `dataset`, with images, or lists of them, as `{"bytes", "path"}`, as stored.

    Without an `image_column` there are none.

    Raises:
        DataError: a column is missing, or `image_column` holds no images.
    """
    for name in columns:
        if name not in dataset.column_names:
            present = ", ".join(map(repr, dataset.column_names))
            raise DataError(
                f"{source}: column {name!r} is missing; the columns present are {present}; name the right one"
            )
    stored = datasets.Image(decode=False)
    kept = dataset.select_columns(list(columns))
    if not image_column:
        return kept
    many = getattr(dataset.features[image_column], "feature", None) is not None
    try:
        return kept.cast_column(image_column, datasets.List(stored) if many else stored)
    except Exception as error:  # pyarrow and datasets raise TypeError, ValueError and their own
        raise DataError(
            f"{source}: column {image_column!r} holds {dataset.features[image_column]}, not images; name the column "
            "that does"
        ) from error

"""Open Hugging Face data sets, from a folder or by name, without running their code or decoding their images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets  # type: ignore[import-untyped]

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
        if split not in found:
            raise DataError(f"{name_or_path}: no split {split!r}; the splits present are {', '.join(found)}")
        return found[split]
    return found


def is_saved(folder: Path) -> bool:
    """Return whether `datasets.save_to_disk` made this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def undecoded(
    dataset: datasets.Dataset, source: str, columns: Sequence[str], image_column: str | None, *, many: bool = False
) -> datasets.Dataset:
    """Return `columns` of `dataset`, with images (with `many`, lists of them) as `{"bytes", "path"}`, as stored.

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
    try:
        return kept.cast_column(image_column, datasets.List(stored) if many else stored)
    except Exception as error:  # pyarrow and datasets raise TypeError, ValueError and their own
        raise DataError(
            f"{source}: column {image_column!r} holds {dataset.features[image_column]}, not "
            f"{'lists of images' if many else 'images'}; name the column that does"
        ) from error

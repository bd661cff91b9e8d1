"""Read what a run noted line by line: `metrics.jsonl` (curves) and `gallery.jsonl` (examples before and after)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from accord.errors import RunError
from accord.runs import read_lines, stage_of

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class MetricsRow:
    """One line of `metrics.jsonl`; a value that its stage does not note is None.

    `accuracy` is a number in the router's stage, and one number for each question type in the alignment's.
    """

    stage: str
    step: int = 0
    reward: float | None = None
    reward_std: float | None = None
    kl: float | None = None
    accuracy_macro: float | None = None
    accuracy: float | Mapping[str, float | None] | None = None
    trust: Mapping[str, float | None] | None = None  # each site's share of all sites', by hidden questions


@dataclass(frozen=True, slots=True)
class SiteScores:
    """One site's standardised scores of the answers before and after; None where it was not asked or absent."""

    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class GalleryRow:
    """One question of the gallery: both answers, the routing weights and every site's scores."""

    image: str | None  # None: the question is without one
    question: str
    answer: str
    question_type: str
    before: str
    after: str
    routed: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, SiteScores | None] = field(default_factory=dict)
    further: tuple[str, ...] = ()  # images after the first


def read_metrics(path: Path) -> list[MetricsRow]:
    """Read `metrics.jsonl`; an absent file is an empty list, an unfinished last line is left out.

    Raises:
        RunError: a line is damaged; the message names file and line.
    """
    return _rows(path, MetricsRow)


def read_gallery(path: Path) -> list[GalleryRow]:
    """Read `gallery.jsonl`; an absent file is an empty list, an unfinished last line is left out.

    Raises:
        RunError: a line is damaged; the message names file and line.
    """
    return _rows(path, GalleryRow)


def stages_begun(run: Path) -> list[str]:
    """Return the stages that noted something in `metrics.jsonl`, in order; a site's stage is `site <name>`."""
    return list(dict.fromkeys(stage_of(record) for record in read_lines(run / "metrics.jsonl")))


def _rows(path: Path, kind: type[Row]) -> list[Row]:
    rows = []
    for number, record in enumerate(read_lines(path), start=1):
        try:
            rows.append(msgspec.convert(record, type=kind))
        except msgspec.ValidationError as error:
            raise RunError(
                f"{path}, line {number}, is damaged: {error}; restore the file, or remove that line"
            ) from error
    return rows

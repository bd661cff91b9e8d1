"""Intervals by hand, and a summary file that is read back as written or refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accord.errors import DataError, RunError
from accord.evaluation.summary import (
    EvaluationSummary,
    Graded,
    PolicySummary,
    Summary,
    TrafficRow,
    accuracy,
    accuracy_by_image,
    competence_summary,
    headline,
    macro_variance,
    read_summary,
    summary_schema,
    vqa_summary,
    wilson_interval,
    write_summary,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_wilson_interval() -> None:
    """p = 0.25, n = 100, z² = 3.841459: centre (0.25 + 0.0192073) / 1.0384146 = 0.2592484;
    half 1.959964 √(0.001875 + 0.0000960365) / 1.0384146 = 1.959964 · 0.0443964 / 1.0384146 = 0.0837963.
    """
    assert wilson_interval(25, 100) == pytest.approx((0.1754521, 0.3430447), abs=1e-6)


def test_wilson_interval_at_the_ends() -> None:
    """At p = 0 the upper end is z² / (n + z²) = 3.841459 / 13.841459 = 0.2775328; p = 1 mirrors it."""
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson_interval(0, 10)[0] >= 0.0
    assert wilson_interval(10, 10)[1] <= 1.0


def test_macro_interval() -> None:
    """p = 0.25 and 0.80 with n = 100 and 400: mean 0.525; variance (0.1875/100 + 0.16/400) / 4 = 0.00056875;
    half 1.959964 · 0.0238485 = 0.0467422. Overall (25 + 320) / 500 = 0.69.
    """
    result = accuracy({"colour": (25, 100), "shape": (320, 400)})
    assert (result.n, result.macro, result.overall) == (500, pytest.approx(0.525), pytest.approx(0.69))
    assert (result.macro_low, result.macro_high) == pytest.approx((0.4782578, 0.5717422), abs=1e-6)
    assert (result.by_type["colour"].correct, result.by_type["colour"].n) == (25, 100)


def test_macro_interval_stays_within_its_range() -> None:
    result = accuracy({"colour": (1, 2), "shape": (4, 4)})
    assert result.macro_high == 1.0


@pytest.mark.parametrize(
    ("counts", "named"), [({}, "at least one"), ({"colour": (0, 0)}, "colour"), ({"shape": (5, 4)}, "shape")]
)
def test_impossible_counts_are_refused(counts: dict[str, tuple[int, int]], named: str) -> None:
    with pytest.raises(DataError, match=named):
        accuracy(counts)


def test_an_image_each_leaves_the_types_intervals_as_they_are() -> None:
    """p = 1/4 of 4 and 1/2 of 2; the effective numbers are 4 and 2, and Wilson's intervals those of 1/4 and 1/2.

    The macro mean: the moves (y - p) / (n · 2) are (3, -1, -1, -1) / 32 and (4, -4) / 32; their squares sum to
    44 / 1024, and SE² = 6/5 · 44 / 1024 = .0515625.
    """
    result = accuracy_by_image({"a": [1, 0, 0, 0], "b": [1, 0]}, {"a": [0, 1, 2, 3], "b": [4, 5]})
    plain = accuracy({"a": (1, 4), "b": (1, 2)})
    for name, n in (("a", 4), ("b", 2)):
        of_type = result.by_type[name]
        assert of_type.effective_n == pytest.approx(n)
        assert (of_type.low, of_type.high) == pytest.approx((plain.by_type[name].low, plain.by_type[name].high))
    assert (result.n, result.images, result.macro) == (6, 6, plain.macro)
    assert result.macro_error == pytest.approx(math.sqrt(0.0515625))
    assert macro_variance(result) == pytest.approx(0.0515625)


def test_questions_about_one_image_count_less() -> None:
    """Of each of 5 images both questions are right, or both wrong, 2 images right: as if 4.44 questions were asked.

    SE² = 5/4 · (2 (2 · .6)² + 3 (2 · .4)²) / 10² = 5/4 · 4.8 / 100 = .06, alone .24 / 9, n_eff = 10 · .02667 / .06.
    """
    images = {"a": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]}
    result = accuracy_by_image({"a": [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]}, images)
    number = 10 * 0.24 / 9 / 0.06
    assert result.by_type["a"].effective_n == pytest.approx(number) == pytest.approx(40 / 9)
    assert (result.by_type["a"].low, result.by_type["a"].high) == pytest.approx(wilson_interval(0.4 * number, number))
    assert result.macro_high - result.macro == pytest.approx(1.959964 * math.sqrt(0.06), abs=1e-6)
    assert result.images == 5 and result.by_type["a"].n == 10 and result.by_type["a"].correct == 4


def test_a_single_image_says_nothing_of_others() -> None:
    result = accuracy_by_image({"a": [1, 0]}, {"a": [7, 7]})
    assert (result.macro_low, result.macro_high) == (0, 1) and result.by_type["a"].effective_n == 1
    with pytest.raises(DataError, match="'a' has 2 outcomes and 1 images"):
        accuracy_by_image({"a": [1, 0]}, {"a": [7]})


def test_a_clustered_accuracy_is_read_back_and_an_older_one_has_none(
    tmp_path: Path, make_summary: Callable[..., Summary]
) -> None:
    path = tmp_path / "summary.json"
    full = make_summary()
    aligned = accuracy_by_image({"colour": [1, 0, 0]}, {"colour": [0, 0, 1]})
    write_summary(path, make_summary(evaluation=dataclasses.replace(full.evaluation, aligned=aligned)))
    assert read_summary(path).evaluation.aligned == aligned
    record = json.loads(path.read_text())
    for name in ("images", "macro_error"):
        del record["evaluation"]["base"][name]
    for of_type in record["evaluation"]["base"]["by_type"].values():
        del of_type["effective_n"]
    path.write_text(json.dumps(record))
    assert read_summary(path).evaluation.base == full.evaluation.base


def test_a_summary_is_read_back_as_written(tmp_path: Path, make_summary: Callable[..., Summary]) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, make_summary())
    assert read_summary(path) == make_summary()
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_what_was_not_measured_is_null(tmp_path: Path, make_summary: Callable[..., Summary]) -> None:
    full = make_summary()
    evaluation = dataclasses.replace(full.evaluation, base=None, question_only=None, shuffled_image=None, compare={})
    summary = dataclasses.replace(full, evaluation=evaluation, router=None, peak_memory_bytes=None)
    write_summary(tmp_path / "summary.json", summary)
    assert read_summary(tmp_path / "summary.json") == summary


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_cannot_hold_is_not_written(
    tmp_path: Path, make_summary: Callable[..., Summary], value: float
) -> None:
    with pytest.raises(RunError, match=r"seconds"):
        write_summary(tmp_path / "summary.json", make_summary(seconds={"align": value}))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_type_is_not_written(tmp_path: Path, make_summary: Callable[..., Summary]) -> None:
    policy = PolicySummary("base", "Llava", parameters="many")  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"\$\.policy\.parameters"):
        write_summary(tmp_path / "summary.json", make_summary(policy=policy))


def _without(record: dict[str, Any]) -> None:
    del record["policy"]["architecture"]


def _of_text(record: dict[str, Any]) -> None:
    record["seed"] = "zero"


def _above_one(record: dict[str, Any]) -> None:
    record["evaluation"]["aligned"]["macro"] = 55.0


def _of_tomorrow(record: dict[str, Any]) -> None:
    record["schema_version"] = 2


def _without_types(record: dict[str, Any]) -> None:
    record["evaluation"]["aligned"]["by_type"] = {}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_without, "architecture.*policy"),
        (_of_text, "seed"),
        (_above_one, "evaluation.aligned.macro"),
        (_of_tomorrow, "schema_version"),
        (_without_types, "by_type"),
    ],
)
def test_a_damaged_field_is_named(
    tmp_path: Path, make_summary: Callable[..., Summary], damage: Callable[[dict[str, Any]], None], named: str
) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, make_summary())
    record = json.loads(path.read_text())
    damage(record)
    path.write_text(json.dumps(record))
    with pytest.raises(RunError, match=f"(?s)summary.json.*{named}"):
        read_summary(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_what_is_not_a_summary_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(RunError, match=r"not a summary"):
        read_summary(tmp_path / "summary.json")


def test_an_absent_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finished run"):
        read_summary(tmp_path / "summary.json")


def test_a_field_of_a_later_version_is_ignored(tmp_path: Path, make_summary: Callable[..., Summary]) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, make_summary())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"carbon_grams": 3}))
    assert read_summary(path) == make_summary()


def test_competence_by_hand() -> None:
    """Items shape, colour, shape, colour; in alphabetical order that is colour 1 and 3, shape 0 and 2.

    Site a has 1, 0, 1, 1: of colour 0 and 1, of shape 1 and 1. Site b did not answer, site c had nothing right.
    """
    nan = math.nan
    found = competence_summary(
        ["a", "b", "c"],
        ["shape", "colour", "shape", "colour"],
        [[1, 0, 1, 1], [nan] * 4, [0] * 4],
        neighbours=2,
        experts=1,
    )
    assert found.items == {"colour": 2, "shape": 2}
    assert found.sites == {
        "a": {"colour": Graded(1, 2), "shape": Graded(2, 2)},
        "b": {},
        "c": {"colour": Graded(0, 2), "shape": Graded(0, 2)},
    }
    assert found.answers == {"a": "0111", "b": "----", "c": "0000"}
    assert (found.neighbours, found.experts) == (2, 1)


def test_competence_is_read_back_and_an_older_file_has_none(
    tmp_path: Path, make_summary: Callable[..., Summary]
) -> None:
    path = tmp_path / "summary.json"
    known = competence_summary(["a"], ["x"], [[1]], neighbours=1, experts=1)
    write_summary(path, make_summary(competence=known))
    assert read_summary(path).competence == known
    record = json.loads(path.read_text())
    del record["competence"], record["method"]
    path.write_text(json.dumps(record))
    assert read_summary(path) == make_summary() and read_summary(path).method == "routed"


def test_the_method_is_read_back(tmp_path: Path, make_summary: Callable[..., Summary]) -> None:
    write_summary(tmp_path / "summary.json", make_summary(method="fedgrpo"))
    assert read_summary(tmp_path / "summary.json").method == "fedgrpo"


def test_a_summary_says_that_there_is_no_competence(tmp_path: Path, make_summary: Callable[..., Summary]) -> None:
    write_summary(tmp_path / "summary.json", make_summary())
    assert json.loads((tmp_path / "summary.json").read_text())["competence"] is None


def test_the_interval_of_a_vqa_accuracy_by_hand() -> None:
    """Types 0.6 and 1: the mean 0.8. Picture 0 moves it by (0.3 - 0.6) / (2 · 2) = -0.075, picture 1 by 0.075.

    The error is √(2 / 1 · 2 · 0.075²) = 0.15, half an interval 0.294; no share is above 1. One picture tells nothing.
    """
    found = vqa_summary({"a": [0.3, 0.9], "b": [1.0]}, {"a": [0, 1], "b": [0]})
    assert (found.n, found.by_type) == (3, {"a": pytest.approx(0.6), "b": 1.0})
    assert (found.macro, found.macro_low, found.macro_high) == pytest.approx((0.8, 0.8 - 1.959964 * 0.15, 1.0))
    alone = vqa_summary({"a": [0.5, 0.5]}, {"a": [0, 0]})
    assert (alone.macro_low, alone.macro_high) == (0.0, 1.0)


def test_the_committed_schema_is_current() -> None:
    assert (DOCS / "summary.schema.json").read_text(encoding="utf-8") == summary_schema()


def test_the_schema_requires_every_field_and_resolves(make_summary: Callable[..., Summary]) -> None:
    schema = json.loads(summary_schema())
    definitions = schema["$defs"]
    optional = {  # older files have no such field
        "Summary": {"competence", "method", "projector", "trust"},
        "ProjectorRound": {"beta", "cosine", "lag"},
        "ProjectorSummary": {"silos"},
        "ProjectorMeasure": {"cider"},
        "Accuracy": {"images", "macro_error"},
        "Certificate": {"way", "flip", "router", "router_steps"},
        "SiteSummary": {"attack", "privacy"},
        "TypeAccuracy": {"effective_n"},
        "TrafficRow": {"refused"},
        "RouterSummary": {"audit"},
        "EvaluationSummary": {"vqa"},
        "TrustSummary": {"two_faced", "triggered", "asked"},
    }
    named = {f.name for f in dataclasses.fields(make_summary())}
    assert set(definitions["Summary"]["required"]) == named - optional["Summary"]
    assert all(
        set(record["required"]) | optional.get(name, set()) == set(record["properties"])
        for name, record in definitions.items()
    )
    assert {name for name in re.findall(r'"#/\$defs/(\w+)"', summary_schema())} == set(definitions)


def test_the_manual_explains_every_field() -> None:
    manual = (DOCS / "summary.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `([\w.]+)`", manual, re.MULTILINE))
    for name, record in json.loads(summary_schema())["$defs"].items():
        section = "" if name == "Summary" else f"{name}."
        assert {f"{section}{field}" for field in record["properties"]} <= explained


def test_the_short_tables_say_what_the_records_say() -> None:
    """Two comparisons under their own names; an arm that was not run is not there."""
    evaluation = EvaluationSummary(
        base=accuracy({"a": (1, 4), "b": (3, 4)}),
        aligned=accuracy({"a": (4, 4), "b": (3, 4)}),
        question_only=None,
        shuffled_image=None,
        compare={"best-site": accuracy({"a": (0, 4), "b": (2, 4)}), "average": accuracy({"a": (2, 4), "b": (2, 4)})},
    )
    rows = [TrafficRow("x", "score", 2, 10, 3, 0), TrafficRow("x", "router", 1, 5, 5, 0)]
    short = headline(evaluation, rows)
    assert short["macro_accuracy"] == {"base": 0.5, "aligned": 0.875, "best-site": 0.25, "average": 0.5}
    assert short["accuracy_by_type"]["aligned"] == {"a": 1.0, "b": 0.75}
    assert short["bytes"] == {"x": {"to_site": 15, "from_site": 8}}
    assert set(headline(dataclasses.replace(evaluation, base=None), rows)["macro_accuracy"]) == {
        "aligned",
        "best-site",
        "average",
    }

"""Every figure is one well-formed SVG element, the same each time, whatever the names are and whatever is missing."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest

from accord.evaluation.figures import (
    NARROW,
    WIDE,
    accuracy_bars,
    comparison_bars,
    competence_heatmap,
    competence_items,
    curves,
    human_bytes,
    judging_heatmap,
    silo_scatter,
    traffic_bars,
)
from accord.evaluation.summary import TrafficRow, accuracy, competence_summary
from accord.evaluation.trace import MetricsRow

HOSTILE = '<script>alert("$x^2$")</script>'
BEFORE = accuracy({"colour": (20, 80), HOSTILE: (40, 80)})
AFTER = accuracy({"colour": (60, 80), HOSTILE: (44, 80)})
ROWS = [
    *(MetricsRow("align", step, reward=0.01 * step, kl=0.001 * step) for step in range(1, 80)),
    MetricsRow("align", 40, accuracy_macro=0.6, accuracy={"colour": 0.5, HOSTILE: None}),
    MetricsRow("router", 1, accuracy=0.9),
]
TRAFFIC = [TrafficRow("北京", HOSTILE, 3, 12_000_000, 0, 1), TrafficRow("colour", "score", 3, 700, 1_200, 0)]

NOBODY = competence_summary(["a"], ["x"], [[math.nan]], neighbours=1, experts=1)
COMPETENCE = competence_summary(
    [HOSTILE, "b", "silent"],
    ["colour", HOSTILE, "colour", "colour"],
    [[1, 0, 0, 1], [0, 1, 1, 1], [math.nan] * 4],
    neighbours=2,
    experts=1,
)

DRAWINGS: dict[str, Callable[[float], str]] = {
    "accuracy": lambda width: accuracy_bars(BEFORE, AFTER, {"question only": BEFORE}, width=width),
    "aligned only": lambda width: accuracy_bars(None, AFTER, {}, width=width),
    "curves": lambda width: curves(ROWS, width=width),
    "one step": lambda width: curves([MetricsRow("align", 1, reward=0.1)], width=width),
    "accuracy curve only": lambda width: curves(ROWS[-2:], width=width),
    "judging": lambda width: judging_heatmap({HOSTILE: {"a": 0.9, "b": 0.1}, "shape": {"a": 1.0}}, width=width),
    "many sites": lambda width: judging_heatmap({"x": {f"hospital number {k}": 0.05 for k in range(20)}}, width=width),
    "competence": lambda width: competence_heatmap(COMPETENCE, width=width),
    "items": lambda width: competence_items(COMPETENCE, width=width),
    "silos": lambda width: silo_scatter({HOSTILE: [(0, 1), (2, -3)], "$b": [(1, 1)], "none": []}, width=width),
    "traffic": lambda width: traffic_bars(TRAFFIC, width=width),
    "comparison": lambda width: comparison_bars({HOSTILE: BEFORE, "this": AFTER}, highlight="this", width=width),
}


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_one_safe_svg_element_and_always_the_same(name: str, width: float) -> None:
    text = DRAWINGS[name](width)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("role") == "img" and root.get("aria-label")
    assert "<script" not in text
    assert "#1a1b1c" not in text.replace("var(", "")  # the ink follows the page
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used <= set(re.findall(r'\sid="([^"]+)"', text))
    assert text == DRAWINGS[name](width)


@pytest.mark.parametrize(
    "text",
    [
        curves([]),
        curves([MetricsRow("router", 1)]),
        judging_heatmap({}),
        competence_items(NOBODY),
        traffic_bars([]),
        comparison_bars({}),
        silo_scatter({}),
        silo_scatter({"a": []}),
    ],
)
def test_nothing_to_draw_is_an_empty_text(text: str) -> None:
    assert text == ""


def test_who_is_good_at_what_is_written_in_the_cells() -> None:
    """Site 1: 2 of 3 colours and 0 of 1; site b: 2 of 3 and 1 of 1; the silent one a dash for each type."""
    drawn = re.findall(r">(\d+ %|–)<", competence_heatmap(COMPETENCE))
    assert sorted(drawn) == ["0 %", "100 %", "67 %", "67 %", "–", "–"]


def test_a_site_that_knows_more_fills_more_of_its_row() -> None:
    """Three items of one type: a knows the first and the last, b the first, c none, and nobody the second.

    That one comes last, so that a's two are one stretch, two thirds of the row's ground, and b's one third.
    """
    known = competence_summary(["a", "b", "c"], ["x"] * 3, [[1, 0, 1], [1, 0, 0], [0, 0, 0]], neighbours=1, experts=1)
    text = competence_items(known, width=WIDE)
    paths = re.findall(r'<path d="([^"]+)"[^>]*fill: var\(--figure-after[^>]*>', text.replace("\n", " "))
    ends = [sorted({float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", path)}) for path in paths]
    widths = [round(end[-1] - end[0], 2) for end in ends]
    whole = max(widths)
    assert [round(3 * width / whole, 2) for width in widths] == [3, 2, 3, 1, 3]  # each row's ground, then what is right
    assert ends[1][0] == ends[3][0] == ends[0][0]


def test_a_silo_has_its_size_and_no_more_points_than_can_be_seen() -> None:
    """Of 1,000 points every fourth is drawn, of 2 both: 252 marks, beside one a site in the legend."""
    text = silo_scatter({"a": [(n, n % 7) for n in range(1000)], "b": [(0, 0), (1, 1)]})
    assert "a: 1,000" in text and "b: 2" in text
    assert len(re.findall(r"<use ", text)) == 252 + 2


def test_a_reward_nobody_gave_is_a_gap() -> None:
    rows = [MetricsRow("align", step, reward=value) for step, value in enumerate([0.1, None, math.nan, 0.2])]
    assert curves(rows) == curves([rows[0], rows[3]])


def test_the_numbers_are_written_beside_the_bars() -> None:
    """colour: 20 / 80 = 25 % and 60 / 80 = 75 %."""
    assert "25 % → 75 %" in DRAWINGS["accuracy"](WIDE)


def test_the_controls_are_told_apart_by_shape_fill_and_place() -> None:
    """Both at 40 %: equal values, which once lay on each other in one colour."""
    share = accuracy({"colour": (4, 10)})
    drawing = accuracy_bars(None, share, {"question only": share, "shuffled image": share})
    shapes = re.findall(r'<path id="[^"]*" d="([^"]*)"', drawing)
    marks = re.findall(r'<use xlink:href="([^"]*)" x="([^"]*)" y="([^"]*)" style="fill: (var[^;]*);', drawing)
    assert len(shapes) == len(set(shapes)) == 2
    (first, second) = {shape: [mark for mark in marks if mark[0] == shape] for shape, *_ in marks}.values()
    assert {mark[3] for mark in first}.isdisjoint(mark[3] for mark in second)
    assert first[0][1] == second[0][1] and float(second[0][2]) - float(first[0][2]) > 7  # points


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (999_600, "1 MB")]
)
def test_human_bytes(size: int, shown: str) -> None:
    assert human_bytes(size) == shown

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
    curves,
    human_bytes,
    judging_heatmap,
    traffic_bars,
)
from accord.evaluation.summary import TrafficRow, accuracy
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

DRAWINGS: dict[str, Callable[[float], str]] = {
    "accuracy": lambda width: accuracy_bars(BEFORE, AFTER, {"question only": BEFORE}, width=width),
    "aligned only": lambda width: accuracy_bars(None, AFTER, {}, width=width),
    "curves": lambda width: curves(ROWS, width=width),
    "one step": lambda width: curves([MetricsRow("align", 1, reward=0.1)], width=width),
    "accuracy curve only": lambda width: curves(ROWS[-2:], width=width),
    "judging": lambda width: judging_heatmap({HOSTILE: {"a": 0.9, "b": 0.1}, "shape": {"a": 1.0}}, width=width),
    "many sites": lambda width: judging_heatmap({"x": {f"hospital number {k}": 0.05 for k in range(20)}}, width=width),
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
    [curves([]), curves([MetricsRow("router", 1)]), judging_heatmap({}), traffic_bars([]), comparison_bars({})],
)
def test_nothing_to_draw_is_an_empty_text(text: str) -> None:
    assert text == ""


def test_a_reward_nobody_gave_is_a_gap() -> None:
    rows = [MetricsRow("align", step, reward=value) for step, value in enumerate([0.1, None, math.nan, 0.2])]
    assert curves(rows) == curves([rows[0], rows[3]])


def test_the_numbers_are_written_beside_the_bars() -> None:
    """colour: 20 / 80 = 25 % and 60 / 80 = 75 %."""
    assert "25 % → 75 %" in DRAWINGS["accuracy"](WIDE)


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (999_600, "1 MB")]
)
def test_human_bytes(size: int, shown: str) -> None:
    assert human_bytes(size) == shown

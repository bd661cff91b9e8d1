"""Means, intervals and marks by hand; every output is readable, whatever the names are."""

import csv
import io
import math
import xml.etree.ElementTree as ElementTree

import pytest

from accord.evaluation.intervals import half_width, is_near, t_quantile
from accord.evaluation.table import Cell, macro, table, to_csv, to_figure, to_markdown


def cells(method, **by_type):
    """One cell a seed: `colour=[5, 6]` are 5 and 6 right answers out of 10."""
    seeds = range(len(next(iter(by_type.values()))))
    return [Cell(method, s, {name: (right[s], 10) for name, right in by_type.items()}, 0, 0, 60.0) for s in seeds]


def estimates(made, method):
    (row,) = [row for row in made.rows if row.method == method]
    return dict(zip([column.name for column in made.columns], row.values, strict=True))


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (30, 2.0423), (999, 1.9623)]
)
def test_student_quantiles(df, t):
    """From the printed table of the 97.5 % points."""
    assert t_quantile(df) == pytest.approx(t, abs=5e-5)


def test_half_width():
    """4, 5, 6: s = 1, so 4.3027 / √3 = 2.484; one value has none."""
    assert half_width([4.0, 5.0, 6.0]) == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert half_width([4.0]) is None


def test_columns_and_means():
    """Per seed colour .4 .5 .6, count .2 .2 .2, shape .6 .7 .8.

    In-domain (colour, shape) .5 .6 .7, held-out .2, overall .4 .4667 .5333: mean .4667, s = 1/15, half
    4.3027 · (1/15) / √3 = .1656.
    """
    made = table(cells("routed", colour=[4, 5, 6], count=[2, 2, 2], shape=[6, 7, 8]), {"colour", "shape"})
    names = ["in-domain", "held-out", "overall", "colour", "count", "shape", "to sites", "from sites", "time"]
    assert [column.name for column in made.columns] == names
    found = estimates(made, "routed")
    assert (found["in-domain"].mean, found["in-domain"].n) == (pytest.approx(0.6), 3)
    assert found["in-domain"].half == pytest.approx(0.1 * 4.302653 / math.sqrt(3), abs=1e-6)
    assert (found["held-out"].mean, found["held-out"].half) == (pytest.approx(0.2), 0)
    assert found["overall"].mean == pytest.approx(7 / 15)
    assert found["overall"].half == pytest.approx(4.302653 / 15 / math.sqrt(3), abs=1e-6)


def test_without_held_out_types_there_is_no_column_for_them():
    made = table(cells("routed", colour=[4]), {"colour"})
    assert [column.name for column in made.columns][:3] == ["in-domain", "overall", "colour"]


@pytest.mark.parametrize(
    ("best", "other", "near"),
    [
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], False),  # d = .1 each time: mean .1 > 0, however wide the values are
        ([0.5, 0.6, 0.7], [0.6, 0.5, 0.6], True),  # d = -.1, .1, .1: mean 1/30, s = .1155, error .0667
        ([0.5, 0.6, 0.7], [0.4, 0.6, 0.6], False),  # d = .1, 0, .1: mean .0667, s = .0577, error .0333
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], True),
        ([0.5], [0.5], True),
        ([0.5], [0.49], False),  # one seed has no error
    ],
)
def test_near_is_within_one_paired_standard_error(best, other, near):
    assert is_near(dict(enumerate(best)), dict(enumerate(other))) is near


@pytest.mark.parametrize(("behind", "near"), [(0.14, True), (0.15, False)])
def test_without_seeds_in_common_both_errors_count(behind, near):
    """Each .7 and .5, less `behind`: variances .02, so the error is √(.02/2 + .02/2) = .1414."""
    assert is_near({0: 0.7, 1: 0.5}, {2: 0.7 - behind, 3: 0.5 - behind}) is near


def test_marks():
    """d(average) = -.1, .1, .1 is near; median is .1 behind each time; what has a role is above and unmarked."""
    made = table(
        [
            *cells("ground-truth", colour=[9, 9, 9]),
            *cells("routed", colour=[5, 6, 7]),
            *cells("average", colour=[6, 5, 6]),
            *cells("median", colour=[4, 5, 6]),
            *cells("base", colour=[8, 8, 8]),
            *cells("pooled", colour=[9, 9, 9]),
            *cells("server-alone", colour=[8, 8, 8]),
            *cells("random", colour=[8, 8, 8]),
        ],
        {"colour"},
        {"ground-truth": "ceiling", "pooled": "bound", "server-alone": "control", "random": "chance"},
    )
    marks = {row.method: row.values[0].mark for row in made.rows}
    unmarked = dict.fromkeys(["base", "ground-truth", "pooled", "server-alone", "random", "median"], "")
    assert marks == {**unmarked, "routed": "best", "average": "near"}
    assert {row.method for row in made.rows if row.competes} == {"routed", "average", "median"}
    assert made.rows[0].method == "base"
    assert {column.name for column, value in zip(made.columns, made.rows[2].values, strict=True) if value.mark} == {
        "in-domain",
        "overall",
        "colour",
    }


def test_share_of_the_ground_truths_gain():
    """Base .2, ground truth .6 and .7: (.4 - .2) / .4 = .5 and (.3 - .2) / .5 = .2, mean .35."""
    base, bound = cells("base", colour=[2, 2]), cells("ground-truth", colour=[6, 7])
    share = "share of the ground truth's gain"
    roles = {"ground-truth": "ceiling"}
    made = table([*base, *bound, *cells("routed", colour=[4, 3])], {"colour"}, roles)
    assert (estimates(made, "routed")[share].mean, estimates(made, "routed")[share].n) == (pytest.approx(0.35), 2)
    assert estimates(made, "base")[share] is estimates(made, "ground-truth")[share] is None
    lost = table([*base, *cells("ground-truth", colour=[6, 2]), *cells("routed", colour=[4, 3])], {"colour"}, roles)
    assert share not in estimates(lost, "routed")
    unknown = table([*base, *bound, *cells("routed", colour=[4, 3])], {"colour"})  # which one is the ceiling
    assert share not in estimates(unknown, "routed")


def test_who_does_not_compete_is_named():
    """A control, and whatever has a role; where all compete, nothing is said."""
    made = table([*cells("pooled", colour=[9]), *cells("base", colour=[5]), *cells("routed", colour=[6])], {"colour"})
    assert to_markdown(made).endswith("Not competing: base.\n")
    bound = table([*cells("pooled", colour=[9]), *cells("base", colour=[5])], {"colour"}, {"pooled": "bound"})
    assert to_markdown(bound).endswith("Not competing: base, pooled.\n")
    assert "Not competing" not in to_markdown(table(cells("routed", colour=[6]), {"colour"}))


def test_a_failed_seed_is_left_out_and_counted():
    made = table(
        [
            *cells("routed", colour=[4, 6]),
            Cell("routed", 2, failed="no room"),
            *[Cell("median", s, failed="x") for s in (0, 1, 2)],
        ],
        {"colour"},
    )
    routed, median = made.rows
    assert (routed.n, routed.failed, routed.values[0].mean) == (2, 1, pytest.approx(0.5))
    assert (median.n, median.failed, set(median.values)) == (0, 3, {None})
    lines = to_markdown(made).splitlines()
    assert lines[2].startswith("| routed | 2 (1 failed) | **50.0 ± 127.1** |")  # s/√2 = .1, t = 12.706
    assert lines[3] == "| median | 0 (3 failed) |" + " failed |" * 6


def test_bytes_and_seconds():
    """Two seeds of 1.5 and 2.5 MB down and 4 kB up: 2 ± 12.706 · .7071 / √2 = 6.353."""
    made = table(
        [Cell("routed", s, {"colour": (1, 2)}, 1_500_000 + s * 1_000_000, 4_000, 83.0) for s in (0, 1)], ["colour"]
    )
    assert to_markdown(made).splitlines()[2].endswith("| 2.00 ± 6.35 | 0.0040 ± 0.0000 | 83.0 ± 0.0 |")


HOSTILE = 'a | b "<script>" $x$\n'


def test_whatever_the_names_are_the_outputs_can_be_read():
    made = table(
        [
            *cells("base", **{HOSTILE: [5, 6, 7], "in-domain": [1, 2, 3]}),
            *cells(HOSTILE, **{HOSTILE: [5, 6, 8], "in-domain": [1, 1, 1]}),
        ],
        {HOSTILE},
    )
    lines = to_markdown(made).splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines[:4]} == {
        11
    }  # ten cells: two, three means, two types, three costs
    header, base, other = csv.reader(io.StringIO(to_csv(made)))
    assert len(header) == len(base) == len(other) == 3 + 4 * len(made.columns)
    assert dict(zip(header[3:7], base[3:7], strict=True))["in-domain: mean"] == "0.6"
    assert (other[0], other[6]) == (HOSTILE, "best")
    root = ElementTree.fromstring(to_figure(made))
    assert root.tag.endswith("svg") and "<script" not in to_figure(made)
    assert to_figure(made) == to_figure(made)


def test_the_figure_shows_best_first_and_two_panels():
    made = table(
        [*cells("average", colour=[2, 3], count=[1, 1]), *cells("routed", colour=[6, 7], count=[2, 2])], {"colour"}
    )
    drawn = to_figure(made)
    assert drawn.index("routed") < drawn.index("average")
    assert "held-out" in drawn and "in-domain" in drawn
    assert "held-out" not in to_figure(table(cells("routed", colour=[6]), {"colour"}))


def test_one_lucky_seed_does_not_win():
    """A method with one seed of two is unmarked, however high."""
    made = table(
        [*cells("lucky", colour=[9]), *cells("routed", colour=[5, 6]), *cells("average", colour=[4, 4])], {"colour"}
    )
    marks = {row.method: row.values[0].mark for row in made.rows}
    assert marks == {"lucky": "", "routed": "best", "average": ""}


def test_nothing_measured():
    assert to_figure(table([], [])) == ""
    made = table([Cell("routed", 0, failed="no room")], [])
    assert to_markdown(made).splitlines()[2] == "| routed | 0 (1 failed) |"
    assert to_figure(made) == ""


def test_macro_of_types_that_were_not_asked():
    assert macro(Cell("routed", 0, {"colour": (1, 4)}), ["shape"]) is None
    assert macro(Cell("routed", 0, {"colour": (1, 4), "shape": (3, 4)}), ["shape", "colour"]) == 0.5

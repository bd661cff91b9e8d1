"""Means, intervals and marks by hand; every output is readable, whatever the names are."""

import csv
import io
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from accord.evaluation.intervals import half_width, holm, paired_p, t_probability, t_quantile
from accord.evaluation.table import Cell, macro, table, to_csv, to_figure, to_markdown


def cells(method, **by_type):
    """One cell a seed: `colour=[5, 6]` are 5 and 6 right answers out of 10."""
    seeds = range(len(next(iter(by_type.values()))))
    return [Cell(method, s, {name: (right[s], 10) for name, right in by_type.items()}, 0, 0, 60.0) for s in seeds]


def p_of(t_squared):
    """Of Student's t over five seeds: tan²θ = t²/4, and p = 1 - sin θ (1 + ½ cos²θ)."""
    return 1 - math.sqrt(t_squared / (t_squared + 4)) * (1 + 2 / (t_squared + 4))


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
    ("t", "df", "p"), [(1.0, 1, 0.5), (1.0, 2, 0.4226497), (2.7764, 4, 0.05), (2.3534, 3, 0.1), (4.6041, 4, 0.01)]
)
def test_student_probabilities(t, df, p):
    """df 1: 1 - 2/π · atan 1 = 1/2; df 2: 1 - t/√(t² + 2) = 1 - 1/√3; the others from the printed table."""
    assert 1 - t_probability(t, df) == pytest.approx(p, abs=2e-5)


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [
        ([0.5, 0.6, 0.7, 0.8, 0.9], [0.4] * 5, 1 - 36 / 11**1.5),  # d = .1 .2 .3 .4 .5: s² = .025, t² = 18
        ([0.4] * 5, [0.5, 0.6, 0.7, 0.8, 0.9], 1 - 36 / 11**1.5),  # two-sided
        ([0.5, 0.6, 0.7, 0.8, 0.4], [0.6] * 5, 1.0),  # d = -.1 0 .1 .2 -.2
        ([0.5, 0.6, 0.7, 0.8, 0.9], [0.5, 0.6, 0.7, 0.8, 0.9], 1.0),
        ([0.75, 0.5, 0.25, 1.0, 0.5], [0.5, 0.25, 0.0, 0.75, 0.25], None),  # the same difference each time
        ([0.3, 0.4, 0.5, 0.6, 0.7], [0.2, 0.3, 0.4, 0.5, 0.6], None),  # so, but for the last bit
        ([0.5, 0.6, 0.7, 0.8], [0.4] * 4, None),
    ],
)
def test_the_paired_test(one, other, p):
    found = paired_p(dict(enumerate(one)), dict(enumerate(other)))
    assert found is None if p is None else found == pytest.approx(p, abs=1e-9)


def test_the_paired_test_takes_the_seeds_that_both_have():
    one = {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.8, 4: 0.9}
    same = dict.fromkeys((4, 3, 2, 1, 0), 0.4)
    assert paired_p({**one, 7: 0.0}, {**same, 8: 1.0}) == pytest.approx(p_of(18), abs=1e-9)
    assert paired_p(one, {**dict.fromkeys((1, 2, 3, 4), 0.4), 8: 1.0}) is None


def test_holm():
    """.01 · 3 = .03; .04 · 2 = .08; .03 comes before it: .03 · 2 = .06, and .04 is no less: max(.06, .04 · 1)."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1, "b": 1} and holm({}) == {}


ROLES = {"ground-truth": "ceiling", "pooled": "bound", "server-alone": "control", "random": "chance"}


def marked():
    """Routed is 5 6 7 5 7; average now ahead, now behind; median about .4 behind; the rest has a role."""
    return table(
        [
            *cells("ground-truth", colour=[9] * 5),
            *cells("routed", colour=[5, 6, 7, 5, 7]),
            *cells("average", colour=[6, 5, 6, 6, 6]),
            *cells("median", colour=[1, 2.1, 2.9, 1.1, 2.9]),
            *cells("base", colour=[8] * 5),
            *cells("pooled", colour=[9] * 5),
            *cells("server-alone", colour=[4, 5.1, 5.9, 4, 6]),
            *cells("random", colour=[8] * 5),
        ],
        {"colour"},
        ROLES,
    )


def test_marks():
    """Three pairs. Routed - average: -.1 .1 .1 -.1 .1, mean .02, s² = .012, t² = 1/6, the largest p and unchanged.

    Routed - median: .4 .39 .41 .39 .41, mean .4, s = .01, t² = 8000, p times 3.
    """
    made = marked()
    marks = {row.method: row.values[0].mark for row in made.rows}
    unmarked = dict.fromkeys(["base", "ground-truth", "pooled", "server-alone", "random"], "")
    assert marks == {**unmarked, "routed": "best", "average": "level", "median": "below"}
    assert {row.method for row in made.rows if row.competes} == {"routed", "average", "median"}
    assert made.rows[0].method == "base"
    assert {column.name for column, value in zip(made.columns, made.rows[2].values, strict=True) if value.mark} == {
        "in-domain",
        "overall",
        "colour",
    }
    level, below = (estimates(made, name)["overall"].with_best for name in ("average", "median"))
    assert (level.difference, level.p, level.adjusted) == pytest.approx((-0.02, p_of(1 / 6), p_of(1 / 6)))
    p = p_of(8000)
    assert (below.difference, below.p, below.adjusted) == pytest.approx((-0.4, p, 3 * p), abs=1e-9)
    assert estimates(made, "routed")["overall"].with_best is None


def test_competing_methods_are_tested_against_the_server_alone():
    """Routed is .1 .09 .11 .1 .1 above it, s² = .00005, t² = 1000; the median .3 below."""
    made = marked()
    assert made.control == "server-alone"
    above, below = (estimates(made, name)["overall"].with_control for name in ("routed", "median"))
    p = p_of(1000)
    assert (above.difference, above.p) == pytest.approx((0.1, p), abs=1e-9) and above.significant
    assert below.difference == pytest.approx(-0.3) and below.significant
    lines = {line.split(" | ")[0][2:]: line for line in to_markdown(made).splitlines() if line.startswith("| ")}
    assert lines["routed"].startswith("| routed | 5 | **60.0 ± 12.4** ‡ |")
    assert lines["average"].startswith("| average | 5 | **58.0 ± 5.6** |")
    assert lines["median"].startswith("| median | 5 | 20.0 ± 11.5 † |")
    assert "†" not in lines["server-alone"] + lines["pooled"] and "**" not in lines["server-alone"]
    header, *rows = csv.reader(io.StringIO(to_csv(made)))
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert float(found["routed"]["overall: p against server-alone"]) == pytest.approx(p, abs=1e-9)
    assert float(found["average"]["overall: adjusted p against the best"]) == pytest.approx(p_of(1 / 6))
    assert found["routed"]["overall: p against the best"] == found["pooled"]["overall: p against server-alone"] == ""


def test_four_seeds_are_not_tested():
    """Nothing is bold, however far apart; nor of a single method, which has nothing to be better than."""
    made = table([*cells("routed", colour=[8, 9, 8, 8]), *cells("average", colour=[1] * 4)], {"colour"})
    assert {value.mark for row in made.rows for value in row.values} == {""}
    assert "Nothing is tested, and nothing bold" in to_markdown(made) and "**" not in to_markdown(made)
    assert "**" not in to_markdown(table(cells("routed", colour=[8, 9, 9, 9, 8]), {"colour"}))


def test_a_difference_that_is_the_same_with_every_seed_is_not_tested():
    """One question more each time; a third method, whose differences vary, is tested all the same: t² = 81."""
    rows = [*cells("routed", colour=[7] * 5), *cells("average", colour=[6] * 5)]
    made = table(rows, {"colour"})
    assert {row.values[0].mark for row in made.rows} == {""}
    assert "Nothing is tested, and nothing bold" in to_markdown(made)
    made = table([*rows, *cells("median", colour=[6, 5, 5, 5, 5])], {"colour"})
    assert {row.method: row.values[0].mark for row in made.rows} == {"routed": "best", "average": "", "median": "below"}
    assert "the same difference with every seed, is not tested" in to_markdown(made)


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
    alone = cells("question-only", colour=[4, 4])  # (.4 - .2) / .4 and (.4 - .2) / .5
    made = table([*base, *alone, *bound, *cells("routed", colour=[4, 3])], {"colour"}, roles)
    assert estimates(made, "question-only")[share].mean == pytest.approx(0.45)
    unknown = table([*base, *bound, *cells("routed", colour=[4, 3])], {"colour"})  # which one is the ceiling
    assert share not in estimates(unknown, "routed")


def test_share_of_the_lead_over_the_question_alone():
    """Ground truth .6, .7 and question-only .4, .5: (.5 - .4) / .2 = .5 and (.4 - .5) / .2 = -.5; the base -1, -1.5."""
    share = "share of the ground truth's lead over the question alone"
    roles = {"ground-truth": "ceiling"}
    rows = [*cells("base", colour=[2, 2]), *cells("ground-truth", colour=[6, 7]), *cells("routed", colour=[5, 4])]
    made = table([*rows, *cells("question-only", colour=[4, 5])], {"colour"}, roles)
    assert (estimates(made, "routed")[share].mean, estimates(made, "routed")[share].n) == (pytest.approx(0), 2)
    assert estimates(made, "base")[share].mean == pytest.approx(-1.25)
    assert estimates(made, "question-only")[share] is estimates(made, "ground-truth")[share] is None
    assert estimates(made, "routed")[share].mark == ""
    note = to_markdown(made).splitlines()[-1]
    assert "Share of the lead: (method - question-only) / (ground truth - question-only)" in note
    even = table([*rows, *cells("question-only", colour=[4, 7])], {"colour"}, roles)  # .7 - .7 is not positive
    assert share not in estimates(even, "routed") and "Share of the lead" not in to_markdown(even)
    assert share not in estimates(table(rows, {"colour"}, roles), "routed")


def test_shuffled_images_have_a_column():
    """Colour 2 and 4 of 10, count 1 and 1: .15 and .25, mean .2. Whoever was not asked so has none."""
    rows = [
        replace(cell, shuffled={"colour": (right, 10), "count": (1, 10)})
        for cell, right in zip(cells("routed", colour=[5, 6], count=[5, 6]), (2, 4), strict=True)
    ]
    made = table([*rows, *cells("average", colour=[5, 5], count=[5, 5])], {"colour"})
    assert [column.name for column in made.columns][:4] == ["in-domain", "held-out", "overall", "shuffled"]
    assert estimates(made, "routed")["shuffled"].mean == pytest.approx(0.2)
    assert estimates(made, "average")["shuffled"] is None and "another image" in to_markdown(made)
    assert "another image" not in to_markdown(table(cells("average", colour=[5]), {"colour"}))


def test_the_interval_over_images():
    """Two seeds. Question by question 1, ½, ½, 0, of which the middle two are about one image: moves .5 0 -.5, over 4.

    SE² = 3/2 · (1/64 + 1/64) = 3/64. Another seed that was asked something else leaves it out.
    """
    asked = {"colour": [["1", 0], ["2", 1], ["3", 1], ["4", 2]]}
    outcomes = [[1, 1, 0, 0], [1, 0, 1, 0]]
    rows = [
        Cell("routed", s, {"colour": (2, 4)}, outcomes={"colour": found}, asked=asked)
        for s, found in enumerate(outcomes)
    ]
    half = 1.959964 * math.sqrt(3 / 64)
    made = table(rows, {"colour"})
    assert estimates(made, "routed")["overall"].half_over_images == pytest.approx(half, abs=1e-6)
    assert estimates(made, "routed")["time"].half_over_images is None
    (row,) = csv.DictReader(io.StringIO(to_csv(made)))
    assert float(row["colour: half width over images"]) == pytest.approx(half, abs=1e-6)
    assert "clustered by image" in to_markdown(made)
    other = replace(rows[1], asked={"colour": [["1", 0], ["2", 1], ["3", 1], ["5", 2]]})
    for second in (other, replace(rows[1], outcomes={}), replace(rows[1], outcomes={"colour": [1]})):
        assert estimates(table([rows[0], second], {"colour"}), "routed")["overall"].half_over_images is None


def test_scores_need_not_be_counts():
    """Means of 1.5 / 2 and 1.8 / 2; items of .7 and .95 over seeds move by ±.125 / 2: SE² = 2 · 2 · .0625² = .125²."""
    asked = {"score": [["1", 0], ["2", 1]]}
    rows = [
        Cell("routed", s, {"score": (total, 2)}, outcomes={"score": items}, asked=asked)
        for s, (total, items) in enumerate([(1.5, [0.5, 1.0]), (1.8, [0.9, 0.9])])
    ]
    found = estimates(table(rows, {"score"}), "routed")["overall"]
    assert found.mean == pytest.approx(0.825)
    assert found.half_over_images == pytest.approx(1.959964 * 0.125, abs=1e-6)


def test_settings_tried_are_told():
    made = table([*cells("routed", colour=[5]), *cells("average", colour=[5])], {"colour"}, None, {"routed": 4, "x": 2})
    header, _, routed, average = to_markdown(made).splitlines()[:4]
    assert header.startswith("| method | seeds | settings tried | in-domain, % |")
    assert routed.startswith("| routed | 1 | 4 | 50.0 |") and average.startswith("| average | 1 | – | 50.0 |")
    assert [row[:4] for row in csv.reader(io.StringIO(to_csv(made)))] == [
        ["method", "seeds", "failed", "settings tried"],
        ["routed", "1", "0", "4"],
        ["average", "1", "0", ""],
    ]
    assert "settings tried" not in to_csv(table(cells("routed", colour=[5]), {"colour"}))


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
    assert lines[2].startswith("| routed | 2 (1 failed) | 50.0 ± 127.1 |")  # s/√2 = .1, t = 12.706
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
    assert len(header) == len(base) == len(other) == 3 + 4 * len(made.columns) + 3 * 5  # five accuracies are compared
    assert dict(zip(header[3:7], base[3:7], strict=True))["in-domain: mean"] == "0.6"
    assert (other[0], other[6]) == (HOSTILE, "")
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


def test_the_figure_of_captions_shows_what_the_judge_says():
    """Best by preference on top; CIDEr-D is no percentage, and no panel."""
    measures = {"CIDEr-D": [2, 3], "matching": [3, 3], "preferred to base": [4, 5]}
    better = {"CIDEr-D": [2, 2], "matching": [2, 3], "preferred to base": [6, 6]}
    drawn = to_figure(table([*cells("routed", **measures), *cells("average", **better)], None))
    assert drawn.index("average") < drawn.index("routed")
    assert "matching" in drawn and "preferred to base" in drawn and "CIDEr-D" not in drawn


def test_one_lucky_seed_does_not_win():
    """A method with four seeds of five is unmarked, however high. Else d = .1 .2 .2 .2 .2: t = 9, p = .0008."""
    made = table(
        [
            *cells("lucky", colour=[9] * 4),
            *cells("routed", colour=[5, 6, 6, 6, 6]),
            *cells("average", colour=[4] * 5),
        ],
        {"colour"},
    )
    marks = {row.method: row.values[0].mark for row in made.rows}
    assert marks == {"lucky": "", "routed": "best", "average": "below"}


def test_a_control_with_more_seeds_stops_no_test():
    """The sites of a sixth seed failed, and the base needs none: five seeds of the methods are compared all the same.

    d = .1 .11 .1 .1 .1: t = 51.
    """
    made = table(
        [
            *cells("base", colour=[3] * 6),
            *cells("routed", colour=[5, 6, 6, 6, 6]),
            *cells("average", colour=[4, 4.9, 5, 5, 5]),
        ],
        {"colour"},
    )
    assert {row.method: row.values[0].mark for row in made.rows} == {"base": "", "routed": "best", "average": "below"}


def test_nothing_measured():
    assert to_figure(table([], [])) == ""
    made = table([Cell("routed", 0, failed="no room")], [])
    assert to_markdown(made).splitlines()[2] == "| routed | 0 (1 failed) |"
    assert to_figure(made) == ""


def test_macro_of_types_that_were_not_asked():
    assert macro(Cell("routed", 0, {"colour": (1, 4)}), ["shape"]) is None
    assert macro(Cell("routed", 0, {"colour": (1, 4), "shape": (3, 4)}), ["shape", "colour"]) == 0.5

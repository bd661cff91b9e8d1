"""What a reward model makes of pairs, against numbers derived by hand."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from accord.evaluation import judging
from accord.evaluation.judging import Bin, judge_pairs, reliability_plot, write_judging
from accord.rewards.model import Standardisation


class Model:
    """A stand-in whose scores have the deviation 2."""

    standardisation = Standardisation(0.0, 2.0 - 1e-6)


@pytest.fixture
def judged(prefer, monkeypatch):
    """Return the judging of pairs with the raw margins given, each about a picture of its own or of a colour given."""

    def make(margins, colours=(), **fields):
        pairs = [
            prefer(n, "red", f"wrong {n}", images=(image(n),) if not colours else (colours[n],), **fields)
            for n in range(len(margins))
        ]
        monkeypatch.setattr(judging, "pair_margins", lambda model, given: [m / 2 for m in margins])
        return judge_pairs(Model(), pairs), pairs

    return make


def image(n):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (n, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def logit(p):
    return math.log(p / (1 - p))


def test_margins_are_on_the_models_own_scale(judged):
    found, _ = judged([1.0, -3.0])
    assert found.margins == pytest.approx((1.0, -3.0)) and found.pairs == 2


def test_calibration_by_hand(judged):
    """Confidence 0.75 four times, three of them right; 0.95 twice, one right: (4/6) · 0 + (2/6) · 0.45 = 0.15."""
    sure, surer = logit(0.75), logit(0.95)
    found, _ = judged([sure, sure, sure, -sure, surer, -surer])
    assert [(b.low, b.high) for b in found.reliability] == [(0.7, pytest.approx(0.8)), (0.9, 1.0)]
    assert [b.pairs for b in found.reliability] == [4, 2]
    assert [b.mean for b in found.reliability] == pytest.approx([0.75, 0.95])
    assert [b.right for b in found.reliability] == pytest.approx([0.75, 0.5])
    assert found.error == pytest.approx(0.15)


def test_accuracy_by_margin_in_fifths(judged):
    """Ten margins of 1 to 10, the two smallest wrong: shares 0, 1, 1, 1, 1."""
    found, _ = judged([float(m) if m > 2 else -float(m) for m in range(1, 11)])
    assert [(b.low, b.high, b.pairs, b.right) for b in found.by_margin] == [
        (pytest.approx(2 * k + 1), pytest.approx(2 * k + 2), 2, float(k > 0)) for k in range(5)
    ]
    assert "80.0% of 10 pairs are judged as people judged them" in found.table()
    assert "| 1.00 to 2.00 | 2 | 0.0% |" in found.table()


def test_a_margin_of_nothing_and_one_beyond_measure(judged):
    """A tie is wrong with confidence 1/2; a margin of 1000 overflows nothing."""
    found, _ = judged([0.0, 1000.0, -1000.0])
    assert [b.pairs for b in found.reliability] == [1, 2] and found.accuracy.overall == pytest.approx(1 / 3)
    assert found.reliability[0] == Bin(0.5, 0.6, 1, 0.5, 0.0)


def test_few_pairs_make_fewer_fifths(judged):
    found, _ = judged([1.0, 2.0])
    assert [b.pairs for b in found.by_margin] == [1, 1]


def test_the_interval_knows_which_pairs_are_about_one_picture(judged):
    """Ten pairs about two pictures say less than about ten."""
    margins = [1.0] * 5 + [-1.0] * 5
    apart, _ = judged(margins)
    together, _ = judged(margins, colours=[image(int(n >= 5)) for n in range(10)])
    assert together.accuracy.macro_error > apart.accuracy.macro_error


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_shows_the_worst_first_and_runs_nothing(judged, tmp_path):
    """Of 30 wrong pairs the 24 with the largest margins; every text is escaped."""
    found, pairs = judged([-1.0 - n for n in range(30)] + [5.0])
    pairs[29] = replace(pairs[29], rejected="<script>alert(1)</script>")
    write_judging(tmp_path / "page.html", "a <b> model", found, pairs)
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text and "a &lt;b&gt; model" in text
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 24 and all(p["src"].startswith("data:image/png;base64,") for p in pictures)
    assert len({p["alt"] for p in pictures}) == 24
    assert re.findall(r"<dt>by</dt><dd>([\d.]+)</dd>", text)[:2] == ["30.00", "29.00"]
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert not [
        a
        for _, a in page.tags
        if any(str(v).startswith(("http:", "https:", "//")) for k, v in a.items() if k in ("src", "href"))
    ]


def test_the_page_of_a_model_that_is_never_wrong(judged, tmp_path):
    found, pairs = judged([1.0, 2.0])
    write_judging(tmp_path / "page.html", "model", found, pairs)
    text = (tmp_path / "page.html").read_text()
    assert "It judges no pair otherwise than people did" in text and "<img" not in text


def test_pairs_without_pictures(judged, tmp_path, prefer):
    found, pairs = judged([-1.0, 2.0])
    bare = [replace(pair, images=(), prompt=[{"role": "user", "content": "1 + 1?"}]) for pair in pairs]
    write_judging(tmp_path / "page.html", "model", found, bare)
    assert "1 + 1?" in (tmp_path / "page.html").read_text()


def test_the_plot_is_the_same_twice(judged):
    found, _ = judged([1.0, -0.5, 2.0])
    assert reliability_plot(found) == reliability_plot(found) and "confidence of the reward model" in reliability_plot(
        found
    )

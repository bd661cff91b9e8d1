"""The pages as a browser shows and prints them: a run's report, and what a reward model makes of pairs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from accord.evaluation import judging
from accord.evaluation.judging import judge_pairs, write_judging
from accord.evaluation.report import write_report
from accord.evaluation.summary import (
    EvaluationSummary,
    ProjectorMeasure,
    ProjectorRound,
    ProjectorSite,
    ProjectorSummary,
    Ranking,
    Summary,
    TrafficRow,
    TrustSummary,
    accuracy,
    competence_summary,
)
from accord.rewards.model import Standardisation
from in_browser import Open, broken_rules, runs_off

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

KINDS = ("colour", "shape", "modality of the image", "objects in rooms", "organ")
SITES = tuple(f"St. Elsewhere University Hospital {n}" for n in range(4))
PAGES = ("report", "crowded", "judging")
SCREENS = [(390, False), (390, True), (1400, False), (1400, True)]

MM = 96 / 25.4  # CSS pixels
PRINTED = {"width": round(186 * MM), "height": round(269 * MM)}  # A4 within the margins of the style sheet


@pytest.fixture
def pages(
    make_run: Callable[..., Path],
    make_summary: Callable[..., Summary],
    prefer: Callable[..., object],
    square: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], str]:
    """Return a function that writes the page of a name and returns its address."""

    def crowded() -> Path:
        """Six sites with long names, six types, and every part that a report can have."""
        of = {n: accuracy({kind: (10 + n * place, 60) for place, kind in enumerate(KINDS)}) for n in range(9)}
        full = make_summary()
        measure = ProjectorMeasure(1.25, 2.5, of[5], 0.5)
        done = {site: ProjectorSite(4, 0.5, 7.25, 0.75) for site in SITES}
        points = {site: tuple((n * place % 7, place % 5) for place in range(40)) for n, site in enumerate(SITES)}
        rounds = (ProjectorRound(-3.0, done, 0.5, 0.2, 0.1),) * 3
        ranking = Ranking(0.7, dict.fromkeys(KINDS, 0.7))
        asked = [kind for kind in KINDS for _ in range(10)]
        summary = make_summary(
            sites=tuple(dataclasses.replace(full.sites[0], name=site, ranking=ranking) for site in SITES),
            evaluation=EvaluationSummary(of[2], of[8], of[1], of[3], {f"method {n}": of[n] for n in range(5)}),
            routing={kind: dict.fromkeys(SITES, 1 / 6) for kind in KINDS},
            traffic=tuple(
                TrafficRow(site, kind, 5, 680_000, 210_000, 0) for site in SITES for kind in ("router", "score")
            ),
            competence=competence_summary(SITES, asked, [[1, 0] * 25] * 4, neighbours=2, experts=1),
            trust=TrustSummary(
                60,
                dict.fromkeys(SITES, dict.fromkeys(KINDS, 0.9)),
                aside={site: (KINDS[2],) for site in SITES},
                two_faced={SITES[0]: KINDS[:2]},
                triggered={SITES[0]: ("yellow", "incomprehensibilities")},
                asked=dict.fromkeys(SITES, dict.fromkeys(KINDS, 20)),
            ),
            projector=ProjectorSummary(
                "x", "federated", "fed-cmp", "plain", "random", 9, measure, measure, rounds, points
            ),
        )
        question = {"question": "which shape is it?", "question_type": "shape", "before": "circle", "after": "triangle"}
        told = {
            "routed": dict.fromkeys(SITES, 1 / 6),
            "scores": {site: {"before": -0.31, "after": 1.22} for site in SITES},
        }
        gallery = [{**question, **told, "image": f"gallery/{n}.png", "answer": "circle"} for n in range(9)]
        return write_report(make_run("crowded", summary=summary, gallery=gallery))

    def judged() -> Path:
        """Ten pairs, of which the model judges seven otherwise than people did."""
        margins = [n - 6.5 for n in range(10)]
        picture = square("red", (200, 400))
        pairs = [prefer(n, "red", "a much longer answer " * 9, images=(picture,)) for n in range(10)]
        monkeypatch.setattr(judging, "pair_margins", lambda model, given: margins)
        model = type("Model", (), {"standardisation": Standardisation(0.0, 1.0 - 1e-6)})
        write_judging(tmp_path / "judging.html", "a model", judge_pairs(model(), pairs), pairs)
        return tmp_path / "judging.html"

    made = {"report": lambda: write_report(make_run()), "crowded": crowded, "judging": judged}
    return lambda name: made[name]().as_uri()


def test_it_opens_without_an_error_and_asks_for_nothing_else(chromium: Open, make_run: Callable[..., Path]) -> None:
    page, errors, asked = chromium(), [], []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    report = write_report(make_run())
    page.goto(report.as_uri())
    assert page.locator("h1").inner_text() == "three sites"
    assert not errors and asked == [report.as_uri()]


@pytest.mark.parametrize("name", PAGES)
def test_everybody_can_read_it_on_every_screen(chromium: Open, pages: Callable[[str], str], name: str) -> None:
    """No rule of axe-core is broken, the page is no wider than its window, and no table hides its last column."""
    address = pages(name)
    for width, dark in SCREENS:
        page = chromium(width=width, dark=dark)
        page.goto(address)
        assert broken_rules(page) == [], (width, dark)
        assert runs_off(page) == 0, (width, dark)
        assert cut_off(page) == [], (width, dark)
        page.close()


def cut_off(page: Page) -> list[str]:
    """Return what of the last cell of each row cannot be seen whole: beyond its card, its region or the window."""
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll('tbody tr')].map(row => row.lastElementChild).filter(cell => {
            const box = cell.getBoundingClientRect();
            const around = cell.closest('li, .scroll').getBoundingClientRect();
            const end = Math.min(innerWidth, around.right) + 0.5;
            return !box.width || box.right > end || cell.scrollWidth > cell.clientWidth;
        }).map(cell => cell.parentElement.textContent)"""
    )
    assert page.locator("tbody tr").count() > 2
    return found


def test_a_column_out_of_sight_is_reached_by_keys(
    chromium: Open, make_run: Callable[..., Path], make_summary: Callable[..., Summary]
) -> None:
    """A word of 120 letters fits nowhere: its table scrolls, is in the order of Tab, and has a name."""
    long = accuracy({"x" * 120: (3, 9)})
    summary = make_summary(evaluation=EvaluationSummary(None, long, None, None, {"other": long}))
    page = chromium()
    page.goto(write_report(make_run(summary=summary)).as_uri())
    wide = page.evaluate(
        """() => [...document.querySelectorAll('*')].filter(
            e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX == 'auto'
        ).map(e => e.getAttribute('aria-label'))"""
    )
    assert "Accuracy of the methods compared" in wide and len(set(wide)) == len(wide)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Accuracy of the methods compared":
            break
    page.keyboard.press("ArrowRight")
    until = time.monotonic() + 30  # by hand: the page's policy lets no text be evaluated within it
    while not page.evaluate("document.activeElement.scrollLeft > 0"):
        assert time.monotonic() < until
        page.wait_for_timeout(50)


@pytest.mark.parametrize("name", PAGES)
def test_every_picture_has_its_own_words(chromium: Open, pages: Callable[[str], str], name: str) -> None:
    page = chromium()
    page.goto(pages(name))
    words = page.locator("img").evaluate_all("pictures => pictures.map(picture => picture.alt)")
    assert len(words) >= 7 and len(set(words)) == len(words)
    assert all("?" in each for each in words)  # what was asked about it


@pytest.mark.parametrize("name", PAGES)
def test_no_printed_page_is_half_empty_or_cut(chromium: Open, pages: Callable[[str], str], name: str) -> None:
    """What is moved to the next page whole leaves its height empty: less than half a page, with the heading above it.

    So all pages but the last are more than half full, and there are at most twice as many as without any moves.
    """
    page = chromium(**PRINTED)
    page.goto(pages(name))
    page.emulate_media(media="print")
    heights = page.evaluate(
        """() => [...document.querySelectorAll('main *')].filter(
            e => getComputedStyle(e).breakInside == 'avoid' && !e.parentElement.closest('li, figure, thead')
        ).map(e => {
            let first = e;
            while (first.previousElementSibling && getComputedStyle(first.previousElementSibling).breakAfter == 'avoid')
                first = first.previousElementSibling;
            return e.getBoundingClientRect().bottom - first.getBoundingClientRect().top;
        })"""
    )
    assert len(heights) > 5 and max(heights) < PRINTED["height"] / 2
    assert runs_off(page) == 0 and cut_off(page) == []
    whole = page.evaluate("document.querySelector('main').getBoundingClientRect().height")
    printed = page.pdf(prefer_css_page_size=True).count(b"/Type /Page\n")
    assert whole / PRINTED["height"] <= printed + 0.5 and printed - 1 <= 2 * math.ceil(whole / PRINTED["height"])

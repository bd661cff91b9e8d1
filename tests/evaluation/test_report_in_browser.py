"""The report as a browser shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from accord.evaluation.report import write_report
from in_browser import Open

pytestmark = pytest.mark.browser


def test_it_opens_without_an_error_and_asks_for_nothing_else(chromium: Open, make_run: Callable[..., Path]) -> None:
    page, errors, asked = chromium(), [], []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    report = write_report(make_run())
    page.goto(report.as_uri())
    assert page.locator("h1").inner_text() == "three sites"
    assert not errors and asked == [report.as_uri()]

"""A headless Chromium for tests that click and type as a person does: the system's own, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from playwright.sync_api import Page

Open: TypeAlias = "Callable[..., Page]"

# What is not wanted would look for its maker's hosts at every start.
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@contextmanager
def opened() -> Iterator[Open]:
    """Start the browser once; give a function that opens a page of its own: `(width=1400, height=900, dark=False)`."""
    from playwright.sync_api import expect, sync_playwright  # of the extra browser, which the other tests go without

    path = shutil.which("chromium")
    assert path, "no chromium found; run: make test-browser"
    expect.set_options(timeout=30_000)  # a busy machine takes a while
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))

        def page(width: int = 1400, height: int = 900, dark: bool = False) -> Page:
            scheme = "dark" if dark else "light"
            return browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()

        yield page
        browser.close()


def broken_rules(page: Page) -> list[str]:
    """Return what axe-core finds on the page: a rule, and the first element that breaks it, a line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['help']}: {each['nodes'][0]['html'][:200]}" for each in found]


def runs_off(page: Page) -> int:
    """Return by how many pixels the page is wider than its window."""
    width: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width

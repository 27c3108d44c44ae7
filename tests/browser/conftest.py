"""A real browser without a network. Where there is none, the tests fail and say how to get one."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.looking import DESKTOP, LOOK, Look


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
REMEDY = (
    "No browser was found. Install Chromium (Debian: apt-get install chromium), or name one in the environment "
    "variable CHROMIUM."
)


@pytest.fixture(scope="session")
def browser():
    with _playwright() as playwright:
        path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
        if path is None:
            pytest.fail(REMEDY)
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@contextmanager
def _playwright():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        pytest.fail(f"{error}. Install the development tools: pip install -e '.[dev]'.")
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture
def look(browser):
    """Function that opens a file and returns a `Look`; `screenshot` names a file for the image of it."""

    def open_page(file: Path, size=DESKTOP, dark=False, screenshot: Path | None = None) -> Look:
        found = Look()
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, offline=True, color_scheme="dark" if dark else "light"
        )
        page = context.new_page()
        page.on("console", lambda message: found.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: found.errors.append(str(error)))
        own = Path(file).resolve().as_uri()
        page.on(
            "request",
            lambda request: found.requests.append(request.url) if not request.url.startswith(("data:", own)) else None,
        )
        page.goto(own)
        if screenshot is not None:
            page.screenshot(path=screenshot)
        found.seen = page.evaluate(LOOK)
        context.close()
        return found

    return open_page

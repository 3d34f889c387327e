"""A real browser: headless Chromium, and a page that must stay quiet and by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
# Where pictures of what was tested are kept.
PICTURES = Path(os.environ.get("LAPE_FAST_PICTURES", Path(__file__).resolve().parents[2] / "build" / "pictures"))


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """A running Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; `make test-browser` installs it")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser")
    with playwright.sync_playwright() as driver:
        # Root has no sandbox, and the pages are our own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium) -> Iterator[Callable]:
    """Opens a file in a window of its own; at the end, nothing may have been complained about or asked for."""
    opened, heard = [], []

    def open_file(
        path: Path, *, width: int = 1280, dark: bool = False, fragment: str = "", ready: str = "html[data-ready]"
    ):
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            # A narrow window is a phone's.
            has_touch=width < 500,
            accept_downloads=True,
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda request: heard.append(f"request: {request.url}"))
        page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        opened.append(context)
        page.goto(f"{path.as_uri()}{fragment}")
        page.wait_for_selector(ready)
        return page

    yield open_file
    for context in opened:
        context.close()
    # The page itself is a request, and so is what it makes and hands out.
    assert [each for each in heard if not each.startswith(("request: file:", "request: blob:", "request: data:"))] == []
    assert sum(each.startswith("request: file:") for each in heard) == len(opened)


@pytest.fixture
def picture(request) -> Callable:
    """Keeps a picture of a page under the test's name."""

    def keep(page, suffix: str = "") -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / f"{request.node.name}{suffix}.png".replace("/", "-"))

    return keep

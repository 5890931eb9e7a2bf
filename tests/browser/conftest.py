"""A page of the HTML report in headless Chromium, which must neither complain nor ask for anything but the file itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


def executable() -> str | None:
    """Chromium's path, if there is one."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def missing() -> str:
    """Why no browser test can run; empty if it can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed (pip install playwright)"
    try:
        import jinja2  # noqa: F401
    except ImportError:
        return "jinja2 is not installed (pip install 'steptrace[html]')"
    return "" if executable() else "no Chromium is installed (apt-get install chromium)"


@dataclass
class Opened:
    """An open page, and what it said or asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


Open = Callable[..., Opened]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a page from disk; afterwards it must not have complained or asked for anything else."""
    opened: list[Opened] = []

    def run(html: str, *, width: int = 1200, height: int = 900, **context: Any) -> Opened:
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        page = chromium.new_context(viewport={"width": width, "height": height}, **context).new_page()
        here = Opened(page)
        page.on("console", lambda message: here.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: here.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (here.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: here.requests.append(request.url))
        page.goto(file.as_uri())
        opened.append(here)
        return here

    yield run
    for here in opened:
        here.page.context.close()
        assert here.complaints == []
        assert {url for url in here.requests if not url.startswith("data:")} == {(tmp_path / "report.html").as_uri()}

"""A headless Chromium for tests that look at pages as a reader does, and note whatever goes wrong behind the picture.

    with open_browser() as browser, watched(browser) as (page, trouble):
        page.goto(address)
    assert trouble == []

A machine without Chromium skips such a test, with the one excuse that counts. Nothing is downloaded: the browser is the system's.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
LEFT = "net::ERR_ABORTED"  # the reader went on before a picture had arrived
HOSTS = ("127.0.0.1", "localhost")


@contextmanager
def open_browser() -> Iterator:
    "Chromium, headless; skips where this machine has none."
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no command chromium found")
    playwright = pytest.importorskip("playwright.sync_api", reason="no package playwright found")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=program, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched(browser, *, size: dict = DESKTOP, scheme: str = "light", hosts: tuple[str, ...] = HOSTS) -> Iterator:
    "A page of its own, and a list that fills with console errors, failed requests, and requests to hosts that are not expected."
    trouble: list[str] = []
    context = browser.new_context(viewport=size, color_scheme=scheme)
    context.set_default_timeout(20_000)
    page = context.new_page()
    page.on("console", lambda message: trouble.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: trouble.append(f"script: {error}"))
    page.on("requestfailed", lambda request: _note_failure(trouble, request))
    page.on("response", lambda answer: trouble.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
    page.on("request", lambda request: trouble.append(f"elsewhere: {request.url}") if _is_elsewhere(request.url, hosts) else None)
    try:
        yield page, trouble
    finally:
        context.close()


def _note_failure(trouble: list[str], request) -> None:
    "Note a request that failed by itself."
    if request.failure != LEFT:
        trouble.append(f"failed: {request.url} {request.failure}")


def _is_elsewhere(url: str, hosts: tuple[str, ...]) -> bool:
    "Whether a request leaves the hosts that are expected."
    parts = urlsplit(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in hosts


def overflow(page) -> int:
    "By how many pixels a page is wider than the window."
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

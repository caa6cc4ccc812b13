# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""A browser for the tests that look at pages as people do, at the sizes of a desktop and of a phone."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 375, "height": 812}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
QUIET = ["background-networking", "component-update", "sync", "quic", "gpu"]  # a browser that calls nobody


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium: the system's, else the one that `playwright install chromium` has brought."""
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened() -> list[Page]:
    """The pages that a test has opened, each with `errors`, by its console, and addresses that it has `requested`."""
    return []


@pytest.fixture
def open_page(browser, opened) -> Iterator[Callable[..., Page]]:
    """Opens an empty page, with options of a browser's context such as `color_scheme`."""

    def open_page(**options) -> Page:
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(15_000)
        page.errors, page.requested = [], []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda said: page.errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda request: page.requested.append(request.url))
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.context.close()


@pytest.fixture
def desktop(open_page) -> Page:
    return open_page(**DESKTOP)


@pytest.fixture
def phone(open_page) -> Page:
    return open_page(**PHONE)


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where screenshots are left to be looked at."""
    folder = Path(__file__).parents[2] / "runs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

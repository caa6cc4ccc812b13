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


# Texts with a contrast below 4.5, by WCAG, to the colours of the elements around them. Left out are texts on images,
# which `besides` selects, and what is disabled.
FIND_FAINT = """
(besides) => {
  const read = (color) => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const blend = (above, below, alpha) => [0, 1, 2].map((at) => alpha * above[at] + (1 - alpha) * below[at]);
  const getBehind = (element) => {
    if (element === null) return [255, 255, 255];
    const color = read(getComputedStyle(element).backgroundColor);
    return color[3] === 1 ? color : blend(color, getBehind(element.parentElement), color[3]);
  };
  const getLuminance = (color) => {
    const linear = color.map((c) => c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  for (const one of document.getAnimations()) if (one instanceof CSSTransition) one.finish();
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const placeholder = element.value === "" ? element.placeholder : "";
    const text = placeholder || [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim())
      .map((node) => node.data.trim()).join(" ");
    if (!text || !element.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    if (element.closest(`script, noscript, option, datalist, :disabled, .unseen, ${besides}`)) continue;
    const behind = getBehind(element).slice(0, 3);
    const style = getComputedStyle(element, placeholder ? "::placeholder" : null);
    const color = read(style.color);
    let alpha = color[3];
    for (let one = element; one !== null; one = one.parentElement) alpha *= Number(getComputedStyle(one).opacity);
    const [low, high] = [getLuminance(blend(color, behind, alpha)), getLuminance(behind)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) found.push(`${text.slice(0, 40)}: ${contrast.toFixed(1)}`);
  }
  return found;
}
"""


def find_faint(page: Page, besides: str) -> list[str]:
    """Texts that are hard to read, with their contrast; `besides` selects what lies on images."""
    return page.evaluate(FIND_FAINT, besides)


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where screenshots are left to be looked at."""
    folder = Path(__file__).parents[2] / "runs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The documentation site: built strictly, its links followed, and opened in a browser from a folder, as readers do."""

import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import sync_playwright

import modeling_vwlmm
import modeling_vwlmm.training
import processing_vwlmm


ROOT = Path(__file__).parents[2]
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
SIZES = {"desktop": (1300, 900), "phone": (390, 844)}


class Page(HTMLParser):
    """Links and anchors of a page; of the links those of its text apart."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links, self.loaded, self.text_links, self.anchors = [], [], [], set()
        self._in_text = 0
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self._in_text += tag == "article"
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
            if self._in_text:
                self.text_links.append(attributes["href"])
        if tag in ("script", "img", "iframe") and "src" in attributes:
            self.loaded.append(attributes["src"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(attributes["href"])

    def handle_endtag(self, tag):
        self._in_text -= tag == "article"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    """All pages but what a server shows where there is none, whose links begin at the server's root."""
    return {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}


def find_target(file: Path, link: str) -> tuple[Path, str] | None:
    """File and anchor that a link inside of the site leads to."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    return (file.parent / unquote(parts.path)).resolve() if parts.path else file, parts.fragment


class TestBuilt:
    def test_links_and_anchors(self, pages):
        for file, page in pages.items():
            for link in page.links + page.loaded:
                if target := find_target(file, link):
                    path, anchor = target
                    assert path.is_file(), f"{file.name}: {link}"
                    assert not anchor or path not in pages or anchor in pages[path].anchors, f"{file.name}: {link}"

    def test_loads_nothing_from_elsewhere(self, pages):
        for file, page in pages.items():
            assert [link for link in page.loaded if urlsplit(link).netloc] == [], file

    def test_every_page_is_within_two_clicks(self, site, pages):
        """By links of the text alone; beside it, every page has the navigation."""
        reached, newest = set(), {site / "index.html"}
        for _ in range(3):
            reached |= newest
            targets = {find_target(file, link) for file in newest for link in pages[file].text_links}
            newest = {target[0] for target in targets if target} & pages.keys()
        assert pages.keys() - reached == set()

    def test_reference_has_every_public_name(self, pages):
        anchors = set().union(*(page.anchors for page in pages.values()))
        for package in (modeling_vwlmm, modeling_vwlmm.training, processing_vwlmm):
            for name in package.__all__:
                home = getattr(package, name)
                assert f"{home.__module__}.{name}" in anchors

    def test_docstrings_are_rendered(self, site):
        """Shapes, defaults, errors and links of docstrings in Hugging Face's form."""
        text = (site / "reference/modeling_vwlmm.inspection.html").read_text()
        assert "<p>Logarithms of" not in text  # attributes are a list, each with its shape
        assert "Of shape <code>[N, C]</code>." in text
        assert "(`" not in text and "*optional*" not in text and "[`" not in text
        assert '<a class="autorefs autorefs-internal"' in text


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def tab(request, browser, site):
    """A page of the browser, which may ask for nothing outside of the site, and whose console may not complain."""
    width, height = SIZES[request.param]
    tab = browser.new_page(viewport={"width": width, "height": height})
    asked, complaints = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    yield tab
    tab.close()
    assert [url for url in asked if not url.startswith((site.as_uri(), "data:", "about:"))] == []
    assert complaints == []


class TestOpened:
    def test_pages(self, tab, site, pages):
        for file in sorted(pages):
            tab.goto(file.as_uri())
            assert tab.locator("h1").first.is_visible()
            # Nothing but what scrolls by itself is wider than the screen.
            assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), file.name
            broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
            assert tab.evaluate(broken) == 0, file.name

    def test_search(self, tab, site):
        tab.goto((site / "index.html").as_uri())
        if tab.viewport_size["width"] < 1000:
            tab.locator("label[for=__search]").first.click()
        tab.locator("input.md-search__input").click()
        tab.keyboard.type("visual words", delay=10)
        results = tab.locator(".md-search-result__link")
        results.first.wait_for()
        assert "Visual words" in results.first.inner_text()
        results.first.click()
        assert "visual words" in tab.locator("article").inner_text().lower()

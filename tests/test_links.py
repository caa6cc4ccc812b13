# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Links of README.md, docs/ and the pages beside them lead somewhere, and figures that stand twice are the same."""

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^( *)```.*?^\1```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")


def read_text(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "`code`", FENCE.sub("", page.read_text()))


def find_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them. Of those that repeat, the first."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def read_tables(page: str) -> list[list[dict[str, str]]]:
    """The tables of a page, each a list of rows by column."""
    tables = []
    for table in re.findall(r"^\|.+\|\n\|[ |-]+\|\n(?:\|.+\|\n)+", (ROOT / page).read_text(), flags=re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        tables.append([dict(zip(header, row, strict=True)) for row in rows])
    return tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
class TestLinks:
    def test_inside_the_repository(self, page):
        for link in LINK.findall(read_text(page)):
            path, _, anchor = link.partition("#")
            if urlsplit(link).scheme:
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.is_relative_to(ROOT) and target.exists(), f"{page.name}: {link} leads nowhere"
            assert not anchor or anchor in find_anchors(target), (
                f"{page.name}: {link} names no heading of {target.name}"
            )

    def test_to_other_places_are_well_formed(self, page):
        for link in LINK.findall(read_text(page)):
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link


def test_every_page_is_in_the_navigation_once():
    pages = re.findall(r"[\w./]+\.md", repr(read_settings()["nav"]))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert len(pages) == len(set(pages))
    assert written <= set(pages)


def test_start_page_links_every_page():
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "docs" / "index.md").read_text())}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked
    assert {"../modeling_vwlmm", "../CONTRIBUTING.md", "../CHANGELOG.md"} <= linked


def read_settings() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


class TestFigures:
    def test_table_of_readme_is_that_of_the_demo_page(self):
        (table,) = [table for table in read_tables("README.md") if "exact match" in table[0]]
        assert table in read_tables("docs/quickstart.md")

    def test_readme_is_short_and_shows_picture_and_table_first(self):
        lines = (ROOT / "README.md").read_text().splitlines()
        assert len(lines) < 160
        first = "\n".join(lines[:25])
        assert "docs/one_image.png" in first and "| all " in first

    def test_rows_of_results_are_filled(self):
        tables = read_tables("docs/results.md")
        assert tables
        for row in (row for table in tables for row in table):
            assert [*row] == ["checkpoint", "data", "steps", "score", "who"]
            assert all(row.values()), row

    def test_results_of_this_project_stand_on_its_pages(self):
        rows = [row for table in read_tables("docs/results.md") for row in table]
        own = [row for row in rows if "this project" in row["who"]]
        assert own
        for row in own:
            (page,) = re.findall(r"\]\((\w+\.md)#", row["who"])
            text = (ROOT / "docs" / page).read_text()
            for score in re.findall(r"\d+\.\d%", row["score"]):
                assert score in text, f"{row['checkpoint']}: {score} does not stand in {page}"

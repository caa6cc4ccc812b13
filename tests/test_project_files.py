# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that GitHub and pre-commit read: they parse, and say what the project says elsewhere."""

import re
from pathlib import Path

import pytest
import yaml

from modeling_vwlmm.training.model_card import PAPERS


ROOT = Path(__file__).parents[1]
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
ELEMENTS = {"checkboxes", "dropdown", "input", "markdown", "textarea"}


def test_citation_file():
    """What the format's version 1.2.0 requires; version, papers and authors as elsewhere."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["version"] == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    references = citation["references"]
    assert [(paper["title"], paper["url"]) for paper in references] == [(p.title, p.url) for p in PAPERS.values()]
    assert citation["preferred-citation"] == references[0]
    entries = re.findall(r"```bibtex\n(.*?)```", (ROOT / "docs" / "cite.md").read_text(), flags=re.DOTALL)
    for entry, paper in zip(entries, references, strict=True):
        people = [a.get("name") or f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
        for field, value in (("title", paper["title"]), ("author", " and ".join(people)), ("year", paper["year"])):
            assert re.search(rf"^  {field} += {{(.+)}}", entry, re.M)[1] == str(value)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_forms(form):
    """What GitHub requires of a form: it would show none with a mistake."""
    content = yaml.safe_load(form.read_text())
    assert all(isinstance(content[key], str) for key in ("name", "description"))
    asked = [element for element in content["body"] if element["type"] != "markdown"]
    assert {element["type"] for element in content["body"]} <= ELEMENTS
    assert len({element["id"] for element in asked}) == len(asked) > 0
    assert all(element["attributes"]["label"] for element in asked)


def test_hooks_of_pre_commit_run_what_is_installed():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        program, *arguments = hook["entry"].split()
        assert program.startswith(".venv/bin/") and hook["language"] == "system"
        assert all((ROOT / argument).is_file() for argument in arguments if argument.endswith(".py"))

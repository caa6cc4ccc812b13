# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the site adds to the pages of `docs/`, which are read on GitHub as well.

- Pages of the API reference, one for each `reference/MODULE.md` in the navigation, made of docstrings; and their list.
- The pages that lie at the top of the repository: CONTRIBUTING.md and CHANGELOG.md.
- Links out of `docs/`: to these pages, or to the file in the repository where it has none.
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[2]
PAGES_AT_THE_TOP = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Their classes are put together from several files: what these add is shown as well.
WHOLE = "modeling_vwlmm.modeling_vwlmm", "modeling_vwlmm.training.trainer", "processing_vwlmm.processing_vwlmm"
REFERENCE = re.compile(r"reference/((?:modeling|processing)_vwlmm[\w.]*)\.md")
FOLDERS = {"modeling_vwlmm": "modeling_vwlmm", "processing_vwlmm": "processing"}  # of packages


def list_modules(nav: list) -> list[str]:
    """The modules that have a page of the reference, in the order of the navigation."""
    return REFERENCE.findall(repr(nav))


def find_file(module: str) -> Path:
    """The file of a module, by its dotted name."""
    package, *names = module.split(".")
    return ROOT.joinpath(FOLDERS[package], *names).with_suffix(".py")


def list_reference(nav: list) -> str:
    """The first page of the reference: every module with the first sentence of its docstring."""
    rows = []
    for module in list_modules(nav):
        text = ast.get_docstring(ast.parse(find_file(module).read_text())) or ""
        first = re.split(r"(?<=\.)\s|\n\n", text)[0].replace("\n", " ")
        first = re.sub(r"\[(`[^`]*`)\]", r"\1", first)  # what a docstring links to
        rows.append(f"| [`{module}`]({module}.md) | {first} |")
    return "\n".join(("# API reference", "", "| module | what |", "|---|---|", *rows, ""))


@event_priority(100)  # before the plugin reads its options
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Tells the reader of docstrings which names have a page."""
    options = config.plugins["mkdocstrings"].config["handlers"]["python"]["options"]
    options["extensions"] = [{"docs/site/docstrings.py": {"pages": list_modules(config.nav)}}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in `docs/`."""
    for module in list_modules(config.nav):
        content = f"::: {module}\n    options: {{inherited_members: {str(module in WHOLE).lower()}}}\n"
        files.append(File.generated(config, f"reference/{module}.md", content=content))
    files.append(File.generated(config, "reference/index.md", content=list_reference(config.nav)))
    for source, page in PAGES_AT_THE_TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to what is not in the site lead to the repository."""
    tops = {page: source for source, page in PAGES_AT_THE_TOP.items()}
    if page.file.src_uri.startswith("reference/"):
        return markdown
    folder = ROOT if page.file.src_uri in tops else ROOT / "docs"
    references = {find_file(module): f"reference/{module}.md" for module in list_modules(config.nav)}
    references[ROOT / "modeling_vwlmm"] = "reference/index.md"

    def replace(link: re.Match) -> str:
        path, _, anchor = link[1].partition("#")
        target = (folder / path).resolve()
        if target.is_relative_to(ROOT / "docs") and not target.is_dir():
            written = target.relative_to(ROOT / "docs").as_posix()
        elif target.parent == ROOT and target.name in PAGES_AT_THE_TOP:
            written = PAGES_AT_THE_TOP[target.name]
        elif target in references:
            written = references[target]
        elif target == ROOT / "README.md":
            written = "index.md"
        else:
            written = f"{config.extra['repository']}/blob/main/{target.relative_to(ROOT).as_posix()}"
        return f"]({written}#{anchor})" if anchor else f"]({written})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", replace, markdown)

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Notebooks are valid, carry no outputs, and name what there is. `make test-docs` executes them."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def read_cells(notebook: Path, kind: str) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def read_code(notebook: Path) -> ast.Module:
    """All code of a notebook, without the lines that are IPython's."""
    return ast.parse(re.sub(r"^%.*$", "", "\n".join(read_cells(notebook, "code")), flags=re.MULTILINE))


def test_there_are_two():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["inspect_checkpoint", "train_small_world"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
class TestNotebooks:
    def test_is_valid(self, notebook):
        nbformat = pytest.importorskip("nbformat")
        nbformat.validate(nbformat.read(notebook, as_version=4))

    def test_has_no_outputs(self, notebook):
        for cell in json.loads(notebook.read_text())["cells"]:
            if cell["cell_type"] == "code":
                assert cell["outputs"] == [] and cell["execution_count"] is None

    def test_imports_exist(self, notebook, monkeypatch):
        monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
        imported = [node for node in ast.walk(read_code(notebook)) if isinstance(node, ast.ImportFrom)]
        assert imported
        for node in imported:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")

    def test_what_is_read_of_an_inspected_image_exists(self, notebook):
        from modeling_vwlmm.inspection import InspectedImage

        used = {
            node.attr
            for node in ast.walk(read_code(notebook))
            if isinstance(node, ast.Attribute)
            and re.fullmatch(r"inspected|inspect_image\([^()]*\)", ast.unparse(node.value))
        }
        assert used
        assert used <= {*InspectedImage.__dataclass_fields__, *dir(InspectedImage)}

    def test_files_of_the_repository_exist(self, notebook):
        text = "\n".join(read_cells(notebook, "code"))
        for path in re.findall(r"(?:examples|modeling_vwlmm)/[\w/]*\w+(?:\.\w+)?", text):
            assert (ROOT / path).exists() or (ROOT / f"{path}1.yaml").exists(), path

    def test_opens_where_the_site_says(self, notebook):
        """Badge, page and installation name one repository, that of `mkdocs.yml`."""
        repository = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["extra"]["repository"]
        name = repository.removeprefix("https://github.com/")
        address = f"https://colab.research.google.com/github/{name}/blob/main/examples/notebooks/{notebook.name}"
        badge, first = read_cells(notebook, "markdown")[0], read_cells(notebook, "code")[0]
        assert f"]({address})" in badge and "Runtime" in badge
        assert f"({address})" in (ROOT / "docs" / "quickstart.md").read_text()
        assert f'REPOSITORY = "{repository}"' in first and '"pip", "install"' in first

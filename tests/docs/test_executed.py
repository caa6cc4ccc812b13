# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Both notebooks, executed from the top in their own folder, with samples for a few steps a stage."""

from pathlib import Path

import nbformat
import pytest
from conftest import GOLDEN
from nbclient import NotebookClient

from modeling_vwlmm import convert_lavit_checkpoint


NOTEBOOKS = Path(__file__).parents[2] / "examples" / "notebooks"


def execute(name: str) -> list[str]:
    """Mime types of all that a notebook shows."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [kind for output in outputs for kind in output.get("data", {})]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder into which the first notebook trains."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VWLMM_NOTEBOOK_SHARE", "0.01")
        patch.setenv("VWLMM_NOTEBOOK_RUNS", str(folder))
        shown = execute("train_small_world")
    assert shown.count("image/png") == 3  # a scene, words, where one of them is
    return folder


def test_train_small_world(runs):
    assert (runs / "stage4" / "model.safetensors").is_file()


def test_inspect_checkpoint(runs, monkeypatch):
    monkeypatch.setenv("VWLMM_NOTEBOOK_CHECKPOINT", str(runs / "stage4"))
    assert execute("inspect_checkpoint").count("image/png") == 5  # the image, words, entropy, where one is, a patch


def test_inspect_a_checkpoint_of_lavit(tmp_path, monkeypatch):
    """One that drops image tokens, whose VM head was never trained, and a word that is no token."""
    convert_lavit_checkpoint(GOLDEN / "lavit" / "checkpoint", tmp_path)
    monkeypatch.setenv("VWLMM_NOTEBOOK_CHECKPOINT", str(tmp_path))
    monkeypatch.setenv("VWLMM_NOTEBOOK_WORD", "zebra crossing")
    assert execute("inspect_checkpoint").count("image/png") == 5  # no map of the word, and the kept patches

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What the estimates on paper count is what the modules have."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_vwlmm import VWLMMVisualTokenizer, VWLMMVisualTokenizerConfig


@pytest.fixture
def estimate(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("estimate")


def test_lavit_counts_the_matrices_of_the_tokenizer(estimate):
    with torch.device("meta"):
        tokenizer = VWLMMVisualTokenizer(VWLMMVisualTokenizerConfig())
    found = {
        name: sum(m.weight.numel() for m in getattr(tokenizer, name).modules() if isinstance(m, nn.Linear))
        for name in ("selector", "task_layer", "merger", "decoder", "vision_tower")
    }
    lavit = estimate.LaVIT(tower_layers=39)  # BLIP-2's tower is one block shorter
    assert lavit.coding_parameters == pytest.approx(found["selector"] + found["task_layer"], rel=1e-2)
    assert lavit.merger_parameters == found["merger"]
    assert lavit.decoder_parameters == found["decoder"]
    assert lavit.tower_parameters == found["vision_tower"]


def test_lavit_trains_as_many_as_the_paper_says(estimate):
    # "around 7.3B in total" (section 3.3).
    assert estimate.estimate_lavit(estimate.Run(), estimate.LaVIT(), 2)["trained, millions"] == pytest.approx(
        7300, abs=50
    )

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo's choice of recipe lines: that it trains all that it starts from."""

import importlib
from pathlib import Path

import pytest


def test_each_choice_starts_from_what_is_trained_before(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    demo = importlib.import_module("demo")
    trained = {"stage1", "stage2", *(demo.name_stage3(*choice) for choice in demo.CHOICES)}
    for (start, weight), options in demo.find_choices().items():
        given = dict(zip(options[::2], options[1::2], strict=True))
        assert start in trained and Path(given["--model_name_or_path"]) == demo.RUNS / start
        assert float(given["--visual_loss_weight"]) == pytest.approx(weight)

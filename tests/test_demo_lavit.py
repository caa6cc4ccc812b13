# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What LaVIT's demo counts, on images that are written by hand."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


ROOT = Path(__file__).parents[1]

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("demo_lavit")


def make_record(objects: dict[int, list[str]]) -> dict:
    """An image of 8 x 8 patches, dark but for those that have words here."""
    return {"patch_words": [objects.get(patch, ["dark"]) for patch in range(64)]}


# A red circle over two rows, one more to its right, beyond the middle, and one below.
RECORD = make_record({patch: ["red", "circle"] for patch in (0, 1, 8, 4, 32)} | {63: ["blue", "square"]})


def test_an_object_is_what_has_the_same_words_in_a_quadrant(demo):
    found = [patches.nonzero()[0].tolist() for patches in demo.find_objects(RECORD)]
    assert sorted(found) == [[0, 1, 8], [4], [32], [63]]
    assert demo.count_objects([RECORD, make_record({})]).tolist() == [4, 0]


def test_an_object_with_one_token_counts_and_background_does_not(demo):
    kept = torch.zeros(2, 64, dtype=torch.bool)
    kept[0, [8, 63, 20]] = True
    records = [RECORD, make_record({5: ["red", "circle"]})]
    assert demo.share_of_objects(kept, records) == pytest.approx(2 / 5)


def test_correlation(demo):
    lengths = torch.tensor([1.0, 2.0, 3.0])
    assert demo.correlate(lengths, torch.tensor([2, 4, 6])) == pytest.approx(1)
    assert demo.correlate(lengths, torch.tensor([1, 0, 1])) == pytest.approx(0)


def test_a_code_agrees_as_far_as_its_most_frequent_word(demo):
    words = [["red", "circle"], ["red", "square"], ["blue", "circle"], ["dark"], ["blue", "square"]]
    keep_mask = torch.tensor([[True, True, True, True, False]])
    tokens = SimpleNamespace(keep_mask=keep_mask, code_ids=torch.tensor([7, 7, 7, 7]))
    assert demo.agree(tokens, [words]) == {"colour": pytest.approx(2 / 3), "shape": pytest.approx(2 / 3)}
    tokens.code_ids = torch.tensor([7, 7, 2, 2])
    assert demo.agree(tokens, [words]) == {"colour": pytest.approx(1), "shape": pytest.approx(2 / 3)}

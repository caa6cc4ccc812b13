# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The dry run of a recipe."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from modeling_vwlmm import VWLMMTrainer
from modeling_vwlmm.training.collating import VWLMMDataCollator
from processing_vwlmm import llava_dataset


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train
from small_world import write_llava_dataset


ROOT = Path(__file__).parents[1]


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llava_dataset, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(VWLMMTrainer, "train", lambda *_, **__: pytest.fail("trains"))
    monkeypatch.chdir(ROOT)
    write_llava_dataset(tmp_path, 12, 4, num_held_out=1)

    def dry_run(*options):
        command = ["--config", "examples/recipes/small_world/stage1.yaml", "--check", "--use_cpu", "--bf16", "false"]
        command += ["--json_file", str(tmp_path / "captions.json"), "--image_folder", str(tmp_path / "images")]
        command += ["--global_batch_size", "4", "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path)]
        with pytest.raises(SystemExit) as stopped:
            train.main([*command, *options])
        return stopped.value.code, capsys.readouterr().out

    return dry_run


@pytest.mark.parametrize(
    "options, way",
    [((), "plain"), (("--train_sampling_strategy", "group_by_length"), "grouped"), (("--packing",), "packed")],
)
def test_good_data(dry_run, options, way):
    code, printed = dry_run(*options)
    assert code == 0
    assert "12 samples, 0 would stop the run" in printed
    assert re.search(r"images of a sample:\n +1 +12 #{40}\n", printed)
    assert re.search(rf"padding of the first epoch's batches \({way}\): \d+\.\d%", printed)
    if way != "packed":
        assert "optimizer steps: 3\n" in printed
    assert "time: not estimated" in printed


def test_samples_that_would_stop_the_run(dry_run, monkeypatch):
    def refuse(self: VWLMMDataCollator, samples: list[dict[str, Any]]) -> None:
        raise ValueError("no good")

    monkeypatch.setattr(VWLMMDataCollator, "_collate", refuse)
    code, printed = dry_run()
    assert code == 1
    assert re.search(r"12 samples, 12 would stop the run\n  12: no good \('[^']+', '[^']+', '[^']+'\)\n", printed)
    assert "optimizer steps" not in printed

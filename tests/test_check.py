# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The dry run of a recipe."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import tiny_text
from test_lavit_training import make_processor, make_tokenizer

from modeling_vwlmm import VWLMMTrainer
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
    assert re.search(r"reading: \d+\.\d samples/s .*\nFLOPs of the run: \d\.\d+e\+\d+\ntime: without", printed)


def number(pattern: str, printed: str) -> float:
    return float(re.search(pattern, printed)[1])


def test_samples_that_would_stop_the_run(dry_run, tmp_path):
    records = json.loads((tmp_path / "captions.json").read_text())
    image = tmp_path / "images" / records[0]["image"]
    image.write_bytes(image.read_bytes()[:-40])  # truncated
    uses = sum(record.get("image") == records[0]["image"] for record in records)
    del records[1]["conversations"]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    code, printed = dry_run()
    assert code == 1
    assert f"12 samples, {uses + 1} would stop the run" in printed
    assert "  1: 'conversations' is missing, expected a list of turns, of an image without text [{" in printed
    assert f"({records[1]['id']!r})" in printed
    assert f"  {uses}: bad image: " in printed
    assert "optimizer steps" not in printed
    code, printed = dry_run("--on_bad_image", "skip")
    assert code == 1
    assert "12 samples, 1 would stop the run" in printed
    assert f"{uses} would be skipped" in printed


def test_images_without_text_are_all_that_a_visual_tokenizer_reads(dry_run, tmp_path):
    records = json.loads((tmp_path / "captions.json").read_text())
    alone = [record | {"conversations": record["conversations"][:1]} for record in records]
    (tmp_path / "captions.json").write_text(json.dumps(alone))
    code, printed = dry_run()
    assert code == 1 and "12 samples, 12 would stop the run" in printed
    code, printed = dry_run("--method", "lavit", "--learning_rate", "1e-3")
    assert code == 0 and "12 samples, 0 would stop the run" in printed


@pytest.mark.parametrize(
    "options",
    [(), ("--train_sampling_strategy", "group_by_length"), ("--packing",)],
    ids=["plain", "grouped", "packed"],
)
def test_images_without_text_are_good_data_where_they_are_learned(dry_run, tmp_path, options):
    records = json.loads((tmp_path / "captions.json").read_text())
    records[::2] = [record | {"conversations": record["conversations"][:1]} for record in records[::2]]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    code, printed = dry_run("--stage", "4", *options)
    assert code == 0 and "12 samples, 0 would stop the run" in printed
    code, printed = dry_run("--stage", "4", "--visual_loss_weight", "0", *options)
    assert code == 1 and "12 samples, 6 would stop the run" in printed


@pytest.mark.parametrize("name", ["visual_word_temperature", "pseudo_image_feature_temperature"])
def test_temperature_that_is_none(dry_run, name):
    with pytest.raises(ValueError, match=f"`{name}` is -1.0; expected a finite number above 0"):
        dry_run(f"--{name}", "-1")


def test_what_a_visual_tokenizer_has_not(dry_run):
    with pytest.raises(ValueError, match="`visual_word_temperature` is set, .* which has no visual words"):
        dry_run("--method", "lavit", "--learning_rate", "1e-3", "--visual_word_temperature", "0.5")


def add_document(file: Path) -> None:
    file.write_text(json.dumps([*json.loads(file.read_text()), {"id": "document", "text": "a red circle"}]))


def test_documents_of_a_template_without_a_form_for_them(dry_run, tmp_path):
    add_document(tmp_path / "captions.json")
    code, printed = dry_run()
    assert code == 1
    assert re.search(r"  1: one 'assistant' message alone is a text .* \('document'\)", printed)


@pytest.mark.parametrize("options", [[], ["--packing"]])
def test_lavit_of_a_tokenizer_and_an_llm(dry_run, tmp_path, options):
    tokenizer = make_tokenizer(threshold=0.5)
    for part in (tokenizer, make_processor(tokenizer)):
        part.save_pretrained(tmp_path / "tokenizer")
    tiny_text("llama", vocab_size=500).save_pretrained(tmp_path / "llm")
    add_document(tmp_path / "captions.json")
    parts = ["--visual_tokenizer", str(tmp_path / "tokenizer"), "--language_model", str(tmp_path / "llm")]
    code, printed = dry_run("--method", "lavit", "--stage", "2", *parts, *options)
    assert code == 0
    assert "13 samples, 0 would stop the run" in printed
    assert re.search(r"images of a sample:\n +0 +1 #+\n +1 +12 #{40}\n", printed)


def test_processes_and_time(dry_run):
    _, one = dry_run("--tflops", "1e-6", "--gradient_accumulation_steps", "1", "--global_batch_size", "2")
    options = ("--tflops", "1e-6", "--gradient_accumulation_steps", "1", "--global_batch_size", "2")
    _, three = dry_run(*options, "--num_processes", "3")
    assert "optimizer steps: 6" in one
    assert "optimizer steps: 2" in three
    hours = [number(r"time: (\S+) h at 1e-06 TFLOP/s", printed) for printed in (one, three)]
    assert hours[0] == pytest.approx(3 * hours[1], rel=0.02)
    flops = number(r"FLOPs of the run: (\S+)", one)
    assert hours[0] == pytest.approx(flops / 1e6 / 3600, rel=0.02)


def test_padding_to_a_multiple(dry_run):
    shares = [
        number(r"batches \(plain\): (\S+)%", dry_run(*options)[1]) for options in ((), ("--pad_to_multiple_of", "512"))
    ]
    assert shares[0] < shares[1]


def test_memory(dry_run):
    decoder = ("--stage", "2", "--chat_template", "plain")
    lora = (*decoder, "--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "2")
    ways = [decoder, (*decoder, "--dtype", "bfloat16"), lora, (*lora, "--load_in_4bit")]
    whole, half, adapters, narrow = (number(r"unsharded: (\S+) GB", dry_run(*options)[1]) for options in ways)
    assert half == pytest.approx(whole / 2, rel=0.05, abs=0.001)
    assert whole > adapters >= narrow


def test_what_does_not_fit_is_refused_before_samples_are_read(dry_run, monkeypatch):
    monkeypatch.setattr("check.VWLMMDataCollator.__call__", lambda *_: pytest.fail("reads samples"))
    reconstruction = {"vae": "examples/small_world/vae", "size": 66}
    with pytest.raises(ValueError, match="66 pixels"):
        dry_run("--visual_objective", json.dumps({"reconstruction": reconstruction}))

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The same samples in the same optimiser steps, and the same losses, on any layout.

Run as a script by the launcher, this file trains; run by pytest, it starts the launcher and compares. `make test-long`
compares more: every stage on DDP, FSDP2 and ZeRO, on one, two and four processes.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from conftest import GOLDEN, LONG
from datasets import Dataset, concatenate_datasets, load_from_disk
from safetensors.torch import load_file
from test_distributed import FSDP, ZERO3, run_python, shard_on_cpu

from modeling_vwlmm import (
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    convert_lavit_checkpoint,
)
from modeling_vwlmm.training import tokenize_images
from processing_vwlmm import VWLMMProcessor


NUM_SAMPLES = 11
GLOBAL_BATCH_SIZE = 4
# Two passes over the samples, whose last step takes three.
NUM_STEPS = 6
MODES = {
    "plain": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "packed": {"packing": True, "max_length": 128},
    "streamed": {"max_steps": NUM_STEPS},
    "dropped": {"dataloader_drop_last": True},
}
ZERO2 = {**ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
SHARDINGS = {"ddp": {}, "fsdp2": FSDP, "zero2": ZERO2, "zero3": ZERO3}


class RecordingTrainer(VWLMMTrainer):
    """Notes which samples each optimiser step takes on all processes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []
        collate = self.data_collator.torch_call

        def collate_and_name(samples: list) -> dict:
            rows = samples if isinstance(samples[0], list) else [samples]
            batch = collate(samples)
            batch["supervised_positions"]["ids"] = [sample["id"] for row in rows for sample in row]
            return batch

        self.data_collator.torch_call = collate_and_name

    def get_batch_samples(self, *args):
        batches, counts = super().get_batch_samples(*args)
        ids = []
        for batch in batches:
            named, num_tokens = batch["supervised_positions"].pop("ids"), batch["input_ids"].numel()
            ids += named if batch["supervised_positions"]["num_padding"] < num_tokens else []
        self.steps.append(sorted(gather_object(ids)))
        return batches, counts


def make_run(name: str, stage: int, mode: str, micro_batch_size: int, **options: Any) -> dict[str, Any]:
    return {"name": name, "stage": stage, "mode": mode, "micro_batch_size": micro_batch_size, **options}


def train(checkpoint: str, data: str, output: str, runs: str) -> None:
    """Trains each run, and writes its steps, losses and weights."""
    for run in json.loads(runs):
        options, samples = MODES[run["mode"]], load_from_disk(data)
        if run["mode"] == "streamed":
            samples = samples.to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=4)
        trainer = RecordingTrainer(
            model=VWLMMForConditionalGeneration.from_pretrained(checkpoint),
            args=VWLMMTrainingArguments(
                f"{output}/{run['name']}",
                stage=run["stage"],
                method=run.get("method", "vw-lmm"),
                chat_template=run.get("chat_template", "vicuna_v1"),
                text_first_share=run.get("text_first_share", 0),
                per_device_train_batch_size=run["micro_batch_size"],
                global_batch_size=GLOBAL_BATCH_SIZE,
                learning_rate=0.05,
                warmup_steps=0,
                max_grad_norm=1.0,
                logging_steps=1,
                save_strategy="steps" if "save_steps" in run else "no",
                save_steps=run.get("save_steps", 500),
                dataloader_num_workers=run.get("num_workers", 0),
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                **{"num_train_epochs": 2, **options},
            ),
            train_dataset=samples,
            processing_class=VWLMMProcessor.from_pretrained(checkpoint),
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        )
        trainer.train(resume_from_checkpoint=run.get("resume_from_checkpoint"))
        trainer.save_model(f"{output}/{run['name']}")
        if trainer.is_world_process_zero():
            log = [entry for entry in trainer.state.log_history if "loss" in entry]
            result = {"steps": trainer.steps, "log": log, "wrapped": type(trainer.model_wrapped).__name__}
            Path(output, run["name"], "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another still talks to it


def launch(num_processes: int, environment: dict[str, str], *arguments: str) -> None:
    """Runs this file in so many processes, with the arguments of `train`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    run_python([*(launcher if num_processes > 1 else []), __file__, *arguments], environment)


def read(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    return {**result, "weights": load_file(folder / "model.safetensors")}


def compare(result: dict[str, Any], expected: dict[str, Any], name: str, first_step: int = 0) -> dict[str, float]:
    """Asserts that a run, from a step on, is that of another layout. Returns the largest differences."""
    assert result["steps"] == expected["steps"][first_step:], name
    largest = {"loss": 0.0, "weight": 0.0}
    assert len(result["log"]) == len(expected["log"])
    for entry, other in zip(result["log"], expected["log"], strict=True):
        for metric in ("loss", "language_loss", "visual_loss", "num_text_positions", "num_image_positions"):
            assert (metric in entry) == (metric in other), (name, metric)
            if metric in other:
                assert entry[metric] == pytest.approx(other[metric], rel=1e-5), (name, entry["step"], metric)
                largest["loss"] = max(largest["loss"], abs(entry[metric] - other[metric]) / max(other[metric], 1e-9))
    for tensor, value in result["weights"].items():
        difference = (value - expected["weights"][tensor]).abs().max().item()
        assert difference <= 1e-4, (name, tensor)
        largest["weight"] = max(largest["weight"], difference)
    return largest


@pytest.fixture(scope="module")
def data(dataset, tmp_path_factory) -> str:
    """Eleven samples with names of their own, with and without images."""
    folder = tmp_path_factory.mktemp("layouts") / "data"
    samples: Dataset = concatenate_datasets([dataset, dataset]).select(range(NUM_SAMPLES))
    ids = [f"sample-{index}" for index in range(NUM_SAMPLES)]
    samples.remove_columns("id").add_column("id", ids).save_to_disk(folder)
    return str(folder)


RUNS = [
    make_run("plain", 4, "plain", 4, save_steps=2),
    make_run("grouped", 3, "grouped", 1, save_steps=4),
    make_run("packed", 2, "packed", 1),
    make_run("streamed", 4, "streamed", 1, save_steps=4),
    make_run("dropped", 1, "dropped", 2),
]


@pytest.fixture(scope="module")
def alone(vicuna, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(vicuna, data, str(folder), json.dumps(RUNS))
    return folder


def test_a_step_has_the_samples_that_it_should(alone):
    results = {run["name"]: read(alone / run["name"])["steps"] for run in RUNS}
    for name in ("plain", "grouped", "streamed"):
        sizes = [len(step) for step in results[name]]
        assert sizes == [4, 4, 3, 4, 4, 3], name
        first, second = sum(results[name][:3], []), sum(results[name][3:], [])
        assert len(set(first)) == len(set(second)) == NUM_SAMPLES, name
        assert results[name][:3] != results[name][3:], name  # each pass has an order of its own
    packed = results["packed"]
    half = len(packed) // 2
    assert sorted(sum(packed[:half], [])) == sorted(sum(packed[half:], [])) == sorted(set(sum(packed, [])))
    assert [len(step) for step in results["dropped"]] == [4] * 4


@pytest.mark.parametrize(("num_processes", "sharding"), [pytest.param(2, "ddp", marks=LONG), (4, "fsdp2")])
def test_layouts_agree(vicuna, data, alone, tmp_path, num_processes, sharding):
    """Also where a run goes on that another number of processes began."""
    through = [
        {**run, "micro_batch_size": micro_batch_size, "num_workers": 2 if run["mode"] == "streamed" else 0}
        for run, micro_batch_size in zip(RUNS, [1, 1, 2 // (num_processes // 2), 1, 1], strict=True)
    ]
    resumed = [
        {**through[0], "name": "resumed", "resume_from_checkpoint": f"{alone}/plain/checkpoint-2"},
        {**through[1], "name": "resumed_grouped", "resume_from_checkpoint": f"{alone}/grouped/checkpoint-4"},
        {**through[3], "name": "resumed_stream", "resume_from_checkpoint": f"{alone}/streamed/checkpoint-4"},
    ]
    # A single process writes no checkpoint that FSDP reads.
    runs = through + (resumed if sharding == "ddp" else [])
    launch(num_processes, SHARDINGS[sharding], vicuna, data, str(tmp_path), json.dumps(runs))
    for run in through:
        compare(read(tmp_path / run["name"]), read(alone / run["name"]), run["name"])
    if sharding == "ddp":
        compare(read(tmp_path / "resumed"), read(alone / "plain"), "resumed", first_step=2)
        compare(read(tmp_path / "resumed_grouped"), read(alone / "grouped"), "resumed grouped", first_step=4)
        compare(read(tmp_path / "resumed_stream"), read(alone / "streamed"), "resumed stream", first_step=4)


# LaVIT's stage 2, in which every image has a length of its own.
LAVIT_RUNS = [
    make_run(name, 2, mode, 4, method="lavit", chat_template="lavit", text_first_share=share)
    for name, mode, share in (("plain", "plain", 0), ("packed", "packed", 0), ("text first", "plain", 1))
]


@pytest.fixture(scope="module")
def lavit(data, tmp_path_factory) -> tuple[str, str, str, Path]:
    """Checkpoint, data with captions among them, these with codes computed once, and a single process's runs."""
    folder = tmp_path_factory.mktemp("lavit_alone")
    checkpoint = str(folder / "checkpoint")
    convert_lavit_checkpoint(GOLDEN / "lavit/checkpoint", checkpoint)
    model, processor = (
        VWLMMForConditionalGeneration.from_pretrained(checkpoint),
        VWLMMProcessor.from_pretrained(checkpoint),
    )
    samples = load_from_disk(data).map(drop_question)
    samples.save_to_disk(folder / "data")
    samples.map(tokenize_images(model, processor), batched=True, batch_size=4).save_to_disk(folder / "with_codes")
    train(checkpoint, str(folder / "data"), str(folder), json.dumps(LAVIT_RUNS))
    return checkpoint, str(folder / "data"), str(folder / "with_codes"), folder


def drop_question(sample: dict[str, Any]) -> dict[str, Any]:
    """Makes a caption, which may come before its image, of the only answer to a question about one image."""
    messages = sample["messages"]
    if len(messages) == 2 and len(sample["images"]) == 1:
        messages[0]["content"] = [part for part in messages[0]["content"] if part["type"] == "image"]
    return {"messages": messages}


@pytest.mark.parametrize(
    "sharding", ["fsdp2", *(pytest.param(name, marks=LONG) for name in ("ddp", "zero2", "zero3"))]
)
def test_images_of_any_length(lavit, tmp_path, sharding):
    """Where weights are sharded, codes are computed before. They may be read, and by one of the processes alone."""
    checkpoint, data, with_codes, alone = lavit
    runs = [{**run, "micro_batch_size": 1} for run in LAVIT_RUNS]
    samples = data if sharding in ("ddp", "zero2") else with_codes
    environment = {**SHARDINGS[sharding], "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,Blip2EncoderLayer,Block"}
    launch(2, environment, checkpoint, samples, str(tmp_path), json.dumps(runs))
    for run in runs:
        compare(read(tmp_path / run["name"]), read(alone / run["name"]), run["name"])


# VLSA's adapter, which reads another number of patches in every image.
PERCEIVER_RUNS = [
    make_run(f"perceiver_{mode}{stage}", stage, mode, 4) for mode, stage in (("plain", 1), ("plain", 2), ("packed", 2))
]


@pytest.fixture(scope="module")
def perceiving_alone(perceiving, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("perceiving_alone")
    train(perceiving, data, str(folder), json.dumps(PERCEIVER_RUNS))
    return folder


# On data parallel processes `test_distributed` has one.
@pytest.mark.parametrize(
    "sharding", ["fsdp2", *(pytest.param(name, marks=LONG) for name in ("ddp", "zero2", "zero3"))]
)
def test_images_of_any_number_of_patches(perceiving, data, perceiving_alone, tmp_path, sharding):
    """Also where one process has texts alone."""
    runs = [{**run, "micro_batch_size": 1} for run in PERCEIVER_RUNS]
    launch(2, SHARDINGS[sharding], perceiving, data, str(tmp_path), json.dumps(runs))
    for run in runs:
        compare(read(tmp_path / run["name"]), read(perceiving_alone / run["name"]), run["name"])


# Every stage in every order of samples, and every layout: for `make test-long`.
ALL_RUNS = [make_run(f"{mode}{stage}", stage, mode, 4) for stage in (1, 2, 3, 4) for mode in MODES]


@pytest.fixture(scope="module")
def all_alone(vicuna, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("all_alone")
    train(vicuna, data, str(folder), json.dumps(ALL_RUNS))
    return folder


@LONG
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("num_processes", [2, 4])
def test_all_layouts_agree(vicuna, data, all_alone, tmp_path, num_processes, sharding):
    runs = [{**run, "micro_batch_size": 1} for run in ALL_RUNS]
    launch(num_processes, SHARDINGS[sharding], vicuna, data, str(tmp_path), json.dumps(runs))
    largest = {"loss": 0.0, "weight": 0.0}
    for run in runs:
        found = compare(read(tmp_path / run["name"]), read(all_alone / run["name"]), run["name"])
        largest = {name: max(largest[name], difference) for name, difference in found.items()}
    print(
        f"{sharding}, {num_processes} processes, {len(runs)} runs: losses differ by {largest['loss']:.1e} at most "
        f"(relative), weights by {largest['weight']:.1e}"
    )


if __name__ == "__main__":
    gc.freeze()  # see conftest.py
    shard_on_cpu()
    train(*sys.argv[1:])
    os._exit(0)  # gloo's threads now and then abort or hang the exit of an interpreter

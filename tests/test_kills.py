# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed goes on to the weights it would have had; one that is asked to end, saves and says so.

`make test-long` kills more often: `KILLS=50`.
"""

import gc
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import BY_HAND
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training import checkpoints, saving
from modeling_vwlmm.training.checkpoints import find_last_checkpoint
from processing_vwlmm import VWLMMProcessor


KILLS = int(os.environ.get("KILLS", 4))
NUM_STEPS = 12


def make_trainer(checkpoint: str, data: str, output: str, stage: int, **options) -> VWLMMTrainer:
    return VWLMMTrainer(
        model=VWLMMForConditionalGeneration.from_pretrained(checkpoint),
        args=VWLMMTrainingArguments(
            output,
            stage=stage,
            **{
                **BY_HAND,
                "chat_template": "vicuna_v1",
                "per_device_train_batch_size": 1,
                "global_batch_size": 2,
                "max_steps": NUM_STEPS,
                "lr_scheduler_type": "cosine",
                "learning_rate": 1e-3,
                "logging_steps": 3,
                "save_strategy": "steps",
                "save_steps": 1,
                "save_total_limit": 2,
                **options,
            },
        ),
        train_dataset=load_from_disk(data),
        processing_class=VWLMMProcessor.from_pretrained(checkpoint),
    )


class Signal(TrainerCallback):
    """Sends the process a signal in its fifth step."""

    def __init__(self, number):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), self.number)


def train(
    checkpoint: str,
    data: str,
    output: str,
    stage: int,
    kill_at: str | None = None,
    signal_number: int | None = None,
    **options,
) -> None:
    """
    Goes on from the newest checkpoint that is whole. With `kill_at` the process is killed where it calls that, in its
    third step.
    """
    gc.freeze()  # see conftest.py
    trainer = make_trainer(checkpoint, data, output, stage, **options)
    if signal_number is not None:
        trainer.add_callback(Signal(signal_number))
    if kill_at is not None:
        owner = next(owner for owner in (trainer, checkpoints, saving) if hasattr(owner, kill_at))
        there = getattr(owner, kill_at)

        def kill(*args, **kwargs):
            if trainer.state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return there(*args, **kwargs)

        setattr(owner, kill_at, kill)
    trainer.train(resume_from_checkpoint=find_last_checkpoint(output))
    trainer.save_model(f"{output}/final")
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("step", "loss", "grad_norm", "learning_rate", "language_loss", "visual_loss", "num_text_positions")
    log = [{name: entry[name] for name in names if name in entry} for entry in log]
    Path(output, "log.json").write_text(json.dumps(log))


@pytest.fixture(scope="module")
def start():
    """Starts a function in a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_vwlmm", "modeling_vwlmm.training", "bitsandbytes", "peft", "trl"])

    def start(*args, **kwargs) -> multiprocessing.Process:
        process = context.Process(target=train, args=tuple(map(str, args[:3])) + args[3:], kwargs=kwargs)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def data(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "data"
    dataset.save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(start, vicuna, data, tmp_path_factory):
    """Weights, log and seconds of a run of a stage that nobody kills."""
    runs = {}

    def run(stage: int):
        if stage not in runs:
            output = tmp_path_factory.mktemp(f"stage{stage}")
            process, begun = start(vicuna, data, output, stage), time.perf_counter()
            process.join()
            assert process.exitcode == 0
            runs[stage] = (
                load_file(output / "final/model.safetensors"),
                read_log(output),
                time.perf_counter() - begun,
            )
        return runs[stage]

    return run


def read_log(output: Path) -> list[dict]:
    return json.loads((output / "log.json").read_text())


def assert_same_run(output: Path, expected: tuple) -> None:
    weights, log, _ = expected
    for name, value in load_file(output / "final/model.safetensors").items():
        assert torch.equal(value, weights[name]), name
    assert read_log(output) == log


def test_killed_at_random(start, uninterrupted, vicuna, data, tmp_path):
    """At any moment of any stage, until it has come to its end."""
    rng = random.Random(0)
    kills = {1: 0, 2: 0, 3: 0, 4: 0}
    runs = 0
    while sum(kills.values()) < KILLS:
        stage = 1 + runs % 4 if KILLS > 4 else 4
        expected = uninterrupted(stage)
        output = tmp_path / f"run{runs}"
        for _ in range(50):
            process = start(vicuna, data, output, stage)
            process.join(rng.uniform(0.2, 0.9) * expected[2] if sum(kills.values()) < KILLS else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills[stage] += 1
            elif process.exitcode == 0:
                break
        assert process.exitcode == 0
        assert_same_run(output, expected)
        runs += 1
    print(f"kills survived, by stage: {kills}; runs equal bit for bit: {runs}")


# Before anything is written, between files, when all are written and none has its place, and behind that.
@pytest.mark.parametrize(
    "kill_at", ["_save_checkpoint", "_save_optimizer_and_scheduler", "_save_rng_state", "_sync", "rotate_checkpoints"]
)
def test_killed_while_it_saves(start, uninterrupted, vicuna, data, tmp_path, kill_at, caplog):
    process = start(vicuna, data, tmp_path, 4, kill_at=kill_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = find_last_checkpoint(tmp_path)
    assert found.endswith("checkpoint-3" if kill_at == "rotate_checkpoints" else "checkpoint-2")
    process = start(vicuna, data, tmp_path, 4)
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path, uninterrupted(4))
    assert not [path for path in tmp_path.rglob("*") if "ncomplete" in path.name and any(path.iterdir())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_end_it_saves_and_says_so(start, uninterrupted, vicuna, data, tmp_path, number):
    process = start(vicuna, data, tmp_path, 4, save_steps=100, signal_number=number)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    process = start(vicuna, data, tmp_path, 4, save_steps=100)
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path, uninterrupted(4))


class TestWhatIsResumed:
    @pytest.fixture
    def run(self, vicuna, data, tmp_path):
        options = {"max_steps": 2, "save_total_limit": None}
        make_trainer(vicuna, data, str(tmp_path), 4, **options).train()

        def resume(stage=4, data=data, checkpoint="checkpoint-1", config=None, **changes):
            trainer = make_trainer(vicuna, data, str(tmp_path), stage, **{**options, **changes})
            for name, value in (config or {}).items():
                setattr(trainer.model.config, name, value)
            trainer.train(resume_from_checkpoint=str(tmp_path / checkpoint) if checkpoint else True)
            return trainer

        return resume

    @pytest.fixture
    def other(self, dataset, tmp_path) -> Path:
        dataset.select(range(7)).save_to_disk(tmp_path / "other")
        return tmp_path / "other"

    def test_a_partial_checkpoint_is_passed_over_and_named(self, run, tmp_path, monkeypatch):
        found = []
        monkeypatch.setattr("modeling_vwlmm.training.checkpoints.logger.warning", found.append)
        file = tmp_path / "checkpoint-2" / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:100])
        assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        (message,) = found
        assert "checkpoint-2 is not whole: there is 100 bytes of the" in message
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            run(checkpoint="checkpoint-2")
        assert run(checkpoint=None).state.global_step == 2

    def test_other_data(self, run, other):
        with pytest.raises(ValueError, match="made on other data.*number of samples was 8 and is 7.*ignore_data_ch"):
            run(data=other)
        assert run(data=other, ignore_data_changes=True).state.global_step == 2

    @pytest.mark.parametrize(
        ("changes", "found"),
        [
            ({"seed": 7}, "data_seed was 42 and is 7"),
            ({"global_batch_size": 4}, "global_batch_size was 2 and is 4"),
            ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy was 'random'"),
            ({"packing": True}, "packing was False and is True"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_another_order(self, run, changes, found):
        with pytest.raises(ValueError, match=found):
            run(**changes)

    def test_another_layout_is_none(self, run):
        assert run(per_device_train_batch_size=2).state.global_step == 2

    def test_another_stage(self, run):
        with pytest.raises(ValueError, match="made by another run: stage was 4 and is 2"):
            run(stage=2, ignore_data_changes=True)

    @pytest.mark.parametrize(
        ("name", "before", "now"),
        [
            ("visual_word_temperature", 1.0, 0.25),
            ("pseudo_image_feature_temperature", 1.0, 0.5),
            ("use_pseudo_image_features", False, True),
        ],
    )
    def test_other_words(self, run, name, before, now):
        with pytest.raises(ValueError, match=f"made by another run: {name} was {before} and is {now}"):
            run(config={name: now}, ignore_data_changes=True)

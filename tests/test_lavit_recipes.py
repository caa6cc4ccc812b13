# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""LaVIT's two stages through examples/train.py: from recipes, in dry runs, and where a run is interrupted."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from conftest import BY_HAND, GOLDEN, make_image, tiny_text, tiny_vision
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessor
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments, VWLMMVisualTokenizer
from modeling_vwlmm.codebook_vwlmm import Codebook
from modeling_vwlmm.training import TrainingDiverged, TrainingInterrupted
from modeling_vwlmm.training.stages import LAVIT_STAGES, set_trainable_parameters
from modeling_vwlmm.training.tokenizer_trainer import VisualTokenizerTrainer
from processing_vwlmm import llava_dataset


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train


CODEBOOK = {"vision_feature_layer": -2, "num_merger_layers": 1, "num_decoder_layers": 1, "num_codes": 8, "code_dim": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with a tower, an LLM, and ten images with captions and questions."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tiny_vision("clip").save_pretrained(folder / "tower")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder / "tower")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "vicuna")
    tokenizer.save_pretrained(folder / "llm")
    tiny_text("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "llm")
    (folder / "images").mkdir()
    records = []
    for number in range(10):
        make_image(number).save(folder / f"images/{number}.png")
        question = "<image>" if number % 2 else f"<image>\nwhat is {number}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a picture " * (1 + number % 3)}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def run_recipe(parts, tmp_path, monkeypatch):
    """Trains a stage as a recipe says, with the command line's options, and returns its folder."""
    monkeypatch.setattr(llava_dataset, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(stage: int, name: str, **options) -> Path:
        recipe = {
            **BY_HAND,
            "method": "lavit",
            "stage": stage,
            "json_file": str(parts / "data.json"),
            "image_folder": str(parts / "images"),
            "language_model": str(parts / "llm"),
            "output_dir": str(tmp_path / name),
            "global_batch_size": 4,
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "logging_steps": 3,
            "save_strategy": "steps",
            "save_steps": 100,
            **({"vision_tower": str(parts / "tower"), "visual_tokenizer_config": CODEBOOK} if stage == 1 else {}),
            **options,
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        train.main(["--config", str(tmp_path / "recipe.yaml")])
        return tmp_path / name

    return run


@pytest.fixture
def interrupted(monkeypatch):
    """Lets a class of trainers get a signal in a step."""

    def interrupt(trainer: type, step: int) -> None:
        take_step = trainer.training_step

        def training_step(self, *args, **kwargs):
            if self.state.global_step == step - 1:
                monkeypatch.setattr(trainer, "training_step", take_step)
                os.kill(os.getpid(), signal.SIGTERM)
            return take_step(self, *args, **kwargs)

        monkeypatch.setattr(trainer, "training_step", training_step)

    return interrupt


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict, list[dict]]:
    """Weights, config and what was logged, but for what time and machine say."""
    (state,) = folder.glob("checkpoint-6/trainer_state.json")
    unlike = ("per_second", "wait_share", "seconds_left", "memory_gib", "runtime")
    log = [
        {name: value for name, value in entry.items() if not name.endswith(unlike)}
        for entry in json.loads(state.read_text())["log_history"]
    ]
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()), log


def assert_same_run(folder: Path, expected: Path) -> None:
    (weights, config, log), (others, other_config, other_log) = read(folder), read(expected)
    assert weights.keys() == others.keys()
    assert not [name for name, value in weights.items() if not torch.equal(value, others[name])]
    assert config == other_config
    assert log == other_log


class TestAnInterruptedRun:
    # At random masks, with a selector that learns, in front of the codebook's first step, and behind it.
    @pytest.mark.parametrize("step", [1, 2, 3, 4])
    def test_tokenizer(self, run_recipe, interrupted, step):
        phases = {"random_mask_steps": 1, "continuous_steps": 3}
        expected = run_recipe(1, "expected", **phases)
        interrupted(VisualTokenizerTrainer, step)
        with pytest.raises(TrainingInterrupted) as stopped:
            run_recipe(1, "run", **phases)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert stopped.value.checkpoint.endswith(f"run/checkpoint-{step}")
        assert_same_run(run_recipe(1, "run", **phases), expected)

    def test_model(self, run_recipe, interrupted):
        options = {"visual_tokenizer": str(run_recipe(1, "tokenizer")), "text_first_share": 0.5, "max_length": 64}
        expected = run_recipe(2, "expected", **options)
        interrupted(VWLMMTrainer, 4)
        with pytest.raises(TrainingInterrupted):
            run_recipe(2, "run", **options)
        assert_same_run(run_recipe(2, "run", **options), expected)

    def test_phases_that_have_moved_leave_out_no_start_of_the_codebook(self, run_recipe, interrupted, monkeypatch):
        interrupted(VisualTokenizerTrainer, 2)
        with pytest.raises(TrainingInterrupted):
            run_recipe(1, "run", random_mask_steps=1, continuous_steps=5)
        starts, start = [], Codebook.start
        monkeypatch.setattr(Codebook, "start", lambda *args: starts.append(1) or start(*args))
        run_recipe(1, "run", random_mask_steps=1, continuous_steps=1)
        assert len(starts) == 1

    def test_samples_in_another_order(self, run_recipe):
        run_recipe(1, "run", max_steps=2)
        with pytest.raises(ValueError, match="made on other data.*data_seed was 42 and is 7"):
            run_recipe(1, "run", seed=7)


def test_codes_before_training(run_recipe, interrupted, monkeypatch):
    """With the losses of a run that computes them in each step; the run that goes on finds the same data."""
    options = {"visual_tokenizer": str(run_recipe(1, "tokenizer")), "text_first_share": 0.5, "max_length": 64}
    _, _, expected = read(run_recipe(2, "expected", **options))
    train_model = VWLMMTrainer.train

    def train_without_a_tokenizer(self, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(VWLMMVisualTokenizer, "encode", None)
            return train_model(self, *args, **kwargs)

    monkeypatch.setattr(VWLMMTrainer, "train", train_without_a_tokenizer)
    interrupted(VWLMMTrainer, 4)
    with pytest.raises(TrainingInterrupted):
        run_recipe(2, "run", tokenize_images=True, **options)
    _, _, log = read(run_recipe(2, "run", tokenize_images=True, **options))
    assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(
        [entry["loss"] for entry in expected if "loss" in entry], rel=1e-5
    )


def test_codes_before_training_need_a_tokenizer(run_recipe, parts):
    with pytest.raises(ValueError, match="there is no tokenizer to make codes of images"):
        run_recipe(2, "run", tokenize_images=True, vision_tower=str(parts / "tower"))


def test_what_makes_codes_is_loaded_whole(monkeypatch, tmp_path):
    """Whatever shards the model that trains, which is sharded as before behind it."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    zero3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    args = VWLMMTrainingArguments(str(tmp_path), method="lavit", stage=2, **BY_HAND)
    monkeypatch.setattr(args, "deepspeed_plugin", DeepSpeedPlugin(hf_ds_config=zero3))
    args.deepspeed_plugin.set_deepspeed_weakref()
    try:
        with pytest.raises(KeyError), train.load_whole(args):
            assert not is_deepspeed_zero3_enabled()
            assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
            raise KeyError
        assert is_deepspeed_zero3_enabled()
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    finally:
        unset_hf_deepspeed_config()


class TestDryRun:
    def dry_run(self, run_recipe, capsys, stage: int, **options) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_recipe(stage, "run", check=True, **options)
        assert stopped.value.code == 0
        return capsys.readouterr().out

    def count_bytes(self, model: torch.nn.Module) -> float:
        """Weights, and of what trains a gradient and two moments, in GB."""
        sizes = [p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters()]
        return sum(sizes) / 1e9

    def test_tokenizer(self, run_recipe, parts, capsys):
        tokenizer = VWLMMVisualTokenizer.from_vision_pretrained(str(parts / "tower"), **CODEBOOK)
        printed = self.dry_run(run_recipe, capsys, 1)
        assert "10 samples, 0 would stop the run" in printed
        assert f"unsharded: {self.count_bytes(tokenizer):.3f} GB" in printed

    def test_model(self, run_recipe, parts, capsys):
        folder = str(run_recipe(1, "tokenizer", max_steps=2))
        model = VWLMMForConditionalGeneration.from_visual_tokenizer(folder, str(parts / "llm"))
        set_trainable_parameters(model, LAVIT_STAGES[2].trains)
        printed = self.dry_run(run_recipe, capsys, 2, visual_tokenizer=folder)
        assert "10 samples, 0 would stop the run" in printed
        assert f"unsharded: {self.count_bytes(model):.3f} GB" in printed


def test_a_loss_that_is_no_number_stops_the_tokenizer(run_recipe, monkeypatch):
    forward = VWLMMVisualTokenizer.forward
    steps = []

    def diverge(self, *args, **kwargs):
        steps.append(1)
        outputs = forward(self, *args, **kwargs)
        outputs.loss = outputs.loss * (float("nan") if len(steps) > 6 else 1)
        return outputs

    monkeypatch.setattr(VWLMMVisualTokenizer, "forward", diverge)
    with pytest.raises(TrainingDiverged, match="loss of step 4 is nan .*reconstruction"):
        run_recipe(1, "run", save_steps=1)

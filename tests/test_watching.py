# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run logs beside its losses, and what stops it."""

import copy
import json
import math
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import BY_HAND, make_image
from peft import LoraConfig
from transformers import TrainerCallback

from modeling_vwlmm import VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training import BenchmarkCallback, TrainingDiverged
from modeling_vwlmm.training.watching import History
from processing_vwlmm import llava_dataset, mix_datasets


@pytest.fixture
def make_trainer(model, processor, dataset, tmp_path):
    def make(stage=4, trainer_kwargs=None, train_dataset=dataset, **kwargs):
        settings = {"per_device_train_batch_size": 4, "global_batch_size": 4, "max_steps": 2, **BY_HAND, **kwargs}
        return VWLMMTrainer(
            model=model,
            args=VWLMMTrainingArguments(str(tmp_path / "run"), stage=stage, chat_template="vicuna_v1", **settings),
            train_dataset=train_dataset,
            processing_class=copy.deepcopy(processor),
            **(trainer_kwargs or {}),
        )

    return make


def logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Gradients(TrainerCallback):
    """The norms of the gradients by part in each step, as they are after clipping."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parts = {
            "adapter": "multi_modal_projector.",
            "decoder": "language_model.",
            "mm_head": "lm_head.",
            "vm_head": "vm_head.",
            "training_modules": "training_modules.",
        }
        norms = {}
        for part, path in parts.items():
            grads = [p.grad.double() for n, p in model.named_parameters() if path in n and p.grad is not None]
            if grads:
                norms[f"{part}_grad_norm"] = math.sqrt(sum(grad.square().sum().item() for grad in grads))
        self.norms.append(norms)


class TestLogs:
    @pytest.mark.parametrize(
        ("stage", "options", "parts"),
        [
            (1, {}, {"adapter"}),
            (2, {}, {"adapter", "decoder", "mm_head"}),
            (3, {}, {"vm_head"}),
            (4, {"visual_objective": "features"}, {"decoder", "mm_head", "training_modules"}),
            (4, {"trainer_kwargs": {"peft_config": LoraConfig(target_modules="all-linear")}}, {"decoder"}),
        ],
        ids=["1", "2", "3", "features", "lora"],
    )
    @pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
    def test_gradient_norms_by_part_are_those_before_clipping(
        self, make_trainer, stage, options, parts, max_grad_norm
    ):
        seen = Gradients()
        trainer = make_trainer(stage, max_grad_norm=max_grad_norm, **options)
        trainer.add_callback(seen)
        trainer.train()
        for entry, norms in zip(logs(trainer), seen.norms, strict=True):
            logged = {name for name in entry if name.endswith("_grad_norm")}
            assert logged == {f"{part}_grad_norm" for part in parts}
            scale = entry["grad_norm"] / math.sqrt(sum(norm**2 for norm in norms.values()))
            assert (scale > 1 + 1e-4) == (0 < max_grad_norm < entry["grad_norm"])
            for name in logged:
                assert entry[name] == pytest.approx(scale * norms[name], rel=1e-4)

    def test_speed_waiting_and_what_is_left(self, make_trainer, dataset):
        trainer = make_trainer(max_steps=4, logging_steps=2)
        make_batch = trainer.data_collator.torch_call

        def make_slowly(examples):
            time.sleep(0.2)
            return make_batch(examples)

        trainer.data_collator.torch_call = make_slowly
        begun = time.perf_counter()
        trainer.train()
        elapsed = time.perf_counter() - begun
        first, second = logs(trainer)
        # Two steps are one pass over the dataset.
        tokens = sum(int((trainer.data_collator([sample])["input_ids"] > 0).sum()) for sample in dataset)
        images = sum(len(sample["images"]) for sample in dataset)
        for entry in (first, second):
            assert entry["tokens_per_second"] / entry["images_per_second"] == pytest.approx(tokens / images, rel=0.02)
            assert 2 * 0.2 * entry["images_per_second"] <= images
            assert 0.2 * 2 <= entry["data_wait_share"] * images / entry["images_per_second"] <= elapsed
            assert 0 < entry["memory_gib"] < 64
        assert first["seconds_left"] == pytest.approx(images / first["images_per_second"], rel=1e-6)
        assert second["seconds_left"] == 0
        assert second["total_flos"] == pytest.approx(2 * first["total_flos"], rel=0.1)

    def test_samples_that_were_skipped(self, make_trainer, tmp_path, monkeypatch, dataset):
        monkeypatch.setattr(llava_dataset, "HF_DATASETS_CACHE", tmp_path / "cache")
        make_image(0).save(tmp_path / "good.png")
        (tmp_path / "bad.png").write_bytes(b"no image")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
        records = [{"id": i, "image": n, "conversations": turns} for i, n in enumerate(["good.png", "bad.png"] * 2)]
        (tmp_path / "data.json").write_text(json.dumps(records))
        with pytest.warns(UserWarning, match="left out 2 of 4"):
            skips = llava_dataset.load_llava_dataset(tmp_path / "data.json", tmp_path, on_bad_image="skip")
        for data, expected in ((skips, 2), (mix_datasets([skips, skips], [1, 2]), 4), (dataset, None)):
            trainer = make_trainer(train_dataset=data, max_steps=1)
            trainer.train()
            assert [entry.get("skipped_samples") for entry in logs(trainer)] == [expected]

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_no_library_warns_of_what_it_will_drop(self, make_trainer, checkpointing):
        trainer = make_trainer(gradient_checkpointing=checkpointing)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*gradient_checkpointing.*deprecated", FutureWarning)
            trainer.train()
        assert (trainer._make_no_cache({}) is None) == checkpointing


class Spoil(TrainerCallback):
    """Makes what a step sees or does wrong."""

    def __init__(self, step, spoil):
        self.step, self.spoil = step, spoil

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.spoil(model)


class TestStopping:
    def weights(self, trainer):
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    def test_gradient_that_is_no_number_changes_no_weight(self, make_trainer, tmp_path):
        """The loss is a number: a derivative is not."""
        trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=4, max_grad_norm=1.0)
        before = {}

        def spoil(model):
            before.update(self.weights(trainer))
            model.lm_head.weight.register_hook(lambda grad: grad / 0.0)

        trainer.add_callback(Spoil(3, spoil))
        with pytest.raises(TrainingDiverged, match="The gradient norm of step 3 is (nan|inf)"):
            trainer.train()
        for name, value in self.weights(trainer).items():
            assert torch.equal(value, before[name]), name
        saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        assert saved == ["checkpoint-1", "checkpoint-2"]

    @pytest.mark.parametrize("spike_threshold", [20.0, 0.0])
    def test_loss_far_outside_its_history(self, make_trainer, spike_threshold):
        """As of a model that has diverged: weights that a step has blown up."""

        def blow_up(model):
            model.lm_head.weight.data *= 1e6

        trainer = make_trainer(
            max_steps=54,
            learning_rate=1e-4,
            logging_steps=100,
            spike_threshold=spike_threshold,
            trainer_kwargs={"callbacks": [Spoil(53, blow_up)]},
        )
        if spike_threshold:
            with pytest.raises(TrainingDiverged, match=r"of step 53 is .*, where the last 52 steps had .*spike_thre"):
                trainer.train()
            assert trainer.state.global_step == 52
        else:
            trainer.train()

    def test_what_is_ordinary_stops_nothing(self):
        """Runs of noise as training has it: a loss that falls, heavy-tailed norms, and batches of two kinds."""
        rng = np.random.default_rng(0)
        for _ in range(20):
            history = History(20.0)
            for step in range(1000):
                loss = (10 * math.exp(-step / 100) + 1.0) * math.exp(rng.normal(0, 0.15)) * (1 + (step % 2))
                norm = math.exp(rng.standard_t(5) * 0.4) * (10 if step < 20 else 1)
                assert history.find_outlier({"loss": loss, "gradient norm": norm}) is None, step

    @pytest.mark.parametrize("others", [("language", "visual_words"), ("language",), ("visual_words", "features")])
    def test_steps_that_learn_other_things_have_a_history_of_their_own(self, others):
        """Grouped by length, images without text, or text without images, fill whole steps."""
        history = History(20.0)
        for _ in range(60):
            assert history.find_outlier({"loss": 0.1}, ("visual_words",)) is None
        assert history.find_outlier({"loss": 1.2}, others) is None
        assert history.find_outlier({"loss": 1.2}, ("visual_words",)) is not None

    def test_what_is_not_does(self):
        rng = np.random.default_rng(0)
        history = History(20.0)
        for _ in range(100):
            assert history.find_outlier({"loss": math.exp(rng.normal(0, 0.1))}) is None
        assert history.find_outlier({"loss": 10.4}) is not None  # a uniform guess among 32,000 tokens
        assert history.find_outlier({"loss": 1.5}) is None
        assert history.find_outlier({"loss": math.inf}) == ("loss", "inf")
        assert History(0.0).find_outlier({"loss": math.nan}) == ("loss", "nan")

    def test_threshold_that_is_none(self, tmp_path):
        for value in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="`spike_threshold` is"):
                VWLMMTrainingArguments(str(tmp_path), stage=2, spike_threshold=value)


class TestBenchmark:
    def test_scores_while_training(self, make_trainer, dataset):
        modes = []

        def count_words(model, processor):
            modes.append((model.training, torch.is_grad_enabled()))
            inputs = processor.apply_chat_template(
                dataset[1]["messages"][:1], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            output = model.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False)
            return {"length": float(output.shape[1] - inputs["input_ids"].shape[1])}

        trainer = make_trainer(max_steps=5)
        trainer.add_callback(BenchmarkCallback(trainer, count_words, steps=2))
        trainer.train()
        scores = {e["step"]: e["benchmark_length"] for e in trainer.state.log_history if "benchmark_length" in e}
        assert scores == {2: 3.0, 4: 3.0, 5: 3.0}
        assert modes == [(False, False)] * 3
        assert trainer.model.training
        assert all(entry["num_text_positions"] > 0 for entry in logs(trainer))  # the sums of training stay

    def test_tasks_without_lmms_eval(self, make_trainer):
        with pytest.raises(ImportError, match="lmms_eval"):
            BenchmarkCallback(make_trainer(), ["gqa"], steps=1)

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training of LaVIT: the tokenizer in its two phases, then decoder and reader on text and codes.

Run as a script by the launcher, this file trains a tokenizer; run by pytest, it starts the launcher, too.
"""

import json
import logging
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BY_HAND, GOLDEN, make_image, tiny_text, tiny_vision
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from test_distributed import run_python
from torch.testing import assert_close
from transformers import SiglipImageProcessor

from modeling_vwlmm import (
    VWLMMConfig,
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    VWLMMVisualTokenizer,
)
from modeling_vwlmm.training import tokenize_images, tokenizer_trainer
from modeling_vwlmm.training.tokenizer_trainer import LEAST_GAIN
from processing_vwlmm import VWLMMProcessor, load_llava_dataset, mix_datasets


TOKENIZER = {
    "vision_feature_layer": -2,
    "num_merger_layers": 1,
    "num_decoder_layers": 1,
    "num_codes": 8,
    "code_dim": 4,
}


def make_tokenizer(**options):
    torch.manual_seed(0)
    return VWLMMVisualTokenizer.from_vision_pretrained(tiny_vision("clip"), **{**TOKENIZER, **options})


def make_processor(tokenizer):
    return VWLMMProcessor.from_visual_tokenizer(tokenizer.config, str(GOLDEN / "vicuna"), num_text_tokens=500)


def make_images():
    return Dataset.from_list([{"images": [make_image(seed)]} for seed in range(16)])


def make_scenes():
    """Images that differ in what their quarters show."""
    colours = np.random.default_rng(0).integers(0, 256, (32, 2, 2, 3), dtype=np.uint8)
    return Dataset.from_list(
        [{"images": [Image.fromarray(quarters.repeat(14, 0).repeat(14, 1))]} for quarters in colours]
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def lavit_processor(tokenizer):
    return make_processor(tokenizer)


@pytest.fixture(scope="session")
def images():
    return make_images()


@pytest.fixture(scope="session")
def pairs():
    """Captions, questions, two images in a sample, and a sample without one."""
    samples = []
    for seed in range(12):
        count = (1, 1, 2, 0)[seed % 4]
        content = [{"type": "image", "text": None}] * count
        if seed % 4:
            content = [*content, {"type": "text", "text": f"what is {seed}"}]
        answer = [{"type": "text", "text": "a picture " * (1 + seed % 3)}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        samples.append({"id": str(seed), "messages": messages, "images": [make_image(seed + i) for i in range(count)]})
    return Dataset.from_list(samples)


def train_tokenizer(tokenizer, processor, data, folder, eval_data=None, **options):
    options = {"per_device_train_batch_size": 8, "max_steps": 6, **options}
    options.setdefault("global_batch_size", 8)
    args = VWLMMTrainingArguments(str(folder), method="lavit", stage=1, **{**BY_HAND, **options})
    trainer = VWLMMTrainer(
        model=tokenizer, args=args, train_dataset=data, eval_dataset=eval_data, processing_class=processor
    )
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


class TestTokenizer:
    def test_phases(self, tokenizer, lavit_processor, images, tmp_path):
        before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
        options = {"random_mask_steps": 2, "continuous_steps": 4, "save_strategy": "steps", "save_steps": 1}
        trainer = train_tokenizer(tokenizer, lavit_processor, images, tmp_path, **options)
        logs = [entry for entry in trainer.state.log_history if "token_gain" in entry]
        assert ["codes_used" in entry for entry in logs] == [False] * 4 + [True] * 2
        two, four, five, six = (
            VWLMMVisualTokenizer.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict() for step in (2, 4, 5, 6)
        )
        selector = "selector.fc3.weight"
        assert torch.equal(two[selector], before[selector])  # patches were kept at random
        assert not torch.equal(four[selector], before[selector])
        assert torch.equal(six[selector], four[selector])  # frozen
        assert torch.equal(four["quantizer.embedding"], before["quantizer.embedding"])
        assert not torch.equal(six["quantizer.embedding"], five["quantizer.embedding"])  # behind its start, too
        assert_close(six["quantizer.embedding"].norm(dim=-1), torch.ones(8))
        assert not torch.equal(six["merger.norm.weight"], four["merger.norm.weight"])
        for name in before:
            if name.startswith("vision_tower."):
                assert torch.equal(six[name], before[name])

    def test_what_is_said_of_an_image_changes_nothing(self, lavit_processor, images, tmp_path):
        """Images alone, without text beside them, and with a conversation: a tokenizer reads images."""
        alone = [{"role": "user", "content": [{"type": "image", "text": None}]}]
        answered = [*alone, {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}]
        losses = []
        for messages in (None, alone, answered):
            data = images if messages is None else images.add_column("messages", [messages] * len(images))
            trainer = train_tokenizer(make_tokenizer(), lavit_processor, data, tmp_path, max_steps=1)
            losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        assert losses[0] == losses[1] == losses[2]

    def test_threshold_keeps_the_share_that_is_aimed_at(self, tokenizer, lavit_processor, images, tmp_path):
        with pytest.raises(ValueError, match="training the tokenizer finds it"):
            tokenizer.encode(torch.zeros(1, 3, 28, 28))
        train_tokenizer(tokenizer, lavit_processor, images, tmp_path, save_strategy="steps", save_steps=6)
        saved = VWLMMVisualTokenizer.from_pretrained(tmp_path / "checkpoint-6")
        pixel_values = lavit_processor.image_processor(list(images["images"]), return_tensors="pt")["pixel_values"]
        kept = saved.encode(pixel_values).keep_mask.float().mean()
        assert abs(kept - 1 / 3) < 0.1

    @pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
    def test_any_tower(self, images, tmp_path, kind):
        """All of its patches are read, the first of a tower without a class token, too, and its own pixels."""
        torch.manual_seed(0)
        tiny_vision(kind).save_pretrained(tmp_path / "tower")
        settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 28, "width": 28}}
        SiglipImageProcessor(**settings).save_pretrained(tmp_path / "tower")
        tokenizer = VWLMMVisualTokenizer.from_vision_pretrained(str(tmp_path / "tower"), **TOKENIZER)
        processor = make_processor(tokenizer)
        grey = processor.image_processor(Image.new("RGB", (9, 30), (51, 51, 51)), return_tensors="pt")["pixel_values"]
        expected = torch.tensor([0.1 / 0.4, 0, -0.1 / 0.6]).reshape(3, 1, 1).expand(3, 28, 28)
        assert_close(grey[0], expected, atol=1e-5, rtol=0)
        train_tokenizer(tokenizer, processor, images, tmp_path, random_mask_steps=1, continuous_steps=3)
        assert tokenizer.config.vision_feature_select_strategy == ("full" if kind == "siglip" else "default")
        pixel_values = torch.randn(2, 3, 28, 28)
        features = tokenizer.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, -16:]
        assert torch.equal(tokenizer.encode_patches(pixel_values), features)

    def test_steps_of_the_selector_are_not_compared_with_those_before(
        self, tokenizer, lavit_processor, images, tmp_path, monkeypatch
    ):
        forward = VWLMMVisualTokenizer.forward

        def rise(self, keep_mask=None, **kwargs):
            outputs = forward(self, keep_mask=keep_mask, **kwargs)
            outputs.loss = outputs.loss * (100 if keep_mask is None else 1)
            return outputs

        monkeypatch.setattr(VWLMMVisualTokenizer, "forward", rise)
        options = {"random_mask_steps": 52, "continuous_steps": 60, "max_steps": 54, "logging_steps": 54}
        trainer = train_tokenizer(tokenizer, lavit_processor, images, tmp_path, **options)
        assert trainer.state.global_step == 54

    def test_what_was_learned_is_loaded_whole_behind_a_tower_in_half_precision(self, tmp_path):
        tiny_vision("clip").half().save_pretrained(tmp_path / "tower")
        tokenizer = VWLMMVisualTokenizer.from_vision_pretrained(str(tmp_path / "tower"), **TOKENIZER)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        loaded = VWLMMVisualTokenizer.from_pretrained(tmp_path / "tokenizer").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tokenizer.state_dict().items())

    @pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float16), ("bfloat16", torch.bfloat16)])
    def test_codes_are_in_full_precision_whatever_the_rest_is(self, dtype, expected):
        tokenizer = VWLMMVisualTokenizer.from_vision_pretrained(tiny_vision("clip").half(), dtype=dtype, **TOKENIZER)
        assert {parameter.dtype for parameter in tokenizer.parameters()} == {expected}
        assert tokenizer.quantizer.embedding.dtype == torch.float32

    def test_a_model_of_another_dtype_is_loaded_as_it_was_assembled(self, tmp_path):
        tokenizer = make_tokenizer(selection="top_k")
        model = VWLMMForConditionalGeneration.from_visual_tokenizer(tokenizer, tiny_text("llama").bfloat16())
        model.save_pretrained(tmp_path)
        loaded = VWLMMForConditionalGeneration.from_pretrained(tmp_path).state_dict()
        assert {name: (t.dtype, t.tolist()) for name, t in loaded.items()} == {
            name: (t.dtype, t.tolist()) for name, t in model.state_dict().items()
        }

    @pytest.mark.parametrize("size", [8, 2, 1])
    def test_evaluation_in_every_phase(self, tokenizer, lavit_processor, images, tmp_path, size):
        """Of each image once, however it is cut into batches."""
        options = {"random_mask_steps": 2, "continuous_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
        trainer = train_tokenizer(
            tokenizer,
            lavit_processor,
            images,
            tmp_path,
            images.select(range(10)),
            per_device_eval_batch_size=size,
            eval_on_start=True,
            **options,
        )
        logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert [entry["step"] for entry in logs] == [0, 1, 2, 3, 4, 5, 6]
        assert ["eval_codes_used" in entry for entry in logs] == [False] * 5 + [True] * 2
        for entry in logs:
            parts = [entry.get(f"eval_{name}_loss", 0) for name in ("reconstruction", "ratio", "commitment")]
            assert entry["eval_loss"] == pytest.approx(parts[0] + 2 * parts[1] + parts[2])
        again = trainer.evaluate()
        assert again["eval_loss"] == pytest.approx(logs[-1]["eval_loss"])
        with torch.no_grad():
            rows = [trainer.data_collator([images[index]]) for index in range(10)]
            noise = trainer._draw(torch.cat([row["image_keys"] for row in rows]), 0)
            pixel_values = torch.cat([row["pixel_values"] for row in rows])
            outputs = tokenizer.eval()(pixel_values=pixel_values, gumbel_noise=noise)
        assert again["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)

    def test_a_tokenizer_that_was_trained_is_evaluated_as_it_is(self, trained, lavit_processor, images, tmp_path):
        args = VWLMMTrainingArguments(str(tmp_path), method="lavit", stage=1, **BY_HAND)
        trainer = VWLMMTrainer(
            model=trained, args=args, eval_dataset=images, train_dataset=images, processing_class=lavit_processor
        )
        assert {"eval_loss", "eval_codes_used", "eval_kept_share"} <= trainer.evaluate().keys()

    def test_any_cut_of_a_step_is_the_same_step(self, tokenizer, lavit_processor, images, tmp_path):
        state = {name: value.clone() for name, value in tokenizer.state_dict().items()}
        losses = []
        for size in (8, 2):
            tokenizer.load_state_dict(state)
            options = {"per_device_train_batch_size": size, "random_mask_steps": 1, "continuous_steps": 3}
            trainer = train_tokenizer(tokenizer, lavit_processor, images, tmp_path, **options)
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
            weights = {name: value.clone() for name, value in tokenizer.state_dict().items()}
            tokenizer.selector.requires_grad_(True)
        assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
        assert_close(weights, dict(tokenizer.state_dict()), rtol=1e-4, atol=1e-5)

    def test_two_processes_are_one(self, tmp_path):
        """Also where the codebook starts, and where codes are revived."""
        losses = []
        for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]):
            run_python([*launcher, __file__, str(tmp_path)], {})
            losses.append(json.loads((tmp_path / "losses.json").read_text()))
        assert len(losses[0]) == 8
        assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("step", [2, 4])
    def test_resume(self, tokenizer, lavit_processor, images, tmp_path, step):
        options = {"random_mask_steps": 1, "continuous_steps": 3, "save_strategy": "steps", "save_steps": 2}
        train_tokenizer(tokenizer, lavit_processor, images, tmp_path, **options)
        checkpoint = tmp_path / f"checkpoint-{step}"
        again = VWLMMVisualTokenizer.from_pretrained(checkpoint)
        options["resume_from_checkpoint"] = str(checkpoint)
        train_tokenizer(again, lavit_processor, images, tmp_path / "again", **options)
        for name, value in tokenizer.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        assert again.config.threshold is not None

    @pytest.fixture
    def warnings(self, lavit_processor, tmp_path, monkeypatch):
        """Trains a tokenizer on scenes, and returns its last logs and the warnings behind the first half."""

        def train(tokenizer, **options):
            told = []
            monkeypatch.setattr(tokenizer_trainer.logger, "warning", told.append)
            options = {"max_steps": 120, "logging_steps": 20, "learning_rate": 3e-3, **options}
            trainer = train_tokenizer(tokenizer, lavit_processor, make_scenes(), tmp_path, **options)
            logs = [entry for entry in trainer.state.log_history if "token_gain" in entry]
            return logs[-1], [text for text in told if int(text.split()[1].rstrip(":")) > 60]

        return train

    def test_a_healthy_run_is_not_warned_of(self, tokenizer, warnings):
        last, told = warnings(tokenizer)
        assert last["token_gain"] > LEAST_GAIN
        assert not told

    def test_tokens_that_say_nothing_have_no_gain(self, tokenizer, warnings, monkeypatch):
        with torch.no_grad():
            tokenizer.task_layer[2].weight.zero_()
        # It stays so: all tokens are its bias.
        tokenizer.task_layer[2].weight.register_hook(torch.zeros_like)
        last, told = warnings(tokenizer, weight_decay=0.0)
        assert abs(last["token_gain"]) < LEAST_GAIN
        assert told
        assert all("they are dead" in text for text in told)

    def test_dead_codes_are_told(self, tokenizer, warnings):
        # The known collapse: tokens that are nearly alike, as they begin, are drawn together by a codebook from the
        # first step on, and many codes are used. From the same beginning a continuous phase spreads them.
        state = {name: value.clone() for name, value in tokenizer.state_dict().items()}
        state["task_layer.2.bias"].fill_(20)
        tokenizer.load_state_dict(state)
        last, told = warnings(tokenizer, max_steps=100)
        assert last["token_gain"] > LEAST_GAIN
        assert not told
        tokenizer.load_state_dict(state)
        tokenizer.config.commitment_weight = 1e4
        last, told = warnings(tokenizer, max_steps=100, random_mask_steps=0, continuous_steps=0)
        assert last["code_perplexity"] > 4
        assert last["token_gain"] < LEAST_GAIN
        assert told
        assert all("they are dead" in text for text in told)

    def test_a_polarised_selector_is_told(self, tokenizer, warnings):
        # The other one: a selector that learns before tokens carry anything, which here never come to.
        for module in (tokenizer.merger, tokenizer.task_layer, tokenizer.decoder):
            for parameter in module.parameters():
                parameter.register_hook(torch.zeros_like)
        tokenizer.config.ratio_weight = 0.0
        options = {"random_mask_steps": 0, "continuous_steps": 1000, "learning_rate": 3e-2, "weight_decay": 0.0}
        last, told = warnings(tokenizer, **options)
        assert last["token_gain"] < LEAST_GAIN
        assert told
        assert all("has polarised before they carry anything" in text for text in told)


@pytest.fixture
def trained(tokenizer, lavit_processor, images):
    """A tokenizer that keeps a third of the patches."""
    pixel_values = lavit_processor.image_processor(list(images["images"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        tokenizer.selector.fc3.weight.mul_(20)
        probabilities = tokenizer.selector(tokenizer.encode_patches(pixel_values))[..., 0].exp()
    tokenizer.config.threshold = probabilities.quantile(2 / 3).item()
    return tokenizer


def make_model(tokenizer, **config):
    torch.manual_seed(0)
    text = tiny_text("llama", vocab_size=500)
    return VWLMMForConditionalGeneration.from_visual_tokenizer(tokenizer, text, **config)


def train_model(model, processor, data, folder, **options):
    options = {
        "per_device_train_batch_size": 6,
        "global_batch_size": 12,
        "max_steps": 3,
        "max_length": None,
        "text_first_share": 0,
        **options,
    }
    args = VWLMMTrainingArguments(str(folder), method="lavit", stage=2, **{**BY_HAND, **options})
    trainer = VWLMMTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    return trainer


class TestUnifiedPreTraining:
    def test_trains_decoder_and_reader_and_no_tokenizer(self, trained, lavit_processor, pairs, tmp_path):
        model = make_model(trained)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train_model(model, lavit_processor, pairs, tmp_path)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.split(".")[1] for name in moved} == {"language_model", "multi_modal_projector", "weight"}
        assert any(name.startswith("model.multi_modal_projector.merger.") for name in moved)
        assert model.config.trained_stages == ["lavit-2"]

    def test_a_stage_that_had_ended_is_recorded_once(self, trained, lavit_processor, pairs, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 3}
        train_model(make_model(trained), lavit_processor, pairs, tmp_path, **options)
        args = VWLMMTrainingArguments(
            str(tmp_path),
            method="lavit",
            stage=2,
            **{**BY_HAND, "max_steps": 3, "global_batch_size": 12},
            per_device_train_batch_size=6,
            max_length=None,
        )
        model = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-3")
        recorded = model.config.trained_stages
        trainer = VWLMMTrainer(model=model, args=args, train_dataset=pairs, processing_class=lavit_processor)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert recorded == model.config.trained_stages == ["lavit-2"]

    @pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 128}, {"text_first_share": 1.0}])
    @pytest.mark.parametrize("adapter", ["token_merger", "mlp"])
    def test_any_cut_of_a_step_is_the_same_step(self, trained, lavit_processor, pairs, tmp_path, adapter, options):
        losses, weights = [], []
        for size in (3, 1) if "packing" in options else (12, 4, 2):  # of rows, or of samples
            model = make_model(trained, adapter=adapter)
            sizes = {"per_device_train_batch_size": size, "global_batch_size": 3 if "packing" in options else 12}
            trainer = train_model(model, lavit_processor, pairs, tmp_path, **{**sizes, **options})
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            losses.append([[entry[n] for n in ("loss", "codes_loss", "language_loss")] for entry in logs])
            weights.append(model.state_dict())
        for other, state in zip(losses[1:], weights[1:], strict=True):
            assert_close(other, losses[0], rtol=1e-5, atol=1e-5)
            assert_close(state, weights[0], rtol=1e-4, atol=1e-4)

    def test_codes_computed_once(self, trained, lavit_processor, pairs, tmp_path, monkeypatch):
        runs = []
        mapped = pairs.map(tokenize_images(trained, lavit_processor), batched=True, batch_size=5)
        for data in (pairs, mapped):
            trainer = train_model(make_model(trained), lavit_processor, data, tmp_path)
            runs.append([entry["codes_loss"] for entry in trainer.state.log_history if "codes_loss" in entry])
            # And no more after that.
            monkeypatch.setattr(VWLMMVisualTokenizer, "encode", None)
            monkeypatch.setattr(VWLMMVisualTokenizer, "select", None)
        assert_close(runs[0], runs[1])

    def test_codes_of_a_column_of_single_images(self, trained, lavit_processor, images):
        add_codes = tokenize_images(trained, lavit_processor)
        expected = images.map(add_codes, batched=True)["image_codes"][:]
        single = Dataset.from_list([*({"image": row["images"][0]} for row in images), {"image": None}])
        assert single.map(add_codes, batched=True, batch_size=5)["image_codes"][:] == [*expected, []]

    def test_dropped_tokens_cost_nothing(self, trained, lavit_processor, pairs, tmp_path, monkeypatch):
        model = make_model(trained)
        trainer = train_model(model, lavit_processor, pairs, tmp_path, max_steps=1)
        batch = trainer.data_collator([pairs[2], pairs[6]])  # two images each
        batch["keep_mask"] = torch.arange(64).reshape(4, 16) % 3 == 0
        read, run = [], model.model.language_model.forward
        monkeypatch.setattr(
            model.model.language_model,
            "forward",
            lambda *args, **kwargs: read.append(kwargs["inputs_embeds"].shape) or run(*args, **kwargs),
        )
        trainer.compute_loss(model.train(), dict(batch))
        num_dropped = (~batch["keep_mask"]).reshape(2, 32).sum(dim=1)
        longest = (batch["attention_mask"].sum(dim=1) - num_dropped).max()
        assert [shape[:2] for shape in read] == [(2, longest)]

    @pytest.mark.parametrize("trains", [None, ["adapter", "decoder", "mm_head", "vision_tower"]])
    def test_a_frozen_tower_runs_once_a_step(self, trained, lavit_processor, pairs, tmp_path, monkeypatch, trains):
        model, seen = make_model(trained), []
        run = model.model.vision_tower.forward
        monkeypatch.setattr(
            model.model.vision_tower, "forward", lambda pixels, **kw: seen.append(len(pixels)) or run(pixels, **kw)
        )
        before = model.model.vision_tower.state_dict()["embeddings.patch_embedding.weight"].clone()
        options = {"max_steps": 1, "per_device_train_batch_size": 6, "global_batch_size": 12, "trains": trains}
        train_model(model, lavit_processor, pairs, tmp_path, **options)
        assert sum(seen) == 12 * (1 if trains is None else 2)  # images
        after = model.model.vision_tower.state_dict()["embeddings.patch_embedding.weight"]
        assert torch.equal(before, after) == (trains is None)

    def test_lora(self, trained, lavit_processor, pairs, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        model = make_model(trained)
        frozen = {n: v.clone() for n, v in model.model.visual_tokenizer.state_dict().items()}
        args = VWLMMTrainingArguments(
            str(tmp_path), method="lavit", stage=2, global_batch_size=8, max_steps=2, **BY_HAND
        )
        trainer = VWLMMTrainer(
            model=model,
            args=args,
            train_dataset=pairs,
            processing_class=lavit_processor,
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )
        trainer.train()
        assert "they stay as they are" not in caplog.text  # nothing that trains goes without a gradient
        trained_names = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        assert any("multi_modal_projector.merger" in name for name in trained_names)
        assert not any("visual_tokenizer" in name or "vision_tower" in name for name in trained_names)
        for name, value in model.model.visual_tokenizer.state_dict().items():
            assert torch.equal(value, frozen[name])

    @pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 128}])
    def test_documents_of_a_mixture_are_learned_whole(self, trained, lavit_processor, tmp_path, options):
        make_image(0).save(tmp_path / "a.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a dog"}]
        captions = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(6)]
        documents = [{"id": f"d{i}", "text": "a picture of a dog " * 3} for i in range(4)]
        parts = []
        for name, records in (("captions", captions), ("documents", documents)):
            (tmp_path / f"{name}.json").write_text(json.dumps(records))
            parts.append(load_llava_dataset(tmp_path / f"{name}.json", tmp_path))
        found, expected = {}, {}
        tokens = [len(lavit_processor.tokenizer(t + "</s>").input_ids) for t in ("a dog", documents[0]["text"])]
        for weight in (1.5, 3):
            data = mix_datasets(parts, [1, weight])
            options = {"max_steps": -1, "num_train_epochs": 1, **options}
            trainer = train_model(make_model(trained), lavit_processor, data, tmp_path / "run", **options)
            found[weight] = sum(entry.get("num_text_positions", 0) for entry in trainer.state.log_history)
            # Nothing stands in front of a document's first token, and so nothing predicts it.
            expected[weight] = 6 * tokens[0] + 4 * weight * (tokens[1] - 1)
        assert found == expected

    def test_images_without_text(self, trained, lavit_processor, tmp_path):
        """Their codes are learned, and no text."""
        message = {"role": "user", "content": [{"type": "image", "text": None}]}
        data = [{"id": str(seed), "messages": [message], "images": [make_image(seed)]} for seed in range(4)]
        model = make_model(trained)
        before = model.lm_head.weight.detach().clone()
        trainer = train_model(model, lavit_processor, Dataset.from_list(data), tmp_path, max_steps=1)
        entry = next(entry for entry in trainer.state.log_history if "codes_loss" in entry)
        assert entry["num_text_positions"] == 0 < entry["num_image_positions"] and "language_loss" not in entry
        assert entry["loss"] == pytest.approx(entry["codes_loss"], rel=1e-4)
        assert not torch.equal(model.lm_head.weight, before)

    def test_a_caption_first(self, trained, lavit_processor, pairs, tmp_path):
        trainer = train_model(make_model(trained), lavit_processor, pairs, tmp_path, text_first_share=1.0)
        batch = trainer.data_collator([pairs[0], pairs[1]])
        assert batch["read_as_codes"].tolist() == [True, False]  # a caption, a question
        samples = [dict(pairs[0]), dict(pairs[1])]
        for sample in samples:  # the same in another form
            (sample["image"],), messages = sample.pop("images"), sample.pop("messages")
            sample |= {"prompt": messages[:1], "completion": messages[1:]}
        found = trainer.data_collator(samples)
        assert torch.equal(found["input_ids"], batch["input_ids"])
        assert found["read_as_codes"].tolist() == [True, False]
        with_codes = pairs.select([0, 1]).map(tokenize_images(trained, lavit_processor), batched=True)
        codes = trainer.data_collator([*with_codes])["read_as_codes"].tolist()
        assert codes == [with_codes[0]["image_codes"][0], [-1] * len(codes[1])]
        text = lavit_processor.tokenizer.decode([i for i in batch["input_ids"][0].tolist() if i != 510])
        assert text.startswith("a picture") and text.index("<|image_start|><|image_end|></s>") > 0
        learned = lavit_processor.tokenizer.decode([i for i in batch["labels"][0].tolist() if i >= 0])
        assert learned.replace(" ", "") == "apicture</s>"


class TestBeginning:
    def test_reader_begins_as_the_tokenizer_or_as_the_features(self, trained, lavit_processor, images):
        pixel_values = lavit_processor.image_processor(list(images["images"]), return_tensors="pt")["pixel_values"]
        features = trained.encode_patches(pixel_values)  # [I, N, C]
        keep_mask = trained.select_patches(features)
        read = {}
        with torch.no_grad():
            trained.merger.norm.weight.mul_(2)  # as if it had learned
            for merger_init in ("tokenizer", "identity"):
                reader = make_model(trained, merger_init=merger_init).model.multi_modal_projector.merger
                read[merger_init] = reader(features, keep_mask)[keep_mask]  # [kept, C]
            tokenizers_own = trained.merger(features, keep_mask)[keep_mask]
        assert torch.equal(read["tokenizer"], tokenizers_own)
        assert_close(read["identity"], torch.nn.functional.layer_norm(features, features.shape[-1:])[keep_mask])

    def test_unknown_beginning(self, trained):
        with pytest.raises(ValueError, match="expected 'tokenizer' or 'identity'"):
            make_model(trained, merger_init="random")


class TestBadInput:
    def test_other_stages_write_no_images(self, tmp_path):
        with pytest.raises(ValueError, match="no other writes images"):
            VWLMMTrainingArguments(str(tmp_path), stage=2, text_first_share=0.5)

    def test_both_orders_by_default_where_codes_are_learned(self, tmp_path):
        def share(**options):
            args = VWLMMTrainingArguments(str(tmp_path), **options)
            return replace(args).text_first_share

        assert share(method="lavit", stage=2) == 0.5
        assert share(method="lavit", stage=2, text_first_share=0.0) == 0
        assert share(method="lavit", stage=2, visual_objective={}) == 0
        assert share(method="lavit", stage=1) == share(stage=2) == share(method="vlsa", stage=1) == 0

    @pytest.mark.parametrize("sharding", ["FSDP", "ZeRO-3"])
    def test_a_sharded_tokenizer(self, tmp_path, monkeypatch, sharding):
        if sharding == "FSDP":
            monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        else:
            monkeypatch.setattr("modeling_vwlmm.training.arguments.is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match=f"{sharding} shards their weights.*launch with DDP or ZeRO-2"):
            VWLMMTrainingArguments(str(tmp_path), method="lavit", stage=1)
        VWLMMTrainingArguments(str(tmp_path), method="lavit", stage=2)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("keep_rate", 2.0),
            ("keep_rate", 0.0),
            ("keep_rate", math.nan),
            ("threshold", 1.5),
            ("min_tokens", 17),
            ("min_tokens", -1),
            ("num_codes", 0),
            ("code_dim", 0),
            ("num_merger_layers", 0),
            ("num_attention_heads", 5),
            ("ratio_weight", -1.0),
            ("commitment_weight", math.inf),
            ("ema_decay", 1.0),
            ("revive_after", -1),
            ("layer_norm_eps", 0.0),
            ("initializer_range", -0.1),
        ],
    )
    def test_numbers_out_of_range(self, name, value):
        with pytest.raises(ValueError, match=f"`{name}` is .*; expected"):
            make_tokenizer(**{name: value})

    def test_pixels_of_a_tower_that_nobody_knows(self):
        torch.manual_seed(0)
        tokenizer = VWLMMVisualTokenizer.from_vision_pretrained(tiny_vision("siglip"), **TOKENIZER)
        with pytest.raises(ValueError, match="no `name_or_path`.*pass `image_processor`"):
            make_processor(tokenizer)

    def test_codes_of_no_images(self, trained, lavit_processor):
        with pytest.raises(ValueError, match="columns text, and codes are made of `images`"):
            Dataset.from_list([{"text": "a"}]).map(tokenize_images(trained, lavit_processor), batched=True)

    def test_codes_without_a_tokenizer(self, model, processor):
        with pytest.raises(ValueError, match="VWLMMForConditionalGeneration, has no visual tokenizer"):
            tokenize_images(model, processor)

    def test_phases_in_order(self, tmp_path):
        with pytest.raises(ValueError, match="no smaller than the first"):
            VWLMMTrainingArguments(str(tmp_path), method="lavit", stage=1, random_mask_steps=0.5, continuous_steps=0.2)

    def test_no_image(self, tokenizer, lavit_processor, tmp_path):
        data = Dataset.from_list([{"images": []}] * 8)
        with pytest.raises(ValueError, match="8 samples have no image"):
            train_tokenizer(tokenizer, lavit_processor, data, tmp_path)

    def test_fewer_features_than_codes(self, lavit_processor, images, tmp_path):
        tokenizer = make_tokenizer(num_codes=64)
        options = {"continuous_steps": 1, "random_mask_steps": 0, "per_device_train_batch_size": 1}
        with pytest.raises(ValueError, match="The codebook of 64 codes starts from"):
            train_tokenizer(
                tokenizer, lavit_processor, images.select(range(1)), tmp_path, global_batch_size=1, **options
            )

    def test_tokenizer_without_threshold(self, tokenizer):
        with pytest.raises(ValueError, match="has none: training finds it at its end"):
            make_model(tokenizer)

    @pytest.mark.parametrize("code", [8, -2])
    def test_codes_out_of_range(self, trained, lavit_processor, pairs, tmp_path, code):
        def add_codes(sample):
            return {"image_codes": [[code] * 16 for _ in sample["images"]]}

        with pytest.raises(ValueError, match=r"expected codes from 0 to 7, and -1 where a token is dropped"):
            train_model(make_model(trained), lavit_processor, pairs.map(add_codes), tmp_path)

    def test_more_codes_than_the_head_has(self, trained):
        fields = make_model(trained).config.to_dict()
        fields["visual_tokenizer_config"]["num_codes"] = 4000
        with pytest.raises(ValueError, match="The codebook has 4000 codes from id 502 on, and the decoder 510 tokens"):
            VWLMMConfig(**fields)

    def test_tokenizer_of_another_tower(self, trained):
        fields = make_model(trained).config.to_dict()
        fields["visual_tokenizer_config"]["hidden_size"] = 48
        with pytest.raises(ValueError, match="expected the tower that the tokenizer was trained on"):
            VWLMMConfig(**fields)

    def test_no_tokenizer(self, model, processor):
        with pytest.raises(ValueError, match="The model has no visual tokenizer"):
            model.get_image_codes(torch.zeros(1, 3, 28, 28))


if __name__ == "__main__":
    tokenizer = make_tokenizer(revive_after=0)
    options = {"random_mask_steps": 1, "continuous_steps": 3, "max_steps": 8, "global_batch_size": 8}
    options["per_device_train_batch_size"] = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = train_tokenizer(tokenizer, make_processor(tokenizer), make_images(), sys.argv[1], **options)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(sys.argv[1], "losses.json").write_text(json.dumps(losses))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody leaves while another still talks to it
    os._exit(0)  # gloo's threads now and then abort or hang the exit of an interpreter

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training of LaVIT: the tokenizer in its two phases, then decoder and reader on text and codes.

Run as a script by the launcher, this file trains a tokenizer; run by pytest, it starts the launcher, too.
"""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import BY_HAND, GOLDEN, make_image, tiny_text, tiny_vision
from datasets import Dataset
from peft import LoraConfig
from test_distributed import run_python
from torch.testing import assert_close

from modeling_vwlmm import (
    VWLMMConfig,
    VWLMMForConditionalGeneration,
    VWLMMTrainer,
    VWLMMTrainingArguments,
    VWLMMVisualTokenizer,
)
from modeling_vwlmm.training import tokenize_images
from processing_vwlmm import VWLMMProcessor


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


def train_tokenizer(tokenizer, processor, data, folder, **options):
    options = {"per_device_train_batch_size": 8, "max_steps": 6, **options}
    options.setdefault("global_batch_size", 8)
    args = VWLMMTrainingArguments(str(folder), method="lavit", stage=1, **{**BY_HAND, **options})
    trainer = VWLMMTrainer(model=tokenizer, args=args, train_dataset=data, processing_class=processor)
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

    def test_threshold_keeps_the_share_that_is_aimed_at(self, tokenizer, lavit_processor, images, tmp_path):
        with pytest.raises(ValueError, match="training the tokenizer finds it"):
            tokenizer.encode(torch.zeros(1, 3, 28, 28))
        train_tokenizer(tokenizer, lavit_processor, images, tmp_path, save_strategy="steps", save_steps=6)
        saved = VWLMMVisualTokenizer.from_pretrained(tmp_path / "checkpoint-6")
        pixel_values = lavit_processor.image_processor(list(images["images"]), return_tensors="pt")["pixel_values"]
        kept = saved.encode(pixel_values).keep_mask.float().mean()
        assert abs(kept - 1 / 3) < 0.1

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

    def test_dead_codes_are_told(self, tokenizer, lavit_processor, images, tmp_path, caplog, monkeypatch):
        # The known collapse: a codebook from the first step on draws all tokens together, and many codes are used.
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        tokenizer.config.commitment_weight = 100.0
        options = {"random_mask_steps": 0, "continuous_steps": 0, "max_steps": 12}
        train_tokenizer(tokenizer, lavit_processor, images, tmp_path, **options)
        assert "codes improve the rebuilt features by a cosine of" in caplog.text

    def test_a_polarised_selector_is_told(self, tokenizer, lavit_processor, images, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with torch.no_grad():
            tokenizer.selector.fc3.weight.mul_(1000)
        options = {"random_mask_steps": 0, "continuous_steps": 6, "max_steps": 2, "learning_rate": 1e-5}
        train_tokenizer(tokenizer, lavit_processor, images, tmp_path, **options)
        assert "has polarised before they carry anything" in caplog.text


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

    def test_a_caption_first(self, trained, lavit_processor, pairs, tmp_path):
        trainer = train_model(make_model(trained), lavit_processor, pairs, tmp_path, text_first_share=1.0)
        batch = trainer.data_collator([pairs[0], pairs[1]])
        assert batch["read_as_codes"].tolist() == [True, False]  # a caption, a question
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

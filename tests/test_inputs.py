# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What may come to `forward`: packed rows, masks of any form, parts of different dtypes, no image at all."""

import copy

import pytest
import torch
from conftest import tiny_text, tiny_vision
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig, Qwen3MoeConfig

from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training.collating import VWLMMDataCollator


@pytest.fixture
def batch(processor, dataset) -> dict[str, torch.Tensor]:
    """Three samples, with one image, none and two."""
    collator = VWLMMDataCollator(processor=processor, max_length=2048, assistant_only_loss=True)
    batch = collator([dataset[0], dataset[1], dataset[2]])
    del batch["supervised_positions"]
    return dict(batch)


class TestPackedRows:
    """Two samples behind each other, told apart by their positions."""

    @pytest.fixture(params=["sdpa", "eager"])
    def model(self, request, vicuna):
        return VWLMMForConditionalGeneration.from_pretrained(vicuna, attn_implementation=request.param)

    @pytest.fixture
    def row(self) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 400, (1, 30), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "position_ids": torch.cat([torch.arange(12), torch.arange(18)])[None]}

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cache": False},
            {"attention_mask": torch.ones(1, 30, dtype=torch.long)},
            {"attention_mask": torch.ones(1, 30, dtype=torch.bool), "use_cache": False},
            {"labels": torch.ones(1, 30, dtype=torch.long)},
        ],
        ids=lambda options: "-".join(options) or "alone",
    )
    def test_samples_do_not_see_each_other(self, model, row, options):
        ids = row["input_ids"]
        with torch.no_grad():
            apart = torch.cat([model(input_ids=ids[:, :12]).logits, model(input_ids=ids[:, 12:]).logits], dim=1)
            for inner in (model, model.model):
                output = inner(**row, **{k: v for k, v in options.items() if k != "labels" or inner is model})
                assert output.past_key_values is None
            assert_close(model(**row, **options).logits, apart, atol=1e-5, rtol=1e-5)

    def test_compiled(self, model, row):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            apart = model(**row).logits
            assert_close(compiled(**row).logits, apart, atol=1e-5, rtol=1e-5)
            with pytest.raises(RuntimeError, match="Runtime assertion failed"):  # of a graph, whose message is lost
                compiled(**row, attention_mask=torch.ones_like(row["input_ids"]))

    @pytest.mark.parametrize(
        ("options", "found"),
        [
            ({"use_cache": True}, "a cache is to be used"),
            ({"past_key_values": DynamicCache()}, "a cache is to be used"),
            ({"attention_mask": (torch.arange(30) > 2).long()[None]}, "`attention_mask` leaves out positions"),
        ],
        ids=["use_cache", "cache", "mask"],
    )
    def test_what_would_mix_them_is_refused(self, model, row, options, found):
        with pytest.raises(ValueError, match=found):
            model(**row, **copy.deepcopy(options))

    @pytest.mark.parametrize("masked", [False, True])
    def test_several_rows_with_the_same_positions(self, model, row, masked):
        """Positions of shape `[1, L]`, beside a mask or none of `[B, L]`."""
        rows = torch.cat([row["input_ids"], row["input_ids"].flip(1)])
        mask = {"attention_mask": torch.ones_like(rows)} if masked else {}
        with torch.no_grad():
            apart = torch.cat([model(input_ids=rows[:, :12]).logits, model(input_ids=rows[:, 12:]).logits], dim=1)
            found = model(input_ids=rows, position_ids=row["position_ids"], **mask)
        assert_close(found.logits, apart, atol=1e-5, rtol=1e-5)

    def test_one_sample_has_its_cache(self, model, row):
        """Also with positions and a mask of its own, as left padding has them."""
        ids = row["input_ids"]
        mask = (torch.arange(30) > 4).long()[None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=mask, position_ids=positions)
            assert whole.past_key_values is not None
            first = model(input_ids=ids[:, :20], attention_mask=mask[:, :20], position_ids=positions[:, :20])
            rest = model(
                input_ids=ids[:, 20:],
                attention_mask=mask,
                position_ids=positions[:, 20:],
                past_key_values=first.past_key_values,
            )
        assert_close(rest.logits, whole.logits[:, 20:], atol=1e-5, rtol=1e-5)


class TestMasks:
    @pytest.mark.parametrize("objective", ["visual_words", "vm_head"])
    def test_those_that_do_not_say_what_is_padding(self, model, batch, objective):
        length = batch["input_ids"].shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1)
        for found, other in ((r"has shape \(3, 1", mask), ("is a dict", {"full_attention": mask})):
            with pytest.raises(ValueError, match=rf"`attention_mask` {found}.*`\[B, L\]`.*position_ids"):
                model(**{**batch, "attention_mask": other}, visual_objective=objective)

    def test_booleans(self, model, batch):
        losses = [
            model(**{**batch, "attention_mask": mask}, visual_objective="visual_words").loss
            for mask in (batch["attention_mask"], batch["attention_mask"].bool())
        ]
        assert torch.equal(*losses)

    def test_four_dimensions_without_an_objective(self, model, batch):
        length = batch["input_ids"].shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(3, 1, -1, -1)
        del batch["labels"]
        with torch.no_grad():
            found, expected = (model(**{**batch, "attention_mask": m}).logits for m in (mask, batch["attention_mask"]))
        is_token = batch["attention_mask"].bool()
        assert_close(found[is_token], expected[is_token], atol=1e-5, rtol=1e-5)


class TestDtypes:
    PARTS = ["lm_head", "model.vm_head", "model.multi_modal_projector", "model.vision_tower"]

    @pytest.mark.parametrize("part", PARTS)
    @pytest.mark.parametrize("objective", [None, "visual_words", "vm_head"])
    @pytest.mark.parametrize("others", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("pseudo", [False, True], ids=["plain", "pseudo_image_features"])
    def test_a_part_of_another_dtype(self, vicuna, batch, part, objective, others, pseudo):
        expected = VWLMMForConditionalGeneration.from_pretrained(vicuna, use_pseudo_image_features=pseudo)
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna, dtype=others, use_pseudo_image_features=pseudo)
        other = torch.bfloat16 if others == torch.float32 else torch.float32
        model.get_submodule(part).to(other).requires_grad_(True)
        output = model(**batch, visual_objective=objective)
        assert_close(output.loss.float(), expected(**batch, visual_objective=objective).loss, atol=0.05, rtol=0.02)
        output.loss.backward()
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
        assert model.get_visual_words(batch["pixel_values"]).token_ids.shape == (3, 16, 1)

    def test_labels_and_ids_of_32_bits(self, model, batch):
        narrow = {**batch, "labels": batch["labels"].int(), "input_ids": batch["input_ids"].int()}
        assert torch.equal(
            model(**narrow, visual_objective="visual_words").loss, model(**batch, visual_objective="visual_words").loss
        )


class TestNoImages:
    @pytest.mark.parametrize("objective", [None, "visual_words"])
    def test_a_batch_of_none(self, model, processor, dataset, objective):
        collator = VWLMMDataCollator(processor=processor, max_length=2048, assistant_only_loss=True)
        batch = dict(collator([dataset[1]]))
        del batch["supervised_positions"]
        loss = model(**batch, visual_objective=objective).loss
        empty = torch.zeros(0, 3, 28, 28)
        assert torch.equal(model(**batch, pixel_values=empty, visual_objective=objective).loss, loss)


def test_overflowing_tokens_are_refused(processor):
    for options in ({"return_overflowing_tokens": True}, {"text_kwargs": {"return_overflowing_tokens": True}}):
        with pytest.raises(ValueError, match="`return_overflowing_tokens` is set"):
            processor(text=["a " * 50], truncation=True, max_length=20, **options)


class TestExperts:
    """Of a router nobody here computes the loss: its decoder would train towards a few experts."""

    SIZE = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    CONFIGS = [
        MixtralConfig(**SIZE, num_local_experts=4),
        Qwen3MoeConfig(**SIZE, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, head_dim=8),
    ]

    @pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
    def test_refused_when_the_model_is_assembled(self, config):
        with pytest.raises(ValueError, match=f"type '{config.model_type}' shares its tokens out among experts"):
            VWLMMForConditionalGeneration.from_vision_text_pretrained(
                tiny_vision("clip"), AutoModelForCausalLM.from_config(config)
            )

    def test_refused_when_it_shall_train(self, processor, dataset, tmp_path):
        config = VWLMMConfig(vision_config=tiny_vision("clip").config, text_config=self.CONFIGS[0])
        args = VWLMMTrainingArguments(str(tmp_path), stage=2, use_cpu=True, report_to="none")
        with pytest.raises(ValueError, match="among experts"):
            VWLMMTrainer(VWLMMForConditionalGeneration(config), args, dataset, processor)

    def test_dense_decoders_are_not(self):
        VWLMMForConditionalGeneration.from_vision_text_pretrained(tiny_vision("clip"), tiny_text("qwen3"))

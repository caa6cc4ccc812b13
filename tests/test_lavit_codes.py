# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Codes of images, read, learned and written, against what LaVIT's authors' code computed on tiny random weights."""

import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch.testing import assert_close

from modeling_vwlmm import VWLMMForConditionalGeneration, convert_lavit_checkpoint


START, END, PLACEHOLDER, NUM_PATCHES = 160, 161, 226, 16
SELECTIONS = ("sampled", "argmax", "extreme")


def close(found, expected):
    assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("lavit") / "converted"
    convert_lavit_checkpoint(GOLDEN / "lavit/checkpoint", output)
    return output


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "lavit/expected.safetensors")


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "lavit/expected.json").read_text())


@pytest.fixture(scope="module")
def model(folder):
    return VWLMMForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture
def prompts(expected):
    """Prompts behind an image each, with its placeholders."""
    return [[START, *[PLACEHOLDER] * NUM_PATCHES, END, *ids] for ids in expected["prompt_ids"]]


def kept_columns(ids, keep_mask):
    kept = iter(keep_mask.flatten().tolist())
    return [column for column, token in enumerate(ids) if token != PLACEHOLDER or next(kept)]


class TestReading:
    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_ids_of_the_decoder(self, model, tensors, expected, selection):
        keep_mask = tensors[f"{selection}.keep_mask"]
        codes = model.get_image_codes(tensors["pixel_values"], keep_mask=keep_mask)
        found = [[START, *(image + model.config.code_offset).tolist(), END] for image in codes]
        assert found == expected[f"{selection}.llm_ids"]


class TestObjective:
    def test_codes_in_place_of_features(self, model, tensors, expected, prompts):
        ids = torch.tensor([expected["sampled.llm_ids"][0] + expected["prompt_ids"][0]])
        close(model(ids).logits, tensors["discrete.logits"])
        # The same through the placeholders of an image.
        keep_mask = tensors["sampled.keep_mask"][:1]
        inputs = {"input_ids": torch.tensor(prompts[:1]), "pixel_values": tensors["pixel_values"][:1]}
        codes = model.get_image_codes(inputs["pixel_values"], keep_mask=keep_mask)[0]  # [kept]
        codes = torch.full(keep_mask.shape, -1).masked_scatter(keep_mask.bool(), codes)  # [1, N]
        for read_as_codes in (torch.tensor([True]), codes):
            logits = model(**inputs, keep_mask=keep_mask, read_as_codes=read_as_codes).logits
            close(logits[:, kept_columns(prompts[0], keep_mask)], tensors["discrete.logits"])

    def test_codes_that_are_read_are_those_that_are_learned(self, model, tensors, prompts):
        """They are computed once, and the loss is the same as of codes that are computed for it."""
        inputs = {"input_ids": torch.tensor(prompts[:1]), "pixel_values": tensors["pixel_values"][:1]}
        inputs |= {"keep_mask": tensors["sampled.keep_mask"][:1], "visual_objective": "codes"}
        codes = model.model.find_codes(
            model.model.select_tokens(inputs["pixel_values"])[1], inputs["keep_mask"].bool()
        )
        expected = model(**inputs, read_as_codes=codes).loss
        calls = []
        handle = model.model.visual_tokenizer.merger.register_forward_hook(lambda *_: calls.append(1))
        found = model(**inputs, read_as_codes=torch.tensor([True])).loss
        handle.remove()
        close(found, expected)
        assert len(calls) == 1

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("normalization", ["apart", "together"])
    def test_equation_5(self, model, tensors, prompts, normalization, training):
        keep_mask, ids = tensors["sampled.keep_mask"][:1], torch.tensor(prompts[:1])
        labels = ids.clone()
        labels[:, : NUM_PATCHES + 2] = -100  # of the image: the codes' objective
        output = model.train(training)(
            input_ids=ids,
            pixel_values=tensors["pixel_values"][:1],
            keep_mask=keep_mask,
            labels=labels,
            visual_objective={"codes": {"normalization": normalization}},
        )
        model.eval()
        expected = tensors["eq5.cross_entropy_per_position"]
        num_codes = int(keep_mask.sum()) + 1  # and [/IMG]
        close(output.terms["codes"].total, expected[:num_codes].sum())
        close(output.terms["language"].total, expected[num_codes:].sum())
        apart = expected[:num_codes].mean() + expected[num_codes:].mean()
        close(output.loss, expected.mean() if normalization == "together" else apart)

    def test_codes_are_not_those_of_the_patch_just_read(self, model, tensors, prompts):
        keep_mask, ids = tensors["sampled.keep_mask"][:1], torch.tensor(prompts[:1])
        inputs = {"input_ids": ids, "pixel_values": tensors["pixel_values"][:1], "keep_mask": keep_mask}
        codes = torch.full((1, NUM_PATCHES), -1).masked_scatter(keep_mask.bool(), tensors["sampled.code_ids"])
        own = model(**inputs, visual_objective="codes").loss
        close(model(**inputs, visual_objective="codes", image_codes=codes).loss, own)
        kept = keep_mask[0].bool()
        shifted = codes.clone()
        shifted[0, kept] = codes[0, kept].roll(1)
        assert (model(**inputs, visual_objective="codes", image_codes=shifted).loss - own).abs() > 0.1


class TestWriting:
    @pytest.mark.parametrize(("name", "options"), [("greedy", {}), ("greedy_guidance3", {"guidance_scale": 3.0})])
    def test_an_image_as_codes(self, model, expected, name, options):
        theirs = expected[f"text_to_image.{name}"]
        prompt = torch.tensor(theirs["input_ids"])[:, :-1]  # which ends with [IMG]
        codes = model.generate_image_codes(prompt, do_sample=False, **options)[0] + model.config.code_offset
        # The authors leave [IMG] possible, and drop what is no code later.
        written = [token for token in theirs["ids"][0][1:] if token > END]
        assert codes[: len(written)].tolist() == written

    def test_no_more_codes_than_patches(self, folder, expected):
        """Also where the model does not end the image: more could not be decoded."""
        model = VWLMMForConditionalGeneration.from_pretrained(folder).eval()
        prompt = torch.tensor(expected["text_to_image.greedy"]["input_ids"])[:, :-1]
        end = model.config.image_end_token_id
        with torch.no_grad():
            model.lm_head.weight[end] = 0  # never the likeliest: of many codes one has a logit above 0
        (codes,) = model.generate_image_codes(prompt, do_sample=False)
        assert len(codes) == NUM_PATCHES

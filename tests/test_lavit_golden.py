# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""LaVIT against what its authors' code computed on tiny random weights, which `tests/golden/lavit` holds."""

import json

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch.testing import assert_close

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMVisualTokenizer, convert_lavit_checkpoint
from processing_vwlmm import VWLMMProcessor


START, END, PLACEHOLDER, NUM_PATCHES = 160, 161, 226, 16
SELECTIONS = ("sampled", "argmax", "extreme")
# As the authors' `predict_answers`: no ids of images in a text, which has two tokens at least.
TEXT = {"suppress_tokens": list(range(START, PLACEHOLDER)), "min_new_tokens": 2, "max_new_tokens": 10}
GRADIENTS = {
    "causal_encoder.blocks.1.token_cross_attn.key.weight": "merger.layers.1.cross_attn.k_proj.weight",
    "causal_encoder.ln_vision.weight": "merger.feature_norm.weight",
    "causal_encoder.norm.weight": "merger.norm.weight",
    "encode_task_layer.2.weight": "task_layer.2.weight",
    "token_predictor.in_conv.1.weight": "selector.in_proj.weight",
    "token_predictor.out_conv.0.weight": "selector.fc1.weight",
    "token_predictor.out_conv.4.bias": "selector.fc3.bias",
    "token_predictor.out_conv.4.weight": "selector.fc3.weight",
}


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


class TestTokenizer:
    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_encode(self, model, tensors, selection):
        tokenizer = model.model.visual_tokenizer
        close(tokenizer.encode_patches(tensors["pixel_values"]), tensors["vit_features"])
        tokens = tokenizer.encode(tensors["pixel_values"], gumbel_noise=tensors[f"{selection}.gumbel_noise"])
        close(tokens.selector_log_probs, tensors["selector_log_probs"])
        assert torch.equal(tokens.keep_mask.long(), tensors[f"{selection}.keep_mask"])
        close(tokens.merged_features, tensors[f"{selection}.merged_all"][tokens.keep_mask])
        close(tokens.projected, tensors[f"{selection}.to_quantizer"])
        close(tokens.quantized, tensors[f"{selection}.quantized"])
        assert torch.equal(tokens.code_ids, tensors[f"{selection}.code_ids"])

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_merger_computes_the_rows_of_dropped_patches_too(self, model, tensors, selection):
        # Thrown away at the end, they are keys and values on the way.
        merged = model.model.visual_tokenizer.merger(
            tensors["vit_features"], tensors[f"{selection}.keep_mask"].float()
        )
        close(merged, tensors[f"{selection}.merged_all"])

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_ids_of_the_decoder(self, model, tensors, expected, selection):
        keep_mask = tensors[f"{selection}.keep_mask"]
        codes = model.get_image_codes(tensors["pixel_values"], keep_mask=keep_mask)
        found = [[START, *(image + model.config.code_offset).tolist(), END] for image in codes]
        assert found == expected[f"{selection}.llm_ids"]

    @pytest.mark.parametrize("selection", ["sampled", "argmax"])
    def test_decode(self, folder, tensors, selection):
        codes, keep_mask = tensors[f"{selection}.code_ids"], tensors[f"{selection}.keep_mask"]
        tokenizer = VWLMMVisualTokenizer.from_pretrained(folder / "visual_tokenizer")
        rebuilt = tokenizer.decode(codes, keep_mask)
        close(rebuilt, tensors[f"{selection}.reconstruction"])
        prompt_embeds, pooled = tokenizer.get_conditions(rebuilt)
        close(prompt_embeds, tensors[f"{selection}.lowres_condition"])
        assert pooled is None
        tokenizer = VWLMMVisualTokenizer.from_pretrained(folder / "visual_tokenizer_highres")
        prompt_embeds, pooled = tokenizer.get_conditions(tokenizer.decode(codes, keep_mask))
        close(prompt_embeds, tensors[f"{selection}.highres_prompt_embeds"])
        close(pooled, tensors[f"{selection}.highres_pooled_prompt_embeds"])

    def test_equation_4_and_its_gradients(self, folder, tensors):
        tokenizer = VWLMMVisualTokenizer.from_pretrained(folder / "visual_tokenizer").train()
        output = tokenizer(tensors["pixel_values"], gumbel_noise=tensors["sampled.gumbel_noise"])
        close(output.loss, tensors["eq4.loss"])
        close(output.reconstruction_loss, tensors["eq4.reconstruction_loss"])
        close(output.ratio_loss, tensors["eq4.ratio_loss_per_image_mean"])
        close(output.commitment_loss, tensors["eq4.commitment"])
        output.loss.backward()
        parameters = dict(tokenizer.named_parameters())
        for theirs, ours in GRADIENTS.items():
            assert_close(parameters[ours].grad, tensors[f"eq4.grad.{theirs}"], atol=1e-5, rtol=1e-4)
        parts = [parameters[f"merger.layers.0.self_attn.{part}_proj.weight"].grad for part in "qkv"]
        theirs = tensors["eq4.grad.causal_encoder.blocks.0.token_causal_attn.qkv.weight"]
        assert_close(torch.cat(parts), theirs, atol=1e-6, rtol=1e-4)


class TestDecoder:
    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_image_features(self, model, tensors, selection):
        keep_mask = tensors[f"{selection}.keep_mask"].bool()
        features = model.model.get_image_features(tensors["pixel_values"], keep_mask=keep_mask).pooler_output
        close(torch.stack(features)[keep_mask], tensors[f"{selection}.llm_features"])

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("selection", ["sampled", "argmax"])
    def test_one_image(self, model, tensors, prompts, selection, use_cache):
        keep_mask = tensors[f"{selection}.keep_mask"][:1]
        inputs = {"input_ids": torch.tensor(prompts[:1]), "pixel_values": tensors["pixel_values"][:1]}
        logits = model(**inputs, keep_mask=keep_mask, use_cache=use_cache).logits
        close(logits[:, kept_columns(prompts[0], keep_mask)], tensors[f"one_image.{selection}.logits"])

    @pytest.mark.parametrize("beams", [1, 5])
    @pytest.mark.parametrize("selection", ["sampled", "argmax"])
    def test_answers(self, model, tensors, expected, prompts, selection, beams):
        output = model.generate(
            input_ids=torch.tensor(prompts[:1]),
            pixel_values=tensors["pixel_values"][:1],
            keep_mask=tensors[f"{selection}.keep_mask"][:1],
            do_sample=False,
            num_beams=beams,
            length_penalty=0.0,
            **TEXT,
        )
        # What Transformers 4.33 puts in front was never read.
        answer = expected[f"one_image.{selection}.vqa_beams{beams}"]["ids"][0][1:]
        assert output[0, len(prompts[0]) :].tolist() == answer

    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
    def test_two_prompts_padded_on_the_left(self, model, tensors, expected, prompts, options):
        length = max(map(len, prompts))
        rows = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
        inputs = {
            "input_ids": torch.tensor(rows),
            "attention_mask": torch.tensor([[int(i >= length - len(p)) for i in range(length)] for p in prompts]),
            "pixel_values": tensors["pixel_values"][[0, 2]],
            "keep_mask": tensors["sampled.keep_mask"][[0, 2]],
        }
        logits = model(**inputs).logits
        for row, prompt, keep_mask, theirs, mask in zip(
            logits,
            prompts,
            inputs["keep_mask"],
            tensors["batch_of_two.logits"],
            tensors["batch_of_two.attention_mask"].bool(),
            strict=True,
        ):
            columns = [length - len(prompt) + column for column in kept_columns(prompt, keep_mask)]
            close(row[columns], theirs[mask])
        output = model.generate(**inputs, do_sample=False, **TEXT, **options)[:, length:]
        assert output.tolist() == [ids[1:] for ids in expected["batch_of_two.vqa_greedy"]["ids"]]

    def test_images_between_texts(self, model, tensors, expected, prompts):
        ids, keep_mask = prompts[0] + prompts[1], tensors["sampled.keep_mask"][[0, 2]]
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": tensors["pixel_values"][[0, 2]]}
        logits = model(**inputs, keep_mask=keep_mask).logits
        close(logits[:, kept_columns(ids, keep_mask)], tensors["interleaved.logits"])
        output = model.generate(**inputs, keep_mask=keep_mask, do_sample=False, max_new_tokens=8)
        assert output[0, len(ids) :].tolist() == expected["interleaved.greedy"][1:]

    def test_text_alone(self, model, tensors, expected):
        ids = torch.tensor(expected["text_only.input_ids"])
        close(model(ids).logits, tensors["text_only.logits"])
        output = model.generate(ids, do_sample=False, max_new_tokens=8)
        assert output[0, ids.shape[1] :].tolist() == expected["text_only.greedy"]

    def test_codes_in_place_of_features(self, model, tensors, expected, prompts):
        ids = torch.tensor([expected["sampled.llm_ids"][0] + expected["prompt_ids"][0]])
        close(model(ids).logits, tensors["discrete.logits"])
        # The same through the placeholders of an image.
        keep_mask = tensors["sampled.keep_mask"][:1]
        inputs = {"input_ids": torch.tensor(prompts[:1]), "pixel_values": tensors["pixel_values"][:1]}
        logits = model(**inputs, keep_mask=keep_mask, read_as_codes=torch.tensor([True])).logits
        close(logits[:, kept_columns(prompts[0], keep_mask)], tensors["discrete.logits"])

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


class TestProcessor:
    def test_prompt(self, folder, expected, prompts):
        processor = VWLMMProcessor.from_pretrained(folder)
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many people?"}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        assert text == f"<image>{expected['prompts'][1]}"
        image = torch.zeros(3, 56, 56, dtype=torch.uint8)
        assert processor(images=[image], text=text)["input_ids"][0] == prompts[1]

    def test_typed_codes_are_text(self, folder):
        processor = VWLMMProcessor.from_pretrained(folder)
        for typed in ("<|image_code_5|>", "<|image_start|>", "<|image_end|>", "<image>"):
            message = {"role": "user", "content": f"a {typed} b"}
            ids = processor.apply_chat_template([message], tokenize=True, return_dict=True)["input_ids"][0]
            assert max(ids) < START

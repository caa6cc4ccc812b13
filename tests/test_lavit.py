# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""LaVIT: what its authors' code computes, image tokens that are dropped, conversion, and the codebook."""

import json
import logging
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import GOLDEN, make_image
from jinja2 import TemplateError
from safetensors.torch import load_file
from test_generation import CHUNKS_IMAGES
from test_hub import run_without_package
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, MistralConfig, StaticCache, set_seed

from modeling_vwlmm import VWLMMForConditionalGeneration
from modeling_vwlmm.codebook_vwlmm import Codebook
from modeling_vwlmm.configuration_vwlmm import VWLMMConfig
from modeling_vwlmm.conversion_lavit import convert_lavit_checkpoint
from modeling_vwlmm.visual_tokenizer_vwlmm import VWLMMVisualTokenizer
from processing_vwlmm import VWLMMProcessor


SOURCE = GOLDEN / "lavit" / "checkpoint"
EXPECTED = json.loads((GOLDEN / "lavit" / "expected.json").read_text())
PROMPTS = EXPECTED["prompt_ids"]
SELECTIONS = ("sampled", "argmax", "extreme")
NUM_PATCHES = 16
IMAGE_START, IMAGE_END, CODE_OFFSET, IMAGE = 160, 161, 162, 226  # ids; the placeholder is one past the vocabulary
CLOSE = {"atol": 1e-4, "rtol": 0}
# How the authors answer questions: no ids behind the text's vocabulary.
ANSWER = {
    "max_new_tokens": 10,
    "min_new_tokens": 2,
    "do_sample": False,
    "suppress_tokens": list(range(IMAGE_START, IMAGE)),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "lavit" / "expected.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The golden checkpoint, converted."""
    folder = tmp_path_factory.mktemp("lavit") / "converted"
    convert_lavit_checkpoint(SOURCE, folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder) -> VWLMMForConditionalGeneration:
    return VWLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def lavit(loaded) -> VWLMMForConditionalGeneration:
    """The model, as it was loaded: what a test changes of it is undone."""
    config = loaded.config
    tokenizer_fields = dict(vars(config.visual_tokenizer_config))
    yield loaded.eval()
    vars(config.visual_tokenizer_config).update(tokenizer_fields)
    config.use_pseudo_image_features = False
    loaded.zero_grad(set_to_none=True)


@pytest.fixture(scope="module")
def lavit_processor(folder) -> VWLMMProcessor:
    return VWLMMProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizers(folder) -> dict[str, VWLMMVisualTokenizer]:
    """The tokenizers by themselves, with the decoder of each resolution."""
    names = {"low": "visual_tokenizer", "high": "visual_tokenizer_highres"}
    return {key: VWLMMVisualTokenizer.from_pretrained(folder / name).eval() for key, name in names.items()}


def ids_of(*parts: list[int] | None) -> list[int]:
    """Ids of a prompt, where `None` is an image."""
    ids = []
    for part in parts:
        ids += [IMAGE_START] + [IMAGE] * NUM_PATCHES + [IMAGE_END] if part is None else part
    return ids


def pad_left(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def find_kept(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions that are neither padding nor a dropped placeholder, `[B, L]`."""
    kept = torch.ones_like(batch["input_ids"]).bool()
    kept[batch["input_ids"] == IMAGE] = batch["keep_mask"].bool().flatten()
    return kept & batch["attention_mask"].bool()


class TestVisualTokenizerEqualsTheAuthors:
    """Values that the authors' code computed; what each is stands in tests/golden/lavit/README.md."""

    def test_features_of_the_tower(self, lavit, golden):
        features = lavit.model.visual_tokenizer.encode_patches(golden["pixel_values"])
        assert_close(features, golden["vit_features"], **CLOSE)

    @pytest.mark.parametrize("name", SELECTIONS)
    def test_encode(self, lavit, golden, name):
        noise = golden[f"{name}.gumbel_noise"]
        tokens = lavit.model.visual_tokenizer.encode(golden["pixel_values"], gumbel_noise=noise)
        assert_close(tokens.selector_log_probs, golden["selector_log_probs"], **CLOSE)
        assert torch.equal(tokens.keep_mask, golden[f"{name}.keep_mask"].bool())
        merged = golden[f"{name}.merged_all"][tokens.keep_mask]
        assert_close(tokens.merged_features, merged, **CLOSE)
        assert_close(tokens.projected, golden[f"{name}.to_quantizer"], **CLOSE)
        assert torch.equal(tokens.code_ids, golden[f"{name}.code_ids"])
        assert_close(tokens.quantized, golden[f"{name}.quantized"], **CLOSE)

    @pytest.mark.parametrize("name", SELECTIONS)
    def test_merger_with_the_rows_of_dropped_patches(self, lavit, golden, name):
        blocks = []
        merger = lavit.model.visual_tokenizer.merger
        hook = merger.layers[0].register_forward_hook(lambda module, inputs, output: blocks.append(output))
        with torch.no_grad():
            merged = merger(golden["vit_features"], golden[f"{name}.keep_mask"])
        hook.remove()
        assert_close(merged, golden[f"{name}.merged_all"], **CLOSE)
        if f"{name}.merger_block0" in golden:
            assert_close(blocks[0], golden[f"{name}.merger_block0"], **CLOSE)

    @pytest.mark.parametrize("name", SELECTIONS)
    def test_features_that_the_decoder_reads(self, lavit, golden, name):
        keep_mask = golden[f"{name}.keep_mask"]
        with torch.no_grad():
            images = lavit.model.get_image_features(golden["pixel_values"], keep_mask=keep_mask)
        assert_close(torch.stack(images.pooler_output)[keep_mask.bool()], golden[f"{name}.llm_features"], **CLOSE)

    # Nothing of `extreme` was rebuilt.
    @pytest.mark.parametrize("name", ["sampled", "argmax"])
    def test_rebuilt_features_and_conditions(self, tokenizers, golden, name):
        codes, keep_mask = golden[f"{name}.code_ids"], golden[f"{name}.keep_mask"]
        low = tokenizers["low"].decode(codes, keep_mask)
        assert_close(low, golden[f"{name}.reconstruction"], **CLOSE)
        prompt, pooled = tokenizers["low"].get_conditions(low)
        assert_close(prompt, golden[f"{name}.lowres_condition"], **CLOSE)
        assert pooled is None
        prompt, pooled = tokenizers["high"].get_conditions(tokenizers["high"].decode(codes, keep_mask))
        assert_close(prompt, golden[f"{name}.highres_prompt_embeds"], **CLOSE)
        assert_close(pooled, golden[f"{name}.highres_pooled_prompt_embeds"], **CLOSE)

    def test_equation_4_and_its_gradients(self, folder, golden):
        tokenizer = VWLMMVisualTokenizer.from_pretrained(folder / "visual_tokenizer").train()
        output = tokenizer(golden["pixel_values"], gumbel_noise=golden["sampled.gumbel_noise"])
        assert_close(output.reconstruction, golden["sampled.reconstruction"], **CLOSE)
        assert_close(output.reconstruction_loss, golden["eq4.reconstruction_loss"], **CLOSE)
        assert_close(output.ratio_loss, golden["eq4.ratio_loss_per_image_mean"], **CLOSE)
        assert_close(output.commitment_loss, golden["eq4.commitment"], **CLOSE)
        assert_close(output.loss, golden["eq4.loss"], **CLOSE)
        output.loss.backward()

        parameters = dict(tokenizer.named_parameters())
        names = {
            "causal_encoder.blocks.0.token_causal_attn.qkv.weight": [
                f"merger.layers.0.self_attn.{part}_proj.weight" for part in "qkv"
            ],
            "causal_encoder.blocks.1.token_cross_attn.key.weight": ["merger.layers.1.cross_attn.k_proj.weight"],
            "causal_encoder.ln_vision.weight": ["merger.feature_norm.weight"],
            "causal_encoder.norm.weight": ["merger.norm.weight"],
            "encode_task_layer.2.weight": ["task_layer.2.weight"],
            "token_predictor.in_conv.1.weight": ["selector.in_proj.weight"],
            "token_predictor.out_conv.0.weight": ["selector.fc1.weight"],
            "token_predictor.out_conv.4.weight": ["selector.fc3.weight"],
            "token_predictor.out_conv.4.bias": ["selector.fc3.bias"],
        }
        assert {f"eq4.grad.{name}" for name in names} == {name for name in golden if name.startswith("eq4.grad.")}
        for theirs, ours in names.items():
            gradient, expected = torch.cat([parameters[n].grad for n in ours]), golden[f"eq4.grad.{theirs}"]
            # Gradients are small: 1e-4 of the largest element.
            assert_close(gradient, expected, atol=1e-4 * expected.abs().max().item(), rtol=0, msg=theirs)
        assert all(parameter.grad is None for parameter in tokenizer.vision_tower.parameters())
        assert not any(parameter.requires_grad for parameter in tokenizer.quantizer.parameters())


class TestDecoderEqualsTheAuthors:
    @pytest.mark.parametrize("name", ["sampled", "argmax"])
    def test_logits_of_one_image(self, lavit, golden, name):
        batch = pad_left([ids_of(None, PROMPTS[0])])
        batch |= {"pixel_values": golden["pixel_values"][:1], "keep_mask": golden[f"{name}.keep_mask"][:1]}
        for use_cache in (True, False):
            with torch.no_grad():
                logits = lavit(**batch, use_cache=use_cache).logits
            assert_close(logits[find_kept(batch)], golden[f"one_image.{name}.logits"][0], **CLOSE)

    @pytest.fixture
    def two(self, golden) -> dict[str, torch.Tensor]:
        """Images 0 and 2, a prompt each, the shorter row padded on the left."""
        images = {name: golden[name][[0, 2]] for name in ("pixel_values", "sampled.keep_mask")}
        rows = [ids_of(None, prompt) for prompt in PROMPTS]
        return {
            **pad_left(rows),
            "pixel_values": images["pixel_values"],
            "keep_mask": images["sampled.keep_mask"],
        }

    def test_logits_of_two_rows(self, lavit, golden, two):
        with torch.no_grad():
            logits = lavit(**two).logits
        expected = golden["batch_of_two.logits"][golden["batch_of_two.attention_mask"].bool()]
        assert_close(logits[find_kept(two)], expected, **CLOSE)

    def test_interleaved(self, lavit, golden, two):
        batch = {**two, **pad_left([ids_of(None, PROMPTS[0], None, PROMPTS[1])])}
        with torch.no_grad():
            logits = lavit(**batch).logits
        assert_close(logits[find_kept(batch)], golden["interleaved.logits"][0], **CLOSE)
        generated = lavit.generate(**batch, max_new_tokens=8, do_sample=False)
        assert generated[0, batch["input_ids"].shape[1] :].tolist() == EXPECTED["interleaved.greedy"][1:]

    def test_text_alone(self, lavit, golden):
        ids = torch.tensor(EXPECTED["text_only.input_ids"])
        with torch.no_grad():
            assert_close(lavit(input_ids=ids).logits, golden["text_only.logits"], **CLOSE)
        generated = lavit.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert generated.tolist() == EXPECTED["text_only.greedy"][-8:]

    def test_codes_as_tokens(self, lavit, golden):
        ids = torch.tensor([EXPECTED["sampled.llm_ids"][0] + PROMPTS[0]])
        assert ids[0, 1:4].tolist() == (golden["sampled.code_ids"][:3] + CODE_OFFSET).tolist()
        with torch.no_grad():
            assert_close(lavit(input_ids=ids).logits, golden["discrete.logits"], **CLOSE)

    # Their ids begin with BOS, which was not fed. Beams with `length_penalty=0` do not depend on it.
    @pytest.mark.parametrize("num_beams", [1, 5])
    @pytest.mark.parametrize("name", ["sampled", "argmax"])
    def test_answers(self, lavit, golden, name, num_beams):
        batch = pad_left([ids_of(None, PROMPTS[0])])
        batch |= {"pixel_values": golden["pixel_values"][:1], "keep_mask": golden[f"{name}.keep_mask"][:1]}
        options = {"num_beams": 5, "length_penalty": 0.0} if num_beams == 5 else {}
        generated = lavit.generate(**batch, **ANSWER, **options)[:, batch["input_ids"].shape[1] :]
        assert generated[0].tolist() == EXPECTED[f"one_image.{name}.vqa_beams{num_beams}"]["ids"][0][1:]

    @pytest.mark.parametrize("way", ["vqa_greedy", "vqa_beams5"])
    def test_answers_to_two(self, lavit, two, way):
        options = {"num_beams": 5, "length_penalty": 0.0} if way == "vqa_beams5" else {}
        generated = lavit.generate(**two, **ANSWER, **options)[:, two["input_ids"].shape[1] :]
        assert generated.tolist() == [row[1:] for row in EXPECTED[f"batch_of_two.{way}"]["ids"]]

    # `length_penalty=1` counts that BOS under their Transformers, and hypotheses of unequal length may be ranked
    # otherwise: of captions, only the greedy ones are compared.
    @pytest.mark.parametrize("name", ["sampled", "argmax"])
    def test_greedy_captions(self, lavit, golden, name):
        batch = pad_left([ids_of(None)])
        batch |= {"pixel_values": golden["pixel_values"][:1], "keep_mask": golden[f"{name}.keep_mask"][:1]}
        expected = EXPECTED[f"one_image.{name}.caption_beams1"]["ids"][0][1:]
        options = {**ANSWER, "max_new_tokens": len(expected), "min_new_tokens": 8}
        assert lavit.generate(**batch, **options)[0, batch["input_ids"].shape[1] :].tolist() == expected


class TestProcessor:
    def test_prompt_of_the_authors(self, lavit_processor):
        text = "<image>" + EXPECTED["prompts"][0]
        inputs = lavit_processor(images=[make_image(1)], text=text, return_tensors="pt")
        assert inputs["input_ids"].tolist() == [ids_of(None, PROMPTS[0])]
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is the dog?"}]}
        assert lavit_processor.apply_chat_template([message], add_generation_prompt=True) == text

    @pytest.mark.parametrize("content", ["a red dog", [{"type": "text", "text": "a red dog"}]])
    def test_an_answer_to_nothing_is_learned_whole_and_without_a_frame(self, lavit_processor, content):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        document = [{"role": "assistant", "content": content}]
        inputs = lavit_processor.apply_chat_template(document, **options)
        expected = lavit_processor.tokenizer("a red dog</s>").input_ids
        assert inputs["input_ids"] == [expected]
        assert inputs["assistant_masks"] == [[1] * len(expected)]
        with pytest.raises(TemplateError, match=r"messages\[0\] has role 'assistant'"):
            lavit_processor.apply_chat_template([*document, {"role": "user", "content": "and?"}])

    @pytest.mark.parametrize("name", ["vicuna_v1", "mistral", "plain"])
    def test_other_templates_have_no_form_for_a_text_alone(self, lavit_processor, name):
        template = lavit_processor.get_chat_template(name)
        with pytest.raises(TemplateError, match="one 'assistant' message alone.*'lavit' template"):
            lavit_processor.apply_chat_template([{"role": "assistant", "content": "a"}], chat_template=template)

    def test_typed_codes_are_text(self, lavit_processor):
        typed = "is <|image_code_5|> in <|image_start|><image><|image_end|>?"
        content = [{"type": "image", "image": make_image(1)}, {"type": "text", "text": typed}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        ids = lavit_processor.apply_chat_template([{"role": "user", "content": content}], **options)["input_ids"][0]
        image = ids_of(None)
        assert ids[: len(image)].tolist() == image
        assert ids[len(image) :].max() < IMAGE_START
        # The typed tokens are characters, some of which this vocabulary does not know.
        plain = typed.replace("<", "").replace(">", "").replace("|", "")
        assert len(ids) - len(image) > len(lavit_processor.tokenizer(plain)["input_ids"])


class TestSelection:
    @pytest.fixture
    def tokenizer(self, lavit) -> VWLMMVisualTokenizer:
        return lavit.model.visual_tokenizer

    def test_threshold_that_no_training_has_found(self, lavit, tokenizer, golden):
        tokenizer.config.selection = "threshold"
        with pytest.raises(ValueError, match="the config has none"):
            tokenizer.encode(golden["pixel_values"])
        with pytest.raises(ValueError, match="the config has none"):
            lavit.model.get_image_features(golden["pixel_values"])

    def test_threshold(self, tokenizer, golden):
        probabilities = golden["selector_log_probs"][..., 0].exp()
        middle = probabilities.median().item() + 1e-5
        tokenizer.config.selection, tokenizer.config.threshold = "threshold", middle
        keep_mask = tokenizer.encode(golden["pixel_values"]).keep_mask
        assert torch.equal(keep_mask, probabilities >= middle)
        assert len(set(keep_mask.sum(dim=1).tolist())) > 1

    def test_an_image_that_reaches_no_threshold_keeps_its_best_patch(self, tokenizer, golden):
        tokenizer.config.selection, tokenizer.config.threshold = "threshold", 1.1
        keep_mask = tokenizer.encode(golden["pixel_values"]).keep_mask
        best = golden["selector_log_probs"][..., 0].argmax(dim=1)
        assert torch.equal(keep_mask, F.one_hot(best, NUM_PATCHES).bool())
        tokenizer.config.min_tokens = 0
        tokens = tokenizer.encode(golden["pixel_values"])
        assert not tokens.keep_mask.any()
        assert tokens.code_ids.shape == (0,)

    @pytest.mark.parametrize("keep_rate", [1 / 3, 0.5, 0.01, 1.0])
    def test_top_k_keeps_a_fixed_number(self, tokenizer, golden, keep_rate):
        tokenizer.config.selection, tokenizer.config.keep_rate = "top_k", keep_rate
        keep_mask = tokenizer.encode(golden["pixel_values"]).keep_mask
        expected = max(round(keep_rate * NUM_PATCHES), 1)
        assert keep_mask.sum(dim=1).tolist() == [expected] * 3
        kept = golden["selector_log_probs"][..., 0]
        for row, mask in zip(kept, keep_mask, strict=True):
            assert row[mask].min() >= row[~mask].max() if (~mask).any() else True

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
    def test_top_k_needs_no_mask(self, lavit, tokenizer, golden, options):
        """The processor writes as many placeholders as are kept, and the model reads these."""
        tokenizer.config.selection = "top_k"
        processor = VWLMMProcessor.from_visual_tokenizer(
            tokenizer.config, SOURCE / "language_model", num_text_tokens=IMAGE_START
        )
        text = [f"<image>{prompt}" for prompt in EXPECTED["prompts"]]
        inputs = processor(images=[[make_image(1)], [make_image(2)]], text=text, padding=True, return_tensors="pt")
        inputs["pixel_values"] = golden["pixel_values"][:2]
        assert (inputs["input_ids"] == IMAGE).sum(dim=1).tolist() == [5, 5]
        masked = pad_left([ids_of(None, prompt) for prompt in PROMPTS]) | {"pixel_values": inputs["pixel_values"]}
        masked["keep_mask"] = tokenizer.encode(inputs["pixel_values"]).keep_mask
        generated = lavit.generate(**inputs, **ANSWER, **options)[:, inputs["input_ids"].shape[1] :]
        expected = lavit.generate(**masked, **ANSWER, **options)[:, masked["input_ids"].shape[1] :]
        assert torch.equal(generated, expected)
        with torch.no_grad():
            logits = lavit(**inputs).logits[inputs["attention_mask"].bool()]
            assert_close(logits, lavit(**masked).logits[find_kept(masked)], **CLOSE)
        assert len(lavit.get_visual_words(inputs["pixel_values"]).token_ids[0]) == 5
        with pytest.raises(ValueError, match="finds 5 features an image"):
            lavit(**inputs, labels=inputs["input_ids"], visual_objective="codes")

    def test_top_k_is_compiled_once_for_all_images(self, lavit, tokenizer, golden):
        tokenizer.config.selection = "top_k"
        ids = torch.tensor([[IMAGE_START] + [IMAGE] * 5 + [IMAGE_END] + PROMPTS[0]])
        counter = torch._dynamo.testing.CompileCounter()
        torch._dynamo.reset()
        compiled, compilations = torch.compile(lavit, backend=counter), []
        for image in golden["pixel_values"][:, None]:
            with torch.no_grad():
                logits = compiled(input_ids=ids, pixel_values=image, use_cache=False).logits
                assert_close(logits, lavit(input_ids=ids, pixel_values=image, use_cache=False).logits, **CLOSE)
            compilations.append(counter.frame_count)
        assert compilations[0] == compilations[-1] > 0

    def test_draw_is_repeated_and_does_not_know_its_neighbours(self, tokenizer, golden):
        images = golden["pixel_values"]
        tokenizer.config.selection = "sample"
        torch.manual_seed(1)
        first = tokenizer.encode(images).keep_mask
        torch.manual_seed(2)
        assert torch.equal(tokenizer.encode(images).keep_mask, first)
        assert torch.equal(tokenizer.encode(images.flip(0)).keep_mask, first.flip(0))
        for i in range(3):
            assert torch.equal(tokenizer.encode(images[i : i + 1]).keep_mask[0], first[i])
        tokenizer.config.seed = 1
        assert not torch.equal(tokenizer.encode(images).keep_mask, first)

    def test_the_model_selects_by_itself(self, lavit, tokenizer, golden):
        batch = pad_left([ids_of(None, PROMPTS[0])]) | {"pixel_values": golden["pixel_values"][:1]}
        tokenizer.config.selection = "sample"
        selected = tokenizer.encode(batch["pixel_values"]).keep_mask
        with torch.no_grad():
            assert_close(lavit(**batch).logits, lavit(**batch, keep_mask=selected).logits)
        answers = [lavit.generate(**batch, **more, **ANSWER) for more in ({}, {"keep_mask": selected})]
        assert torch.equal(*answers)


class TestImageThatKeepsNothing:
    @pytest.fixture
    def batch(self, golden) -> dict[str, torch.Tensor]:
        """An image that keeps nothing, beside one that keeps some."""
        return {
            **pad_left([ids_of(None, PROMPTS[0]), ids_of(None, PROMPTS[1])]),
            "pixel_values": golden["pixel_values"][1:],
            "keep_mask": golden["extreme.keep_mask"][1:],
        }

    def test_encode_and_decode(self, tokenizers, golden):
        tokenizer, nothing = tokenizers["low"], torch.zeros(1, NUM_PATCHES, dtype=torch.bool)
        tokens = tokenizer.encode(golden["pixel_values"][1:2], keep_mask=nothing)
        assert tokens.code_ids.shape == (0,) and tokens.quantized.shape == (0, 8)
        rebuilt = tokenizer.decode(tokens.code_ids, nothing)
        assert rebuilt.shape == (1, NUM_PATCHES, 32) and rebuilt.isfinite().all()
        # Beside another image it is rebuilt alike.
        codes, keep_mask = golden["extreme.code_ids"], golden["extreme.keep_mask"]
        assert_close(tokenizer.decode(codes, keep_mask)[1:2], rebuilt, **CLOSE)
        with torch.no_grad():
            assert tokenizer(golden["pixel_values"][1:2], keep_mask=nothing).loss.isfinite()

    @pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=str)
    def test_forward_and_generate(self, lavit, batch, options):
        compact = torch.tensor([[IMAGE_START, IMAGE_END, *PROMPTS[0]]])
        with torch.no_grad():
            logits = lavit(**batch, **options).logits[0]
            expected = lavit(input_ids=compact).logits[0]
        assert_close(logits[find_kept(batch)[0]], expected, **CLOSE)
        generated = lavit.generate(**batch, **ANSWER, **options)[0, batch["input_ids"].shape[1] :]
        assert torch.equal(generated, lavit.generate(input_ids=compact, **ANSWER)[0, compact.shape[1] :])


# The prompts that stand side by side, in `ids_of`'s form.
LAYOUTS = {
    "one image": [(None, PROMPTS[0])],
    "left padding": [(None, PROMPTS[0]), (None, PROMPTS[1])],
    "two images in a row": [(PROMPTS[1][:3], None, None, PROMPTS[0]), (None, PROMPTS[1])],
    "text beside": [(PROMPTS[0],), (None, PROMPTS[1])],
    "an image that keeps nothing": [(None, PROMPTS[0], None, PROMPTS[1])],
    "short rows": [(PROMPTS[0][:2],), (None, None, PROMPTS[0]), (PROMPTS[1][:3],), (None, PROMPTS[1])],
}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "beams_returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.0},
    "no_cache": {"use_cache": False},
    "static_cache": {"cache_implementation": "static"},
    **({"chunked_prefill": {"prefill_chunk_size": 5}} if CHUNKS_IMAGES else {}),  # else prompts are read at once
}


class TestDroppedPlaceholdersAreNotThere:
    """
    `N` placeholders an image, of which some are dropped, against the decoder by itself, Transformers' own and loaded
    from the authors' file, that is given the kept features alone.
    """

    @pytest.fixture(scope="class")
    def decoder(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(SOURCE / "language_model", dtype=torch.float32).eval()

    @pytest.fixture(params=LAYOUTS)
    def batch(self, request, golden) -> dict[str, torch.Tensor]:
        return self.make_batch(golden, request.param)

    def make_batch(self, golden: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
        rows = LAYOUTS[layout]
        images = [1, 2] if "nothing" in layout else [0, 2, 1][: sum(part is None for row in rows for part in row)]
        keep_mask = golden["extreme.keep_mask" if "nothing" in layout else "sampled.keep_mask"][images].bool()
        pixel_values = golden["pixel_values"][images]
        return {**pad_left([ids_of(*r) for r in rows]), "pixel_values": pixel_values, "keep_mask": keep_mask}

    def make_compact(self, lavit, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same without what is dropped, as embeddings, padded on the left."""
        with torch.no_grad():
            images = lavit.model.get_image_features(batch["pixel_values"], keep_mask=batch["keep_mask"])
            is_image, kept = batch["input_ids"] == IMAGE, find_kept(batch)
            embeds = lavit.get_input_embeddings()(batch["input_ids"].masked_fill(is_image, 0))
            embeds[is_image] = torch.cat(list(images.pooler_output))
        rows = [row[mask] for row, mask in zip(embeds, kept, strict=True)]
        longest = max(map(len, rows))
        padded = [F.pad(row, (0, 0, longest - len(row), 0)) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"inputs_embeds": torch.stack(padded), "attention_mask": torch.tensor(mask)}

    def run_compact(self, decoder, compact: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of all positions that are no padding, `[kept, C]`."""
        mask = compact["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        with torch.no_grad():
            return decoder(**compact, position_ids=positions).logits[mask.bool()]

    @pytest.mark.parametrize("pseudo", [False, True], ids=["features", "pseudo_image_features"])
    @pytest.mark.parametrize("way", ["cache", "no_cache", "training"])
    def test_logits(self, lavit, decoder, batch, way, pseudo):
        lavit.config.use_pseudo_image_features = pseudo
        expected = self.run_compact(decoder, self.make_compact(lavit, batch))
        lavit.train(way == "training")
        with torch.no_grad():
            logits = lavit(**batch, **({} if way == "training" else {"use_cache": way == "cache"})).logits
        assert logits.shape[:2] == batch["input_ids"].shape
        assert_close(logits[find_kept(batch)], expected, **CLOSE)

    @pytest.mark.parametrize("way", ["cache", "no_cache"])
    def test_behind_a_dropped_position_stands_what_was_before(self, lavit, batch, way):
        with torch.no_grad():
            logits = lavit(**batch, use_cache=way == "cache").logits
        kept = find_kept(batch)
        for row, is_kept, is_token in zip(logits, kept, batch["attention_mask"].bool(), strict=True):
            last = None
            for position in is_token.nonzero().flatten().tolist():
                last = position if is_kept[position] else last
                assert torch.equal(row[position], row[last])

    def test_position_ids_of_a_padded_batch_change_nothing(self, lavit, golden):
        batch = self.make_batch(golden, "left padding")
        mask = batch["attention_mask"]
        for filler in (0, 1):
            positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, filler)
            for use_cache in (True, False):
                with torch.no_grad():
                    given = lavit(**batch, position_ids=positions, use_cache=use_cache).logits
                    left_out = lavit(**batch, use_cache=use_cache).logits
                assert_close(given[find_kept(batch)], left_out[find_kept(batch)], **CLOSE)

    @pytest.mark.parametrize("stateful", [False, True])
    def test_training_reads_kept_positions_alone(self, lavit, golden, monkeypatch, stateful):
        """In as many rows as that takes; a decoder that carries a state through a row has none with two samples."""
        batch = self.make_batch(golden, "short rows")
        monkeypatch.setattr(lavit.model.language_model, "_is_stateful", stateful)
        shapes = []
        hook = lavit.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
        )
        lavit.train()(**batch)
        hook.remove()
        assert shapes == [(4 if stateful else 2, find_kept(batch).sum(dim=1).max())]

    def test_loss_and_gradients(self, lavit, decoder, golden):
        batch = self.make_batch(golden, "short rows")
        labels = batch["input_ids"].masked_fill(
            (batch["attention_mask"] == 0) | (batch["input_ids"] > IMAGE_END), -100
        )
        labels[labels == IMAGE_START] = -100
        labels.scatter_(1, batch["attention_mask"].argmax(dim=1, keepdim=True), -100)  # nothing is before it
        lavit.train()(**batch, labels=labels).loss.backward()
        compact = self.make_compact(lavit, batch)
        mask = compact["attention_mask"].bool()
        rows = torch.full(mask.shape, -100)
        rows[mask] = labels[find_kept(batch)]
        decoder.zero_grad()
        logits = decoder(**compact, position_ids=(mask.long().cumsum(dim=1) - 1).clamp_min(0)).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        assert_close(lavit(**batch, labels=labels).loss, loss, atol=1e-5, rtol=0)
        theirs = dict(decoder.model.named_parameters())
        for name, parameter in lavit.model.language_model.named_parameters():
            if name != "embed_tokens.weight":  # which the decoder by itself was not asked for
                assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=0, msg=name)
        assert lavit.model.multi_modal_projector.linear.weight.grad.abs().max() > 0
        assert all(parameter.grad is None for parameter in lavit.model.visual_tokenizer.parameters())

    @pytest.mark.parametrize("way", WAYS)
    def test_generate(self, lavit, decoder, batch, way):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **WAYS[way]}
        # How a cache is kept is for the model under test; what is right, the decoder says with its own.
        plain = {
            k: v for k, v in options.items() if k not in ("use_cache", "cache_implementation", "prefill_chunk_size")
        }
        set_seed(0)
        expected = decoder.generate(**self.make_compact(lavit, batch), **plain)
        set_seed(0)
        generated = lavit.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        assert torch.equal(generated, expected)

    @pytest.mark.parametrize("way", ["greedy", "beams", "sampling"])
    def test_generate_with_pseudo_image_features(self, lavit, decoder, golden, way):
        lavit.config.use_pseudo_image_features = True
        self.test_generate(lavit, decoder, self.make_batch(golden, "left padding"), way)

    def test_logits_while_it_generates(self, lavit, decoder, batch):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        expected = decoder.generate(**self.make_compact(lavit, batch), **options).logits
        for step, logits in enumerate(lavit.generate(**batch, **options).logits):
            assert_close(logits, expected[step], **CLOSE)

    @pytest.mark.parametrize("masked", [False, True])
    def test_a_cache_remembers_what_was_dropped(self, lavit, golden, masked):
        """In a loop of one's own, which knows placeholders alone: a prompt, two tokens, and a turn with an image."""
        prompts = [ids_of(None, PROMPTS[0]), ids_of(None, PROMPTS[1])][: 2 if masked else 1]
        turn = torch.tensor([ids_of(PROMPTS[1][:2], None, PROMPTS[0][:3])] * len(prompts))
        batch = pad_left(prompts)
        length = batch["input_ids"].shape[1]
        images = torch.tensor([[0, 2], [1, 0]][: len(prompts)])  # in the prompt of each row, and in its turn
        whole = {
            "input_ids": torch.cat([batch["input_ids"], turn], dim=1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(turn)], dim=1),
            "pixel_values": golden["pixel_values"][images.flatten()],
            "keep_mask": golden["sampled.keep_mask"].bool()[images.flatten()],
        }
        cache, found = None, []
        with torch.no_grad():
            expected = lavit(**whole, use_cache=False).logits
            for begin, end in pairwise([0, length - 2, length - 1, length, whole["input_ids"].shape[1]]):
                part = {"input_ids": whole["input_ids"][:, begin:end], "past_key_values": cache, "use_cache": True}
                if masked:
                    part["attention_mask"] = whole["attention_mask"][:, :end]
                if begin in (0, length):
                    chosen = images[:, int(begin == length)]
                    part["pixel_values"] = golden["pixel_values"][chosen]
                    part["keep_mask"] = golden["sampled.keep_mask"].bool()[chosen]
                output = lavit(**part)
                cache = output.past_key_values
                found.append(output.logits)
        kept = find_kept(whole)
        assert_close(torch.cat(found, dim=1)[kept], expected[kept], **CLOSE)
        if masked:
            with pytest.raises(ValueError, match="A cache of 2 rows is given for 1"):
                lavit(input_ids=turn[:1, :2], past_key_values=cache)

    @pytest.mark.parametrize("way", [way for way in WAYS if way in ("greedy", "static_cache", "chunked_prefill")])
    @pytest.mark.parametrize("num_new", [1, 4])
    def test_a_cache_of_generate_remembers_what_was_dropped(self, lavit, golden, way, num_new):
        """In a loop of one's own behind it, which counts slots."""
        batch = self.make_batch(golden, "left padding")
        options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
        if way == "static_cache":  # with room for what comes behind
            options["past_key_values"] = StaticCache(lavit.config.text_config, max_cache_len=64)
        else:
            options |= WAYS[way]
        output = lavit.generate(**batch, **options, return_dict_in_generate=True)
        num_cached = int(output.past_key_values.get_seq_length())
        turn = torch.tensor([PROMPTS[1]] * 2)
        ids = torch.cat([output.sequences, turn], dim=1)
        new = ids.shape[1] - batch["input_ids"].shape[1]
        whole = {**batch, "input_ids": ids, "attention_mask": F.pad(batch["attention_mask"], (0, new), value=1)}
        begin, cache = num_cached, output.past_key_values
        with torch.no_grad():
            expected = lavit(**whole, use_cache=False).logits
            for end in range(begin + 1, ids.shape[1]):
                part = {"input_ids": ids[:, begin:end], "attention_mask": whole["attention_mask"][:, :end]}
                positions = torch.arange(begin, end).expand(2, -1)
                logits = lavit(**part, position_ids=positions, past_key_values=cache).logits
                assert_close(logits, expected[:, begin:end], **CLOSE)
                begin = end

    @pytest.mark.parametrize("layout", ["one image", "an image that keeps nothing"])
    def test_prompt_lookup(self, lavit, decoder, golden, layout):
        batch = self.make_batch(golden, layout)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        expected = decoder.generate(**self.make_compact(lavit, batch), **options)
        generated = lavit.generate(**batch, **options, prompt_lookup_num_tokens=3)
        assert torch.equal(generated[:, batch["input_ids"].shape[1] :], expected)

    def test_packed_rows(self, lavit, decoder, golden):
        batch = self.make_batch(golden, "left padding")
        rows = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        packed = {
            "input_ids": torch.cat(rows).unsqueeze(0),
            "position_ids": torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0),
            "pixel_values": batch["pixel_values"],
            "keep_mask": batch["keep_mask"],
        }
        expected = self.run_compact(decoder, self.make_compact(lavit, batch))
        is_kept = find_kept({**packed, "attention_mask": torch.ones_like(packed["input_ids"])})
        for training in (False, True):
            with torch.no_grad():
                logits = lavit.train(training)(**packed).logits
            assert_close(logits[is_kept], expected, **CLOSE)

    def test_dropped_image_tokens_have_no_words(self, lavit, golden):
        pixel_values, keep_mask = golden["pixel_values"][:2], golden["sampled.keep_mask"][:2].bool()
        words = lavit.get_visual_words(pixel_values, top_k=2, keep_mask=keep_mask)
        nearest = lavit.get_nearest_tokens(pixel_values, keep_mask=keep_mask)
        assert torch.equal(words.token_ids[..., 1] >= 0, keep_mask) and torch.equal(nearest >= 0, keep_mask)
        assert torch.equal(words.probabilities[..., 1] > 0, keep_mask)
        features = torch.stack(list(lavit.get_image_features(pixel_values, keep_mask=keep_mask).image_features))
        expected = lavit.model.vm_head(features[keep_mask]).argmax(dim=-1)
        assert torch.equal(words.token_ids[keep_mask][:, 0], expected)

    def test_generate_from_embeddings(self, lavit, decoder, golden):
        compact = self.make_compact(lavit, self.make_batch(golden, "left padding"))
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(lavit.generate(**compact, **options), decoder.generate(**compact, **options))

    def test_assisted_decoding(self, lavit, decoder, golden):
        batch, options = self.make_batch(golden, "one image"), {"max_new_tokens": 8, "do_sample": False}
        expected = lavit.generate(**batch, **options)
        assert torch.equal(lavit.generate(**batch, **options, assistant_model=decoder), expected)

    @pytest.mark.parametrize("shape", [(1, 15), (2, 16), (16,)])
    def test_keep_mask_of_another_shape(self, lavit, golden, shape):
        batch = {**self.make_batch(golden, "one image"), "keep_mask": torch.ones(shape)}
        with pytest.raises(ValueError, match="`keep_mask` has shape"):
            lavit(**batch)

    def test_a_mask_of_another_shape(self, lavit, golden):
        batch = self.make_batch(golden, "one image")
        batch["attention_mask"] = torch.ones(1, 1, 34, 34)
        with pytest.raises(ValueError, match="another shape"):
            lavit(**batch)


class TestBadInput:
    """Found, expected, and what to do; never an answer that is wrong."""

    def test_gumbel_noise_of_another_shape(self, lavit, golden):
        with pytest.raises(ValueError, match=r"`gumbel_noise` has shape \(2, 15, 2\); expected \(2, 16, 2\)"):
            lavit.model.visual_tokenizer.encode(golden["pixel_values"][:2], gumbel_noise=torch.zeros(2, 15, 2))

    def test_another_number_of_codes_than_is_kept(self, tokenizers):
        keep_mask = torch.zeros(1, NUM_PATCHES, dtype=torch.bool)
        keep_mask[:, :3] = True
        with pytest.raises(ValueError, match="There are 4 codes, and `keep_mask` keeps 3 patches"):
            tokenizers["low"].decode(torch.zeros(4, dtype=torch.long), keep_mask)

    @pytest.mark.parametrize("name", ["image_codes", "read_as_codes"])
    @pytest.mark.parametrize(
        ("codes", "message"),
        [
            (torch.full((1, NUM_PATCHES), 64), "goes from 64 to 64; expected codes from 0 to 63"),
            (torch.zeros(1, 15, dtype=torch.long), r"has shape \(1, 15\); expected \(1, 16\)"),
        ],
        ids=["range", "shape"],
    )
    def test_codes_of_images(self, lavit, golden, name, codes, message):
        batch = pad_left([ids_of(None, PROMPTS[0])]) | {"pixel_values": golden["pixel_values"][:1]}
        with pytest.raises(ValueError, match=f"`{name}` {message}"):
            lavit(**batch, **{name: codes}, visual_objective="codes", use_cache=False)

    def test_cache_that_does_not_know_what_was_dropped(self, lavit, golden):
        batch = pad_left([ids_of(None, PROMPTS[0])]) | {"pixel_values": golden["pixel_values"][:1]}
        first = lavit.generate(**batch, **ANSWER, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([PROMPTS[1]])], dim=1)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with pytest.raises(ValueError, match="Leave `past_key_values` out: the prompt is read again"):
            lavit.generate(**batch, **ANSWER, past_key_values=first.past_key_values)

    def test_keywords_that_are_no_fields(self):
        text = str(SOURCE / "language_model")
        for make, error in (
            (lambda: VWLMMVisualTokenizer.from_vision_pretrained("tower", num_code=8), "you mean `num_codes`"),
            (lambda: VWLMMForConditionalGeneration.from_visual_tokenizer("x", text, adaptor="mlp"), "mean `adapter`"),
            (
                lambda: VWLMMForConditionalGeneration.from_vision_text_pretrained("x", text, zzzz=1),
                "nor anything else",
            ),
        ):
            with pytest.raises(TypeError, match=error):
                make()

    def test_another_tower(self, folder):
        fields = VWLMMConfig.from_pretrained(folder).to_dict()
        fields["vision_config"]["image_size"] *= 2
        with pytest.raises(ValueError, match="tower whose image_size is [0-9]+, and the model's is [0-9]+"):
            VWLMMConfig(**fields)

    def test_folder_of_another_model(self, folder):
        with pytest.raises(ValueError, match="type 'vwlmm'; expected a visual tokenizer, 'vwlmm_visual_tokenizer'"):
            VWLMMForConditionalGeneration.from_visual_tokenizer(str(folder), str(SOURCE / "language_model"))

    def test_tokenizer_with_a_tensor_missing(self, tokenizers, tmp_path):
        state_dict = tokenizers["low"].state_dict()
        del state_dict["merger.layers.0.fc1.weight"]
        tokenizers["low"].save_pretrained(tmp_path, state_dict=state_dict)
        with pytest.raises(ValueError, match="not whole: 1 of its tensors are missing, merger.layers.0.fc1.weight"):
            VWLMMForConditionalGeneration.from_visual_tokenizer(str(tmp_path), str(SOURCE / "language_model"))

    def test_code_suppressed_by_the_user(self, lavit):
        ids = torch.tensor([PROMPTS[0]])
        written = lavit.generate_image_codes(ids, max_new_tokens=4, do_sample=False)[0]
        first = int(written[0])
        others = lavit.generate_image_codes(
            ids, max_new_tokens=4, do_sample=False, suppress_tokens=[CODE_OFFSET + first]
        )
        assert first not in others[0]


class TestSlidingWindow:
    """A window counts slots, those of dropped placeholders, too."""

    @pytest.fixture(scope="class")
    def mistral(self, loaded) -> VWLMMForConditionalGeneration:
        text = {name: getattr(loaded.config.text_config, name) for name in ("hidden_size", "intermediate_size")}
        text_config = MistralConfig(
            **text,
            vocab_size=IMAGE,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
            initializer_range=0.5,
        )
        set_seed(0)
        config = VWLMMConfig(**{**loaded.config.to_dict(), "text_config": text_config})
        model = VWLMMForConditionalGeneration(config).eval()
        model.model.multi_modal_projector.load_state_dict(loaded.model.multi_modal_projector.state_dict())
        return model

    @pytest.fixture
    def batch(self, golden) -> dict[str, torch.Tensor]:
        batch = pad_left([ids_of(None, PROMPTS[0])])
        return batch | {"pixel_values": golden["pixel_values"][:1], "keep_mask": golden["argmax.keep_mask"][:1]}

    def test_refused_with_a_cache(self, mistral, batch):
        for options in ({}, {"use_cache": True}):
            with pytest.raises(ValueError, match="does not see all positions"):
                mistral(**batch, **options)
        for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
            with pytest.raises(ValueError, match='selection="top_k"'):
                mistral.generate(**batch, **options, max_new_tokens=2)

    @pytest.mark.parametrize("training", [False, True])
    def test_right_without_one(self, mistral, batch, training):
        compact = TestDroppedPlaceholdersAreNotThere().make_compact(mistral, batch)["inputs_embeds"]
        with torch.no_grad():
            expected = mistral(inputs_embeds=compact).logits[0]
            logits = mistral.train(training)(**batch, **({} if training else {"use_cache": False})).logits
        mistral.eval()
        assert_close(logits[find_kept(batch)], expected, **CLOSE)

    def test_a_fixed_number_of_tokens(self, mistral, batch, monkeypatch):
        """With `top_k` no slot is dropped: a window, here shorter than the prompt, counts what is there."""
        monkeypatch.setattr(mistral.config.visual_tokenizer_config, "selection", "top_k")
        ids = ids_of(None, PROMPTS[0])
        ids = torch.tensor([[IMAGE_START] + [IMAGE] * 5 + ids[1 + NUM_PATCHES :]])
        inputs = {"input_ids": ids, "pixel_values": batch["pixel_values"]}
        options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
        found = mistral.generate(**inputs, **options)
        assert torch.equal(found, mistral.generate(**inputs, **options, cache_implementation="static"))
        for _ in range(4):
            with torch.no_grad():
                logits = mistral(**inputs, use_cache=False).logits
            inputs["input_ids"] = torch.cat([inputs["input_ids"], logits[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(found, inputs["input_ids"])

    def test_right_where_nothing_is_dropped(self, mistral):
        ids = torch.tensor([ids_of(PROMPTS[0])])
        assert mistral.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (1, ids.shape[1] + 2)


class TestCodebook:
    @pytest.fixture
    def codebook(self) -> Codebook:
        torch.manual_seed(0)
        return Codebook(num_codes=6, code_dim=4, decay=0.9, revive_after=0)

    def draw(self, *shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape), dim=-1)

    def test_nearest_code_is_by_distance_where_rows_are_not_of_unit_length(self, codebook):
        codebook.embedding.copy_(self.draw(6, 4) * torch.tensor([0.2, 0.5, 1, 1.5, 2, 3]).unsqueeze(1))
        features = torch.randn(3, 50, 4)
        ids, codes = codebook(features)
        directions = F.normalize(features, dim=-1)
        nearest = torch.cdist(directions, codebook.embedding).argmin(dim=-1)
        assert torch.equal(ids, nearest)
        assert torch.equal(codes, codebook.embedding[ids])
        by_cosine = (directions @ F.normalize(codebook.embedding, dim=-1).T).argmax(dim=-1)
        assert not torch.equal(ids, by_cosine)

    def test_average_moves_codes_and_then_idle_ones_are_revived(self, codebook):
        before, features = codebook.embedding.clone(), self.draw(5, 4)
        ids = torch.tensor([0, 0, 0, 2, 2])
        codebook.note(features[:2], ids[:2])  # two micro-batches
        codebook.note(features[2:], ids[2:])
        assert torch.equal(codebook.embedding, before)
        codebook.update(torch.Generator().manual_seed(0))
        for code in (0, 2):
            mean = F.normalize(features[ids == code].sum(dim=0), dim=0)
            expected = F.normalize(0.9 * before[code] + 0.1 * mean, dim=0)
            assert_close(codebook.embedding[code], expected)
        # Revived codes are features as they are, each another one: no average has been over them.
        revived = codebook.embedding[[1, 3, 4, 5]]
        matches = (revived.unsqueeze(1) == features).all(dim=-1)
        assert matches.sum(dim=1).tolist() == [1] * 4
        assert matches.sum(dim=0).max() == 1
        assert codebook.idle_steps.tolist() == [0] * 6
        assert codebook.features == [] and codebook.ids == []

    def test_idle_codes_stay_for_as_long_as_they_may(self, codebook):
        codebook.revive_after = 2
        before, features = codebook.embedding.clone(), self.draw(8, 4)
        for step in range(3):
            assert torch.equal(codebook.embedding[1:], before[1:])
            assert codebook.idle_steps.tolist() == [0] + [step] * 5
            codebook.note(features, torch.zeros(8, dtype=torch.long))
            codebook.update(torch.Generator().manual_seed(step))
        assert not (codebook.embedding[1:] == before[1:]).all(dim=-1).any()

    def test_images_that_keep_nothing_move_no_code(self, codebook):
        before = codebook.embedding.clone()
        codebook.note(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
        codebook.update(torch.Generator())
        assert torch.equal(codebook.embedding, before)

    def test_no_gradient(self, codebook):
        features = torch.randn(5, 4, requires_grad=True)
        _, codes = codebook(features)
        assert not list(codebook.parameters())
        assert not codes.requires_grad

    def test_start_finds_clusters(self, codebook):
        centres = torch.cat([torch.eye(4), -torch.eye(4)])[:6]
        features = (centres.repeat(40, 1) + 0.05 * torch.randn(240, 4)) * 7  # of any length
        codebook.idle_steps.fill_(9)
        codebook.start(features, torch.Generator().manual_seed(3))
        assert_close(codebook.embedding.norm(dim=-1), torch.ones(6))
        # K-means may leave two codes in one cluster; a code is where features are, and never between clusters.
        ids, codes = codebook(features)
        assert (F.normalize(features, dim=-1) * codes).sum(dim=-1).mean() > 0.8
        for code in ids.unique():
            assert_close(
                codebook.embedding[code],
                F.normalize(F.normalize(features[ids == code], dim=-1).sum(dim=0), dim=0),
            )
        assert codebook.idle_steps.tolist() == [0] * 6

    def test_start_asks_for_a_feature_for_each_code(self, codebook):
        with pytest.raises(ValueError, match="6 codes starts from 5 features"):
            codebook.start(self.draw(5, 4), torch.Generator())


class TestConversion:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        """A copy of the golden checkpoint, to take apart."""
        return Path(shutil.copytree(SOURCE, tmp_path / "source"))

    @pytest.mark.parametrize(
        "name",
        [
            "visual_tokenizer/eva_vitg_psz14.bin",
            "visual_tokenizer/tokenizer_encoder.bin",
            "language_model/visual_weight.bin",
            "language_model/config.json",
            "language_model/tokenizer.model",
            "language_model/pytorch_model.bin",
        ],
    )
    def test_missing_file(self, source, tmp_path, name):
        (source / name).unlink()
        named = "no weights" if name.endswith("pytorch_model.bin") else name
        with pytest.raises(FileNotFoundError, match=named):
            convert_lavit_checkpoint(source, tmp_path / "output")
        assert not (tmp_path / "output").exists()

    def test_what_is_left_out_is_named(self, source, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        monkeypatch.setattr("modeling_vwlmm.conversion_lavit.logger", logging.getLogger("transformers.conversion"))
        file = source / "visual_tokenizer" / "tokenizer_encoder.bin"
        torch.save({**torch.load(file, weights_only=True), "encoder.extra.weight": torch.zeros(2)}, file)
        convert_lavit_checkpoint(source, tmp_path / "output")
        assert f"{file} has tensors that the authors' code does not read. They are left out: [" in caplog.text
        assert "'encoder.extra.weight'" in caplog.text

    def test_decoders_are_not_needed(self, source, tmp_path):
        for name in ("tokenizer_decoder.bin", "highres_tokenizer_decoder.bin"):
            (source / "visual_tokenizer" / name).unlink()
        convert_lavit_checkpoint(source, tmp_path / "output")
        assert not list((tmp_path / "output").glob("visual_tokenizer*/"))
        VWLMMForConditionalGeneration.from_pretrained(tmp_path / "output")

    @pytest.mark.parametrize(
        ("file", "edit", "message"),
        [
            (
                "language_model/visual_weight.bin",
                lambda t: t.update({"vit_proj.weight": t["vit_proj.weight"][:40]}),
                r"linear\.weight of shape \(40, 32\)",
            ),
            (
                "visual_tokenizer/tokenizer_encoder.bin",
                lambda t: t.update({"encode_task_layer.0.weight": torch.zeros(16, 16)}),
                r"task_layer\.0\.weight of shape \(16, 16\)",
            ),
            (
                "visual_tokenizer/tokenizer_encoder.bin",
                lambda t: t.update({"quantize.embedding.weight": torch.zeros(300, 8)}),
                "300 codes",
            ),
            (
                "visual_tokenizer/tokenizer_encoder.bin",
                lambda t: t.update({"quantize.embedding.weight": t["quantize.embedding.weight"][:32]}),
                "32 codes, .* leaves 192 for text, and tokenizer.model has 160 tokens",
            ),
            (
                "visual_tokenizer/tokenizer_encoder.bin",
                lambda t: t.pop("quantize.embedding.weight"),
                r"tokenizer_encoder\.bin has no tensor that would become quantizer\.embedding",
            ),
            (
                "visual_tokenizer/eva_vitg_psz14.bin",
                lambda t: t.pop("pos_embed"),
                r"eva_vitg_psz14\.bin has no tensor that would become embeddings\.position_embedding",
            ),
            (
                "visual_tokenizer/eva_vitg_psz14.bin",
                lambda t: t.pop("blocks.0.attn.v_bias"),
                "q_bias, and no v_bias beside it",
            ),
            (
                "visual_tokenizer/tokenizer_encoder.bin",
                lambda t: t.pop("token_predictor.out_conv.4.bias"),
                r"selector\.fc3\.bias of shape None",
            ),
            (
                "visual_tokenizer/tokenizer_encoder.bin",
                lambda t: t.update({"something_new.weight": torch.zeros(2)}),
                r"something_new\.weight",
            ),
            (
                "visual_tokenizer/tokenizer_decoder.bin",
                lambda t: t.update({"unet_proj.weight": torch.zeros(24, 16)}),
                r"condition_projs\.0\.weight of shape \(24, 16\)",
            ),
            (
                "language_model/pytorch_model.bin",
                lambda t: t.update({"lm_head.weight": torch.zeros(226, 40)}),
                r"lm_head\.weight of shape \(226, 40\)",
            ),
        ],
        ids=[
            "reader",
            "task_layer",
            "larger codebook",
            "smaller codebook",
            "no codebook",
            "no positions",
            "half of the biases",
            "missing",
            "unknown",
            "decoder",
            "language_model",
        ],
    )
    def test_file_of_another_checkpoint(self, source, tmp_path, file, edit, message):
        tensors = torch.load(source / file, weights_only=True)
        edit(tensors)
        torch.save(tensors, source / file)
        with pytest.raises(ValueError, match=message):
            convert_lavit_checkpoint(source, tmp_path / "output")
        assert not (tmp_path / "output" / "config.json").exists()

    @pytest.mark.parametrize("content", [{"a": 3}, {"a": Path("x")}], ids=["a number", "code"])
    @pytest.mark.parametrize("file", ["visual_tokenizer/tokenizer_encoder.bin", "language_model/visual_weight.bin"])
    def test_anything_but_tensors_is_refused(self, source, tmp_path, file, content):
        torch.save(content, source / file)
        with pytest.raises(ValueError, match=Path(file).name):
            convert_lavit_checkpoint(source, tmp_path / "output")
        assert not (tmp_path / "output").exists()

    def test_half_precision_leaves_the_codebook_as_it_is(self, folder, loaded):
        codes = loaded.model.visual_tokenizer.quantizer.embedding
        model = VWLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        alone = VWLMMVisualTokenizer.from_pretrained(folder / "visual_tokenizer", dtype=torch.bfloat16)
        cast = VWLMMVisualTokenizer.from_pretrained(folder / "visual_tokenizer").to(torch.bfloat16)
        for tokenizer in (model.model.visual_tokenizer, alone, cast, cast.half(), model.half().model.visual_tokenizer):
            assert tokenizer.task_layer[0].weight.dtype in (torch.bfloat16, torch.float16)
            assert tokenizer.quantizer.embedding.dtype == torch.float32
            assert torch.equal(tokenizer.quantizer.embedding, codes)
            assert tokenizer.quantizer.idle_steps.dtype == torch.long

    def test_half_precision_runs(self, folder, golden):
        model = VWLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
        batch = pad_left([ids_of(None, PROMPTS[0])]) | {"pixel_values": golden["pixel_values"][:1].bfloat16()}
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()
        tokens = model.model.visual_tokenizer.encode(batch["pixel_values"])
        assert tokens.quantized.dtype == torch.float32

    def test_folders_are_complete(self, folder, tmp_path, lavit, golden):
        """In a process without this package: model, processor, and the tokenizer by itself."""
        torch.save({"pixel_values": golden["pixel_values"]}, tmp_path / "images.pt")
        output = run_without_package(
            f"""
            import torch
            from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
            trust = {{"trust_remote_code": True}}
            images = torch.load("images.pt")["pixel_values"]
            processor = AutoProcessor.from_pretrained({str(folder)!r}, **trust)
            model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, **trust)
            text = "<image>" + {EXPECTED["prompts"][0]!r}
            from PIL import Image
            inputs = processor(images=[Image.new("RGB", (60, 50))], text=text, return_tensors="pt")
            inputs["pixel_values"] = images[:1]
            answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            print("answer", answer[0, inputs["input_ids"].shape[1]:].tolist())
            tokenizer = AutoModel.from_pretrained({str(folder / "visual_tokenizer")!r}, **trust)
            print("tokenizer", type(tokenizer).__name__)
            print("codes", tokenizer.encode(images).code_ids.tolist())
            model.save_pretrained("model"), tokenizer.save_pretrained("tokenizer")
            again = AutoModelForImageTextToText.from_pretrained("model", **trust)
            states = (model.state_dict(), again.state_dict())
            print("weights", all(torch.equal(*pair) for pair in zip(*(s.values() for s in states))))
            print("again", AutoModel.from_pretrained("tokenizer", **trust).encode(images).code_ids.tolist())
            """,
            tmp_path,
        )
        lines = dict(line.split(" ", 1) for line in output.splitlines())
        batch = pad_left([ids_of(None, PROMPTS[0])]) | {"pixel_values": golden["pixel_values"][:1]}
        answer = lavit.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert lines["answer"] == str(answer.tolist())
        assert lines["tokenizer"] == "VWLMMVisualTokenizer"
        codes = lavit.model.visual_tokenizer.encode(golden["pixel_values"]).code_ids.tolist()
        assert lines["codes"] == lines["again"] == str(codes)
        assert lines["weights"] == "True"

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What Transformers' users do with a model: every way to generate, every attention, offload, shards, quantization."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_conversation, make_image, tiny_text, tiny_vision
from peft import LoraConfig
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompileConfig, set_seed
from transformers.utils import is_flash_attn_2_available

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments


IMAGE = 480  # id of the placeholder, one past the vocabulary
NEW_TOKENS = 12
CHUNKS_IMAGES = hasattr(transformers.generation.utils, "_slice_mm_encoder_output")
ROWS = ("one image", "two images", "no image")


@pytest.fixture(params=[False, True], ids=["plain", "pseudo_image_features"])
def either_model(model, request):
    model.config.use_pseudo_image_features = request.param
    return model


@pytest.fixture
def prompts(processor) -> dict:
    """A batch of three prompts of unequal length: one image, two, and none; left-padded."""
    conversations = [
        make_conversation((1, "Who?", ""))[:1],
        make_conversation((2, "What is left?", ""))[:1],
        make_conversation((0, "How many people are walking?", ""))[:1],
    ]
    images = [[make_image(1)], [make_image(2), make_image(3)], []]
    text = [processor.apply_chat_template(c, add_generation_prompt=True) for c in conversations]
    return dict(processor(text=text, images=images, padding=True, return_tensors="pt"))


def row(prompts: dict, index: int) -> dict:
    """One prompt of the batch, by itself and without padding."""
    is_token = prompts["attention_mask"][index].bool()
    inputs = {name: prompts[name][index : index + 1, is_token] for name in ("input_ids", "attention_mask")}
    if index < 2:
        inputs["pixel_values"] = prompts["pixel_values"][[[0], [1, 2]][index]]
    return inputs


def flip_first_image(prompts: dict) -> dict:
    pixel_values = prompts["pixel_values"].clone()
    pixel_values[0] = pixel_values[0].flip(-1)
    return {**prompts, "pixel_values": pixel_values}


def generate(model, inputs, **kwargs) -> torch.Tensor:
    """The answers, `[B, NEW_TOKENS]`: no answer ends early, so that all of them can be compared whole."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


class TestScores:
    @staticmethod
    def scores(model, inputs, **kwargs):
        return model.generate(
            **inputs,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **{"max_new_tokens": 8, **kwargs},
        )

    def test_depend_on_the_image_of_the_row(self, either_model, prompts):
        scores = self.scores(either_model, prompts, max_new_tokens=1).scores[0]
        other = self.scores(either_model, flip_first_image(prompts), max_new_tokens=1).scores[0]
        assert (scores[0] - other[0]).abs().max() > 1e-3
        assert_close(scores[1:], other[1:])

    def test_first_are_those_of_forward(self, either_model, prompts):
        with torch.no_grad():
            logits = either_model(**prompts).logits[:, -1]
        assert_close(self.scores(either_model, prompts, max_new_tokens=1).scores[0], logits, atol=1e-5, rtol=1e-5)

    def test_do_not_depend_on_the_cache(self, either_model, prompts):
        cached, uncached = (self.scores(either_model, prompts, use_cache=use_cache) for use_cache in (True, False))
        assert torch.equal(cached.sequences, uncached.sequences)
        for a, b in zip(cached.scores, uncached.scores, strict=True):
            assert_close(a, b, atol=1e-4, rtol=1e-4)


class TestStrategies:
    def test_greedy_rows_of_a_mixed_batch_are_those_alone(self, either_model, prompts):
        together = generate(either_model, prompts)
        assert len(together.unique(dim=0)) == len(ROWS)
        for index, name in enumerate(ROWS):
            assert torch.equal(together[index], generate(either_model, row(prompts, index))[0]), name

    @pytest.mark.skipif(not CHUNKS_IMAGES, reason="this Transformers reads prompts with images at once")
    def test_prompt_read_in_chunks(self, either_model, prompts):
        answers = generate(either_model, prompts)
        for size in (7, 50):  # less than an image, and more
            assert torch.equal(generate(either_model, prompts, prefill_chunk_size=size), answers)

    def test_beams_of_a_mixed_batch_are_those_alone(self, either_model, prompts):
        def search(inputs):
            output = either_model.generate(
                **inputs,
                num_beams=3,
                num_return_sequences=2,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                return_dict_in_generate=True,
                output_scores=True,
            )
            return output.sequences[:, -NEW_TOKENS:].view(-1, 2, NEW_TOKENS), output.sequences_scores.view(-1, 2)

        beams, scores = search(prompts)
        assert (scores[:, None] - scores).abs().sum(-1).fill_diagonal_(1).min() > 1e-3  # no row is like another
        for index, name in enumerate(ROWS):
            beams_alone, scores_alone = search(row(prompts, index))
            assert torch.equal(beams[index], beams_alone[0]), name
            assert_close(scores[index], scores_alone[0], atol=1e-5, rtol=1e-5)

    def test_beam_search_depends_on_the_image_of_the_row(self, model, prompts):
        before, after = (generate(model, p, num_beams=3) for p in (prompts, flip_first_image(prompts)))
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[1:], after[1:])

    def test_sampling_depends_on_seed_and_image(self, model, prompts):
        def sample(seed, inputs):
            set_seed(seed)
            return generate(model, inputs, do_sample=True, num_return_sequences=2).view(3, 2, NEW_TOKENS)

        first = sample(0, prompts)
        assert torch.equal(sample(0, prompts), first)
        assert not (sample(1, prompts) == first).all(-1).any()
        assert not (first[:, 0] == first[:, 1]).all(-1).any()
        # The same draws from another distribution, in the row that has another image.
        other = sample(0, flip_first_image(prompts))
        assert not torch.equal(other[0], first[0])
        assert torch.equal(other[1:], first[1:])


class TestAssistedDecoding:
    """It needs a batch of one, and gives what greedy decoding gives, in fewer calls of the model."""

    @staticmethod
    def generate_and_count(model, inputs, **kwargs):
        calls = []
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        answer = generate(model, inputs, **kwargs)
        hook.remove()
        return answer, len(calls)

    def check(self, model, prompts, **kwargs):
        num_calls = 0
        for index, name in enumerate(ROWS):
            inputs = row(prompts, index)
            answer, calls = self.generate_and_count(model, inputs, **kwargs)
            assert torch.equal(answer, generate(model, inputs)), name
            num_calls += calls
        assert num_calls < len(ROWS) * NEW_TOKENS

    def test_prompt_lookup(self, either_model, prompts):
        self.check(either_model, prompts, prompt_lookup_num_tokens=3)

    def test_proposals_from_the_prompt_hold_no_placeholder(self, model, prompts):
        # The last token has stood before the image, so that the image is what followed it.
        input_ids = torch.tensor([[1, 7, *[IMAGE] * 16, 8, 7]])
        inputs = {"input_ids": input_ids, "pixel_values": prompts["pixel_values"][:1]}
        answer = generate(model, inputs, prompt_lookup_num_tokens=3, min_new_tokens=None)
        assert torch.equal(answer, generate(model, inputs, min_new_tokens=None))

    def test_proposals_of_a_decoder_hold_no_placeholder(self, model, prompts):
        # Inside the vocabulary the placeholder is a token that a text-only decoder may well propose.
        model.config.image_token_id = 7
        inputs = {"input_ids": torch.tensor([[1, *[7] * 16, 8, 9]]), "pixel_values": prompts["pixel_values"][:1]}
        assistant = AutoModelForCausalLM.from_config(model.config.text_config).eval()
        assistant.lm_head.register_forward_hook(
            lambda module, args, logits: logits.index_fill(-1, torch.tensor(7), 1e4)
        )
        answer = generate(model, inputs, assistant_model=assistant, min_new_tokens=None)
        assert torch.equal(answer, generate(model, inputs, min_new_tokens=None))

    @pytest.mark.parametrize("kind", ["decoder", "vwlmm"])
    def test_smaller_model_that_sees_no_image(self, model, prompts, kind):
        config = copy.deepcopy(model.config)
        config.text_config.num_hidden_layers -= 1
        if kind == "vwlmm":
            assistant = VWLMMForConditionalGeneration(config)
            assistant.load_state_dict(model.state_dict(), strict=False)
        else:
            assistant = AutoModelForCausalLM.from_config(config.text_config)
            assistant.model.load_state_dict(model.model.language_model.state_dict(), strict=False)
            assistant.lm_head.load_state_dict(model.lm_head.state_dict())
        self.check(model, prompts, assistant_model=assistant.eval())


class TestCompile:
    def test_static_cache(self, either_model, prompts):
        assert torch.equal(
            generate(either_model, prompts, cache_implementation="static"), generate(either_model, prompts)
        )

    def test_decoding_step_is_one_graph(self, either_model, prompts):
        expected = generate(either_model, prompts)
        # On a CPU, `generate` compiles only when told. Inductor would build the C++ of this one graph for half a
        # minute.
        compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
        compile_config._compile_all_devices = True
        torch._dynamo.reset()
        counters.clear()
        answers = generate(either_model, prompts, cache_implementation="static", compile_config=compile_config)
        assert counters["stats"]["unique_graphs"] == 1
        assert torch.equal(answers, expected)

    def test_text_and_images_are_one_graph(self, model, prompts):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            expected = model(**prompts).logits  # the first call puts hooks on the tower, which cannot be compiled
            assert_close(compiled(**prompts).logits, expected)


class TestAttention:
    @staticmethod
    def check(model, prompts, expected_logits, expected_answers):
        is_token = prompts["attention_mask"].bool()
        with torch.no_grad():
            assert_close(model(**prompts).logits[is_token], expected_logits[is_token], atol=1e-4, rtol=1e-4)
        assert torch.equal(generate(model, prompts), expected_answers)

    @pytest.fixture
    def expected(self, model, prompts):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            return model(**prompts).logits, generate(model, prompts)

    @pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
    def test_agrees_with_eager(self, vicuna, prompts, expected, implementation):
        model = VWLMMForConditionalGeneration.from_pretrained(
            vicuna, dtype=torch.float32, attn_implementation=implementation
        )
        parts = (model.config, model.config.text_config, model.config.vision_config)
        assert [part._attn_implementation for part in parts] == [implementation] * 3
        # Compiling flex attention takes half a minute on a CPU. Uncompiled it reads the same masks.
        with torch.compiler.set_stance("force_eager"):
            self.check(model, prompts, *expected)

    @pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs a GPU and flash-attn")
    def test_flash_attention_agrees_with_eager(self, vicuna, prompts):
        eager, flash = (
            VWLMMForConditionalGeneration.from_pretrained(
                vicuna, dtype=torch.bfloat16, attn_implementation=implementation, device_map="cuda"
            )
            for implementation in ("eager", "flash_attention_2")
        )
        inputs = {name: value.to("cuda") for name, value in prompts.items()}
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        is_token = inputs["attention_mask"].bool()
        with torch.no_grad():
            logits = [model(**inputs).logits[is_token].float() for model in (eager, flash)]
        assert F.cosine_similarity(*logits, dim=-1).min() > 0.99


class TestDeviceMap:
    def load(self, vicuna, folder, **kwargs):
        return VWLMMForConditionalGeneration.from_pretrained(
            vicuna, dtype=torch.float32, offload_folder=folder, **kwargs
        )

    # Bytes of memory for 750 kB of weights: for the embeddings of the tower, for the tower and the adapter.
    @pytest.mark.parametrize("memory", [150_000, 300_000])
    def test_offloaded_to_disk(self, either_model, vicuna, prompts, tmp_path, memory):
        offloaded = self.load(vicuna, tmp_path, device_map="auto", max_memory={"cpu": memory})
        offloaded.config.use_pseudo_image_features = either_model.config.use_pseudo_image_features
        assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
        assert offloaded.model.vm_head.weight.is_meta
        with torch.no_grad():
            for name in ("logits", "image_hidden_states"):
                assert torch.equal(offloaded(**prompts)[name], either_model(**prompts)[name])
        assert torch.equal(generate(offloaded, prompts), generate(either_model, prompts))
        words, expected = (m.get_visual_words(prompts["pixel_values"], top_k=2) for m in (offloaded, either_model))
        assert torch.equal(words.token_ids, expected.token_ids)
        nearest = [m.get_nearest_tokens(prompts["pixel_values"]) for m in (offloaded, either_model)]
        assert torch.equal(*nearest)

    def test_visual_loss_needs_the_heads(self, model, vicuna, prompts, tmp_path):
        inputs = {**prompts, "labels": prompts["input_ids"], "visual_objective": "visual_words"}
        offloaded = self.load(vicuna, tmp_path, device_map="auto", max_memory={"cpu": 300_000})
        with pytest.raises(ValueError, match="`lm_head` and `model.vm_head`"):
            offloaded(**inputs)
        device_map = dict.fromkeys(("lm_head", "model.vm_head", "model.vision_tower"), "cpu")
        device_map |= dict.fromkeys(("model.multi_modal_projector", "model.language_model"), "disk")
        offloaded = self.load(vicuna, tmp_path, device_map=device_map)
        assert_close(offloaded(**inputs).loss, model(**inputs).loss)

    def test_one_device(self, model, vicuna, prompts):
        mapped = VWLMMForConditionalGeneration.from_pretrained(vicuna, dtype=torch.float32, device_map={"": "cpu"})
        with torch.no_grad():
            assert torch.equal(mapped(**prompts).logits, model(**prompts).logits)


class TestShards:
    def test_hold_the_same_bits(self, model, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
        assert not (tmp_path / "model.safetensors").exists()
        again, info = VWLMMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        saved, loaded = model.state_dict(), again.state_dict()
        assert saved.keys() == loaded.keys()
        for name, value in saved.items():
            assert torch.equal(value, loaded[name]), name


QUANTIZATION = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}


class TestQuantization:
    """bitsandbytes runs on a CPU as well. There 4-bit weights need sizes that are multiples of its blocks of 64."""

    @pytest.fixture
    def folder(self, tmp_path) -> str:
        pytest.importorskip("bitsandbytes")
        set_seed(0)
        size = {"hidden_size": 64, "intermediate_size": 128}
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            tiny_vision("clip", **size),
            tiny_text("llama", **size, num_key_value_heads=4, vocab_size=480, attention_bias=True),
        )
        model.save_pretrained(tmp_path / "full")
        return str(tmp_path / "full")

    @pytest.fixture(params=QUANTIZATION)
    def quantized(self, request, folder):
        return VWLMMForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**QUANTIZATION[request.param])
        )

    def test_both_heads_stay_as_they_are(self, quantized, folder):
        full = VWLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(quantized.lm_head.weight, full.lm_head.weight)
        assert torch.equal(quantized.model.vm_head.weight, full.model.vm_head.weight)
        linear = {name for name, module in full.named_modules() if isinstance(module, nn.Linear)}
        converted = {name for name in linear if type(quantized.get_submodule(name)).__module__.startswith("bitsandb")}
        adapter = {f"model.multi_modal_projector.linear_{number}" for number in (1, 2)}
        assert linear - converted == {"lm_head", "model.vm_head", *adapter}
        assert {name for name, p in quantized.named_parameters() if p.requires_grad} == {
            name for name, _ in full.named_parameters() if name.startswith(("lm_head", "model.vm_head", *adapter))
        }

    @pytest.mark.parametrize("as_dict", [False, True])
    def test_what_its_user_leaves_out_is_left_out_beside_them(self, folder, prompts, as_dict):
        options = {"load_in_4bit": True, "llm_int8_skip_modules": ["model.vision_tower"]}
        config = options if as_dict else BitsAndBytesConfig(**options)
        model = VWLMMForConditionalGeneration.from_pretrained(folder, quantization_config=config)
        kept = {name for name, module in model.named_modules() if type(module) is nn.Linear}
        assert {name.split(".")[-2] if "." in name else name for name in kept if "vision_tower" not in name} == {
            "multi_modal_projector",
            "lm_head",
        }
        assert any("vision_tower" in name for name in kept)
        assert options["llm_int8_skip_modules"] == ["model.vision_tower"]  # the user's own stays
        assert math.isfinite(model(**prompts, visual_objective="visual_words").loss.item())

    def test_runs_with_gradients_on(self, quantized, prompts):
        """bitsandbytes adds a bias in place, which fails on one with a gradient: not in the first call."""
        for _ in range(2):
            quantized.eval()(**prompts)
            quantized.get_image_features(prompts["pixel_values"])

    @pytest.mark.parametrize("use_pseudo_image_features", [False, True], ids=["plain", "pseudo_image_features"])
    def test_answers_are_close(self, quantized, folder, prompts, use_pseudo_image_features):
        full = VWLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        is_token = prompts["attention_mask"].bool()
        logits = []
        for model in (quantized, full):
            model.config.use_pseudo_image_features = use_pseudo_image_features
            with torch.no_grad():
                logits.append(model(**prompts).logits[is_token])
        similarity = F.cosine_similarity(*logits, dim=-1)
        assert 0.9 < similarity.min() < 0.999999
        first_tokens = generate(quantized, prompts, max_new_tokens=1, min_new_tokens=1)[:, 0]
        with torch.no_grad():
            assert torch.equal(first_tokens, quantized(**prompts, logits_to_keep=1).logits[:, 0].argmax(-1))

    def test_saved_and_loaded(self, quantized, prompts, tmp_path):
        # Before it runs: bitsandbytes packs 4-bit weights anew for a CPU, and would save them packed.
        quantized.save_pretrained(tmp_path / "quantized")
        with torch.no_grad():
            expected = quantized(**prompts).logits
            again = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "quantized")
            assert torch.equal(again.model.vm_head.weight, quantized.model.vm_head.weight)
            assert_close(again(**prompts).logits, expected, atol=1e-5, rtol=1e-5)

    def test_stage_3_teaches_the_vm_head(self, quantized, prompts):
        quantized(**prompts, visual_objective="vm_head").loss.backward()
        assert quantized.model.vm_head.weight.grad.abs().max() > 0

    def test_stage_4_trains_lora_on_the_quantized_decoder(self, quantized, processor, dataset, tmp_path):
        args = VWLMMTrainingArguments(
            str(tmp_path),
            stage=4,
            max_steps=2,
            per_device_train_batch_size=4,
            global_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        lora = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)")
        trainer = VWLMMTrainer(quantized, args, dataset, copy.deepcopy(processor), peft_config=lora)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name in before if "lora_" in name}
        assert trainer.state.log_history[0]["visual_loss"] > 0

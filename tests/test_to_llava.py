# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""A VW-LMM becomes Transformers' own LLaVA, which does the same where nothing of this package is known."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, make_conversation, make_image, tiny_text, tiny_vision
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_from_llava import IMAGE, forward, make_llava
from test_hub import run_without_package
from torch import nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from modeling_vwlmm import VWLMMForConditionalGeneration, conversion, convert_official_checkpoint
from modeling_vwlmm.adapters_vwlmm import ADAPTERS
from modeling_vwlmm.objectives_vwlmm import parse_objectives
from modeling_vwlmm.training.training_modules import attach_training_modules
from processing_vwlmm import VWLMMProcessor


def make_model(vision: str, text: str) -> VWLMMForConditionalGeneration:
    torch.manual_seed(0)
    # The placeholder of all tests here, one past the vocabulary.
    return VWLMMForConditionalGeneration.from_vision_text_pretrained(
        tiny_vision(vision), tiny_text(text, vocab_size=IMAGE)
    )


class TestModel:
    @pytest.mark.parametrize(
        ("vision", "text"),
        [("clip", "llama"), ("siglip", "llama_tied"), ("dinov2", "mistral"), ("clip", "gemma3"), ("clip", "qwen3")],
    )
    def test_same_logits_there_saved_and_back(self, tmp_path, vision, text):
        model = make_model(vision, text)
        expected = forward(model)
        llava = model.to_llava()
        assert type(llava) is LlavaForConditionalGeneration
        assert torch.equal(forward(llava)[..., :IMAGE], expected)
        llava.save_pretrained(tmp_path)
        again, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loading.values())
        assert torch.equal(forward(again), forward(llava))
        back = VWLMMForConditionalGeneration.from_llava(str(tmp_path))
        assert torch.equal(forward(back), forward(llava))
        assert str(tmp_path) not in (tmp_path / "config.json").read_text()

    @pytest.mark.parametrize("decoder", ["llama", "tied"])
    def test_a_llava_comes_back_as_it_was(self, tmp_path, processor, decoder):
        folder = make_llava(tmp_path / "llava", processor, decoder)
        llava = LlavaForConditionalGeneration.from_pretrained(folder)
        back = VWLMMForConditionalGeneration.from_llava(folder).to_llava()
        assert torch.equal(forward(back), forward(llava))
        assert back.state_dict().keys() == llava.state_dict().keys()
        assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in llava.state_dict().items())
        assert back.generation_config.suppress_tokens is None
        differing = {"_name_or_path", "transformers_version", "architectures"}
        before, after = llava.config.to_dict(), back.config.to_dict()
        assert {name for name in before if before[name] != after.get(name)} <= differing

    def test_model_stays_as_it_is(self, model, processor):
        tensors, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
        generation_config = model.generation_config.to_dict()
        llava = model.to_llava()
        assert (llava.config.text_config.vocab_size, model.config.text_config.vocab_size) == (481, 480)
        assert llava.model.language_model.config.vocab_size == llava.get_input_embeddings().num_embeddings == 481
        llava.to(torch.float64)
        llava.set_attn_implementation("eager")
        assert model.config.to_dict() == config
        assert model.config.text_config._attn_implementation == "sdpa"
        assert model.generation_config.to_dict() == generation_config
        assert model.state_dict().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
        assert model.dtype == torch.float32

    def test_holds_no_tensor_twice(self, model):
        """Seven billion parameters are not copied."""
        there = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        new = {name for name, tensor in model.to_llava().state_dict().items() if tensor.data_ptr() != there[name]}
        assert new == {"model.language_model.embed_tokens.weight", "lm_head.weight"}

    def test_settings_and_types_stay(self, vicuna):
        model = VWLMMForConditionalGeneration.from_pretrained(
            vicuna, dtype=torch.bfloat16, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
        )
        model.model.vm_head.float()
        model.model.vision_tower.float()
        model.generation_config.suppress_tokens = [7]
        llava = model.to_llava()
        assert not llava.training
        assert {parameter.dtype for parameter in llava.model.language_model.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in llava.model.vision_tower.parameters()} == {torch.float32}
        assert llava.model.language_model.config._attn_implementation == "eager"
        assert llava.config.vision_config._attn_implementation == "sdpa"
        assert llava.generation_config.suppress_tokens == [7, 480]
        assert llava.generation_config.eos_token_id == model.generation_config.eos_token_id

    def test_what_objectives_train_stays_behind(self, model):
        expected = model.to_llava().state_dict().keys()
        attach_training_modules(model, parse_objectives({"features": 1.0})[0])
        assert model.to_llava().state_dict().keys() == expected


class TestPlaceholder:
    def test_never_the_most_probable(self, model, processor):
        """Not even where all other logits are below zero, as which a row of zeros would count."""
        inputs = processor(text="<image>What?", images=make_image(1), return_tensors="pt")
        with torch.no_grad():
            hidden = model.model(**inputs).last_hidden_state[0, -1]
            model.lm_head.weight.copy_(0.01 * torch.randn(480, 48) - hidden)
            logits = model.to_llava()(**inputs).logits[0, -1]
        assert logits[:480].max() < 0
        assert torch.allclose(logits[480], logits[:480].mean(), atol=1e-3)
        assert logits.argmax() != 480
        assert logits.softmax(-1)[480] <= 1 / 481 + 1e-6

    def test_never_generated(self, model, processor):
        """All logits alike: each token is drawn equally often."""
        torch.nn.init.zeros_(model.lm_head.weight)
        inputs = processor(text=["<image>What?"] * 64, images=[make_image(1)] * 64, return_tensors="pt")
        torch.manual_seed(0)
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 40, "min_new_tokens": 40}
        output = model.to_llava().generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        assert output.numel() == 2560 and not (output == 480).any()

    def test_told_from_every_token(self, model, processor):
        """LLaVA finds placeholders in `inputs_embeds` by their embedding."""
        inputs = processor(text="<image>What <unk>?", images=make_image(1), return_tensors="pt")
        llava = model.to_llava()
        with torch.no_grad():
            expected = llava(**inputs).logits
            inputs["inputs_embeds"] = llava.get_input_embeddings()(inputs.pop("input_ids"))
            assert torch.equal(llava(**inputs).logits, expected)

    def test_several_ids_past_the_vocabulary(self):
        torch.manual_seed(0)
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            tiny_vision("clip"), tiny_text("llama", vocab_size=470), image_token_index=IMAGE
        )
        llava = model.to_llava()
        assert torch.equal(forward(llava)[..., :470], forward(model))
        assert llava.generation_config.suppress_tokens == [*range(470, IMAGE + 1)]


class GatedAdapter(nn.Linear):
    def __init__(self, config):
        super().__init__(config.vision_config.hidden_size, config.text_config.hidden_size)


class TestRefusals:
    def test_pseudo_image_features(self, pif):
        model = VWLMMForConditionalGeneration.from_pretrained(pif)
        with pytest.raises(ValueError, match=r"use_pseudo_image_features = False"):
            model.to_llava()
        model.config.use_pseudo_image_features = False
        assert model.to_llava()

    def test_temperatures_are_left_behind(self, model):
        """They are of targets and of pseudo image features, which LLaVA has not."""
        expected = forward(model)
        model.config.visual_word_temperature = model.config.pseudo_image_feature_temperature = 0.25
        llava = model.to_llava()
        assert torch.equal(forward(llava)[..., :IMAGE], expected)
        assert not [name for name in llava.config.to_dict() if "temperature" in name]

    def test_another_adapter(self, monkeypatch):
        monkeypatch.setitem(ADAPTERS, "gated", GatedAdapter)
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            tiny_vision("clip"), tiny_text("llama"), adapter="gated"
        )
        with pytest.raises(ValueError, match=r"`adapter` is 'gated'.*'mlp' alone"):
            model.to_llava()

    @pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {}], ids=["module", "LoRA"])
    def test_adapters_of_peft(self, model, settings):
        expected = forward(model)
        peft_model = get_peft_model(model, LoraConfig(target_modules=r".*language_model\..*q_proj", **settings))
        with pytest.raises(ValueError, match="tensors that LLaVA has no place for.*merge_and_unload"):
            peft_model.to_llava()
        merged = peft_model.merge_and_unload()
        assert torch.allclose(forward(merged.to_llava())[..., :480], expected, atol=1e-5)

    def test_quantised(self, tmp_path):
        pytest.importorskip("bitsandbytes")
        text = tiny_text("llama", hidden_size=64, intermediate_size=64)
        VWLMMForConditionalGeneration.from_vision_text_pretrained(tiny_vision("clip"), text).save_pretrained(tmp_path)
        model = VWLMMForConditionalGeneration.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )
        with pytest.raises(ValueError, match="is quantised. Load it without `quantization_config`"):
            model.to_llava()

    def test_weights_that_are_elsewhere(self, vicuna, tmp_path):
        parts = ("model.vision_tower", "model.multi_modal_projector", "model.vm_head", "lm_head")
        device_map = {**dict.fromkeys(parts, "cpu"), "model.language_model": "disk"}
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna, device_map=device_map, offload_folder=tmp_path)
        with pytest.raises(ValueError, match=r"not whole in this process, model\.language_model\..*offloaded"):
            model.to_llava()


SETTINGS = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def ask(*num_images: int) -> list[dict]:
    """A conversation that ends with a question, images inside."""
    messages = make_conversation(*((n, f"What is <image> of {n}?", "A circle.") for n in num_images))[:-1]
    for message in messages:
        for part in message["content"]:
            if part["type"] == "image":
                part["image"] = make_image(len(message["content"]))
    return messages


def save_metaspace(folder: Path) -> str:
    """A tokenizer that puts a `▁` at the start of a text, and none behind BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127))])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["vicuna_v1", "mistral", "Metaspace"])
def pair(request, vicuna, tmp_path_factory) -> tuple[VWLMMProcessor, LlavaProcessor]:
    """A processor and its LLaVA's, saved and loaded again."""
    folder = tmp_path_factory.mktemp("processors")
    ours = VWLMMProcessor.from_pretrained(vicuna)
    if request.param == "Metaspace":
        tokenizer = AutoTokenizer.from_pretrained(save_metaspace(folder / "tokenizer"))
        tiny_vision("clip").save_pretrained(folder / "tower")
        ours.image_processor.save_pretrained(folder / "tower")
        ours = VWLMMProcessor.from_vision_text_pretrained(str(folder / "tower"), tokenizer)
    else:
        ours.chat_template = ours.get_chat_template(request.param)
    ours(text=["a", "<image>a b"], images=[make_image(1)], padding=True, truncation=True, max_length=40)
    ours.to_llava().save_pretrained(folder)
    return ours, LlavaProcessor.from_pretrained(folder)


class TestProcessor:
    @pytest.mark.parametrize("messages", [ask(0), ask(1), ask(2, 0, 1)], ids=["text", "image", "images"])
    def test_same_inputs_for_conversations(self, pair, messages):
        ours, llava = pair
        expected = ours.apply_chat_template(messages, **SETTINGS)
        found = llava.apply_chat_template(messages, **SETTINGS)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name

    def test_same_inputs_for_texts(self, pair):
        ours, llava = pair
        call = {"text": ["<image> a", "b"], "images": [make_image(1)], "padding": True, "return_tensors": "pt"}
        expected, found = ours(**call), llava(**call)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def test_a_prompt_that_its_template_wrote_gets_one_bos(self, pair, request):
        """In two steps, as LLaVA's users do it: there the tokenizer adds BOS."""
        ours, llava = pair
        prompt = llava.apply_chat_template(ask(0), add_generation_prompt=True)
        keeps_bos = "Metaspace" in request.node.name  # ids would differ
        assert prompt.startswith("<s>") == keeps_bos
        ids = llava(text=prompt, **({"add_special_tokens": False} if keeps_bos else {}))["input_ids"]
        assert ids[0] == ours.apply_chat_template(ask(0), **SETTINGS)["input_ids"][0].tolist()

    def test_nothing_of_ours_is_left(self, pair, tmp_path):
        ours, llava = pair
        made = ours.to_llava()
        assert made.tokenizer is not ours.tokenizer and made.image_processor is not ours.image_processor
        for part in (made, made.tokenizer, made.image_processor):
            assert type(part).__module__.startswith("transformers.")
        llava.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.py"))
        for file in tmp_path.glob("*config.json"):
            assert not {"auto_map", "vwlmm"} & set(json.loads(file.read_text())), file
            assert "vwlmm" not in file.read_text().lower()
        # llama.cpp does not start with a template that it cannot read.
        assert "\\u" not in (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
        tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
        assert tokenizer["padding"] is tokenizer["truncation"] is None

    def test_back(self, vicuna, model, processor, tmp_path):
        model.to_llava().save_pretrained(tmp_path)
        processor.to_llava().save_pretrained(tmp_path)
        again = VWLMMProcessor.from_llava(tmp_path)
        expected = processor.apply_chat_template(ask(2, 0), **SETTINGS)
        found = again.apply_chat_template(ask(2, 0), **SETTINGS)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert VWLMMProcessor.from_llava(tmp_path, "vicuna_v1").chat_template == processor.chat_template


class TestCommandLine:
    def run(self, monkeypatch, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["conversion", *map(str, arguments)])
        conversion.main()

    def test_plain_transformers_answers_alike(self, monkeypatch, vicuna, model, processor, tmp_path):
        output = tmp_path / "llava"
        output.mkdir()  # an empty folder is free
        self.run(monkeypatch, "--to-llava", vicuna, output)
        assert {path.name for path in output.iterdir()} == {
            *("config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
            *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        }
        assert [path.name for path in tmp_path.iterdir()] == ["llava"]
        make_image(3).save(tmp_path / "image.png")
        content = [{"type": "image", "image": "image.png"}, {"type": "text", "text": "Describe the <image>."}]
        printed = run_without_package(
            f"""
            from transformers import pipeline
            pipe = pipeline("image-text-to-text", model="llava")
            print(type(pipe.model).__module__, type(pipe.processor).__module__)
            messages = [{{"role": "user", "content": {content}}}]
            print(repr(pipe(text=messages, max_new_tokens=16, return_full_text=False)[0]["generated_text"]))
            """,
            tmp_path,
        ).splitlines()
        assert printed[0] == "transformers.models.llava.modeling_llava transformers.models.llava.processing_llava"
        content[0]["image"] = make_image(3)
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **SETTINGS)
        ids = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        assert printed[1] == repr(processor.decode(ids, skip_special_tokens=True))

    @pytest.mark.parametrize(
        ("vision", "text", "prefix"),
        [
            ("clip", "llama", "vision_tower.vision_model."),
            ("siglip", "llama_tied", "vision_tower.vision_model."),
            ("dinov2", "gemma", "vision_tower."),
        ],
    )
    def test_tensors_have_the_names_that_every_tool_knows(
        self, monkeypatch, processor, tmp_path, vision, text, prefix
    ):
        model = make_model(vision, text)
        model.save_pretrained(tmp_path / "source")
        processor.save_pretrained(tmp_path / "source")
        self.run(monkeypatch, "--to-llava", tmp_path / "source", tmp_path / "llava")
        prefixes = {"language_model.model.", "multi_modal_projector.", prefix}
        prefixes |= set() if model.config.tie_word_embeddings else {"language_model.lm_head."}
        names = set(load_file(tmp_path / "llava" / "model.safetensors"))
        assert all(any(name.startswith(start) for start in prefixes) for name in names), names
        assert all(any(name.startswith(start) for name in names) for start in prefixes), prefixes
        llava, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
        assert not any(loading.values())
        assert torch.equal(forward(llava)[..., :IMAGE], forward(model))

    def test_a_full_folder_stays(self, monkeypatch, vicuna, tmp_path):
        (tmp_path / "precious.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            self.run(monkeypatch, "--to-llava", vicuna, tmp_path)
        assert os.listdir(tmp_path) == ["precious.txt"]

    @pytest.mark.parametrize("problem", ["another architecture", "adapter", "pseudo image features"])
    def test_nothing_is_written(self, monkeypatch, processor, pif, tmp_path, problem):
        source, output = tmp_path / "source", tmp_path / "output"
        if problem == "another architecture":
            make_llava(source, processor)
            message = "has the model type 'llava'; expected 'vwlmm'"
        elif problem == "adapter":
            source.mkdir()
            (source / "adapter_config.json").write_text("{}")
            message = "merge_and_unload"
        else:
            source, message = pif, "pseudo image features"
        with pytest.raises(ValueError, match=message):
            self.run(monkeypatch, "--to-llava", source, output)
        assert not output.exists()

    def test_options_of_the_other_conversion(self, monkeypatch, vicuna, tmp_path, capsys):
        with pytest.raises(SystemExit):
            self.run(monkeypatch, "--to-llava", vicuna, tmp_path / "output", "--vision_tower", "x")
        assert "for checkpoints in the authors' format" in capsys.readouterr().err


def test_official_checkpoints_go_into_an_empty_folder_as_well(tmp_path):
    convert_official_checkpoint(GOLDEN / "vicuna", tmp_path)
    assert (tmp_path / "model.safetensors").is_file()

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Towers and decoders other than the paper's: all four stages, saving, generation, and how each is read."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_image, tiny_text, tiny_vision
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    set_seed,
)

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.training.stages import STAGES
from processing_vwlmm import VWLMMProcessor


N = 16  # image tokens of an image
PAIRS = [
    ("clip", "llama"),
    ("siglip", "llama"),
    ("dinov2", "llama"),
    ("clip", "mistral"),
    ("clip", "qwen3"),
    ("clip", "gemma"),
    ("clip", "gemma3"),
    ("clip", "llama_tied"),
    ("siglip", "qwen3"),
    ("dinov2", "gemma"),
]
# As they are published: CLIP's size and crop are the tower's, SigLIP does not crop, and DINOv2 comes with the image
# processor of a classifier, which makes smaller images than the tower was trained for.
IMAGE_PROCESSORS = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 28, "width": 28},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 16},
        "do_center_crop": True,
        "crop_size": {"height": 14, "width": 14},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}


def save_tower(kind: str, folder) -> str:
    tiny_vision(kind).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSORS[kind]))
    return str(folder)


def save_decoder(kind: str, folder) -> str:
    # Qwen's embedding has rows to spare, so that `<image>` gets an id inside the vocabulary.
    tiny_text(kind, vocab_size=512 if kind == "qwen3" else 480).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GOLDEN / "vicuna").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pair(request, tmp_path) -> tuple[VWLMMForConditionalGeneration, VWLMMProcessor]:
    """Model and processor, made from two folders as a user makes them."""
    set_seed(0)
    vision = save_tower(request.param[0], tmp_path / "vision")
    text = save_decoder(request.param[1], tmp_path / "text")
    processor = VWLMMProcessor.from_vision_text_pretrained(vision, text)
    model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
        vision, text, image_token_index=processor.image_token_id
    )
    return model, processor


def train(model, processor, stage, dataset, folder) -> set[str]:
    """Two optimiser steps of a stage. Returns the names of the parameters that changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = VWLMMTrainingArguments(
        str(folder),
        stage=stage,
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
        gradient_checkpointing=False,
    )
    trainer = VWLMMTrainer(model, args, dataset, processor)
    trainer.train()
    trainer.save_model()
    losses = {"language_loss", "visual_loss"} & trainer.state.log_history[0].keys()
    assert losses == {1: {"language_loss"}, 2: {"language_loss"}, 3: {"visual_loss"}}.get(
        stage, {"language_loss", "visual_loss"}
    )
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("pair", PAIRS, ids="-".join, indirect=True)
def test_four_stages_then_saved_and_loaded(pair, dataset, tmp_path):
    model, processor = pair
    samples = dataset.select([0, 2, 4, 5])  # one turn each, with one image or two
    for number, stage in STAGES.items():
        changed = train(model, processor, number, samples, tmp_path / "run")
        trained = tuple(f"{module}." for module in stage.trains)
        assert changed == {name for name, _ in model.named_parameters() if name.startswith(trained)}
    tied = model.config.text_config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied

    again, info = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.trained_stages == [1, 2, 3, 4]
    inputs = VWLMMProcessor.from_pretrained(tmp_path / "run")(
        text="USER: <image>\nWho? ASSISTANT:", images=make_image(1), return_tensors="pt"
    )
    assert (inputs["input_ids"] == processor.image_token_id).sum() == N == again.config.image_seq_length
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        assert torch.equal(again(**inputs).logits, logits)
        assert (again(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits - logits)[:, -1].abs().max() > 1e-4
    answers = [m.generate(**inputs, max_new_tokens=5, do_sample=False) for m in (model, again)]
    assert torch.equal(*answers)
    assert answers[0][0, inputs["input_ids"].shape[1]] == logits[0, -1].argmax()


class TestDinov2:
    @pytest.fixture
    def processor(self, tmp_path):
        return VWLMMProcessor.from_vision_text_pretrained(save_tower("dinov2", tmp_path), GOLDEN / "vicuna")

    def test_features_are_the_patches_alone(self):
        tower = tiny_vision("dinov2").eval()
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(tower, tiny_text("llama"))
        pixel_values = torch.randn(2, 3, 28, 28)
        with torch.no_grad():
            patches = tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
            expected = model.model.multi_modal_projector(patches)
            features = torch.stack(model.get_image_features(pixel_values).image_features)
        assert features.shape == (2, N, 32)
        assert_close(features, expected)

    def test_processor_counts_them(self, processor):
        assert (processor.patch_size, processor.num_additional_image_tokens) == (7, 1)
        assert processor.vision_feature_select_strategy == "default"

    def test_the_tower_sees_the_whole_image_at_its_own_size(self, processor):
        pixels = np.zeros((56, 56, 3), dtype=np.uint8)
        pixels[:, :4] = pixels[:, -4:] = 255  # two pixels of what the tower reads, on either side
        image = processor(text="<image>", images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        assert image.shape == (1, 3, 28, 28)
        assert image[0, 0, 14, 0] > 2 and image[0, 0, 14, -1] > 2
        assert image[0, 0, 14, 14] < -2
        # ImageNet's mean, which the tower was trained with, is the colour of the padding.
        wide = processor(text="<image>", images=Image.new("RGB", (40, 20)), return_tensors="pt")["pixel_values"]
        assert_close(wide[0, :, 0, 0], torch.zeros(3), atol=0.02, rtol=0)

    def test_register_tokens_are_refused(self):
        config = Dinov2WithRegistersConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7
        )
        with pytest.raises(ValueError, match="4 register tokens"):
            VWLMMForConditionalGeneration.from_vision_text_pretrained(
                Dinov2WithRegistersModel(config), tiny_text("llama")
            )


class TestScaledEmbeddings:
    """Gemma multiplies token embeddings by the root of the hidden size, and image features by nothing."""

    @pytest.fixture(params=["llama", "gemma", "gemma3"])
    def model(self, request):
        set_seed(0)
        return VWLMMForConditionalGeneration.from_vision_text_pretrained(
            tiny_vision("clip"), tiny_text(request.param), image_token_index=99
        )

    @pytest.fixture
    def inputs(self):
        input_ids = torch.tensor([[2, 5, *[99] * N, 6, 7]])
        return {"input_ids": input_ids, "pixel_values": torch.randn(1, 3, 28, 28)}

    @pytest.fixture(autouse=True)
    def no_grad(self):
        with torch.no_grad():
            yield

    def test_logits_are_those_of_llava(self, model, inputs):
        fields = {name: getattr(model.config, name) for name in ("vision_config", "text_config", "image_token_index")}
        llava = LlavaForConditionalGeneration(LlavaConfig(**fields, image_seq_length=N)).eval()
        weights = {name: value for name, value in model.state_dict().items() if "vm_head" not in name}
        llava.load_state_dict(weights)
        assert_close(model(**inputs).logits, llava(**inputs).logits)

    def test_a_visual_word_is_read_as_the_token_itself(self, model, inputs):
        """Where the VM head is certain of one token, pseudo image features are that token's embedding."""
        model.config.use_pseudo_image_features = True
        adapter, vm_head = model.model.multi_modal_projector, model.model.vm_head
        adapter.linear_2.weight.zero_()
        adapter.linear_2.bias.fill_(1.0)
        vm_head.weight.zero_()
        vm_head.weight[42] = 10.0
        text = inputs["input_ids"].masked_fill(inputs["input_ids"] == 99, 42)
        assert_close(model(**inputs).logits, model(input_ids=text).logits)

    def test_nearest_token_of_an_embedding_is_its_own(self, model, inputs):
        embedding = model.get_input_embeddings()(torch.tensor(42))
        adapter = model.model.multi_modal_projector
        adapter.linear_2.weight.zero_()
        adapter.linear_2.bias.copy_(embedding)
        assert (model.get_nearest_tokens(inputs["pixel_values"]) == 42).all()

    def test_placeholder_is_found_among_embeddings(self, model, inputs):
        logits = model(**inputs).logits
        inputs_embeds = model.get_input_embeddings()(inputs["input_ids"])
        assert_close(model(inputs_embeds=inputs_embeds, pixel_values=inputs["pixel_values"]).logits, logits)


def test_soft_capped_logits_are_refused():
    text = AutoModelForCausalLM.from_config(
        Gemma2Config(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8)
    )
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        VWLMMForConditionalGeneration.from_vision_text_pretrained(tiny_vision("clip"), text)

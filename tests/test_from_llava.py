# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Any LLaVA of Transformers becomes a VW-LMM that does the same, and starts at stage III."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_conversation, make_image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Qwen3Config,
    SiglipVisionConfig,
)

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from processing_vwlmm import VWLMMProcessor


IMAGE = 480  # inside the vocabulary, as published LLaVAs have it
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {**SIZE, "image_size": 28, "patch_size": 7}
TEXT = {**SIZE, "vocab_size": 512, "num_key_value_heads": 2, "head_dim": 8}
DECODERS = {
    "llama": LlamaConfig(**TEXT),
    "mistral": MistralConfig(**TEXT, sliding_window=None),
    "qwen3": Qwen3Config(**TEXT),
    "gemma": GemmaConfig(**TEXT),
    "tied": LlamaConfig(**TEXT, tie_word_embeddings=True),
}
TENSOR = "model.language_model.layers.1.mlp.up_proj.weight"
# Names of Transformers 5, and what they were in checkpoints published before.
LAYOUTS = {
    "now": {},
    "since 4.52": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "before 4.52": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
}


def make_llava(folder: Path, processor: VWLMMProcessor, decoder: str = "llama", tower=CLIPVisionConfig) -> str:
    """A tiny LLaVA with random weights in a folder, model and processor."""
    torch.manual_seed(0)
    is_siglip = tower is SiglipVisionConfig
    text = DECODERS[decoder]
    config = LlavaConfig(
        vision_config=tower(**TOWER),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_select_strategy="full" if is_siglip else "default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    llava = LlavaForConditionalGeneration(config)
    llava.save_pretrained(folder)
    # Transformers still saves the oldest names.
    weights = {name: tensor.clone() for name, tensor in llava.state_dict().items()}
    if text.tie_word_embeddings:
        del weights["lm_head.weight"]
    rewrite_weights(folder, lambda _: weights)
    tokenizer = processor.tokenizer
    LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=7,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if is_siglip else 1,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)
    return str(folder)


def rewrite_weights(folder: str, change) -> None:
    file = Path(folder) / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def forward(model):
    input_ids = torch.tensor([[1, *[IMAGE] * 16, 5, 6, 7]])
    pixel_values = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        return model(input_ids=input_ids, pixel_values=pixel_values).logits


class TestModel:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("decoder", DECODERS)
    def test_same_logits_from_every_layout_and_decoder(self, tmp_path, processor, decoder, layout):
        folder = make_llava(tmp_path / "llava", processor, decoder)
        expected = forward(LlavaForConditionalGeneration.from_pretrained(folder).eval())

        def rename(weights):
            def name_of(name):
                for now, then in LAYOUTS[layout].items():
                    if name.startswith(now):
                        return then + name.removeprefix(now).removeprefix("vision_model.")
                return name

            return {name_of(name): tensor for name, tensor in weights.items()}

        rewrite_weights(folder, rename)
        model = VWLMMForConditionalGeneration.from_llava(folder)
        assert torch.equal(forward(model), expected)
        assert model.config.trained_stages == [1, 2]
        assert model.model.vm_head.weight.shape == (512, 32)
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

    def test_siglip(self, tmp_path, processor):
        folder = make_llava(tmp_path / "llava", processor, tower=SiglipVisionConfig)
        expected = forward(LlavaForConditionalGeneration.from_pretrained(folder).eval())
        assert torch.equal(forward(VWLMMForConditionalGeneration.from_llava(folder)), expected)

    @pytest.mark.parametrize("decoder", ["llama", "tied"])
    def test_saved_and_loaded_again(self, tmp_path, processor, decoder):
        model = VWLMMForConditionalGeneration.from_llava(make_llava(tmp_path / "llava", processor, decoder))
        model.save_pretrained(tmp_path / "saved")
        again = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "saved")
        assert torch.equal(forward(again), forward(model))
        assert torch.equal(again.model.vm_head.weight, model.model.vm_head.weight)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda name, w: {}, rf"config\.json announces 1 tensors that the weights beside it lack, {TENSOR}"),
            (
                lambda name, w: {name: w, "x." + name: w.clone()},
                rf"model\.safetensors has tensors.* 1 in all, x\.{TENSOR}",
            ),
            (
                lambda name, w: {
                    "language_model.model." + name.removeprefix("model.language_model."): w[:, 1:].clone()
                },
                rf"model\.safetensors has {TENSOR} of shape \(48, 31\), config\.json announces \(48, 32\)",
            ),
        ],
        ids=["missing", "unknown layout", "shape"],
    )
    def test_tensors_are_verified(self, tmp_path, processor, change, message):
        folder = make_llava(tmp_path / "llava", processor)
        rewrite_weights(folder, lambda weights: change(TENSOR, weights.pop(TENSOR)) | weights)
        with pytest.raises(ValueError, match=message):
            VWLMMForConditionalGeneration.from_llava(folder)

    def test_config_that_lies(self, tmp_path, processor):
        folder = make_llava(tmp_path / "llava", processor)
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text())
        config["text_config"]["intermediate_size"] = 50
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"model\.safetensors has model\..*mlp.* of shape .*announces"):
            VWLMMForConditionalGeneration.from_llava(folder)

    @pytest.mark.parametrize("problem", ["missing", "damaged"])
    def test_shards_are_verified(self, tmp_path, processor, problem):
        folder = Path(make_llava(tmp_path / "llava", processor))
        LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
        (folder / "model.safetensors").unlink()
        shard = sorted(folder.glob("*.safetensors"))[1]
        content = shard.read_bytes()
        shard.unlink()
        if problem == "damaged":
            shard.write_bytes(content[: len(content) // 2])
        with pytest.raises((ValueError, OSError), match=shard.name):
            VWLMMForConditionalGeneration.from_llava(folder)

    def test_bin_with_more_than_tensors(self, tmp_path, processor):
        folder = Path(make_llava(tmp_path / "llava", processor))
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save({**weights, "x": Path("x")}, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin holds more than tensors"):
            VWLMMForConditionalGeneration.from_llava(folder)

    def test_takes_what_from_pretrained_takes(self, tmp_path, processor):
        expected = forward(VWLMMForConditionalGeneration.from_llava(make_llava(tmp_path / "llava", processor)))
        model = VWLMMForConditionalGeneration.from_llava(
            str(tmp_path), subfolder="llava", dtype=torch.float64, ignore_mismatched_sizes=False
        )
        assert torch.allclose(forward(model), expected.double(), atol=1e-5)

    def test_another_architecture(self, tmp_path, processor):
        folder = make_llava(tmp_path / "llava", processor)
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llava_next"}))
        with pytest.raises(ValueError, match="has the model type 'llava_next'; expected 'llava'"):
            VWLMMForConditionalGeneration.from_llava(folder)


def test_stages_3_and_4_follow(tmp_path, processor, dataset):
    folder = make_llava(tmp_path / "llava", processor)
    model = VWLMMForConditionalGeneration.from_llava(folder)
    for stage in (3, 4):
        args = VWLMMTrainingArguments(
            str(tmp_path / "run"),
            stage=stage,
            per_device_train_batch_size=4,
            global_batch_size=8,
            report_to="none",
            use_cpu=True,
            chat_template="vicuna_v1",
        )
        trainer = VWLMMTrainer(model, args, dataset, VWLMMProcessor.from_llava(folder))
        trainer.train()
        assert trainer.state.log_history[0]["visual_loss"] > 0
    assert model.config.trained_stages == [1, 2, 3, 4]


class TestProcessor:
    def test_same_inputs_as_llava(self, tmp_path, processor):
        folder = make_llava(tmp_path / "llava", processor)
        ours, llava = VWLMMProcessor.from_llava(folder), LlavaProcessor.from_pretrained(folder)
        call = {"text": ["USER: <image>\nWhat? ASSISTANT:"], "images": [make_image(0)], "return_tensors": "pt"}
        for name, expected in llava(**call).items():
            assert torch.equal(ours(**call)[name], expected), name

    def test_what_early_checkpoints_leave_to_the_config(self, tmp_path, processor):
        folder = make_llava(tmp_path / "llava", processor)
        file = Path(folder) / "processor_config.json"
        settings = json.loads(file.read_text())
        for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
            del settings[name]
        file.write_text(json.dumps(settings))
        ids = VWLMMProcessor.from_llava(folder)(text=["<image>"], images=[make_image(0)])["input_ids"][0]
        assert ids.count(processor.image_token_id) == 16

    def test_template(self, tmp_path, processor):
        folder = make_llava(tmp_path / "llava", processor)
        assert VWLMMProcessor.from_llava(folder).chat_template == processor.chat_template
        mistral = VWLMMProcessor.from_llava(folder, chat_template="mistral")
        assert "[INST]" in mistral.apply_chat_template(make_conversation((0, "Who?", "Me.")))

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: the two golden checkpoints, converted once, and a small mixed dataset."""

import gc
import os


# Before torch and transformers are imported: nothing may reach for the network, and two test workers share two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, which some models of Transformers do

from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    logging,
)

from modeling_vwlmm import VWLMMForConditionalGeneration, convert_official_checkpoint
from processing_vwlmm import VWLMMProcessor


GOLDEN = Path(__file__).parent / "golden"

logging.disable_progress_bar()
datasets.disable_progress_bars()
# Settings of a trainer under which a step can be computed by hand.
BY_HAND = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def pytest_collection_finish() -> None:
    """Every trainer collects garbage, twice: looking through all that has been imported takes a third of a second."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # some libraries report what is left at the end as a leak


@pytest.fixture(scope="session")
def vicuna(tmp_path_factory) -> str:
    """Folder of the converted golden checkpoint: 16 image tokens an image, 480 tokens, placeholder 480."""
    folder = tmp_path_factory.mktemp("converted") / "vicuna"
    convert_official_checkpoint(GOLDEN / "vicuna", folder)
    return str(folder)


@pytest.fixture(scope="session")
def pif(tmp_path_factory) -> str:
    """Folder of the converted golden checkpoint with pseudo image features."""
    folder = tmp_path_factory.mktemp("converted") / "pif"
    convert_official_checkpoint(GOLDEN / "pif", folder)
    return str(folder)


def let_patches_matter(model: VWLMMForConditionalGeneration) -> VWLMMForConditionalGeneration:
    """Gives a perceiver, which starts as if there were no patches, weights as if it had learned something."""
    torch.manual_seed(1)
    perceiver = model.model.multi_modal_projector.perceiver
    for layer in (perceiver.w_q, perceiver.w_kv, perceiver.w_o1, perceiver.w_k, perceiver.w_o2):
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model


@pytest.fixture(scope="session")
def perceiving(vicuna, tmp_path_factory) -> str:
    """Folder of the first with VLSA's adapter, which reads up to four patches an image."""
    folder = str(tmp_path_factory.mktemp("converted") / "perceiving")
    model = VWLMMForConditionalGeneration.from_pretrained(vicuna, adapter="sa_perceiver")
    let_patches_matter(model).save_pretrained(folder)
    VWLMMProcessor.from_pretrained(vicuna, max_patches=4).save_pretrained(folder)
    return folder


@pytest.fixture
def model(vicuna) -> VWLMMForConditionalGeneration:
    return VWLMMForConditionalGeneration.from_pretrained(vicuna, dtype=torch.float32)


@pytest.fixture(scope="session")
def processor(vicuna) -> VWLMMProcessor:
    return VWLMMProcessor.from_pretrained(vicuna)


def make_image(seed: int) -> Image.Image:
    """A noise image whose size depends on the seed, too."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (20 + seed % 17, 24 + seed % 11, 3), dtype=np.uint8))


def make_conversation(*turns: tuple[int, str, str]) -> list[dict]:
    """Messages of turns (number of images, question, answer)."""
    messages = []
    for num_images, question, answer in turns:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def tiny_vision(kind: str, **overrides):
    """A random vision tower: images of 28 x 28 pixels, 16 patches."""
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        **overrides,
    }
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**size))
    if kind == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**size))
    if kind == "dinov2":
        del size["intermediate_size"]
        return Dinov2Model(Dinov2Config(**size, mlp_ratio=2))
    text = {**size, "vocab_size": 60}
    del text["image_size"], text["patch_size"]
    return CLIPModel(CLIPConfig(text_config=text, vision_config=size, projection_dim=16))


def tiny_text(kind: str, **overrides):
    """A random decoder with its head. Gemma's and Qwen3's small checkpoints tie the head to the embeddings."""
    size = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **overrides,
    }
    configs = {
        "llama": lambda: LlamaConfig(**size),
        "llama_tied": lambda: LlamaConfig(**size, tie_word_embeddings=True),
        "mistral": lambda: MistralConfig(**size),
        "qwen3": lambda: Qwen3Config(**size, head_dim=16, tie_word_embeddings=True),
        "gemma": lambda: GemmaConfig(**size, head_dim=8),
        "gemma3": lambda: Gemma3TextConfig(**size, head_dim=8, sliding_window=16),
    }
    return AutoModelForCausalLM.from_config(configs[kind]())


@pytest.fixture(scope="session")
def make_model_of_words(tmp_path_factory) -> Callable[..., tuple[VWLMMForConditionalGeneration, VWLMMProcessor]]:
    """Makes random models, with their processors, whose vocabulary is some words behind six that a prompt needs."""

    def make(words: list[str], num_layers: int = 2, **vision: int) -> tuple:
        words = ["<unk>", "<s>", "</s>", "<pad>", "USER", "ASSISTANT", *words]
        tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        torch.manual_seed(0)
        tower = tiny_vision("clip", **vision)
        side = tower.config.image_size
        folder = str(tmp_path_factory.mktemp("words"))
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
        tower.name_or_path = folder
        processor = VWLMMProcessor.from_vision_text_pretrained(
            tower, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        )
        text = tiny_text("llama", vocab_size=len(words), num_hidden_layers=num_layers, max_position_embeddings=1024)
        model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
            tower, text, image_token_index=processor.image_token_id
        )
        return model.eval(), processor

    return make


LONG = pytest.mark.skipif("LONG" not in os.environ, reason="only in `make test-long`")
# Where diffusers can be installed it has to be: without it these tests fail.
needs_diffusers = pytest.mark.skipif(sys.version_info < (3, 11), reason="diffusers 0.42 needs Python 3.11")


def make_vae(folder: Path) -> None:
    """Saves a random VAE of diffusers, which makes one of two pixels, and four channels."""
    from diffusers import AutoencoderKL  # an optional dependency

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            shift_factor=0.1,
            scaling_factor=1.5,
        )
        # Latents that differ between images more than between samples of one.
        vae.quant_conv.weight[:4] *= 3
        vae.quant_conv.bias[4:] = -4
    vae.save_pretrained(folder)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """The folder of a pipeline: a VAE that makes one of two pixels, and a transformer of two layers."""
    if sys.version_info < (3, 11):
        pytest.skip(needs_diffusers.kwargs["reason"])
    from diffusers import SD3Transformer2DModel

    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    make_vae(folder / "vae")
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    )
    with torch.no_grad():  # by default it draws the same, whatever it reads
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def dataset() -> datasets.Dataset:
    """Eight samples of unequal length: one image, none, two in one turn, one in a later turn."""
    conversations = [
        make_conversation((1, "What is the color of the circle?", "Red.")),
        make_conversation((0, "How many people?", "Two people walking, and a dog behind them.")),
        make_conversation((2, "What is left?", "A red circle.")),
        make_conversation((0, "Hello?", "Hello."), (1, "Describe the image.", "A blue square and a dog.")),
        make_conversation((1, "Where?", "Left.")),
        make_conversation((1, "Describe the image.", "A red circle left of a blue square.")),
        make_conversation((0, "Who?", "Me.")),
        make_conversation((1, "What shape is it?", "A circle."), (0, "Which color?", "It is blue, and so am I.")),
    ]
    num_images = [sum(part["type"] == "image" for m in c for part in m["content"]) for c in conversations]
    return datasets.Dataset.from_dict(
        {
            "id": [f"sample-{i}" for i in range(len(conversations))],
            "messages": conversations,
            "images": [[make_image(10 * i + j) for j in range(n)] for i, n in enumerate(num_images)],
        }
    ).cast_column("images", datasets.List(datasets.Image()))

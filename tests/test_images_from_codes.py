# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
`examples/images_from_codes.py`: rebuilt features reach a denoiser as those of an image do, a pipeline of diffusers
reads what the tokenizer's decoder makes, and what does not fit together is refused.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, make_image, make_vae, needs_diffusers, tiny_text, tiny_vision
from PIL import Image
from test_reconstruction import awaken
from torch.testing import assert_close

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMVisualTokenizer, convert_lavit_checkpoint
from modeling_vwlmm.objectives_vwlmm import parse_objectives
from modeling_vwlmm.training import attach_training_modules
from modeling_vwlmm.training.reconstruction import get_conditions
from modeling_vwlmm.training.training_modules import save_training_modules
from processing_vwlmm import VWLMMProcessor


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import images_from_codes
from images_from_codes import (
    check_same_tower,
    condition,
    load_pipeline,
    load_tokenizer,
    measure_lengths,
    paint_with_pipeline,
    rebuild,
    write_codes,
)
from reconstruct import load, paint


pytestmark = needs_diffusers


CODES = torch.tensor([3, 0, 7, 5, 5])
SDXL = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """Folder of a visual tokenizer that keeps half of the patches."""
    torch.manual_seed(0)
    tokenizer = VWLMMVisualTokenizer.from_vision_pretrained(
        tiny_vision("clip"), num_merger_layers=1, num_decoder_layers=1, num_codes=8, code_dim=4, keep_rate=0.5
    )
    with torch.no_grad():
        tokenizer.selector.fc3.weight.mul_(20)
        probabilities = tokenizer.selector(tokenizer.encode_patches(torch.randn(8, 3, 28, 28)))[..., 0].exp()
    tokenizer.config.threshold = probabilities.quantile(0.5).item()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["mlp", "sa_perceiver", "token_merger"])
def folder(request, tokenizer, pipeline, tmp_path_factory) -> str:
    """Folder of a model that writes codes and was trained to reconstruct: the denoiser is no longer a new one."""
    torch.manual_seed(0)
    model = VWLMMForConditionalGeneration.from_visual_tokenizer(
        tokenizer, tiny_text("llama", vocab_size=500), adapter=request.param
    )
    denoiser = str(pipeline) if request.param == "token_merger" else "per_token"
    objectives, _ = parse_objectives({"reconstruction": {"vae": str(pipeline), "denoiser": denoiser}})
    attach_training_modules(model, objectives)
    awaken(model.training_modules["reconstruction"])
    folder = str(tmp_path_factory.mktemp("model"))
    model.save_pretrained(folder)
    save_training_modules(model, folder)
    config = model.config.visual_tokenizer_config
    VWLMMProcessor.from_visual_tokenizer(config, str(GOLDEN / "vicuna"), num_text_tokens=500).save_pretrained(folder)
    return folder


class TestDenoiser:
    def test_conditions_are_those_of_an_image(self, folder, tokenizer):
        """Of an image's true features what the model itself makes of the image: nothing of the path is left out."""
        model, processor = load(folder)
        decoder = load_tokenizer(tokenizer, model)
        pixel_values = processor.image_processor([make_image(n) for n in range(2)], return_tensors="pt")[
            "pixel_values"
        ]
        with torch.no_grad():
            expected = get_conditions(model.model.get_image_features(pixel_values))
        found = condition(model, decoder.encode_patches(pixel_values))
        for part, own in zip(found, expected, strict=True):
            assert (part is None) == (own is None)
            if own is not None:
                assert_close(part, own)

    def test_rebuilt_features_are_as_long_as_those_of_images(self, folder, tokenizer):
        model, processor = load(folder)
        decoder = load_tokenizer(tokenizer, model)
        lengths = measure_lengths(decoder, processor, [make_image(n) for n in range(3)])
        pixel_values = processor.image_processor([make_image(n) for n in range(3)], return_tensors="pt")[
            "pixel_values"
        ]
        assert_close(lengths[:, 0], decoder.encode_patches(pixel_values).norm(dim=-1).mean(dim=0))
        assert not torch.allclose(lengths, measure_lengths(decoder, processor), rtol=1e-2)
        features, directions = rebuild(decoder, CODES, lengths), decoder.decode(CODES)
        assert_close(features.norm(dim=-1, keepdim=True)[0], lengths)
        assert torch.cosine_similarity(features, directions, dim=-1).min() > 1 - 1e-5

    def test_other_codes_another_picture(self, folder, tokenizer):
        model, processor = load(folder)
        decoder = load_tokenizer(tokenizer, model)
        lengths = measure_lengths(decoder, processor)
        reconstructor, pictures = model.training_modules["reconstruction"], []
        for codes in (CODES, CODES, CODES.flip(0)):
            features, noise = rebuild(decoder, codes, lengths), torch.Generator().manual_seed(0)
            pictures.append(paint(reconstructor, condition(model, features), [reconstructor.size] * 2, 3, noise))
        assert torch.equal(pictures[0], pictures[1])
        assert (pictures[0] - pictures[2]).abs().max() > 1e-5  # the tiny SD3 hardly listens

    def test_command(self, folder, tokenizer, tmp_path, capsys):
        make_image(1).save(tmp_path / "like.png")
        options = ["--tokenizer", tokenizer, "--steps", "2", "--like", str(tmp_path / "like.png"), "--seed", "1"]
        images_from_codes.main([folder, "a red circle", "-o", str(tmp_path / "a.png"), *options])
        assert Image.open(tmp_path / "a.png").size == (28, 28)
        assert " of 16 at most, 'a red circle'" in capsys.readouterr().out


@pytest.fixture(scope="module")
def lavit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lavit") / "converted"
    convert_lavit_checkpoint(GOLDEN / "lavit/checkpoint", folder)
    return folder


@pytest.fixture(scope="module")
def writer(lavit):
    return VWLMMForConditionalGeneration.from_pretrained(lavit, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def decoder(lavit, writer):
    return load_tokenizer(lavit / "visual_tokenizer_highres", writer, has_conditions=True)


@pytest.fixture(scope="module")
def sdxl(decoder, tmp_path_factory) -> str:
    """VAE, U-Net and scheduler in folders, as the authors have released them: without a text encoder."""
    return make_sdxl(tmp_path_factory.mktemp("sdxl"), decoder.config)


class TestPipeline:
    """Stable Diffusion XL with tiny random weights; real ones were not run."""

    def test_it_reads_both_conditions_and_zeros_as_negatives(self, sdxl, decoder):
        pipeline = load_pipeline(sdxl)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.text_encoder is None and pipeline.text_encoder_2 is None
        prompt, pooled = decoder.get_conditions(decoder.decode(CODES))
        conditions = {
            "prompt_embeds": prompt,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": 0 * prompt,
            "negative_pooled_prompt_embeds": 0 * pooled,
        }

        def paint(guidance_scale: float = 5.0, **changes: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(2)
            options = {"generator": generator, "guidance_scale": guidance_scale, **SDXL}
            return torch.from_numpy(pipeline(**{**conditions, **changes}, **options).images[0])

        drawn = torch.from_numpy(paint_with_pipeline(pipeline, decoder, CODES, 2, guidance_scale=5.0, **SDXL))
        assert torch.equal(drawn, paint())
        # Everything that was passed counts.
        for name, value in conditions.items():
            assert not torch.allclose(drawn, paint(**{name: value + 1}), atol=1e-4), name
        assert not torch.allclose(drawn, paint(1.0), atol=1e-4)
        other = torch.from_numpy(paint_with_pipeline(pipeline, decoder, CODES.flip(0), 2, guidance_scale=5.0, **SDXL))
        assert not torch.allclose(drawn, other, atol=1e-5)

    def test_command(self, lavit, sdxl, tmp_path):
        images_from_codes.main(
            [str(lavit), "a b", "--pipeline", sdxl, "--steps", "1", "-o", str(tmp_path / "picture.png")]
        )
        assert Image.open(tmp_path / "picture.png").size == (16, 16)

    def test_pipeline_of_another_decoder(self, decoder, tmp_path):
        config = type(decoder.config)(**{**decoder.config.to_dict(), "pooled_condition_dim": 4})
        pipeline = load_pipeline(make_sdxl(tmp_path, config))
        with pytest.raises(
            ValueError, match=r"makes conditions of \d+ and \d+ numbers, and the pipeline reads \d+ and 4"
        ):
            paint_with_pipeline(pipeline, decoder, CODES, **SDXL)

    def test_decoder_of_the_lower_resolution(self, lavit, writer):
        with pytest.raises(ValueError, match="does not make the two conditions.*`visual_tokenizer_highres`"):
            load_tokenizer(lavit / "visual_tokenizer", writer, has_conditions=True)

    def test_without_diffusers(self, lavit, monkeypatch):
        monkeypatch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(ImportError, match=r"`--pipeline` needs diffusers.*pip install 'diffusers>=0.42'"):
            images_from_codes.main([str(lavit), "a", "--pipeline", "x"])

    def test_an_earlier_diffusers(self, lavit, monkeypatch):
        monkeypatch.setattr("diffusers.__version__", "0.41.2")
        with pytest.raises(ImportError, match=r"needs diffusers 0.42 or later, and 0.41.2 is installed. Install it"):
            images_from_codes.main([str(lavit), "a", "--pipeline", "x"])

    def test_pipeline_without_a_scheduler(self, sdxl, lavit, tmp_path):
        shutil.copytree(sdxl, tmp_path / "sdxl", ignore=shutil.ignore_patterns("scheduler"))
        with pytest.raises(OSError, match="has a VAE and a U-Net, and no scheduler: .* Name a whole pipeline"):
            images_from_codes.main([str(lavit), "a", "--pipeline", str(tmp_path / "sdxl")])

    def test_folder_of_no_pipeline(self, lavit, tmp_path):
        with pytest.raises(OSError, match="There is no AutoencoderKL under .*, neither in the folder itself nor"):
            images_from_codes.main([str(lavit), "a", "--pipeline", str(tmp_path)])


def make_sdxl(folder: Path, config) -> str:
    """Saves the parts of a tiny pipeline that reads what a decoder of this config makes."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=config.pooled_condition_dim + 6 * 4,
        cross_attention_dim=sum(config.condition_dims),
        norm_num_groups=4,
    )
    make_vae(folder / "vae")
    for part, name in ((unet, "unet"), (EulerDiscreteScheduler(), "scheduler")):
        part.save_pretrained(folder / name)
    return str(folder)


class TestRefused:
    @pytest.fixture
    def model(self, tokenizer):
        torch.manual_seed(0)
        return VWLMMForConditionalGeneration.from_visual_tokenizer(
            tokenizer, tiny_text("llama", vocab_size=500)
        ).eval()

    def test_model_without_a_tokenizer(self, vicuna):
        with pytest.raises(ValueError, match="has no visual tokenizer, and writes no codes"):
            images_from_codes.main([vicuna, "a"])

    def test_folder_without_a_tokenizer(self, model, vicuna, tmp_path):
        for folder in (vicuna, tmp_path):
            with pytest.raises(FileNotFoundError, match="holds no visual tokenizer.*`--tokenizer`"):
                load_tokenizer(folder, model)

    def test_tokenizer_without_a_decoder(self, model, tokenizer, tmp_path):
        whole = VWLMMVisualTokenizer.from_pretrained(tokenizer)
        weights = {name: value for name, value in whole.state_dict().items() if not name.startswith("decoder.")}
        whole.save_pretrained(tmp_path, state_dict=weights)
        with pytest.raises(ValueError, match=r"has no decoder: \d+ of its tensors are missing, decoder\."):
            load_tokenizer(tmp_path, model)

    def test_tokenizer_of_another_model(self, model, tokenizer, tmp_path):
        other = VWLMMVisualTokenizer.from_pretrained(tokenizer)
        other.quantizer.embedding.neg_()
        other.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is not that of the model"):
            load_tokenizer(tmp_path, model)

    def test_no_code(self, model, tokenizer):
        processor = VWLMMProcessor.from_visual_tokenizer(
            model.config.visual_tokenizer_config, str(GOLDEN / "vicuna"), num_text_tokens=500
        )
        ids = processor.tokenizer("a dog", add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([ids, ids.new_full((1, 1), model.config.image_start_token_id)], dim=1)
        with torch.no_grad():
            last = model.model(ids).last_hidden_state[0, -1]
            model.lm_head.weight[model.config.image_end_token_id] = 100 * last
        with pytest.raises(ValueError, match="Behind 'a dog' the model ends the image before it has written a code"):
            write_codes(model, processor, "a dog", do_sample=True)

    @pytest.mark.parametrize("change", ["weights", "layer"])
    def test_denoiser_on_another_tower(self, model, tokenizer, change):
        other = VWLMMForConditionalGeneration.from_visual_tokenizer(tokenizer, tiny_text("llama", vocab_size=400))
        check_same_tower(model, other, "runs/other")
        if change == "weights":
            with torch.no_grad():
                next(other.model.vision_tower.parameters()).add_(1e-3)
        else:
            other.config.vision_feature_layer = -3
        with pytest.raises(ValueError, match="runs/other has another vision tower than the model"):
            check_same_tower(model, other, "runs/other")

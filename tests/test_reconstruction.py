# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Reconstruction: its parts against reference values, its loss by hand and under every cut of a batch, who learns from it,
what of it is saved, and what is refused before a run begins.
"""

import copy
import http.server
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BY_HAND, GOLDEN
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.objectives_vwlmm import find_image_rows, find_supervised_positions, parse_objectives
from modeling_vwlmm.training import Epigone, attach_training_modules
from modeling_vwlmm.training.denoisers import PerTokenDenoiser
from modeling_vwlmm.training.lockstep import encode_no_images
from modeling_vwlmm.training.reconstruction import (
    add_noise,
    check_sizes,
    reconstruction_losses,
    to_vae_pixels,
)
from modeling_vwlmm.training.stages import set_trainable_parameters


N, D = 16, 48  # image tokens of an image, hidden size
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
ADAPTER, TOWER, OWN = "model.multi_modal_projector.", "model.vision_tower.", "training_modules.reconstruction."
has_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    """The folder of a pipeline: a VAE that makes one of two pixels, and a transformer of two layers."""
    pytest.importorskip("diffusers")
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    vae = make_vae(AutoencoderKL)
    with torch.no_grad():  # latents that differ between images more than between samples of one
        vae.quant_conv.weight[:4] *= 3
        vae.quant_conv.bias[4:] = -4
    vae.save_pretrained(folder / "vae")
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


def make_vae(vae_class, num_blocks=2, **kwargs):
    return vae_class(
        block_out_channels=(8,) * num_blocks,
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        latent_channels=4,
        norm_num_groups=4,
        **{"shift_factor": 0.1, "scaling_factor": 1.5, **kwargs},
    )


@pytest.fixture(params=["per_token", "sd3"])
def options(request, pipeline) -> dict:
    """Of the objective, with either denoiser."""
    return {"vae": str(pipeline), "denoiser": "per_token" if request.param == "per_token" else str(pipeline)}


@pytest.fixture
def make_trainer(model, processor, dataset, tmp_path):
    """Makes a trainer with settings under which a step can be computed by hand."""

    def make(options, stage=2, model=model, train_dataset=dataset, trainer_kwargs=None, **kwargs):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "chat_template": "vicuna_v1",
            "per_device_train_batch_size": 4,
            "global_batch_size": 8,
            "max_steps": 1,
            **BY_HAND,
        }
        if options is not None:
            defaults["visual_objective"] = {"reconstruction": options}
        return VWLMMTrainer(
            model=model,
            args=VWLMMTrainingArguments(stage=stage, **{**defaults, **kwargs}),
            train_dataset=train_dataset,
            processing_class=copy.deepcopy(processor),
            **(trainer_kwargs or {}),
        )

    return make


def attach(model, options, seed=0):
    """The model with the modules of the objective, of which all trains that may."""
    set_trainable_parameters(model, ["model.multi_modal_projector"])
    attach_training_modules(model, parse_objectives({"reconstruction": options})[0], seed)
    awaken(model.training_modules["reconstruction"])
    return model.train()


def awaken(reconstructor) -> None:
    """A new denoiser draws the same, whatever it reads, until its first step."""
    if isinstance(reconstructor.denoiser, PerTokenDenoiser):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(3)
            for parameter in reconstructor.denoiser.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)


def make_batch(num_images: int, seed: int = 0) -> dict:
    """One image a row, and seeds of its noise."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.tensor([[1, *[480] * N, 5 + n, 6] for n in range(num_images)])
    return {
        "input_ids": input_ids,
        "labels": input_ids.where(input_ids == 6, -100),
        "pixel_values": torch.randn(num_images, 3, 28, 28, generator=generator),
        "image_seeds": list(range(100, 100 + num_images)),
        **CLIP,
    }


def run(model, batch, options, **kwargs):
    return model(**batch, visual_objective={"reconstruction": options}, **kwargs)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
class TestGolden:
    @pytest.fixture
    def golden(self) -> dict[str, np.ndarray]:
        return dict(np.load(GOLDEN / "vlsa" / "vlsa.npz"))

    def test_epigone(self, golden, dtype, tolerance):
        values = {name: torch.tensor(value, dtype=dtype) for name, value in golden.items()}
        rank, width = values["epigone.down"].shape
        joint, pooled = len(values["epigone.up"]), len(values["image0.pooled"])
        epigone = Epigone(width, joint, pooled, rank).to(dtype)
        for name in ("down", "up"):
            layer = getattr(epigone, name)
            layer.weight.data, layer.bias.data = values[f"epigone.{name}"], values[f"epigone.{name}_bias"]
        for n in range(3):
            prompt, found = epigone(values[f"image{n}.features"][None], values[f"image{n}.global_feature"][None])
            assert_close(prompt[0], values[f"image{n}.prompt"], atol=tolerance, rtol=tolerance)
            assert_close(found[0], values[f"image{n}.pooled"], atol=tolerance, rtol=tolerance)

    def test_noise_and_loss(self, golden, dtype, tolerance):
        values = {name: torch.tensor(value, dtype=dtype) for name, value in golden.items()}
        losses = []
        for n in range(3):
            z, noise, sigma, velocity, z_t, loss = (
                values[f"image{n}.{name}"][None] for name in ("z", "noise", "sigma", "velocity", "z_t", "loss")
            )
            found = add_noise(z, noise, sigma)
            assert_close(found, z_t, atol=tolerance, rtol=tolerance)
            losses.append(reconstruction_losses(z, found, sigma, velocity))
            assert_close(losses[-1], loss, atol=tolerance, rtol=tolerance)
        mean = torch.cat(losses).mean()
        assert_close(mean, values["loss.mean_over_images"], atol=tolerance, rtol=tolerance)


class TestParts:
    def test_loss_on_the_latent_is_that_on_the_velocity_times_sigma_squared(self):
        z, noise, velocity = torch.randn(3, 5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
        sigma = torch.linspace(0.1, 0.9, 5)
        found = reconstruction_losses(z, add_noise(z, noise, sigma), sigma, velocity)
        wanted = sigma**2 * (velocity - (noise - z)).square().mean(dim=(1, 2, 3))
        assert_close(found, wanted, atol=1e-6, rtol=1e-6)
        # The right velocity leads back to the image from anywhere.
        assert_close(reconstruction_losses(z, add_noise(z, noise, sigma), sigma, noise - z), 0 * sigma)

    def test_pixels_go_back_to_what_the_tower_reads(self, processor):
        rgb = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        images = processor.image_processor
        pixel_values = images(rgb, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"]
        pixels = to_vae_pixels(pixel_values, images.image_mean, images.image_std, 28)
        assert_close(pixels[0].permute(1, 2, 0), torch.tensor(rgb) / 127.5 - 1, atol=1e-5, rtol=0)
        assert to_vae_pixels(100 * pixel_values, images.image_mean, images.image_std, 28).abs().max() == 1
        assert to_vae_pixels(pixel_values, images.image_mean, images.image_std, 20).shape == (1, 3, 20, 20)

    def test_each_token_tells_the_patches_where_it_lies(self):
        """Of tokens in a grid of 4 x 4 and patches in one of 8 x 8, before attention spreads what they say."""
        torch.manual_seed(0)
        denoiser = PerTokenDenoiser(4, 24, 12, 16, num_blocks=0)
        torch.nn.init.normal_(denoiser.out.weight)
        torch.nn.init.normal_(denoiser.modulation.weight)
        prompt = torch.randn(1, 16, 24, requires_grad=True)
        inputs = (torch.randn(1, 4, 16, 16), torch.tensor([0.5]), prompt, torch.randn(1, 12))
        velocity = denoiser(*inputs)
        assert velocity.shape == inputs[0].shape
        corner = velocity[:, :, -2:, :2].square().sum()  # lower left
        (gradient,) = torch.autograd.grad(corner, prompt)
        assert gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist() == [12]

    def test_per_token_denoiser_reads_all_that_it_is_given(self):
        torch.manual_seed(0)
        denoiser = PerTokenDenoiser(4, 24, 12, 16)
        z_t, sigma, prompt, pooled = torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, 16, 24), torch.randn(2, 12)
        assert not denoiser(z_t, sigma, prompt, pooled).any()  # until its first step
        for parameter in denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        velocity = denoiser(z_t, sigma, prompt, pooled)
        for changed in (
            (z_t.flip(0), sigma, prompt, pooled),
            (z_t, sigma.flip(0), prompt, pooled),
            (z_t, sigma, prompt.flip(0), pooled),
            (z_t, sigma, prompt.flip(1), pooled),
            (z_t, sigma, prompt, pooled.flip(0)),
        ):
            assert (denoiser(*changed) - velocity).abs().max() > 1e-3
        together = denoiser(z_t, sigma, prompt, pooled)
        one_by_one = [denoiser(*(part[n : n + 1] for part in (z_t, sigma, prompt, pooled))) for n in range(2)]
        assert_close(together, torch.cat(one_by_one))

    def test_rows_of_patches_are_no_images(self):
        boxes = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0.5], [0, 0.5, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]])
        pixel_values = torch.zeros(5, 3, 4, 4)
        assert find_image_rows(pixel_values, boxes).tolist() == [0, 3]
        assert find_image_rows(pixel_values).tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="has 4 rows, and `pixel_values` 5"):
            find_image_rows(pixel_values, boxes[1:])
        batch = {"input_ids": torch.tensor([[480] * 4]), "pixel_values": pixel_values, "patch_boxes": boxes}
        found = find_supervised_positions(parse_objectives({"reconstruction": {}}, has_labels=False)[0], batch, 480)
        assert found["by_objective"]["reconstruction"].tolist() == [0, 1]
        assert found["image_rows"].tolist() == [0, 3] and found["num_columns"] == 4


class TestLoss:
    def by_hand(self, model, batch, n) -> torch.Tensor:
        """Of one image, from the parts."""
        reconstructor = model.training_modules["reconstruction"]
        features = model.get_image_features(batch["pixel_values"][n : n + 1]).image_features[0]  # [N, D]
        mean, std = (torch.tensor(CLIP[name])[:, None, None] for name in ("image_mean", "image_std"))
        pixels = (batch["pixel_values"][n] * std + mean).clamp(0, 1) * 2 - 1
        sigma, noise, epsilon = reconstructor.draw(
            [batch["image_seeds"][n]], (4, 14, 14), reconstructor.step if model.training else None
        )
        with torch.no_grad():
            distribution = reconstructor.vae.encode(pixels[None]).latent_dist
        z = distribution.mean + distribution.std * epsilon if model.training else distribution.mode()
        z = (z - 0.1) * 1.5
        z_t = (1 - sigma) * z + sigma * noise
        rows = torch.cat([features, features.mean(dim=0, keepdim=True)])
        epigone = reconstructor.epigone
        rows = torch.nn.functional.silu(rows @ epigone.down.weight.T + epigone.down.bias)
        rows = rows @ epigone.up.weight.T + epigone.up.bias
        velocity = reconstructor.denoiser(z_t, sigma, rows[None, :-1], rows[-1:, : epigone.pooled_projection_dim])
        return (z - (z_t - sigma * velocity)).square().mean()

    @pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
    def test_by_hand(self, model, options, is_training):
        attach(model, options).train(is_training)
        model.training_modules["reconstruction"].set_step(7)
        batch = make_batch(3)
        output = run(model, batch, {**options, "weight": 0.5})
        wanted = torch.stack([self.by_hand(model, batch, n) for n in range(3)]).mean()
        assert_close(output.losses["reconstruction"], wanted.detach())
        assert_close(output.loss, output.language_loss + 0.5 * wanted)
        assert output.terms["reconstruction"].count == 3
        # Over the images of the whole step, whatever else is counted.
        counts = {"language": 3, "reconstruction": 12}
        output = run(model, batch, options, num_items_in_batch=counts)
        assert_close(output.losses["reconstruction"], wanted.detach() / 4)
        output = run(model, batch, options, num_items_in_batch=3, num_image_items_in_batch=48)
        assert_close(output.losses["reconstruction"], wanted.detach())

    def test_noise_changes_with_step_seed_and_image_and_with_nothing_else(self, model, options):
        attach(model, options)
        batch = make_batch(2)

        def loss(**changed):
            torch.rand(3)
            return run(model, {**batch, **changed}, options).losses["reconstruction"].item()

        reconstructor, first = model.training_modules["reconstruction"], loss()
        assert loss() == first
        reconstructor.set_step(1)
        assert loss() != first
        reconstructor.set_step(0)
        assert loss() == first
        assert loss(image_seeds=[100, 7]) != first
        reconstructor.seed = 1
        assert loss() != first
        model.eval()
        evaluated = loss()
        reconstructor.set_step(1)
        assert loss() == evaluated

    def test_sigma_is_a_sigmoid_of_normal_numbers(self, model, pipeline):
        attach(model, {"vae": str(pipeline)})
        sigma, noise, epsilon = model.training_modules["reconstruction"].draw(range(4000), (1, 1, 1), 0)
        assert sigma.logit().mean().abs() < 0.06 and abs(sigma.logit().std() - 1) < 0.05
        numbers = torch.stack([sigma.logit(), noise.flatten(), epsilon.flatten()])
        assert (torch.corrcoef(numbers) - torch.eye(3)).abs().max() < 0.06

    def test_without_seeds_pixels_say_which_image_it_is(self, model, options):
        attach(model, options)
        batch = make_batch(3)
        del batch["image_seeds"]
        together = run(model, batch, options).losses["reconstruction"]
        one_by_one = []
        for n in (2, 0, 1):
            part = {name: value[n : n + 1] if torch.is_tensor(value) else value for name, value in batch.items()}
            one_by_one.append(run(model, part, options).losses["reconstruction"])
        assert_close(together, torch.stack(one_by_one).mean())

    def test_any_cut_gives_the_same_loss_and_gradients(self, model, options):
        attach(model, options)
        batch, counts = make_batch(4), {"language": 4, "reconstruction": 4}
        found = []
        for size in (4, 2, 1):
            model.zero_grad()
            total = 0
            for start in range(0, 4, size):
                cut = slice(start, start + size)
                part = {name: batch[name] if name in CLIP else value[cut] for name, value in batch.items()}
                output = run(model, part, options, num_items_in_batch=counts)
                output.loss.backward()
                total = total + output.loss.detach()
            found.append((total, gradients(model)))
        (loss, grads), *others = found
        assert {name.startswith(OWN) for name in grads} == {True, False}
        for other, other_grads in others:
            assert_close(other, loss, atol=1e-6, rtol=1e-6)
            assert other_grads.keys() == grads.keys()
            for name, gradient in grads.items():
                assert_close(other_grads[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    def test_it_teaches_adapter_and_tower_and_not_the_decoder(self, model, options):
        attach(model, options)
        model.requires_grad_(True)
        model(**make_batch(2), visual_objective={"language": 0, "reconstruction": options}).loss.backward()
        reached = {name for name, gradient in gradients(model).items() if gradient.any()}
        for prefix in (ADAPTER, f"{TOWER}encoder.layers.0.", f"{OWN}epigone.", f"{OWN}_denoiser."):
            own = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
            # Of keys a bias says nothing, and in SD3's last block nobody asks the context.
            own = {name for name in own if "k_proj.bias" not in name and ".1.attn.add_q_proj" not in name}
            assert own and own <= reached, prefix
        assert not [name for name in reached if name.startswith(("model.language_model.", "lm_head.", "model.vm"))]

    def test_without_images_it_is_zero_and_all_that_trains_has_a_gradient(self, model, options):
        attach(model, options)
        text = {"input_ids": torch.tensor([[1, 5, 6]]), "labels": torch.tensor([[-100, 5, 6]])}
        expected = model(**text).loss
        output = run(model, text, options)
        assert_close(output.loss, expected)
        assert output.losses["reconstruction"] == 0 and output.terms["reconstruction"].count == 0
        model.encode_no_images = lambda base: encode_no_images(base, False)
        output = run(model, text, options)
        assert_close(output.loss, expected)
        output.loss.backward()
        grads = gradients(model)
        assert grads.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert not any(gradient.any() for gradient in grads.values())

    def test_features_without_pixels_are_an_error(self, model, pipeline):
        attach(model, {"vae": str(pipeline)})
        batch = make_batch(1)
        images = {"image": model.get_image_features(batch.pop("pixel_values"))}
        with pytest.raises(ValueError, match="Pass `pixel_values` in place of `mm_encoder_outputs`"):
            run(model, batch, {"vae": str(pipeline)}, mm_encoder_outputs=images)
        batch = make_batch(1)
        del batch["image_std"]
        with pytest.raises(ValueError, match="needs `image_std`"):
            run(model, batch, {"vae": str(pipeline)})

    def test_a_global_feature_of_the_adapter_takes_the_place_of_the_mean(self, model, options):
        attach(model, options)
        batch = make_batch(2)
        images = model.get_image_features(batch["pixel_values"])
        model.model.encode_images = lambda *args: images
        found = []
        for features in (None, torch.stack(images.image_features).mean(dim=1), torch.ones(2, D)):
            images.global_features = features
            found.append(run(model, batch, options).losses["reconstruction"])
        assert_close(found[0], found[1])
        assert abs(found[2] - found[0]) > 1e-5


@has_diffusers
class TestSD3:
    def test_order_of_the_tokens_says_nothing_and_another_images_tokens_do(self, model, pipeline):
        """After a little training on four images, whose own features serve them better than those of another."""
        options = {"vae": str(pipeline), "denoiser": str(pipeline)}
        attach(model, options)
        reconstructor = model.training_modules["reconstruction"]
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        pixel_values = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 28, 28)
        batch = {**make_batch(4), "pixel_values": 2 * pixel_values}
        objective = {"language": 0, "reconstruction": options}
        for step in range(60):
            reconstructor.set_step(step)
            optimizer.zero_grad()
            model(**batch, visual_objective=objective).loss.backward()
            optimizer.step()
        model.eval()
        pixels = to_vae_pixels(batch["pixel_values"], *CLIP.values(), 28)
        with torch.no_grad():
            features = torch.stack(model.get_image_features(batch["pixel_values"]).image_features)  # [4, N, D]
            own, shuffled, other = (
                reconstructor(rows, rows.mean(dim=1), pixels, batch["image_seeds"])
                for rows in (features, features[:, torch.randperm(N)], features.roll(1, dims=0))
            )
        assert_close(own, shuffled, atol=1e-6, rtol=1e-5)
        assert other.mean() > 1.2 * own.mean()

    @pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
    def test_checkpointed_activations_give_the_same_gradients(self, vicuna, pipeline, trains):
        """And a frozen denoiser hands them on to what it reads."""
        options = {"vae": str(pipeline), "denoiser": str(pipeline), "trains_denoiser": trains}
        found = []
        for checkpoints in (False, True):
            model = attach(VWLMMForConditionalGeneration.from_pretrained(vicuna), options)
            calls = []
            block = model.training_modules["reconstruction"].denoiser.transformer.transformer_blocks[0]
            block.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
            if checkpoints:
                model.gradient_checkpointing_enable()
            model(**make_batch(2), visual_objective={"language": 0, "reconstruction": options}).loss.backward()
            assert len(calls) == 1 + checkpoints
            found.append(gradients(model))
        plain, checkpointed = found
        assert plain.keys() == checkpointed.keys()
        assert any(name.startswith(f"{OWN}_denoiser") for name in plain) == trains
        assert all(plain[name].any() for name in plain if name.startswith(ADAPTER))
        for name, gradient in plain.items():
            assert_close(checkpointed[name], gradient, msg=lambda m, n=name: f"{n}: {m}")

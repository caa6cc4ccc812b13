# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Reconstruction: its parts against reference values, its loss by hand and under every cut of a batch, who learns from
it, what of it is saved, and what is refused before a run begins.
"""

import copy
import http.server
import importlib
import json
import logging
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BY_HAND, GOLDEN, make_image, needs_diffusers
from datasets import Dataset
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration, VWLMMTrainer, VWLMMTrainingArguments
from modeling_vwlmm.objectives_vwlmm import find_image_rows, find_supervised_positions, parse_objectives
from modeling_vwlmm.training import Epigone, attach_training_modules
from modeling_vwlmm.training.denoisers import PerTokenDenoiser, _sample
from modeling_vwlmm.training.lockstep import encode_no_images
from modeling_vwlmm.training.reconstruction import (
    add_noise,
    check_sizes,
    get_conditions,
    make_pictures,
    reconstruction_losses,
    to_vae_pixels,
)
from modeling_vwlmm.training.stages import set_trainable_parameters
from modeling_vwlmm.visualization import draw_reconstructions
from processing_vwlmm import VWLMMProcessor
from processing_vwlmm.cutting_vwlmm import fit_grid


N, D = 16, 48  # image tokens of an image, hidden size
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
ADAPTER, TOWER, OWN = "model.multi_modal_projector.", "model.vision_tower.", "training_modules.reconstruction."


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

    def test_a_model_in_bf16(self, vicuna, options):
        """Latents, noise and loss stay in fp32."""
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna, dtype=torch.bfloat16)
        attach(model, options, seed=5)
        reconstructor = model.training_modules["reconstruction"]
        assert reconstructor.seed == 5 and reconstructor.epigone.up.weight.dtype == torch.bfloat16
        output = run(model, make_batch(2), options)
        output.loss.backward()
        assert output.terms["reconstruction"].total.dtype == torch.float32
        reference = VWLMMForConditionalGeneration.from_pretrained(vicuna, dtype=torch.float32)
        attach(reference, options, seed=5)
        expected = run(reference, make_batch(2), options).losses["reconstruction"]
        assert_close(output.losses["reconstruction"], expected, atol=0, rtol=0.02)

    def test_the_collator_names_images(self, processor):
        """By the sample's id, which other samples of the batch do not change, or by their pixels."""
        objective = parse_objectives({"reconstruction": {}})[0]["reconstruction"]
        samples = [{"id": "a", "images": [make_image(0), make_image(1)]}, {"id": "b", "images": []}, {"id": 7}]
        samples += [{"images": [make_image(1)]}, {"id": None, "images": [make_image(2), make_image(1)]}]
        columns = objective.collate(samples, processor, N)
        first, second, third, fourth, fifth = columns["image_seeds"]
        assert len({first, second, third, fourth}) == 4 and fifth == third
        assert objective.collate(samples[:1], processor, N)["image_seeds"] == [first, second]
        assert {name: columns[name] for name in CLIP} == CLIP
        assert objective.optional_columns == tuple(columns)

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
        # In double precision, for what fp32 leaves of a sum depends on the processor.
        model.double()
        batch, counts = make_batch(4), {"language": 4, "reconstruction": 4}
        batch["pixel_values"] = batch["pixel_values"].double()
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


@needs_diffusers
class TestPatches:
    """The high-resolution image that patches are cut from, in place of the snapshot."""

    SIZES = ((56, 28), (20, 100), (50, 40), (50, 20), (90, 18))  # width and height

    @pytest.fixture(params=["per_token", "sd3"])
    def options(self, request, pipeline, tmp_path) -> dict:
        """As above, with a transformer that knows positions enough for four patches beside each other."""
        options = {"vae": str(pipeline), "denoiser": "per_token", "image": "patches"}
        if request.param == "per_token":
            return options
        from diffusers import SD3Transformer2DModel

        config = SD3Transformer2DModel.load_config(pipeline, subfolder="transformer")
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel.from_config({**config, "pos_embed_max_size": 28})
        with torch.no_grad():
            for parameter in transformer.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
        transformer.save_pretrained(tmp_path / "transformer")
        return {**options, "denoiser": str(tmp_path / "transformer")}

    @pytest.fixture
    def model(self, perceiving):
        return VWLMMForConditionalGeneration.from_pretrained(perceiving, dtype=torch.float32)

    @pytest.fixture
    def processor(self, perceiving):
        return VWLMMProcessor.from_pretrained(perceiving)

    def read(self, processor, indices=range(5)) -> tuple[list[Image.Image], dict]:
        """Images of unlike grids, and a batch with one a row."""
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in self.SIZES]
        inputs = processor(images=[images[n] for n in indices], return_tensors="pt")
        input_ids = torch.tensor([[1, *[480] * N, 5 + n, 6] for n in indices])
        columns = {"input_ids": input_ids, "labels": input_ids.where(input_ids == 6, -100)}
        seeds = {"image_seeds": [100 + n for n in indices]}
        return images, {**columns, **seeds, **CLIP, **{k: inputs[k] for k in ("pixel_values", "patch_boxes")}}

    def test_pictures(self, processor):
        """What was cut is whole again, padding and all, and says where in the snapshot's square it lies."""
        images, batch = self.read(processor)
        groups = make_pictures(batch["pixel_values"], batch["patch_boxes"], *CLIP.values(), 28, "patches")
        assert 3 <= len(groups) < len(images)  # some are of one size
        made = {n: (group.pixels[k], group.boxes[k]) for group in groups for k, n in enumerate(group.indices)}
        assert sorted(made) == list(range(len(images)))
        assert len({group.pixels.shape[-2:] for group in groups}) == len(groups)
        for n, image in enumerate(images):
            grid = fit_grid(image.height, image.width, 28, 28, 4)
            height, width = 28 * grid.rows, 28 * grid.columns
            pixels, box = made[n]
            assert pixels.shape == (3, height, width)
            top, left = (height - grid.height) // 2, (width - grid.width) // 2
            inside = pixels[:, top : top + grid.height, left : left + grid.width]
            if (grid.width, grid.height) == image.size:
                wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
                assert_close(inside, wanted, atol=1e-5, rtol=0)
            side = max(image.size)  # of the square that the snapshot shows
            scale = image.height / grid.height
            assert_close((box[2] - box[0]).item(), height * scale / side, atol=1e-5, rtol=0)
            assert_close((box[0] + box[2]).item() / 2, 0.5, atol=1 / 28, rtol=0)
        snapshots = make_pictures(batch["pixel_values"], batch["patch_boxes"], *CLIP.values(), 28)
        assert [group.indices for group in snapshots] == [list(range(5))] and snapshots[0].boxes is None
        _, batch = self.read(processor, [2])  # two rows of two
        batch["patch_boxes"][-1, 1] += 0.1
        with pytest.raises(ValueError, match="which is no grid"):
            make_pictures(batch["pixel_values"], batch["patch_boxes"], *CLIP.values(), 28, "patches")

    def test_a_batch_is_its_images_one_by_one(self, model, processor, options):
        """Each with its own features, noise and size. The denoiser is called once for each size."""
        attach(model, options)
        reconstructor = model.training_modules["reconstruction"]
        calls = []
        reconstructor.denoiser.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
        _, batch = self.read(processor)
        output = run(model, batch, options)
        assert len(calls) == len(set(calls)) and sum(shape[0] for shape in calls) == 5
        assert {(4, 14, 28), (4, 28, 28)} <= {tuple(shape[1:]) for shape in calls}
        losses = [run(model, self.read(processor, [n])[1], options).losses["reconstruction"] for n in range(5)]
        assert_close(output.losses["reconstruction"], torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
        assert len({round(loss.item(), 4) for loss in losses}) == 5

    def test_patches_are_the_target(self, vicuna, processor, pipeline):
        """Of a new perceiver, which tells nothing of the patches, so that the loss has them as what is drawn."""
        model = VWLMMForConditionalGeneration.from_pretrained(vicuna, adapter="sa_perceiver", dtype=torch.float32)
        _, batch = self.read(processor, [2])
        losses = {}
        for image in ("snapshot", "patches"):
            options = {"vae": str(pipeline), "image": image}
            attach(model, options)
            for name, change in (("as it is", 0.0), ("changed", 0.3)):
                changed = batch["pixel_values"].clone()
                changed[1:] += change
                output = run(model, {**batch, "pixel_values": changed}, options)
                losses[image, name] = output.losses["reconstruction"]
        assert torch.equal(losses["snapshot", "as it is"], losses["snapshot", "changed"])
        assert not torch.equal(losses["patches", "as it is"], losses["patches", "changed"])

    def test_tokens_stand_where_the_picture_is(self):
        """Tokens that say their place are read where the latent's patches are, outside of the square at the rim."""
        centres = (torch.arange(4) + 0.5) / 4
        tokens = torch.stack(torch.meshgrid(centres, centres, indexing="ij"))[None].expand(2, -1, -1, -1)
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, -0.5, 0.75, 1.5]])
        found = _sample(tokens, boxes, 2, 8)  # [2, (y, x), 2, 8]
        for n, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
            y = (y0 + (torch.arange(2) + 0.5) / 2 * (y1 - y0)).clamp(0.125, 0.875)
            x = (x0 + (torch.arange(8) + 0.5) / 8 * (x1 - x0)).clamp(0.125, 0.875)
            assert_close(found[n, 0], y[:, None].expand(-1, 8))
            assert_close(found[n, 1], x[None].expand(2, -1))

    def test_it_draws_pictures_of_their_sizes(self, model, processor, pipeline, monkeypatch):
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
        reconstruct = importlib.import_module("reconstruct")
        attach(model, {"vae": str(pipeline), "image": "patches"}).eval()
        images, _ = self.read(processor)
        pictures = reconstruct.reconstruct(model, processor, images[:3], num_steps=2)
        sizes = [(28 * grid.rows, 28 * grid.columns) for grid in (fit_grid(*i.size[::-1], 28, 28, 4) for i in images)]
        assert [tuple(picture.shape) for picture in pictures] == [(3, 3, *size) for size in sizes[:3]]
        shown = [axes.images[0].get_array().shape[:2] for axes in draw_reconstructions(pictures).axes]
        assert shown == [size for size in sizes[:3] for _ in range(3)]

    def test_refused(self, model, processor, vicuna, options):
        _, batch = self.read(processor)
        plain = VWLMMForConditionalGeneration.from_pretrained(vicuna, dtype=torch.float32)
        with pytest.raises(ValueError, match="'patches', and the adapter 'mlp' reads none"):
            attach(plain, options)
        with pytest.raises(ValueError, match="`image` of `reconstruction` is 'picture'"):
            attach(model, {**options, "image": "picture"})
        attach(model, options)
        model.training_modules["reconstruction"].epigone.up.weight.ds_id = 0  # as ZeRO-3 marks it
        with pytest.raises(ValueError, match="once for each size, and weights are sharded"):
            run(model, batch, options)
        vae = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
        transformer = {"patch_size": 2, "in_channels": 16, "pos_embed_max_size": 96}
        check_sizes(336, vae, transformer, 4)
        with pytest.raises(ValueError, match="1792 pixels, 4 patches beside each other, have 112 .* to 384 at most"):
            check_sizes(448, vae, transformer, 4)


def test_modules_on_meta_read_no_weights(vicuna, options, monkeypatch):
    """They are as large as the real ones, of which as much trains: a dry run counts them."""
    objectives = parse_objectives({"reconstruction": options})[0]

    def make(device):
        with torch.device(device):
            model = VWLMMForConditionalGeneration(VWLMMConfig.from_pretrained(vicuna))
            attach_training_modules(model, objectives)
        modules = model.training_modules
        assert {parameter.device.type for parameter in modules.parameters()} == {device}
        return {n: (p.shape, p.dtype, p.requires_grad) for n, p in modules.named_parameters()}

    expected = make("cpu")
    for model_class in ("AutoencoderKL", "SD3Transformer2DModel"):
        monkeypatch.setattr(f"diffusers.{model_class}.from_pretrained", None)
    assert make("meta") == expected


class TestSD3:
    def test_order_of_the_tokens_says_nothing_and_another_images_tokens_do(self, model, pipeline):
        """After a little training on four images, whose own features serve them better than those of another."""
        attach(model, {"vae": str(pipeline), "denoiser": str(pipeline)})
        reconstructor, projector = model.training_modules["reconstruction"], model.model.multi_modal_projector
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        pixel_values = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 28, 28) * 2
        patch_features = model.get_image_features(pixel_values).patch_features  # [4, N, W]
        pixels = to_vae_pixels(pixel_values, *CLIP.values(), 28)
        for step in range(100):
            reconstructor.set_step(step)
            optimizer.zero_grad()
            features = projector(patch_features)
            reconstructor(features, features.mean(dim=1), pixels, range(4)).mean().backward()
            optimizer.step()
        reconstructor.eval()
        with torch.no_grad():
            features, pixels = projector(patch_features).repeat(8, 1, 1), pixels.repeat(8, 1, 1, 1)  # of eight draws
            own, shuffled, other = (
                reconstructor(rows, rows.mean(dim=1), pixels, range(32))
                for rows in (features, features[:, torch.randperm(N)], features.roll(1, dims=0))
            )
        assert_close(own, shuffled, atol=1e-6, rtol=1e-5)
        own, other = (losses.view(8, 4).mean(dim=0) for losses in (own, other))
        assert (other > own).all() and other.mean() > 1.1 * own.mean()

    def test_dropped_tokens_say_nothing(self, model, pipeline):
        """An adapter that drops some leaves each image its own number of them."""
        attach(model, {"vae": str(pipeline), "denoiser": str(pipeline)})
        reconstructor = model.training_modules["reconstruction"]
        features, z_t, sigma = torch.randn(2, N, D), torch.randn(2, 4, 14, 14), torch.rand(2)
        keep_mask = torch.arange(2 * N).view(2, N) % 5 < torch.tensor([[2], [4]])
        velocities, means = [], []
        for rows in (features, features.masked_fill(~keep_mask[..., None], 7.0)):
            images = {"image_features": list(rows), "keep_mask": keep_mask}
            velocities.append(reconstructor.denoise(z_t, sigma, *get_conditions(images)))
            means.append(get_conditions(images)[1])
        assert torch.equal(*velocities) and torch.equal(*means)
        for n in range(2):
            kept = features[n, keep_mask[n]]
            assert_close(means[0][n], kept.mean(dim=0))
            alone = get_conditions({"image_features": [kept]})
            assert_close(velocities[0][n], reconstructor.denoise(z_t[n : n + 1], sigma[n : n + 1], *alone)[0])

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


class TestTrainer:
    SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}

    @pytest.mark.parametrize(
        ("options", "layout"),
        [("sd3", {"per_device_train_batch_size": 1}), ("per_token", {"packing": True})],
        indirect=["options"],
        ids=str,
    )
    def test_any_micro_batch_takes_the_same_step(self, make_trainer, vicuna, options, layout):
        """Of eight samples, with two images, with one and with none."""
        found = []
        for kwargs in ({"per_device_train_batch_size": 8}, layout):
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
            trainer = make_trainer(options, model=model, max_steps=2, **self.SGD, **kwargs)
            awaken(model.training_modules["reconstruction"])
            trainer.train()
            found.append((logs(trainer), weights(model)))
        (entries, expected), (others, changed) = found
        for entry, other in zip(entries, others, strict=True):
            assert entry["num_image_positions"] == other["num_image_positions"] == 7
            assert other["reconstruction_loss"] == pytest.approx(entry["reconstruction_loss"], rel=1e-6)
        assert entries[0]["reconstruction_loss"] != entries[1]["reconstruction_loss"]
        for name, value in expected.items():
            # Weights, of which a tenth of the gradients are a part.
            assert_close(changed[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    def test_images_without_text(self, make_trainer, model, pipeline):
        message = {"role": "user", "content": [{"type": "image", "text": None}]}
        data = [{"id": str(i), "messages": [message], "images": [make_image(i)]} for i in range(4)]
        before = weights(model)
        trainer = make_trainer({"vae": str(pipeline)}, train_dataset=Dataset.from_list(data), global_batch_size=4)
        awaken(trainer.model.training_modules["reconstruction"])
        trainer.train()
        entry = logs(trainer)[0]
        assert entry["num_text_positions"] == 0 < entry["num_image_positions"] and "language_loss" not in entry
        assert entry["loss"] == pytest.approx(entry["reconstruction_loss"], rel=1e-4)
        changed = {name for name, value in weights(model).items() if name in before and (value != before[name]).any()}
        assert changed and all(name.startswith(ADAPTER) for name in changed)

    def test_evaluation_is_the_same_on_any_batch_and_in_any_step(self, make_trainer, options, dataset):
        metrics = []
        for size in (4, 1):
            trainer = make_trainer(
                options, trainer_kwargs={"eval_dataset": dataset.select(range(5))}, per_device_eval_batch_size=size
            )
            awaken(trainer.model.training_modules["reconstruction"])
            metrics += [trainer.evaluate()["eval_reconstruction_loss"]]
            trainer.model.training_modules["reconstruction"].set_step(5)
            metrics += [trainer.evaluate()["eval_reconstruction_loss"]]
        assert metrics == pytest.approx(metrics[:1] * 4, rel=1e-6)

    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_stages(self, make_trainer, model, pipeline, caplog, stage):
        """With a pretrained denoiser, which stage 1 leaves as it is."""
        options = {"vae": str(pipeline), "denoiser": str(pipeline)}
        trainer = make_trainer(options, stage=stage, method="vlsa", chat_template="vicuna_v1")
        before = weights(model)
        frozen = weights(model.training_modules["reconstruction"].denoiser)
        trainer.train()
        changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        parts = {
            ADAPTER: True,
            f"{OWN}epigone.": True,
            f"{OWN}_denoiser.": stage > 1,
            TOWER: stage > 1,
            "model.language_model.": stage > 2,
            "lm_head.": stage > 2,
            "model.vm_head.": False,
        }
        for prefix, is_trained in parts.items():
            assert any(name.startswith(prefix) for name in changed) == is_trained, prefix
        after = weights(model.training_modules["reconstruction"].denoiser)
        assert all(torch.equal(value, frozen[name]) for name, value in after.items()) == (stage == 1)
        assert model.config.trained_stages[-1] == f"vlsa-{stage}"
        assert not trainer.model.training_modules["reconstruction"].vae.encoder.conv_in.weight.requires_grad
        # All that trains has a gradient, or DDP would wait for it.
        assert "shall train, and no loss of this run depends on them" not in caplog.text

    def test_a_new_denoiser_trains_in_stage_1_and_a_run_may_say_otherwise(self, tmp_path):
        def trains(stage=1, **options):
            args = VWLMMTrainingArguments(
                str(tmp_path), method="vlsa", stage=stage, use_cpu=True, visual_objective={"reconstruction": options}
            )
            return args.get_objectives()[0]["reconstruction"].trains_denoiser

        assert trains() and not trains(denoiser="x") and trains(denoiser="x", trains_denoiser=True)
        assert trains(stage=2, denoiser="x") and not trains(stage=2, denoiser="x", trains_denoiser=False)
        # What the stage says is not written into what the run says.
        args = VWLMMTrainingArguments(str(tmp_path), method="vlsa", stage=1, use_cpu=True)
        assert args.visual_objective == "reconstruction"
        off = VWLMMTrainingArguments(str(tmp_path), method="vlsa", stage=1, use_cpu=True, visual_objective={})
        assert off.get_objectives()[0].keys() == {"language"}

    def test_vision_tower_has_a_rate_of_its_own(self, make_trainer, model, pipeline):
        trainer = make_trainer(
            {"vae": str(pipeline)},
            method="vlsa",
            optim="sgd",
            learning_rate=0.5,
            vision_tower_learning_rate=0.25,
            max_grad_norm=0.0,
            max_steps=2,
            lr_scheduler_type="linear",
            weight_decay=0.1,
        )
        trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(rate == (0.25 if name.startswith(TOWER) else 0.5) for name, rate in rates.items())
        decays = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
        assert decays[f"{TOWER}encoder.layers.0.mlp.fc1.weight"] == 0.1
        assert decays[f"{TOWER}encoder.layers.0.mlp.fc1.bias"] == 0.0
        seen = []
        trainer.get_decay_parameter_names, step = None, trainer.optimizer.step
        trainer.optimizer.step = lambda *args, **kwargs: (
            seen.append(sorted({group["lr"] for group in trainer.optimizer.param_groups if group["params"]})),
            step(*args, **kwargs),
        )[1]
        trainer.train()
        assert seen == [[0.25, 0.5], [0.125, 0.25]]

    def test_such_a_rate_without_a_tower_that_trains_is_an_error(self, tmp_path):
        for kwargs, found in (
            ({"stage": 2}, "stage 2 keeps the vision tower frozen"),
            ({"stage": 2, "method": "vlsa", "vision_tower_learning_rate": -1.0}, "is -1.0; expected a finite number"),
        ):
            with pytest.raises(ValueError, match=found):
                VWLMMTrainingArguments(str(tmp_path), use_cpu=True, **{"vision_tower_learning_rate": 1e-6, **kwargs})

    def test_learns_beside_lora_where_the_adapter_trains(self, make_trainer, pipeline):
        from peft import LoraConfig

        lora = LoraConfig(target_modules=r".*language_model.*q_proj")
        # Before a part is read, of which there is none.
        with pytest.raises(ValueError, match="teaches adapter and vision_tower, and all of that is frozen"):
            make_trainer({"vae": "nowhere"}, trainer_kwargs={"peft_config": lora})
        lora = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
        trainer = make_trainer({"vae": str(pipeline)}, trainer_kwargs={"peft_config": lora}, max_steps=4)
        before = weights(trainer.model)
        trainer.train()
        changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
        assert any("modules_to_save" in name for name in changed) and any("epigone" in name for name in changed)


class TestSaved:
    SAVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    FILE = "_training_modules/reconstruction.safetensors"

    def test_resumed_run_continues_identically(self, make_trainer, vicuna, options, tmp_path):
        results = []
        for folder in ("through", "resumed"):
            model = VWLMMForConditionalGeneration.from_pretrained(vicuna)
            trainer = make_trainer(options, model=model, output_dir=str(tmp_path / folder), **self.SAVES)
            trainer.train(
                resume_from_checkpoint=str(tmp_path / "through/checkpoint-2") if folder == "resumed" else None
            )
            results.append((weights(model), [entry["reconstruction_loss"] for entry in logs(trainer)]))
        (through, losses), (resumed, other_losses) = results
        assert len(losses) == 4 and losses == other_losses
        assert not [name for name, value in through.items() if not torch.equal(resumed[name], value)]
        files = [load_file(tmp_path / f"through/checkpoint-{step}/{self.FILE}") for step in (2, 4)]
        assert not torch.equal(files[0]["epigone.up.weight"], files[1]["epigone.up.weight"])

    def test_the_model_loads_without_it_and_the_vae_is_nowhere(self, make_trainer, model, options, tmp_path, caplog):
        trainer = make_trainer(options)
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        tensors = load_file(tmp_path / "saved/model.safetensors")
        assert not [name for name in tensors if "training_modules" in name]
        own = load_file(tmp_path / "saved" / self.FILE)
        assert {name.partition(".")[0] for name in own} == {"epigone", "_denoiser"}
        assert {name for name, _ in model.named_parameters() if name.startswith(OWN)} <= {OWN + name for name in own}
        with caplog.at_level(logging.WARNING):
            _, info = VWLMMForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values()) and not caplog.records
        assert json.loads((tmp_path / "saved" / self.FILE).with_suffix(".json").read_text()) == {
            **options,
            "size": 28,
            "rank": 256,
            "width": None,
            "image": "snapshot",
        }

    def test_the_next_stage_goes_on_with_it(self, make_trainer, model, pipeline, tmp_path):
        """Also with a denoiser that begins to train, and not with one of another kind."""
        options = {"vae": str(pipeline), "denoiser": str(pipeline)}
        trainer = make_trainer(options, stage=1, method="vlsa")
        trainer.train()
        trainer.save_model(tmp_path / "stage1")
        saved = load_file(tmp_path / "stage1" / self.FILE)
        assert {name.partition(".")[0] for name in saved} == {"epigone"}
        following = make_trainer(options, stage=2, method="vlsa", model=str(tmp_path / "stage1"))
        own = following.model.training_modules["reconstruction"].state_dict()
        assert all(torch.equal(own[name], value) for name, value in saved.items())
        assert any(name.startswith("_denoiser.") for name in own)
        following.train()
        following.save_model(tmp_path / "stage2")
        saved = load_file(tmp_path / "stage2" / self.FILE)
        last = make_trainer(options, stage=3, method="vlsa", model=str(tmp_path / "stage2"))
        own = last.model.training_modules["reconstruction"].state_dict()
        assert all(torch.equal(own[name], value) for name, value in saved.items())
        with pytest.raises(ValueError, match="is of another module than this run trains"):
            make_trainer({"vae": str(pipeline)}, stage=3, method="vlsa", model=str(tmp_path / "stage2"))


class TestPicture:
    """`examples/reconstruct.py`."""

    @pytest.fixture
    def reconstruct(self, monkeypatch):
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
        return importlib.import_module("reconstruct")

    def test_it_draws_with_what_was_trained(self, reconstruct, make_trainer, model, options, tmp_path):
        trainer = make_trainer(options)
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        loaded, _ = reconstruct.load(str(tmp_path / "saved"))
        for name, value in model.training_modules.state_dict().items():
            assert torch.equal(loaded.training_modules.state_dict()[name], value), name
        for n in range(2):
            make_image(n).save(tmp_path / f"{n}.png")
        files = [str(tmp_path / f"{n}.png") for n in range(2)]
        reconstruct.main([str(tmp_path / "saved"), *files, "-o", str(tmp_path / "picture.png"), "--steps", "2"])
        assert min(Image.open(tmp_path / "picture.png").size) > 2 * 28
        with pytest.raises(FileNotFoundError, match="was not trained with the objective `reconstruction`"):
            reconstruct.load(str(tmp_path))

    def test_originals_are_what_the_processor_reads(
        self, reconstruct, make_trainer, model, processor, options, tmp_path, monkeypatch
    ):
        """What is transparent lies on white, and pixels are those of a processor that does not normalise, too."""
        trainer = make_trainer(options)
        trainer.save_model(tmp_path / "saved")
        Image.new("RGBA", (28, 28), (0, 0, 0, 0)).save(tmp_path / "nothing.png")
        files = [str(tmp_path / "nothing.png"), "-o", str(tmp_path / "picture.png")]
        reconstruct.main([str(tmp_path / "saved"), *files, "--steps", "1"])
        width, height = Image.open(tmp_path / "picture.png").size
        assert min(Image.open(tmp_path / "picture.png").convert("RGB").getpixel((width // 6, height // 2))) >= 254
        monkeypatch.setattr(processor.image_processor, "do_normalize", False)
        image = Image.new("RGB", (28, 28), (51, 102, 255))
        (original, *_) = reconstruct.reconstruct(model.eval(), processor, [image], num_steps=1)[0]
        assert_close(original.mean(dim=(1, 2)), torch.tensor([-0.6, -0.2, 1.0]), atol=1e-5, rtol=0)

    def test_the_right_velocity_leads_from_noise_to_the_vaes_copy(self, reconstruct, model, processor, pipeline):
        attach(model, {"vae": str(pipeline)}).eval()
        reconstructor = model.training_modules["reconstruction"]
        image = make_image(1)
        inputs = processor.image_processor(image, return_tensors="pt")
        pixels = to_vae_pixels(inputs["pixel_values"], *CLIP.values(), 28)
        z = reconstructor.encode(pixels)
        reconstructor.denoise = lambda z_t, sigma, *conditions: (z_t - z) / sigma.view(-1, 1, 1, 1)
        original, copy, drawn = reconstruct.reconstruct(model, processor, [image], num_steps=5)[0]
        assert_close(original, pixels[0])
        assert_close(copy, reconstructor.decode(z)[0])
        assert_close(drawn, copy, atol=1e-5, rtol=1e-5)


class TestRefused:
    """Before any step, with what was found, what was expected and what to do."""

    @pytest.mark.parametrize("stage", [3, 4])
    def test_where_the_adapter_is_frozen(self, make_trainer, pipeline, stage):
        visual_objective = {"reconstruction": {"vae": str(pipeline)}, "visual_words": 1.0, "vm_head": 1.0}
        with pytest.raises(ValueError, match="`reconstruction` teaches adapter and vision_tower, and all of that is"):
            make_trainer(None, stage=stage, visual_objective=visual_objective)
        trains = ["adapter", "decoder", "vm_head"]
        make_trainer(None, stage=stage, visual_objective=visual_objective, trains=trains).train()

    @pytest.mark.parametrize(
        ("options", "found"),
        [
            ({}, "reads the latents of a VAE, and none is named"),
            ({"vae": "nowhere"}, "There is no AutoencoderKL under 'nowhere'"),
            ({"vae": "{}/transformer"}, "is a SD3Transformer2DModel; expected a AutoencoderKL"),
            ({"vae": "{}", "denoiser": "{}/vae"}, "is a AutoencoderKL; expected a SD3Transformer2DModel"),
            ({"vae": "{}", "size": 29}, "29 pixels .* one of 2 pixels: 14.5 .* to 28 or 32"),
            ({"vae": "{}", "size": 30}, "sides of 15, and the denoiser reads patches of 2.* to 28 or 32"),
            ({"vae": "{}", "size": 36, "denoiser": "{}"}, "9 patches a side, and .* positions of 8.* to 32 at most"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, make_trainer, pipeline, options, found):
        options = {
            name: value.format(pipeline) if isinstance(value, str) else value for name, value in options.items()
        }
        with pytest.raises((ValueError, OSError), match=found):
            make_trainer(options)

    @pytest.mark.parametrize(
        ("options", "found"),
        [
            ({"trains_denoiser": False}, "'per_token' begins anew"),
            ({"trains_denoiser": "no"}, "`trains_denoiser` of `reconstruction` is 'no'"),
            ({"size": 33.5}, "`size` of `reconstruction` is 33.5"),
            ({"rank": 0}, "`rank` of `reconstruction` is 0"),
            ({"steps": 3}, "has no such options as .'steps'"),
        ],
        ids=str,
    )
    def test_options(self, tmp_path, options, found):
        with pytest.raises(ValueError, match=found):
            VWLMMTrainingArguments(
                str(tmp_path), stage=1, use_cpu=True, visual_objective={"reconstruction": {"vae": "x", **options}}
            )

    def test_sizes_of_published_parts(self):
        """SD3's VAE and transformer, and what other towers read."""
        vae = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
        transformer = {"patch_size": 2, "in_channels": 16, "pos_embed_max_size": 192}
        for size in (224, 336, 384, 448, 672, 3072):
            check_sizes(size, vae, transformer)
        with pytest.raises(ValueError, match="378 pixels .* 47.25"):
            check_sizes(378, vae, transformer)
        with pytest.raises(ValueError, match="193 patches a side, and .* of 192"):
            check_sizes(3088, vae, transformer)
        with pytest.raises(ValueError, match="have 4 channels, and the denoiser reads 16"):
            check_sizes(336, {**vae, "latent_channels": 4}, transformer)

    def test_a_pooled_embedding_that_is_no_part_of_a_row(self):
        with pytest.raises(ValueError, match="pooled embedding of 25 numbers, and a row of its prompt has 24"):
            Epigone(48, 24, 25)

    def test_tokens_that_are_no_grid(self, make_trainer, model, pipeline):
        model.config.image_seq_length = 17
        with pytest.raises(ValueError, match="17 tokens, which are no square grid"):
            attach(model, {"vae": str(pipeline)})

    def test_missing_diffusers(self, make_trainer, monkeypatch):
        monkeypatch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(
            ImportError, match=r"`reconstruction` needs diffusers 0.42 .*pip install 'diffusers>=0.42'"
        ):
            make_trainer({"vae": "somewhere"})

    @needs_diffusers
    def test_gated_download(self, make_trainer, monkeypatch):
        """A server that answers as the Hub does to who has not accepted a licence."""

        class Gated(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(403)
                self.send_header("X-Error-Code", "GatedRepo")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Gated)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + path)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        try:
            with pytest.raises(OSError, match="someone/gated is given to who has accepted its licence"):
                make_trainer({"vae": "someone/gated"})
        finally:
            server.shutdown()

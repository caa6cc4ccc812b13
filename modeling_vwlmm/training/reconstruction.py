# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Reconstruction, VLSA's supervision of image features: from them alone a denoiser has to draw the image (OpenReview
RLhEGWt94S, section 3.1). Nothing of it is there at inference.

An image becomes a clean latent `z` of a frozen VAE; `z_t = (1 - sigma) z + sigma * noise`. The Epigone makes of the
image features what a text encoder gives a denoiser, which predicts the velocity `noise - z`. The loss is the mean of
`(z - (z_t - sigma * velocity))^2` over the elements of a latent, and then over images.

`sigma` and the noise of an image are drawn from a generator of its own. Its seed is made of the run's seed, the number
of the optimiser step and what the collator says of the image (the `id` of its sample and its place there, or without
an `id` its pixels), so that no cut of a batch into micro-batches or processes, and no resumed run, changes them. In an
evaluation the step has no part in it.

The image is the snapshot that the tower reads, or the picture in high resolution, put together of its patches: then
images have different sizes, and the denoiser is called once for each size.

Shapes: `I` images, `l` tokens of an image, `D` hidden size of the decoder, `J` width of the prompt, `Q` of the pooled
embedding, `C'` channels of a latent, `h, w` its sides, `H, W` those of an image, `R` rows of `pixel_values`, `M` those
of them that are patches.
"""

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..adapters_vwlmm import drops_tokens, get_max_patches, to_dtype_of
from ..objectives_vwlmm import OBJECTIVES, Objective, ObjectiveInputs, Term, find_image_rows
from ..patches_vwlmm import split_patches
from .denoisers import PerTokenDenoiser, Pretrained, SD3Denoiser


class Epigone(nn.Module):
    """
    Stands in for a text encoder: one small MLP on image features and global feature.

    Args:
        hidden_size (`int`): Width `D` of the image features.
        joint_attention_dim (`int`): Width `J` of the prompt that the denoiser reads.
        pooled_projection_dim (`int`): Width `Q` of its pooled embedding, the first entries of a row of `J`.
        rank (`int`, *optional*, defaults to 256): Width of the middle layer.

    Raises:
        ValueError: If a row has fewer entries than the pooled embedding.
    """

    def __init__(
        self, hidden_size: int, joint_attention_dim: int, pooled_projection_dim: int, rank: int = 256
    ) -> None:
        super().__init__()
        if pooled_projection_dim > joint_attention_dim:
            raise ValueError(
                f"The denoiser reads a pooled embedding of {pooled_projection_dim} numbers, and a row of its prompt "
                f"has {joint_attention_dim}, of which it is a part. Take a denoiser whose `pooled_projection_dim` is "
                "no larger than its `joint_attention_dim`."
            )
        self.pooled_projection_dim = pooled_projection_dim
        self.down = nn.Linear(hidden_size, rank)
        self.up = nn.Linear(rank, joint_attention_dim)

    def forward(
        self, image_features: torch.Tensor, global_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `[I, l, D]` and `[I, D]` the prompt, `[I, l, J]`, and the pooled embedding, `[I, Q]`."""
        rows = torch.cat([image_features, global_features[:, None]], dim=1)  # [I, l + 1, D]
        rows = self.up(F.silu(self.down(rows)))  # [I, l + 1, J]
        return rows[:, :-1], rows[:, -1, : self.pooled_projection_dim]


def add_noise(z: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """`z_t`, latents `[I, C', h, w]` of which the shares `sigma`, `[I]`, are noise."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * z + sigma * noise


def reconstruction_losses(
    z: torch.Tensor, z_t: torch.Tensor, sigma: torch.Tensor, velocity: torch.Tensor
) -> torch.Tensor:
    """The loss of each image, the mean over the elements of `(z - (z_t - sigma * velocity))^2`: `[I]`."""
    predicted = z_t - sigma.view(-1, 1, 1, 1) * velocity  # [I, C', h, w]
    return (z - predicted).square().mean(dim=(1, 2, 3))


def get_normalization(image_processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by which an image processor normalises, `[3]` each: 0 and 1 if it does not."""
    if not getattr(image_processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return list(image_processor.image_mean), list(image_processor.image_std)


def to_vae_pixels(
    pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float], size: int
) -> torch.Tensor:
    """
    What a VAE reads, from what a vision tower reads.

    Args:
        pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Normalised images.
        image_mean, image_std (`Sequence[float]`): Of the image processor that has normalised them.
        size (`int`): Sides in pixels that they get.

    Returns:
        `torch.Tensor` of shape `[I, 3, size, size]`, from -1 to 1, in fp32.
    """
    mean, std = (pixel_values.new_tensor(values).view(-1, 1, 1) for values in (image_mean, image_std))
    pixels = pixel_values.float() * std.float() + mean.float()  # [I, 3, H, W], from 0 to 1
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return pixels.clamp(0, 1) * 2 - 1


@dataclass
class Pictures:
    """
    Images of one size.

    indices (`list[int]`): Which of the images they are.
    pixels (`torch.Tensor` of shape `[I, 3, rows * size, columns * size]`): From -1 to 1.
    boxes (`torch.Tensor` of shape `[I, 4]`, *optional*): (y0, x0, y1, x1) of each in the unit square of its snapshot,
        where it shows something else than this.
    """

    indices: list[int]
    pixels: torch.Tensor
    boxes: torch.Tensor | None = None


def make_pictures(
    pixel_values: torch.Tensor,
    patch_boxes: torch.Tensor | None,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    size: int,
    image: str = "snapshot",
) -> list[Pictures]:
    """
    What is reconstructed, by size. Reads the boxes, for which the host waits, if they are of patches.

    Args:
        pixel_values (`torch.Tensor` of shape `[R, 3, H, W]`): Normalised snapshots, each with its patches behind it.
        patch_boxes (`torch.Tensor` of shape `[R, 4]`, *optional*): Where in its snapshot each row lies; zeros for the
            snapshots. Without, all are, and each is its own patch.
        image_mean, image_std (`Sequence[float]`): See [`to_vae_pixels`].
        size (`int`): Sides in pixels that a snapshot or a patch gets.
        image (`str`, *optional*, defaults to `"snapshot"`): `"snapshot"`, or `"patches"` for the padded image that has
            been cut into them.

    Raises:
        ValueError: If the patches of an image are no grid.
    """
    if image == "snapshot" or patch_boxes is None:
        rows = find_image_rows(pixel_values, patch_boxes).to(pixel_values.device)  # [I]
        pixels = to_vae_pixels(pixel_values[rows], image_mean, image_std, size)
        return [Pictures(list(range(len(rows))), pixels)]
    _, patches = split_patches(pixel_values, patch_boxes)
    pixels = to_vae_pixels(patches.features, image_mean, image_std, size)  # [M, 3, size, size]
    groups: dict[tuple[int, int], list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    parts = zip(pixels.split(patches.num_patches), patches.boxes.split(patches.num_patches), strict=True)
    for index, (own, boxes) in enumerate(parts):
        tops, lefts = boxes[:, 0].tolist(), boxes[:, 1].tolist()
        columns = tops.count(tops[0])
        rows = len(tops) // columns
        if (tops, lefts) != ([top for top in tops[::columns] for _ in range(columns)], lefts[:columns] * rows):
            raise ValueError(
                f"The patches of image {index} begin at {list(zip(tops, lefts, strict=True))} (y, x), which is no "
                "grid. Pass `pixel_values` and `patch_boxes` as the processor has made them."
            )
        picture = own.view(rows, columns, 3, size, size).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        box = torch.cat([boxes[0, :2], boxes[-1, 2:]])
        groups.setdefault((rows, columns), []).append((index, picture, box))
    return [
        Pictures(list(indices), torch.stack(pictures), torch.stack(boxes))
        for indices, pictures, boxes in (zip(*group, strict=True) for group in groups.values())
    ]


class Reconstructor(nn.Module):
    """
    Epigone and denoiser, with the frozen VAE that makes latents. What is frozen stands in a plain list: it is no
    parameter, it is neither sharded nor saved.

    Args:
        epigone ([`Epigone`]): Makes the denoiser's prompt.
        denoiser (`nn.Module`): A denoiser of [`denoisers`].
        vae (`diffusers.AutoencoderKL`): The VAE.
        size (`int`): Sides in pixels of a snapshot or a patch.
        image (`str`): What is reconstructed, see [`make_pictures`].
        trains_denoiser (`bool`): Whether the denoiser learns.
        seed (`int`): Seed of the noise.
        options (`dict`): What it was made with, for who loads it again.
    """

    def __init__(
        self,
        epigone: Epigone,
        denoiser: nn.Module,
        vae: nn.Module,
        size: int,
        image: str,
        trains_denoiser: bool,
        seed: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.epigone = epigone
        self._frozen = [vae.requires_grad_(False)]
        self.trains_denoiser = trains_denoiser
        if trains_denoiser:
            self._denoiser = denoiser
        else:
            self._frozen.append(denoiser.requires_grad_(False))
        self.size, self.image, self.seed, self.step, self.options = size, image, seed, 0, options

    @property
    def vae(self) -> nn.Module:
        """The frozen VAE."""
        return self._frozen[0]

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, wherever it stands."""
        return self._denoiser if self.trains_denoiser else self._frozen[1]

    def set_step(self, step: int) -> None:
        """The trainer tells the number of the optimiser step, from which the noise follows."""
        self.step = step

    def checkpoint_activations_like(self, model: PreTrainedModel) -> None:
        """Whether a frozen denoiser keeps activations, it does as the model, which knows its own modules alone."""
        if self.trains_denoiser:
            return
        checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if self.denoiser.transformer.gradient_checkpointing == checkpoints:
            return
        if checkpoints:
            self.denoiser.transformer.enable_gradient_checkpointing()
        else:
            self.denoiser.transformer.disable_gradient_checkpointing()

    def draw(
        self, image_seeds: Sequence[int], shape: Sequence[int], step: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The random numbers of images, on the CPU: the same on every device.

        Args:
            image_seeds (`Sequence[int]`): A number for each image.
            shape (`Sequence[int]`): Shape of a latent, `[C', h, w]`.
            step (`int`, *optional*): Optimiser step. Without, they are the same in all.

        Returns:
            `sigma` `[I]`, sigmoids of normal numbers; noise, and what samples of the VAE's distribution are made from,
            `[I, C', h, w]` each.
        """
        drawn = []
        for image_seed in image_seeds:
            digest = hashlib.blake2b(f"{self.seed} {step} {image_seed}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            sigma = torch.randn((), generator=generator).sigmoid()
            drawn.append((sigma, *(torch.randn(*shape, generator=generator) for _ in range(2))))
        sigma, noise, epsilon = zip(*drawn, strict=True)
        return torch.stack(sigma), torch.stack(noise), torch.stack(epsilon)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, epsilon: torch.Tensor | None = None) -> torch.Tensor:
        """
        The latents of images, in fp32.

        Args:
            pixels (`torch.Tensor` of shape `[I, 3, H, W]`): Images, from -1 to 1.
            epsilon (`torch.Tensor` of shape `[I, C', h, w]`, *optional*): Normal numbers that make a sample of the
                VAE's distribution. Without, its mode.

        Returns:
            `torch.Tensor` of shape `[I, C', h, w]`, shifted and scaled as the VAE's config says.
        """
        vae = self.vae.to(pixels.device)
        with torch.autocast(pixels.device.type, enabled=False):
            # One by one: on an image the layers of a VAE work with hundreds of megabytes, beside the activations that
            # the decoder keeps.
            found = [vae.encode(image[None].float()).latent_dist for image in pixels]
            z = torch.cat([distribution.mean for distribution in found])  # [I, C', h, w]
            if epsilon is not None:
                z = z + torch.cat([distribution.std for distribution in found]) * epsilon
        return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The images of latents `[I, C', h, w]`: `[I, 3, H, W]`, from -1 to 1."""
        vae = self.vae.to(z.device)
        return vae.decode(z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample.clamp(-1, 1)

    def get_latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels and sides of the latent of an image with these sides in pixels, `[C', h, w]`."""
        factor = get_vae_factor(self.vae.config)
        return self.vae.config.latent_channels, height // factor, width // factor

    @property
    def is_sharded(self) -> bool:
        """Whether every process has to call the modules equally often."""
        return any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in self.parameters())

    def denoise(
        self,
        z_t: torch.Tensor,
        sigma: torch.Tensor,
        image_features: torch.Tensor,
        global_features: torch.Tensor,
        keep_mask: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The velocity of noisy latents, of which image features tell what they shall be.

        Args:
            z_t (`torch.Tensor` of shape `[I, C', h, w]`): Noisy latents.
            sigma (`torch.Tensor` of shape `[I]`): Their shares of noise.
            image_features (`torch.Tensor` of shape `[I, l, D]`), global_features (`torch.Tensor` of shape `[I, D]`):
                What the adapter has made of the images.
            keep_mask (`torch.BoolTensor` of shape `[I, l]`, *optional*): Which of the features are kept.
            boxes (`torch.Tensor` of shape `[I, 4]`, *optional*): See [`Pictures`].

        Returns:
            `torch.Tensor` of shape `[I, C', h, w]`, in fp32.
        """
        prompt, pooled = self.epigone(
            to_dtype_of(self.epigone, image_features), to_dtype_of(self.epigone, global_features)
        )  # [I, l, J], [I, Q]
        denoiser = self.denoiser if self.trains_denoiser else self.denoiser.to(z_t.device)
        if keep_mask is None:
            return denoiser(z_t, sigma, prompt, pooled, boxes).float()
        # Images of unlike numbers of tokens, which know no padding.
        if self.is_sharded:
            raise ValueError(
                "The adapter drops tokens, so that the denoiser is called once for each image, and weights are "
                "sharded: processes would call it unequally often. Use DDP or ZeRO-2."
            )
        one_by_one = zip(z_t, sigma, prompt, pooled, keep_mask, strict=True)
        velocities = [
            denoiser(z[None], s[None], rows[kept][None], one[None]).float() for z, s, rows, one, kept in one_by_one
        ]
        return torch.cat(velocities)

    def forward(
        self,
        image_features: torch.Tensor,
        global_features: torch.Tensor,
        pixels: torch.Tensor,
        image_seeds: Sequence[int],
        keep_mask: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The losses of images of one size, `[I]`.

        Args:
            image_features, global_features, keep_mask, boxes: See [`~Reconstructor.denoise`].
            pixels (`torch.Tensor` of shape `[I, 3, H, W]`, *optional*): The images, from -1 to 1; there are none
                without.
            image_seeds (`Sequence[int]`): What their noise follows from.
        """
        # At least one row passes, or a process without images would have no gradients to average.
        is_blank = not len(image_features)
        if is_blank:
            shape = (self.vae.config.latent_channels, 2, 2)
            image_features, global_features = (
                F.pad(rows, (*[0, 0] * (rows.ndim - 1), 0, 1)) for rows in (image_features, global_features)
            )
            image_seeds, keep_mask, boxes = [0], None, None
        else:
            shape = self.get_latent_shape(*pixels.shape[-2:])
        drawn = self.draw(image_seeds, shape, self.step if self.training else None)
        sigma, noise, epsilon = (numbers.to(image_features.device, non_blocking=True) for numbers in drawn)
        z = noise if is_blank else self.encode(pixels, epsilon if self.training else None)  # [I, C', h, w]
        z_t = add_noise(z, noise, sigma)
        velocity = self.denoise(z_t, sigma, image_features, global_features, keep_mask, boxes)
        losses = reconstruction_losses(z, z_t, sigma, velocity)  # [I]
        return 0 * losses if is_blank else losses


def get_conditions(images: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    What a denoiser is told of images: image features `V` `[I, l, D]`, global features `P` `[I, D]`, which are the
    means of the image features where the adapter makes none, and which tokens are kept, `[I, l]`, if some are not.

    Args:
        images ([`VWLMMImageFeaturesOutput`]): What the adapter has made of them.

    Raises:
        ValueError: If images have different numbers of tokens.
    """
    sizes = {len(features) for features in images["image_features"]}
    if len(sizes) > 1:
        raise ValueError(
            f"Images have {' and '.join(map(str, sorted(sizes)))} tokens, and reconstruction expects equally many of "
            "each. Take a tower whose images are of one size."
        )
    features = torch.stack(tuple(images["image_features"]))  # [I, l, D]
    keep_mask, global_features = images.get("keep_mask"), images.get("global_features")  # [I, l], [I, D]
    if global_features is None:
        kept = torch.ones_like(features[..., 0]) if keep_mask is None else keep_mask.to(features.dtype)  # [I, l]
        global_features = (features * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
    return features, global_features, keep_mask


def get_vae_factor(config: Any) -> int:
    """Pixels of a side that a VAE makes one of."""
    return 2 ** (len(config["block_out_channels"]) - 1)


class Reconstruction(Objective):
    """
    The image from its features: the loss of a denoiser whose prompt is made of them, a mean over images (VLSA,
    equations 3 and 4).

    Args:
        vae (`str`): Path or name of diffusers' `AutoencoderKL`, or of a pipeline with one. It stays frozen.
        denoiser (`str`, *optional*, defaults to `"per_token"`): `"per_token"`, a light denoiser that begins anew, or
            path or name of an `SD3Transformer2DModel`, or of a pipeline with one.
        trains_denoiser (`bool` or `"if_new"`, *optional*, defaults to `True`): Whether the denoiser learns;
            `"if_new"`, if it begins anew.
        size (`int`, *optional*): Sides in pixels of what is reconstructed, of `"patches"` those of each. By default
            the vision tower's.
        image (`str`, *optional*, defaults to `"snapshot"`): What is reconstructed: the `"snapshot"`, or with an
            adapter that reads `"patches"` the high-resolution image that these are cut from, with its padding, as
            the paper has it. A snapshot costs less, and all are of one size; it cannot teach what it does not show.
        rank (`int`, *optional*, defaults to 256): Width of the Epigone's middle layer.
        width (`int`, *optional*): Width of the blocks of `"per_token"`. By default the decoder's, and 1024 at most.

    Raises:
        ValueError: If an option is none of these.
    """

    name = "reconstruction"
    teaches = ("adapter", "vision_tower")
    counts_images = True
    must_teach = True
    continues_module = True
    optional_columns = ("image_seeds", "image_mean", "image_std")

    def __init__(
        self,
        vae: str | None = None,
        denoiser: str = "per_token",
        trains_denoiser: bool | str = True,
        size: int | None = None,
        rank: int = 256,
        width: int | None = None,
        image: str = "snapshot",
    ) -> None:
        if image not in ("snapshot", "patches"):
            raise ValueError(f"`image` of `reconstruction` is {image!r}; expected 'snapshot' or 'patches'.")
        if trains_denoiser not in (True, False, "if_new"):
            raise ValueError(
                f"`trains_denoiser` of `reconstruction` is {trains_denoiser!r}; expected true, false or 'if_new'."
            )
        for name, number in (("size", size), ("rank", rank), ("width", width)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"`{name}` of `reconstruction` is {number!r}; expected a whole number above 0.")
        self.vae, self.denoiser, self.size, self.rank, self.width = vae, denoiser, size, rank, width
        self.image = image
        is_new = denoiser == "per_token"
        self.trains_denoiser = is_new if trains_denoiser == "if_new" else trains_denoiser
        if is_new and not self.trains_denoiser:
            raise ValueError(
                "`trains_denoiser` of `reconstruction` is false, and 'per_token' begins anew: a denoiser that knows "
                "nothing and learns nothing has nothing to teach. Set it to true, or name a pretrained denoiser."
            )

    def make_modules(self, model: PreTrainedModel) -> Reconstructor:
        """See [`Objective.make_modules`]. All sizes are compared before any weight is read."""
        config, is_new = model.config, self.denoiser == "per_token"
        if self.vae is None:
            raise ValueError(
                "The objective `reconstruction` reads the latents of a VAE, and none is named. Set it in the "
                "objective: `visual_objective: {reconstruction: {vae: PATH_OR_NAME}}`, of an AutoencoderKL or of a "
                "pipeline."
            )
        hidden_size, num_tokens = config.text_config.hidden_size, config.image_seq_length
        side = math.isqrt(num_tokens)
        if is_new and drops_tokens(config):
            raise ValueError(
                f"The adapter {config.adapter!r} drops tokens, and `denoiser: per_token` has a token for each place "
                "of an image. Name an SD3 transformer, which reads any number of them, or take another adapter."
            )
        if is_new and side**2 != num_tokens:
            raise ValueError(
                f"An image has {num_tokens} tokens, which are no square grid, and `denoiser: per_token` has a token "
                "for each place of an image. Set `vision_feature_select_strategy` to 'default', or name an SD3 "
                "transformer."
            )
        max_patches = get_max_patches(config)
        if self.image == "patches" and max_patches is None:
            raise ValueError(
                f"`image` of `reconstruction` is 'patches', and the adapter {config.adapter!r} reads none. Set it to "
                "'snapshot', or take an adapter that reads patches."
            )
        vae = Pretrained("AutoencoderKL", self.vae, "vae")
        transformer = None if is_new else Pretrained("SD3Transformer2DModel", self.denoiser, "transformer")
        size = self.size or config.vision_config.image_size
        most = max_patches if self.image == "patches" else 1
        check_sizes(size, vae.config, None if transformer is None else transformer.config, most)
        if is_new:
            width = self.width or min(hidden_size, 1024)
            joint, pooled = hidden_size, hidden_size
            denoiser = PerTokenDenoiser(vae.config["latent_channels"], joint, pooled, width - width % 4)
            epigone = Epigone(hidden_size, joint, pooled, self.rank)
        else:
            joint, pooled = (transformer.config[name] for name in ("joint_attention_dim", "pooled_projection_dim"))
            epigone = Epigone(hidden_size, joint, pooled, self.rank)
            denoiser = SD3Denoiser(transformer.load(model.dtype))
        options = {"vae": self.vae, "denoiser": self.denoiser, "size": size, "rank": self.rank, "width": self.width}
        options["image"] = self.image
        # The seed that its weights are drawn with is also that of its noise.
        seed = torch.initial_seed()
        return Reconstructor(epigone, denoiser, vae.load(), size, self.image, self.trains_denoiser, seed, options)

    def collate(
        self, examples: list[dict[str, Any]], processor: Any, image_seq_length: int
    ) -> dict[str, list[int] | list[float]]:
        """
        A number for each image, from which its noise follows, and what its pixels were normalised with. No tensors:
        they are read on the host.
        """
        seeds = []
        for example in examples:
            for index, image in enumerate(example.get("images") or []):
                name = None if example.get("id") is None else f"{example['id']} {index}".encode()
                seeds.append(zlib.crc32(np.asarray(image).tobytes() if name is None else name))
        image_mean, image_std = get_normalization(processor.image_processor)
        return {"image_seeds": seeds, "image_mean": image_mean, "image_std": image_std}

    def predict(self, inputs: ObjectiveInputs) -> Term:
        reconstructor, batch, config = inputs.model.get_training_module(self.name), inputs.batch, inputs.model.config
        reconstructor.checkpoint_activations_like(inputs.model)
        num_images = len(inputs.positions_of(self))  # all, or none
        hidden_size = config.text_config.hidden_size
        rows = inputs.hidden_states.new_empty(0, hidden_size)  # [I * l, D]
        images = {} if inputs.images is None else inputs.images
        if images:
            rows = torch.cat(tuple(images["image_features"]))
        if not num_images:
            if len(rows) and batch.get("pixel_values") is None:
                raise ValueError(
                    "The objective `reconstruction` draws images, and finds their features alone. Pass `pixel_values` "
                    "in place of `mm_encoder_outputs`."
                )
            # Connected with what has made them: their gradients are zero.
            features = rows[:0].view(0, config.image_seq_length, hidden_size)  # [0, l, D]
            global_features = images.get("global_features")  # [I, D]
            global_features = features.sum(dim=1) if global_features is None else global_features[:0]
            losses = reconstructor(features, global_features, None, [])  # [1]
            return Term(losses.sum(), 0, {})
        features, global_features, keep_mask = get_conditions(images)  # [I, l, D], [I, D], [I, l]
        if len(features) != num_images:
            raise ValueError(
                f"There are features of {len(features)} images, and `pixel_values` of {num_images}. Pass "
                "`pixel_values` and `patch_boxes` as the processor has made them."
            )
        for name in ("image_mean", "image_std"):
            if batch.get(name) is None:
                raise ValueError(
                    f"The objective `reconstruction` needs `{name}`, which is not among the inputs. Pass that of "
                    "`processor.image_processor`."
                )
        pixel_values, patch_boxes = batch["pixel_values"].to(features.device), batch.get("patch_boxes")
        seeds = batch.get("image_seeds")
        if seeds is None:
            rows = inputs.supervised_positions["image_rows"].tolist()
            seeds = [zlib.crc32(pixel_values[row].cpu().float().numpy().tobytes()) for row in rows]
        normalization = (batch["image_mean"], batch["image_std"])
        pictures = make_pictures(pixel_values, patch_boxes, *normalization, reconstructor.size, reconstructor.image)
        if len(pictures) > 1 and reconstructor.is_sharded:
            raise ValueError(
                "Images have different sizes, so that the denoiser is called once for each size, and weights are "
                "sharded: processes would call it unequally often. Set `image` of `reconstruction` to 'snapshot', or "
                "use DDP or ZeRO-2."
            )
        losses = [
            reconstructor(
                features[group.indices],
                global_features[group.indices],
                group.pixels,
                [seeds[index] for index in group.indices],
                None if keep_mask is None else keep_mask[group.indices],
                group.boxes,
            )
            for group in pictures
        ]
        return Term(torch.cat(losses).sum(), num_images, {})


def check_sizes(size: int, vae: Any, transformer: Any | None, max_patches: int = 1) -> None:
    """
    Compares the sizes of what reconstruction puts together, by their configs.

    Args:
        size (`int`): Sides in pixels of what is reconstructed, or of each of its patches.
        max_patches (`int`, *optional*, defaults to 1): Most patches beside each other.
        vae, transformer: Configs of the VAE, and of the transformer if there is one.

    Raises:
        ValueError: If they do not fit.
    """
    factor, patch_size = get_vae_factor(vae), PerTokenDenoiser.patch_size
    if transformer is not None:
        patch_size = transformer["patch_size"]
    step = factor * patch_size
    fitting = " or ".join(str(n * step) for n in (size // step, size // step + 1) if n)
    if size % factor:
        raise ValueError(
            f"Images of {size} pixels are reconstructed, and the VAE makes one of {factor} pixels: {size / factor:g} "
            f"is no size of a latent. Set `size` of `reconstruction` to {fitting}."
        )
    side = size // factor
    if side % patch_size:
        raise ValueError(
            f"Latents of images of {size} pixels have sides of {side}, and the denoiser reads patches of "
            f"{patch_size}: it would leave out the last. Set `size` of `reconstruction` to {fitting}."
        )
    if transformer is None:
        return
    if transformer["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"The VAE's latents have {vae['latent_channels']} channels, and the denoiser reads "
            f"{transformer['in_channels']}. Take those of one pipeline."
        )
    most, found = transformer["pos_embed_max_size"], max_patches * side // patch_size
    if found > most:
        images = f"images of {max_patches * size} pixels"
        if max_patches > 1:
            images += f", {max_patches} patches beside each other,"
        raise ValueError(
            f"Latents of {images} have {found} patches a side, and the denoiser knows positions of {most}. Set `size` "
            f"of `reconstruction` to {most // max_patches * step} at most."
        )


OBJECTIVES[Reconstruction.name] = Reconstruction

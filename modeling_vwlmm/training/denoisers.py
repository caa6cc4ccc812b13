# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
What reconstruction denoises with: two denoisers behind one call, `(z_t, sigma, prompt, pooled) -> velocity`, and the
loading of what diffusers has.

Shapes: `I` images, `C'` channels of a latent, `h, w` its sides, `l` tokens of an image, `J` width of the prompt, `Q`
of the pooled embedding, `T` patches of a latent, `w` width of a denoiser.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError
from packaging.version import Version
from torch import nn

from ..adapters_vwlmm import to_dtype_of
from ..patches_vwlmm import get_token_centres


# How diffusers is installed.
OLDEST_DIFFUSERS = "0.42"
EXTRA = f"pip install 'diffusers>={OLDEST_DIFFUSERS}'"


class AdaLNBlock(nn.Module):
    """
    A transformer block whose norms are scaled and shifted by a condition, one for each of its rows, and whose branches
    begin at zero (DiT, arXiv 2212.09748, "adaLN-Zero").
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, rows: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Of rows and their conditions, `[I, T, w]` each, the next rows, `[I, T, w]`."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=-1)  # [I, T, w]
        qkv = self.qkv(modulate(rows, shift_1, scale_1))  # [I, T, 3 w]
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [I, T, w]
        rows = rows + gate_1 * self.out(mixed)
        return rows + gate_2 * self.down(F.gelu(self.up(modulate(rows, shift_2, scale_2)), approximate="tanh"))


def modulate(rows: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm without weights of its own, with those that a condition gives."""
    return F.layer_norm(rows, rows.shape[-1:]) * (1 + scale) + shift


class PerTokenDenoiser(nn.Module):
    """
    A light denoiser that is trained from its beginning (after ROSS, arXiv 2410.09575): three blocks over the patches
    of a latent, each of which is told by the image token that lies there. Tokens and patches are grids over the same
    square; where they differ, the tokens are interpolated.

    Args:
        latent_channels (`int`): Channels `C'` of a latent.
        joint_attention_dim (`int`): Width `J` of the prompt.
        pooled_projection_dim (`int`): Width `Q` of the pooled embedding.
        width (`int`): Width of the blocks, a multiple of 4.
        num_blocks (`int`, *optional*, defaults to 3): Number of blocks.
    """

    patch_size = 2

    def __init__(
        self,
        latent_channels: int,
        joint_attention_dim: int,
        pooled_projection_dim: int,
        width: int,
        num_blocks: int = 3,
    ) -> None:
        super().__init__()
        self.width = width
        size = latent_channels * self.patch_size**2
        self.embed = nn.Linear(size, width)
        self.prompt = nn.Linear(joint_attention_dim, width)
        self.pooled = nn.Linear(pooled_projection_dim, width)
        self.time_1 = nn.Linear(width, width)
        self.time_2 = nn.Linear(width, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width, max(width // 64, 1)) for _ in range(num_blocks))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, size)
        for linear in (self.modulation, self.out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        z_t: torch.Tensor,
        sigma: torch.Tensor,
        prompt: torch.Tensor,
        pooled: torch.Tensor,
        boxes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The velocity `noise - z` of noisy latents.

        Args:
            z_t (`torch.Tensor` of shape `[I, C', h, w]`): Noisy latents.
            sigma (`torch.Tensor` of shape `[I]`): Their shares of noise, 0 to 1.
            prompt (`torch.Tensor` of shape `[I, l, J]`): A condition for each token of a square grid.
            pooled (`torch.Tensor` of shape `[I, Q]`): One for the image.
            boxes (`torch.Tensor` of shape `[I, 4]`, *optional*): (y0, x0, y1, x1) of the images in the unit square of
                the tokens. By default they are of the same square.

        Returns:
            `torch.Tensor` of shape `[I, C', h, w]`.
        """
        p, (height, width) = self.patch_size, (z_t.shape[2] // self.patch_size, z_t.shape[3] // self.patch_size)
        patches = F.pixel_unshuffle(z_t, p).flatten(2).transpose(1, 2)  # [I, T, C' p p]
        rows = self.embed(to_dtype_of(self.embed, patches))  # [I, T, w]
        rows = rows + _encode_grid(height, width, self.width, rows)
        side = math.isqrt(prompt.shape[1])
        tokens = F.layer_norm(prompt, prompt.shape[-1:])  # [I, l, J]
        tokens = self.prompt(tokens).transpose(1, 2).unflatten(2, (side, side))  # [I, w, side, side]
        if boxes is not None:
            tokens = _sample(tokens, boxes, height, width)
        elif (height, width) != (side, side):
            tokens = F.interpolate(tokens, (height, width), mode="bilinear")
        tokens = tokens.flatten(2).transpose(1, 2)  # [I, T, w]
        time = _encode(1000 * sigma, self.width)  # [I, w]
        time = self.time_2(F.silu(self.time_1(to_dtype_of(self.time_1, time))))
        condition = F.silu(tokens + (time + self.pooled(pooled))[:, None])  # [I, T, w]
        for block in self.blocks:
            rows = block(rows, condition)
        velocity = self.out(modulate(rows, *self.modulation(condition).chunk(2, dim=-1)))  # [I, T, C' p p]
        return F.pixel_shuffle(velocity.transpose(1, 2).unflatten(2, (height, width)), p)  # [I, C', h, w]


def _encode(values: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of numbers `[n]` at `width / 2` frequencies: `[n, width]`."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=values.device) / (width // 2))
    angles = values.float()[:, None] * frequencies  # [n, width / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _encode_grid(height: int, width: int, size: int, like: torch.Tensor) -> torch.Tensor:
    y, x = torch.meshgrid(*(torch.arange(n, device=like.device) for n in (height, width)), indexing="ij")
    return torch.cat([_encode(y.flatten(), size // 2), _encode(x.flatten(), size // 2)], dim=-1).to(like.dtype)


def _sample(tokens: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Tokens `[I, w, side, side]` at the centres of grids in boxes, `[I, w, height, width]`; at the rim the next."""
    grid = 2 * get_token_centres(boxes.to(tokens.device, tokens.dtype), height, width).flip(-1) - 1  # x, y; -1 to 1
    return F.grid_sample(tokens, grid, mode="bilinear", padding_mode="border", align_corners=False)


class SD3Denoiser(nn.Module):
    """
    Stable Diffusion 3's transformer (arXiv 2403.03206), as the paper has it: all tokens are the context of all
    patches. The context has no positions: what is where has to be inside of the embeddings.

    Args:
        transformer (`diffusers.SD3Transformer2DModel`): The transformer.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        z_t: torch.Tensor,
        sigma: torch.Tensor,
        prompt: torch.Tensor,
        pooled: torch.Tensor,
        boxes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See [`PerTokenDenoiser.forward`]. `prompt` may have any number of rows, in any order; no box is read."""
        return self.transformer(
            hidden_states=to_dtype_of(self.transformer, z_t),
            encoder_hidden_states=to_dtype_of(self.transformer, prompt),
            pooled_projections=to_dtype_of(self.transformer, pooled),
            timestep=1000 * sigma,
            return_dict=False,
        )[0]


def import_diffusers(needed_by: str = "The objective `reconstruction`") -> Any:
    """
    The package diffusers, which nothing needs but what draws.

    Raises:
        ImportError: If it is not installed, or an earlier one.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            f"{needed_by} needs diffusers {OLDEST_DIFFUSERS} or later, and it cannot be imported: {error}. Install it "
            f"with `{EXTRA}`, on Python 3.11 or later."
        ) from error
    if Version(diffusers.__version__) < Version(OLDEST_DIFFUSERS):
        raise ImportError(
            f"{needed_by} needs diffusers {OLDEST_DIFFUSERS} or later, and {diffusers.__version__} is installed. "
            f"Install it with `{EXTRA}`, on Python 3.11 or later."
        )
    return diffusers


class Pretrained:
    """
    A model of diffusers by the name or path of its own folder or of a pipeline's: first its config alone.

    Args:
        class_name (`str`): Its class in diffusers.
        name (`str`): Path of a folder, or name on the Hub.
        subfolder (`str`): Where a pipeline has it.

    Raises:
        ImportError: If diffusers is not installed.
        OSError: If there is nothing under this name, or its licence has not been accepted.
        ValueError: If it is a model of another class.
    """

    def __init__(self, class_name: str, name: str, subfolder: str) -> None:
        self.model_class = getattr(import_diffusers(), class_name)
        self.name, self.options = str(name), {"subfolder": subfolder}
        if Path(name).is_dir() and not Path(name, subfolder, "config.json").exists():
            self.options = {}
        try:
            self.config = self.model_class.load_config(self.name, **self.options)
        except OSError as error:
            if Path(name).is_dir() or _is_gated(error):
                raise self._explain(error) from error
            self.options = {}  # on the Hub, and no pipeline
            try:
                self.config = self.model_class.load_config(self.name)
            except OSError as other:
                raise self._explain(other) from other
        found = self.config.get("_class_name")
        if found != class_name:
            raise ValueError(f"{self.name} is a {found}; expected a {class_name}. Name another.")

    def load(self, dtype: torch.dtype = torch.float32, use_safetensors: bool | None = True) -> nn.Module:
        """
        The model with its weights, in evaluation mode; on `meta`, without. Only safetensors are read, unless
        `use_safetensors` is `None`.

        Raises:
            OSError: If they are not there.
        """
        if torch.get_default_device().type == "meta":
            return self.model_class.from_config(self.config).to(dtype).eval()
        try:
            return self.model_class.from_pretrained(
                self.name, torch_dtype=dtype, use_safetensors=use_safetensors, **self.options
            ).eval()
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> OSError:
        if _is_gated(error):
            return OSError(
                f"{self.name} is given to who has accepted its licence. Accept it at https://huggingface.co/"
                f"{self.name}, log in with `hf auth login`, and start again; or name the path of a folder."
            )
        return OSError(
            f"There is no {self.model_class.__name__} under {self.name!r}, neither in the folder itself nor in that "
            f"of a pipeline: {error}"
        )


def _is_gated(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, GatedRepoError):
            return True
        error = error.__cause__ or error.__context__
    return False

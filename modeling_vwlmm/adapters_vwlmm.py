# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Adapters: how patch features become what the decoder reads.

An adapter is a module made from a [`VWLMMConfig`] and called once for all images of a batch, with the patch features
of the vision tower. What it needs beside them is in `config.adapter_config`. It returns image features, as `[I, N, D]`
where all images have equally many, else as [`AdapterOutput`].

Shapes: `I` images, `M` high-resolution patches of all images together, `N` image tokens of one image, `W` width of the
tower's patch features, `D` hidden size of the decoder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import ModelOutput

from .configuration_vwlmm import VWLMMConfig
from .patches_vwlmm import Patches, get_token_centres
from .visual_tokenizer_vwlmm import TokenMerger


# Most patches that an image is cut into, where a config says nothing else.
MAX_PATCHES = 4


@dataclass
class AdapterOutput(ModelOutput):
    """
    image_features (`torch.Tensor` of shape `[I, N, D]`, or `list[torch.Tensor]`):
        The image features `x`, `[N, D]` an image. Adapters return a tensor where all images have equally many: ZeRO-3
        counts tensors, of which there have to be as many in every batch.
    keep_mask (`torch.BoolTensor` of shape `[I, N]`, *optional*):
        Which image tokens the adapter keeps, if it drops some.
    global_features (`torch.Tensor` of shape `[I, D]`, *optional*):
        One feature for each image, if the adapter makes one.
    """

    image_features: torch.Tensor | list[torch.Tensor] | None = None
    keep_mask: torch.Tensor | None = None
    global_features: torch.Tensor | None = None


class TokenMergerAdapter(nn.Module):
    """
    LaVIT's adapter: the reader's own token merger and a linear projection. It is another merger than that of the
    visual tokenizer, whose codes have to stay what they are while this one learns.
    """

    # The model asks its visual tokenizer which patches to keep.
    drops_tokens = True

    def __init__(self, config: VWLMMConfig) -> None:
        super().__init__()
        if config.visual_tokenizer_config is None:
            raise ValueError(
                '`adapter="token_merger"` keeps what a visual tokenizer selects, and `visual_tokenizer_config` is '
                "missing. Train one with `method='lavit'`, stage 1, and make the model of it."
            )
        self.merger = TokenMerger(config.visual_tokenizer_config)
        self.linear = nn.Linear(config.visual_tokenizer_config.hidden_size, config.text_config.hidden_size)

    def forward(self, patch_features: torch.Tensor, keep_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Of features `[I, N, W]` and what is kept of them, `[I, N]`, the image features, `[I, N, D]`."""
        if keep_mask is None:
            keep_mask = torch.ones(patch_features.shape[:2], device=patch_features.device, dtype=torch.bool)
        return self.linear(self.merger(patch_features, keep_mask))


class SAPerceiver(nn.Module):
    """
    VLSA's SA-Perceiver: the tokens of a snapshot, and one learned query, gather detail from high-resolution patches by
    cross-attention (equation 1), then attend to each other (equation 2). Single-headed, without biases, on a residual
    stream. At the start it returns the snapshot's features as they are.

    The paper's equations have no scale, no norm and no positions; as printed they do not train. Here logits are
    divided by the square root of the width, what enters an attention is normalised, and the logit of a snapshot token
    and a patch token falls with their squared distance in the picture, at a learned rate: else a token could not know
    which patch lies where it looks.

    Args:
        hidden_size (`int`): Width `W`.
        activation (`str`, *optional*, defaults to `"softmax"`):
            What makes weights of logits. `"silu"` is the paper's, divided by the number of keys.
        pre_norm (`bool`, *optional*, defaults to `True`): Whether what enters an attention is normalised.
        distance_bias (`bool`, *optional*, defaults to `True`): Whether the distance of tokens counts.
        side (`int`, *optional*, defaults to 24):
            Tokens in a row of a crop, for the start of the distance's rate: a token begins with what is about a
            token's width around it.

    Raises:
        ValueError: If the activation is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        activation: str = "softmax",
        pre_norm: bool = True,
        distance_bias: bool = True,
        side: int = 24,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` is {activation!r}; expected one of {sorted(ACTIVATIONS)}.")
        self.activation, self.side = activation, side
        self.query = nn.Parameter(torch.empty(hidden_size))
        self.w_q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.w_kv = nn.Linear(hidden_size, hidden_size, bias=False)
        self.w_o1 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.w_k = nn.Linear(hidden_size, hidden_size, bias=False)
        self.w_o2 = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm_snapshot = nn.LayerNorm(hidden_size) if pre_norm else nn.Identity()
        self.norm_patches = nn.LayerNorm(hidden_size) if pre_norm else nn.Identity()
        self.norm = nn.LayerNorm(hidden_size) if pre_norm else nn.Identity()
        # A row of one number, for FSDP2 shards no parameter without dimensions.
        self.log_nearness = nn.Parameter(torch.empty(1)) if distance_bias else None
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Sets what begins otherwise than in other modules. Through `nn.init`, which spares what has been loaded."""
        nn.init.normal_(self.query, std=0.02)
        for layer in (self.w_q, self.w_kv, self.w_k):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))  # as `nn.Linear` begins
        nn.init.zeros_(self.w_o1.weight)
        nn.init.zeros_(self.w_o2.weight)
        if self.log_nearness is not None:
            nn.init.constant_(self.log_nearness, math.log(self.side**2 / 2))

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        name = f"{prefix}log_nearness"
        if name in state_dict and state_dict[name].ndim == 0:  # a plain number will do
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        snapshot: torch.Tensor,
        patches: torch.Tensor,
        patch_boxes: torch.Tensor,
        num_patches: torch.Tensor | Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            snapshot (`torch.Tensor` of shape `[I, N, W]`): Features of the snapshots.
            patches (`torch.Tensor` of shape `[M, N, W]`): Features of the patches, in the order of their images.
            patch_boxes (`torch.Tensor` of shape `[M, 4]`): (y0, x0, y1, x1) of each in its snapshot's unit square.
            num_patches (`torch.Tensor` or `Sequence[int]` of length `I`): How many patches each image has.

        Returns:
            `torch.Tensor` of shape `[I, N, W]`, the image tokens, and `[I, W]`, the learned query's global feature.

        Raises:
            ValueError: If an image has no patches, or numbers of images, patches and boxes differ.
        """
        num_patches = num_patches.tolist() if isinstance(num_patches, torch.Tensor) else list(num_patches)
        if len(num_patches) != len(snapshot) or sum(num_patches) != len(patches) or min(num_patches, default=1) < 1:
            raise ValueError(
                f"`num_patches` is {num_patches}, of {len(snapshot)} snapshots and {len(patches)} patches; expected a "
                "number for each snapshot, one at least, that sum to the patches."
            )
        if getattr(patch_boxes, "shape", None) != (len(patches), 4):
            found = getattr(patch_boxes, "shape", None) or type(patch_boxes).__name__
            raise ValueError(
                f"`patch_boxes` is {found}; expected a tensor of shape {(len(patches), 4)}, a box for each patch and "
                "none for snapshots."
            )
        tokens = torch.cat([snapshot, self.query.expand(len(snapshot), 1, -1)], dim=1)  # [I, N + 1, W]
        keys = self.w_kv(self.norm_patches(patches))  # [M, N, W]
        # One call for all images: those with fewer patches are padded, and their padding is masked.
        keys = pad_sequence(keys.split(num_patches), batch_first=True).flatten(1, 2)  # [I, K, W]
        sizes = torch.tensor(num_patches, device=keys.device).view(-1, 1, 1) * patches.shape[1]  # [I, 1, 1]
        bias = None if self.log_nearness is None else self._get_bias(snapshot, patch_boxes, num_patches)
        queries = self.w_q(self.norm_snapshot(tokens))  # [I, N + 1, W]
        tokens = tokens + self.w_o1(self._attend(queries, keys, keys, sizes, bias))  # equation 1
        normed = self.norm(tokens)
        sizes = torch.full_like(sizes, tokens.shape[1])
        tokens = tokens + self.w_o2(self._attend(normed, self.w_k(normed), normed, sizes))  # equation 2
        # Contiguous, so that what follows rounds as it does without a perceiver.
        return tokens[:, :-1].contiguous(), tokens[:, -1]

    def _get_bias(self, snapshot: torch.Tensor, patch_boxes: torch.Tensor, num_patches: list[int]) -> torch.Tensor:
        """`-exp(log_nearness) |p - p'|^2` for each snapshot token and key, 0 for the query: `[I, N + 1, K]`."""
        side = math.isqrt(snapshot.shape[1])
        if side**2 != snapshot.shape[1]:
            raise ValueError(
                f"A crop has {snapshot.shape[1]} tokens, which are no square grid: the SA-Perceiver has to know where "
                "they are. Leave the class token out (`vision_feature_select_strategy='default'`), or set "
                "`distance_bias` to False."
            )
        dtype = torch.promote_types(snapshot.dtype, torch.float32)
        boxes = patch_boxes.to(snapshot.device, dtype)
        centres = get_token_centres(boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]]), side, side).view(1, -1, 1, 2)
        others = get_token_centres(boxes, side, side).flatten(1, 2)  # [M, N, 2]
        others = pad_sequence(others.split(num_patches), batch_first=True).flatten(1, 2).unsqueeze(1)  # [I, 1, K, 2]
        distances = sum((centres[..., axis] - others[..., axis]).square() for axis in (0, 1))  # [I, N, K]
        return F.pad(-self.log_nearness.to(dtype).exp() * distances, (0, 0, 0, 1))

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sizes: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of queries `[I, Q, W]` to keys `[I, K, W]`, of which the first `sizes`, `[I, 1, 1]`, are any."""
        logits = queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])  # [I, Q, K]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if bias is not None:
            logits = logits + bias
        is_key = torch.arange(keys.shape[1], device=keys.device) < sizes  # [I, 1, K]
        return ACTIVATIONS[self.activation](logits, is_key, sizes).to(values.dtype) @ values  # [I, Q, W]


def _softmax(logits: torch.Tensor, is_key: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~is_key, -torch.inf).softmax(dim=-1)


def _silu(logits: torch.Tensor, is_key: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    return F.silu(logits) * is_key / sizes


# What makes weights of logits, of what is a key, and of how many there are.
ACTIVATIONS = {"softmax": _softmax, "silu": _silu}


class SAPerceiverProjector(LlavaMultiModalProjector):
    """
    VLSA's adapter: the SA-Perceiver at the width of the tower, then LLaVA's projector, for image tokens and global
    feature alike. An image has as many tokens as its snapshot, whatever its resolution.

    `config.adapter_config` may have `max_patches` (4 by default), the most patches that the processor cuts an image
    into, and `activation` and `distance_bias` of [`SAPerceiver`].

    Raises:
        ValueError: If `config.adapter_config` has other fields or values.
    """

    # The model hands it the patches of the images.
    reads_patches = True

    def __init__(self, config: VWLMMConfig) -> None:
        super().__init__(config)
        options = read_perceiver_options(config)
        options.pop("max_patches")
        layers, vision = config.vision_feature_layer, config.vision_config
        width = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
        self.perceiver = SAPerceiver(width, side=vision.image_size // vision.patch_size, **options)

    def forward(self, patch_features: torch.Tensor, patches: Patches | None = None) -> AdapterOutput:
        """Of the features of snapshots, `[I, N, W]`, and of their patches: by default each is its own only one."""
        if patches is None:
            boxes = patch_features.new_tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(patch_features), -1)
            patches = Patches(patch_features, boxes, [1] * len(patch_features))
        tokens, queries = self.perceiver(patch_features, patches.features, patches.boxes, patches.num_patches)
        return AdapterOutput(super().forward(tokens), global_features=super().forward(queries))


def read_perceiver_options(config: VWLMMConfig) -> dict[str, Any]:
    """
    The fields of `config.adapter_config` for `adapter="sa_perceiver"`, all of them.

    Raises:
        ValueError: If there are others, or one has a value that it cannot have.
    """
    options = {"max_patches": MAX_PATCHES, "activation": "softmax", "distance_bias": True}
    if unknown := sorted(config.adapter_config.keys() - options):
        raise ValueError(
            f"`adapter_config` has the field {unknown[0]!r}, which `adapter='sa_perceiver'` does not know; expected "
            f"{', '.join(options)}. Leave it out."
        )
    options |= config.adapter_config
    max_patches = options["max_patches"]
    if not isinstance(max_patches, int) or isinstance(max_patches, bool) or max_patches < 1:
        raise ValueError(f"`adapter_config['max_patches']` is {max_patches!r}; expected a whole number from 1 on.")
    if options["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"`adapter_config['activation']` is {options['activation']!r}; expected one of {sorted(ACTIVATIONS)}."
        )
    if not isinstance(options["distance_bias"], bool):
        raise ValueError(f"`adapter_config['distance_bias']` is {options['distance_bias']!r}; expected True or False.")
    return options


# Every adapter under the name that `config.adapter` has for it: classes made from a config, with
# `forward(patch_features [I, N, W])`, and `keep_mask [I, N]` for those that drop tokens, or `patches` for those that
# read high-resolution patches. The MLP of two layers is LLaVA's own, and so are the names of its tensors.
ADAPTERS: dict[str, type[nn.Module]] = {
    "mlp": LlavaMultiModalProjector,
    "token_merger": TokenMergerAdapter,
    "sa_perceiver": SAPerceiverProjector,
}


def make_adapter(config: VWLMMConfig) -> nn.Module:
    """
    The adapter that `config.adapter` names.

    Raises:
        ValueError: If there is none of that name.
    """
    if config.adapter not in ADAPTERS:
        raise ValueError(
            f"`adapter` is {config.adapter!r}; expected one of {sorted(ADAPTERS)}. Add a class of your own to "
            "`ADAPTERS` before the model is made."
        )
    return ADAPTERS[config.adapter](config)


def to_dtype_of(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of a module's weights, for parts of a model may differ. Autocast sees to it itself."""
    weight = next((weight for weight in module.parameters() if weight.is_floating_point()), tensor)
    return tensor if torch.is_autocast_enabled(tensor.device.type) else tensor.to(weight.dtype)


def drops_tokens(config: VWLMMConfig) -> bool:
    """Whether the adapter that `config.adapter` names reads a part of the image tokens alone."""
    return getattr(ADAPTERS[config.adapter], "drops_tokens", False)


def selects_tokens(config: VWLMMConfig) -> bool:
    """Whether it depends on an image how many tokens it has."""
    return drops_tokens(config) and config.visual_tokenizer_config.selection != "top_k"


def get_max_patches(config: VWLMMConfig) -> int | None:
    """Most patches of an image that the adapter of a config is made for; `None` if it reads none."""
    reads_patches = getattr(ADAPTERS[config.adapter], "reads_patches", False)
    return config.adapter_config.get("max_patches", MAX_PATCHES) if reads_patches else None


def adapt(
    adapter: nn.Module,
    patch_features: torch.Tensor,
    image_sizes: list[int] | None = None,
    keep_mask: torch.Tensor | None = None,
    patches: Patches | None = None,
) -> AdapterOutput:
    """
    Calls an adapter, and gives what it returns its full form.

    Args:
        adapter (`nn.Module`): The adapter.
        patch_features (`torch.Tensor` of shape `[I, N, W]`): What the tower made of the images.
        image_sizes (`list[int]`, *optional*): Patches of each image, for towers that put all images into one row.
        keep_mask (`torch.BoolTensor` of shape `[I, N]`, *optional*): Which patches are kept, if not all are.
        patches ([`Patches`], *optional*): What the tower made of the images' high-resolution patches.

    Raises:
        ValueError: If the adapter reads no patches, and there are some.
    """
    options = {}
    if patches is not None:
        if not getattr(adapter, "reads_patches", False):
            raise ValueError(
                f"`patch_boxes` says that images have high-resolution patches, and {type(adapter).__name__} reads one "
                "row of `pixel_values` an image. Make the processor without `max_patches`, or load the model with "
                "`adapter='sa_perceiver'`."
            )
        options["patches"] = replace(patches, features=to_dtype_of(adapter, patches.features))
    if keep_mask is not None and getattr(adapter, "drops_tokens", False):
        options["keep_mask"] = keep_mask
    output = adapter(to_dtype_of(adapter, patch_features), **options)  # [I, N, D]
    if not isinstance(output, AdapterOutput):
        output = AdapterOutput(output if image_sizes is None else output.squeeze(0).split(image_sizes))
    output.image_features = list(output.image_features)  # I x [N, D]
    if output.keep_mask is None:
        output.keep_mask = keep_mask
    return output

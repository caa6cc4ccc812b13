# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Adapters: how patch features become what the decoder reads.

An adapter is a module made from a [`VWLMMConfig`] and called once for all images of a batch, with the patch features
of the vision tower. What it needs beside them is in `config.adapter_config`. It returns image features, as `[I, N, D]`
where all images have equally many, else as [`AdapterOutput`].

Shapes: `I` images, `N` image tokens of one image, `W` width of the tower's patch features, `D` hidden size of the
decoder.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import ModelOutput

from .configuration_vwlmm import VWLMMConfig
from .visual_tokenizer_vwlmm import TokenMerger


@dataclass
class AdapterOutput(ModelOutput):
    """
    image_features (`list[torch.Tensor]`):
        The image features `x`, `[N, D]` an image.
    keep_mask (`torch.BoolTensor` of shape `[I, N]`, *optional*):
        Which image tokens the adapter keeps, if it drops some.
    global_features (`torch.Tensor` of shape `[I, D]`, *optional*):
        One feature for each image, if the adapter makes one.
    """

    image_features: list[torch.Tensor] | None = None
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


# Every adapter under the name that `config.adapter` has for it: classes made from a config, with
# `forward(patch_features [I, N, W])`, and `keep_mask [I, N]` for those that drop tokens. The MLP of two layers is
# LLaVA's own, and so are the names of its tensors.
ADAPTERS: dict[str, type[nn.Module]] = {"mlp": LlavaMultiModalProjector, "token_merger": TokenMergerAdapter}


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


def adapt(
    adapter: nn.Module,
    patch_features: torch.Tensor,
    image_sizes: list[int] | None = None,
    keep_mask: torch.Tensor | None = None,
) -> AdapterOutput:
    """
    Calls an adapter, and gives what it returns its full form.

    Args:
        adapter (`nn.Module`): The adapter.
        patch_features (`torch.Tensor` of shape `[I, N, W]`): What the tower made of the images.
        image_sizes (`list[int]`, *optional*): Patches of each image, for towers that put all images into one row.
        keep_mask (`torch.BoolTensor` of shape `[I, N]`, *optional*): Which patches are kept, if not all are.
    """
    options = {}
    if keep_mask is not None and getattr(adapter, "drops_tokens", False):
        options["keep_mask"] = keep_mask
    output = adapter(to_dtype_of(adapter, patch_features), **options)  # [I, N, D]
    if not isinstance(output, AdapterOutput):
        output = AdapterOutput(list(output) if image_sizes is None else list(output.squeeze(0).split(image_sizes)))
    if output.keep_mask is None:
        output.keep_mask = keep_mask
    return output

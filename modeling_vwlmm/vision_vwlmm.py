# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The vision tower: how it runs, and that it is frozen unless its user unfreezes it.

Shapes: `I` images, `N` image tokens of one image, `W` width of the patch features.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import output_capturing

from .configuration_vwlmm import VWLMMConfig


# Whether Transformers can keep the outputs of some layers and no others (5.23), counted from the last ones, too.
KEEPS_NAMED_LAYERS = hasattr(output_capturing, "selected_hidden_states")


class FrozenVisionTower:
    """A model whose vision tower is frozen when it is loaded, as when it is made: loading forgets what was frozen."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`. The vision tower is frozen until its user unfreezes it."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        model.base_model.vision_tower.requires_grad_(False)
        return loaded


def run_vision_tower(
    vision_tower: PreTrainedModel,
    config: VWLMMConfig,
    pixel_values: torch.Tensor,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    output_hidden_states: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, BaseModelOutputWithPooling]:
    """
    What the adapter reads of images, and what else the tower returns. A frozen tower keeps no activations, whatever
    PEFT and gradient checkpointing make of its inputs.

    Args:
        vision_tower (`PreTrainedModel`): The tower.
        config ([`VWLMMConfig`]): Names the layers to read, and says whether the class token is among them.
        pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.
        vision_feature_layer, vision_feature_select_strategy (*optional*): In place of those of the config.
        output_hidden_states (`bool`, *optional*): Whether to return the outputs of all layers, too.
        kwargs: What else the tower takes.

    Returns:
        `torch.Tensor` of shape `[I, N, W]`, and the tower's output.
    """
    layers = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
    if output_hidden_states is None:
        output_hidden_states = config.output_hidden_states
    learns = any(parameter.requires_grad for parameter in vision_tower.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        kept = layers if KEEPS_NAMED_LAYERS else True
        outputs = vision_tower(pixel_values, output_hidden_states=output_hidden_states or kept, **kwargs)
        selected = [outputs.hidden_states[layer] for layer in layers]  # [I, N (+ 1), W]
        selected = [features[:, 1:] if strategy == "default" else features for features in selected]
        patch_features = torch.cat(selected, dim=-1)  # [I, N, W]
    if not output_hidden_states:
        outputs.hidden_states = None
    return patch_features, outputs

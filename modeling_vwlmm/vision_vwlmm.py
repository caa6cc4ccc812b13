# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The vision tower: how it runs, and that it is frozen unless its user unfreezes it.

Shapes: `I` images, `N` image tokens of one image, `W` width of the patch features.
"""

import copy
from typing import Any

import torch
from transformers import AutoModel, Blip2VisionConfig, Blip2VisionModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import output_capturing

from .configuration_vwlmm import VWLMMConfig


# What is not quantised.
WHOLE = ("lm_head", "model.vm_head", "model.multi_modal_projector", "model.visual_tokenizer")
# Whether Transformers can keep the outputs of some layers and no others (5.23), counted from the last ones, too.
KEEPS_NAMED_LAYERS = hasattr(output_capturing, "selected_hidden_states")
# EVA-CLIP's ViT-g/14, LaVIT's tower, is in Transformers as a part of BLIP-2, where no auto class finds it.
AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)


class FrozenVisionTower:
    """A model whose vision tower is frozen when it is loaded, as when it is made: loading forgets what was frozen."""

    def freeze_encoders(self) -> None:
        """Freezes the vision tower, and the visual tokenizer if there is one."""
        self.vision_tower.requires_grad_(False)
        if self.visual_tokenizer is not None:
            self.visual_tokenizer.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """
        See `PreTrainedModel.from_pretrained`. The vision tower is frozen until its user unfreezes it. No quantiser
        touches heads and adapter, whatever else it is told to leave: the losses read their weights, and they train.
        All else of a quantised model is frozen: bitsandbytes adds biases in place, which fails where they train.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = leave_whole(kwargs["quantization_config"])
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        model.base_model.freeze_encoders()
        if getattr(model, "is_quantized", False):
            for name, parameter in model.named_parameters():
                if not any(f".{whole}." in f".model.{name}" for whole in WHOLE):
                    parameter.requires_grad_(False)
        return loaded


class GeneratesInLockstep:
    """A model whose weights may be sharded: then every process has to call each of its modules equally often."""

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """
        See `GenerationMixin.generate`. Where weights are sharded (FSDP2, ZeRO-3), a process without images runs the
        vision tower on a blank one, and processes go on until the last of them has ended: call it on all together.
        """
        tower = self.model.vision_tower
        if any(hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in tower.parameters()):
            if kwargs.get("synced_gpus") is None:
                kwargs["synced_gpus"] = True
            if kwargs.get("pixel_values") is None and kwargs.get("mm_encoder_outputs") is None:
                with torch.no_grad():
                    self.model.get_image_features(make_blank_image(self.model))
        return super().generate(inputs, **kwargs)


def make_blank_image(model: PreTrainedModel) -> torch.Tensor:
    """What stands for an image where there is none: `[1, 3, H, W]`, as the model's tower takes it."""
    config = model.config.vision_config
    size = (getattr(config, "num_channels", 3), config.image_size, config.image_size)
    return torch.zeros(1, *size, device=model.device, dtype=model.dtype)


def leave_whole(quantization_config: Any) -> Any:
    """A copy of a quantiser's config that leaves out what has to stay as it is, beside what its user leaves out."""
    quantization_config = copy.deepcopy(quantization_config)
    is_dict = isinstance(quantization_config, dict)
    fields = quantization_config if is_dict else vars(quantization_config)
    for name in ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules"):  # of one quantiser or another
        if name in fields:
            fields[name] = list(dict.fromkeys([*(fields[name] or ()), *WHOLE]))
    if is_dict and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        fields["llm_int8_skip_modules"] = list(dict.fromkeys([*fields.get("llm_int8_skip_modules", ()), *WHOLE]))
    return quantization_config


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

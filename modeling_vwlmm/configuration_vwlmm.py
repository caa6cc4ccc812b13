# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of VW-LMM."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.models.llava.configuration_llava import LlavaConfig


# Every auto class that can load a saved folder. `register_for_auto_class` knows one model class at a time, while a
# folder that holds the whole model is also opened by `AutoModel` (feature extraction, vLLM).
AUTO_MAP = {
    "AutoConfig": "configuration_vwlmm.VWLMMConfig",
    "AutoModel": "modeling_vwlmm.VWLMMModel",
    "AutoModelForImageTextToText": "modeling_vwlmm.VWLMMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_vwlmm.VWLMMForConditionalGeneration",
}


@strict
class VWLMMConfig(LlavaConfig):
    """
    Configuration of [`VWLMMForConditionalGeneration`]: LLaVA's, and what visual words add to it.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision tower. CLIP-ViT-L/14-336px by default.
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the decoder. Llama by default.
        image_token_index (`int`, *optional*):
            Id of the image placeholder. By default `text_config.vocab_size`, one past the decoder's vocabulary, so
            that visual words are distributions over exactly the vocabulary of the LLM. An id inside the vocabulary
            works as well.
        adapter (`str`, *optional*, defaults to `"mlp"`):
            How patch features become what the decoder reads: a name in `modeling_vwlmm.adapters_vwlmm.ADAPTERS`.
        adapter_config (`dict`, *optional*, defaults to `{}`):
            What that adapter needs to know beside the sizes of tower and decoder. The MLP needs nothing.
        use_pseudo_image_features (`bool`, *optional*, defaults to `False`):
            Whether the decoder reads pseudo image features (section 2.3 of the paper, equation 8) in place of image
            features.
        trained_stages (`list[int]`, *optional*, defaults to `[]`):
            The training stages that have ended behind these weights, in order, with repeats. Written by
            [`VWLMMTrainer`].
        kwargs:
            Everything that `LlavaConfig` takes.

    Example:

    ```python
    >>> from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration

    >>> config = VWLMMConfig()  # CLIP-ViT-L/14-336px and Llama-7B
    >>> config.image_token_id
    32000
    ```
    """

    model_type = "vwlmm"
    # What a Trainer does not gather as predictions.
    keys_to_ignore_at_inference = ["past_key_values", "losses", "terms"]

    image_token_index: int | None = None
    adapter: str = "mlp"
    adapter_config: dict | None = None
    use_pseudo_image_features: bool = False
    trained_stages: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.image_token_index is None:
            self.image_token_index = self.text_config.vocab_size
        self.adapter_config = self.adapter_config or {}
        self.trained_stages = self.trained_stages or []
        self.auto_map = dict(AUTO_MAP)

    def to_dict(self) -> dict:
        """See `PreTrainedConfig.to_dict`. Parts keep their names on the Hub, and no folder of this machine."""
        fields = super().to_dict()
        for part in (fields["text_config"], fields["vision_config"]):
            if os.path.exists(part.get("_name_or_path", "")):
                part["_name_or_path"] = ""
        return fields


VWLMMConfig.register_for_auto_class("AutoConfig")
# `transformers serve` asks this table what a model is, and not `auto_map`.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[VWLMMConfig.model_type] = "VWLMMForConditionalGeneration"

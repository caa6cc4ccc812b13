# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Configurations of the model and of the visual tokenizer."""

import math
import os
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
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
VISUAL_TOKENIZER_AUTO_MAP = {
    "AutoConfig": "configuration_vwlmm.VWLMMVisualTokenizerConfig",
    "AutoModel": "visual_tokenizer_vwlmm.VWLMMVisualTokenizer",
}
TEMPERATURES = ("visual_word_temperature", "pseudo_image_feature_temperature")
# What says which visual words are learned, and whether they are read.
VISUAL_WORD_FIELDS = ("use_pseudo_image_features", *TEMPERATURES)


@strict
class VWLMMVisualTokenizerConfig(PreTrainedConfig):
    """
    Configuration of [`VWLMMVisualTokenizer`], LaVIT's dynamic visual tokenizer. The defaults are LaVIT's: an EVA-CLIP
    ViT-g/14, 16384 codes of 32 numbers.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the frozen vision tower. BLIP-2's ViT-g/14 by default, which is EVA-CLIP's.
        vision_feature_layer (`int`, *optional*, defaults to -1):
            Layer of the tower whose output is read, before the tower's last norm.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` drops the class token, `"full"` is for towers without one.
        hidden_size (`int`, *optional*):
            Width `C` of the patch features. By default the tower's.
        num_patches (`int`, *optional*):
            Patches `N` of one image. By default the tower's.
        num_merger_layers (`int`, *optional*, defaults to 12):
            Blocks of the token merger.
        num_decoder_layers (`int`, *optional*, defaults to 3):
            Blocks of the decoder, which rebuilds the features of all patches.
        num_attention_heads, intermediate_size (`int`, *optional*):
            Of the blocks of both. By default the tower's.
        num_codes (`int`, *optional*, defaults to 16384):
            Codes `K` of the codebook.
        code_dim (`int`, *optional*, defaults to 32):
            Numbers `d` of one code.
        condition_dims (`list[int]`, *optional*, defaults to `[]`):
            Widths of the text conditions of a diffusion model that the decoder's features are projected to, side by
            side. The decoders of the authors have them.
        pooled_condition_dim (`int`, *optional*):
            Width of its pooled condition, if it reads one (SDXL).
        selection (`str`, *optional*, defaults to `"threshold"`):
            How patches are kept, except in training: `"threshold"`, those whose probability reaches `threshold`;
            `"sample"`, by a draw, as the authors do, with `seed`; `"top_k"`, the best `round(keep_rate * N)`.
        threshold (`float`, *optional*):
            Probability from which a patch is kept. Training finds it.
        min_tokens (`int`, *optional*, defaults to 1):
            Patches that an image keeps at least, the most probable ones. 0 lets an image keep none.
        seed (`int`, *optional*, defaults to 0):
            Of the draw. Every image gets the same noise, so that its tokens do not depend on its neighbours.
        keep_rate (`float`, *optional*, defaults to 1/3):
            Share `rho` of patches that training aims at.
        ratio_weight (`float`, *optional*, defaults to 2.0):
            Weight `lambda` of the term that does so (equation 4 of the paper).
        commitment_weight (`float`, *optional*, defaults to 1.0):
            Weight of the mean squared distance of features and their codes.
        decoder_selects (`bool`, *optional*, defaults to `True`):
            Whether the selector learns through the decoder's attention, too, and not only through the merger's.
        ema_decay (`float`, *optional*, defaults to 0.99):
            Of the codebook's moving average.
        revive_after (`int`, *optional*, defaults to 20):
            Steps without use after which a code is put where features are.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Of the norms of selector, merger and decoder.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the decoder's new queries and positions. Linear layers start by Glorot's rule.
        kwargs:
            Everything that `PreTrainedConfig` takes.

    Raises:
        ValueError: If a number is outside of its range.
    """

    model_type = "vwlmm_visual_tokenizer"
    base_config_key = "visual_tokenizer_config"
    sub_configs = {"vision_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -1
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    hidden_size: int | None = None
    num_patches: int | None = None
    num_merger_layers: int = 12
    num_decoder_layers: int = 3
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    num_codes: int = 16384
    code_dim: int = 32
    condition_dims: list[int] | None = None
    pooled_condition_dim: int | None = None
    selection: Literal["threshold", "sample", "top_k"] = "threshold"
    threshold: float | None = None
    min_tokens: int = 1
    seed: int = 0
    keep_rate: float = 1 / 3
    ratio_weight: float = 2.0
    commitment_weight: float = 1.0
    decoder_selects: bool = True
    ema_decay: float = 0.99
    revive_after: int = 20
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            fields = dict(self.vision_config)
            self.vision_config = CONFIG_MAPPING[fields.pop("model_type", "blip_2_vision_model")](**fields)
        elif self.vision_config is None:
            self.vision_config = CONFIG_MAPPING["blip_2_vision_model"]()
        vision = self.vision_config
        self.hidden_size = self.hidden_size or vision.hidden_size
        self.num_patches = self.num_patches or (vision.image_size // vision.patch_size) ** 2
        self.num_attention_heads = self.num_attention_heads or vision.num_attention_heads
        # DINOv2 names a factor in place of its width.
        self.intermediate_size = self.intermediate_size or getattr(vision, "intermediate_size", 4 * vision.hidden_size)
        self.condition_dims = self.condition_dims or []
        self._check_ranges()
        self.auto_map = dict(VISUAL_TOKENIZER_AUTO_MAP)
        super().__post_init__(**kwargs)

    def _check_ranges(self) -> None:
        at_least_1 = ("hidden_size", "num_patches", "num_merger_layers", "num_decoder_layers", "num_codes", "code_dim")
        ranges = {
            **{name: (getattr(self, name) >= 1, "1 at least") for name in (*at_least_1, "intermediate_size")},
            "num_attention_heads": (
                self.num_attention_heads >= 1 and self.hidden_size % self.num_attention_heads == 0,
                f"a divisor of `hidden_size`, {self.hidden_size}",
            ),
            "threshold": (self.threshold is None or 0 <= self.threshold <= 1, "a probability, or None"),
            "min_tokens": (0 <= self.min_tokens <= self.num_patches, f"0 to `num_patches`, {self.num_patches}"),
            "keep_rate": (0 < self.keep_rate <= 1, "a share above 0, and 1 at most"),
            "ratio_weight": (0 <= self.ratio_weight < math.inf, "a finite number that is not negative"),
            "commitment_weight": (0 <= self.commitment_weight < math.inf, "a finite number that is not negative"),
            "ema_decay": (0 <= self.ema_decay < 1, "0 or more, and below 1"),
            "revive_after": (self.revive_after >= 0, "a number of steps that is not negative"),
            "layer_norm_eps": (0 < self.layer_norm_eps < math.inf, "a finite number above 0"),
            "initializer_range": (0 <= self.initializer_range < math.inf, "a finite number that is not negative"),
        }
        for name, (is_inside, expected) in ranges.items():
            if not is_inside:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; expected {expected}.")

    def to_dict(self) -> dict:
        """See `PreTrainedConfig.to_dict`."""
        # Transformers takes a class with "Tokenizer" in its name for one of texts, and puts a pair of names here.
        return super().to_dict() | {"auto_map": dict(VISUAL_TOKENIZER_AUTO_MAP)}

    @property
    def num_fixed_tokens(self) -> int | None:
        """Tokens that every image has with `selection="top_k"`; `None` where that depends on the image."""
        return max(round(self.keep_rate * self.num_patches), 1) if self.selection == "top_k" else None


def check_fields(config_class: type[PreTrainedConfig], given: Iterable[str]) -> None:
    """
    Checks keywords that are to become fields of a config, which takes any.

    Raises:
        TypeError: If one is no field.
    """
    known = {field.name for field in fields(config_class)} | {*config_class.attribute_map, "attn_implementation"}
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise TypeError(
                f"`{name}` is no field of {config_class.__name__}"
                + (f"; did you mean `{close[0]}`?" if close else ", nor anything else that is expected here.")
            )


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
            What that adapter needs to know beside the sizes of tower and decoder. The MLP and the token merger need
            nothing; of `"sa_perceiver"` it may have `max_patches` (4), `activation` (`"softmax"` or `"silu"`) and
            `distance_bias` (`True`).
        visual_tokenizer_config (`dict` or [`VWLMMVisualTokenizerConfig`], *optional*):
            Configuration of LaVIT's visual tokenizer, which selects what `adapter="token_merger"` keeps and whose
            codes the objective `codes` teaches. Without it the model has none.
        image_start_token_id, image_end_token_id, code_offset (`int`, *optional*):
            Ids of `[IMG]` and `[/IMG]`, which stand around an image, and of code 0. With a visual tokenizer, by
            default the last `2 + num_codes` rows of the decoder's vocabulary.
        use_pseudo_image_features (`bool`, *optional*, defaults to `False`):
            Whether the decoder reads pseudo image features (section 2.3 of the paper, equation 8) in place of image
            features.
        visual_word_temperature (`float`, *optional*, defaults to 1.0):
            `T` of the visual words `softmax(W_VM x / T)` that stage IV's decoder learns to predict, and that
            `get_visual_words` returns. 1.0 is the paper's; below it they are sharper.
        pseudo_image_feature_temperature (`float`, *optional*, defaults to 1.0):
            The same of the visual words that pseudo image features are made of.
        trained_stages (`list[int | str]`, *optional*, defaults to `[]`):
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
    visual_word_temperature: float | int = 1.0
    pseudo_image_feature_temperature: float | int = 1.0
    trained_stages: list[int | str] | None = None
    visual_tokenizer_config: dict | PreTrainedConfig | None = None
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    code_offset: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.visual_tokenizer_config, dict):
            self.visual_tokenizer_config = VWLMMVisualTokenizerConfig(**self.visual_tokenizer_config)
        if (tokenizer := self.visual_tokenizer_config) is not None:
            if self.code_offset is None:
                self.code_offset = self.text_config.vocab_size - tokenizer.num_codes
            if self.image_start_token_id is None:
                self.image_start_token_id, self.image_end_token_id = self.code_offset - 2, self.code_offset - 1
            if tokenizer.hidden_size != self.vision_config.hidden_size:
                raise ValueError(
                    f"The visual tokenizer reads patch features of {tokenizer.hidden_size} numbers, and those of the "
                    f"vision tower have {self.vision_config.hidden_size}; expected the tower that the tokenizer was "
                    "trained on."
                )
            for name in ("model_type", "image_size", "patch_size"):
                found, expected = (getattr(c, name, None) for c in (tokenizer.vision_config, self.vision_config))
                if found != expected:
                    raise ValueError(
                        f"The visual tokenizer was trained on a tower whose {name} is {found!r}, and the model's is "
                        f"{expected!r}; expected the tower that the tokenizer was trained on."
                    )
            for name in ("vision_feature_layer", "vision_feature_select_strategy"):
                if getattr(tokenizer, name) != getattr(self, name):
                    raise ValueError(
                        f"The visual tokenizer reads {name}={getattr(tokenizer, name)!r} of its tower, and the model "
                        f"{getattr(self, name)!r}; expected the same, for they share the tower."
                    )
            if not 2 <= self.code_offset <= self.text_config.vocab_size - tokenizer.num_codes:
                raise ValueError(
                    f"The codebook has {tokenizer.num_codes} codes from id {self.code_offset} on, and the decoder "
                    f"{self.text_config.vocab_size} tokens; expected a row of the decoder for each code. Resize the "
                    "decoder's embeddings, or load the tokenizer that it was trained with."
                )
        if self.image_token_index is None:
            self.image_token_index = self.text_config.vocab_size
        self.adapter_config = self.adapter_config or {}
        self.trained_stages = self.trained_stages or []
        self.auto_map = dict(AUTO_MAP)

    def __setattr__(self, name: str, value: Any) -> None:
        """
        Raises:
            ValueError: If a temperature is no number from 1e-30 to 1e30, also where it is set on a model's config.
        """
        # fp32 holds what logits are when they are divided by one of these.
        if name in TEMPERATURES and not 1e-30 <= value <= 1e30:
            limit = " For the most probable word alone, as T goes to 0, let stage IV learn `token_labels`."
            raise ValueError(
                f"`{name}` is {value}; expected a finite number above 0, from 1e-30 to 1e30."
                + (limit if name == "visual_word_temperature" else "")
            )
        super().__setattr__(name, value)

    def to_dict(self) -> dict:
        """See `PreTrainedConfig.to_dict`. Parts keep their names on the Hub, and no folder of this machine."""
        written = super().to_dict()
        for part in (written["text_config"], written["vision_config"]):
            if os.path.exists(part.get("_name_or_path", "")):
                part["_name_or_path"] = ""
        return written


VWLMMConfig.register_for_auto_class("AutoConfig")
# `transformers serve` asks this table what a model is, and not `auto_map`.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[VWLMMConfig.model_type] = "VWLMMForConditionalGeneration"

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""How a model is made from pretrained parts, and becomes a LLaVA: by the package, which does not travel."""

from importlib import import_module
from typing import Any

from transformers import LlavaForConditionalGeneration, PreTrainedModel


class MadeOfParts:
    """A model that is made from a vision tower and an LLM, or a LLaVA, and that becomes a LLaVA again."""

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | PreTrainedModel, text: str | PreTrainedModel, **config: Any
    ) -> Any:
        """The model that stage I starts from. See [`modeling_vwlmm.assembly.from_vision_text_pretrained`]."""
        # Not a relative import: it would make the file travel with every checkpoint.
        return import_module("modeling_vwlmm.assembly").from_vision_text_pretrained(cls, vision, text, **config)

    @classmethod
    def from_visual_tokenizer(
        cls, visual_tokenizer: str | PreTrainedModel, text: str | PreTrainedModel, **config: Any
    ) -> Any:
        """The model that LaVIT's stage 2 starts from. See [`modeling_vwlmm.assembly.from_visual_tokenizer`]."""
        return import_module("modeling_vwlmm.assembly").from_visual_tokenizer(cls, visual_tokenizer, text, **config)

    @classmethod
    def from_llava(cls, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
        """The model that stage III starts from with a LLaVA at hand. See [`modeling_vwlmm.assembly.from_llava`]."""
        return import_module("modeling_vwlmm.assembly").from_llava(cls, name_or_path, **kwargs)

    def to_llava(self) -> LlavaForConditionalGeneration:
        """This model as Transformers' own LLaVA. See [`modeling_vwlmm.assembly.to_llava`]."""
        return import_module("modeling_vwlmm.assembly").to_llava(self)

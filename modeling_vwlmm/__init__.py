# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""VW-LMM: multi-modal auto-regressive modeling via visual words. Importing this registers the auto classes."""

from importlib import import_module

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from processing_vwlmm import VWLMMProcessor

from .configuration_vwlmm import VWLMMConfig, VWLMMVisualTokenizerConfig
from .loss_vwlmm import linear_kl_div
from .modeling_vwlmm import VWLMMForConditionalGeneration, VWLMMModel
from .visual_tokenizer_vwlmm import VWLMMVisualTokenizer


AutoConfig.register(VWLMMConfig.model_type, VWLMMConfig)
AutoModel.register(VWLMMConfig, VWLMMModel)
AutoConfig.register(VWLMMVisualTokenizerConfig.model_type, VWLMMVisualTokenizerConfig)
AutoModel.register(VWLMMVisualTokenizerConfig, VWLMMVisualTokenizer)
AutoModelForImageTextToText.register(VWLMMConfig, VWLMMForConditionalGeneration)
AutoModelForMultimodalLM.register(VWLMMConfig, VWLMMForConditionalGeneration)
AutoProcessor.register(VWLMMConfig, VWLMMProcessor)

# Loaded on first use: who only runs the model does not wait for TRL and datasets.
_LAZY = {
    "VWLMMTrainer": ".training",
    "VWLMMTrainingArguments": ".training",
    "convert_lavit_checkpoint": ".conversion_lavit",
    "convert_official_checkpoint": ".conversion",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)


__all__ = [
    "VWLMMConfig",
    "VWLMMForConditionalGeneration",
    "VWLMMModel",
    "VWLMMVisualTokenizer",
    "VWLMMVisualTokenizerConfig",
    "linear_kl_div",
    *_LAZY,
]

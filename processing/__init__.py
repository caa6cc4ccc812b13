# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
from .cognition_alignment import add_cognition_alignment
from .llava_dataset import load_llava_dataset
from .mixtures import mix_datasets
from .processing_vwlmm import VWLMMProcessor


__all__ = ["VWLMMProcessor", "add_cognition_alignment", "load_llava_dataset", "mix_datasets"]

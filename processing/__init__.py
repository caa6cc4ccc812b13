# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
from .llava_dataset import load_llava_dataset
from .mixtures import mix_datasets
from .processing_vwlmm import VWLMMProcessor


__all__ = ["VWLMMProcessor", "load_llava_dataset", "mix_datasets"]

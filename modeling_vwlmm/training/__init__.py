# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The training stages of VW-LMM, LaVIT and VLSA as one trainer and its arguments."""

from .arguments import VWLMMTrainingArguments
from .checkpoints import TrainingInterrupted, find_last_checkpoint
from .image_codes import tokenize_images
from .reconstruction import Epigone, Reconstruction
from .trainer import VWLMMTrainer
from .training_modules import attach_training_modules
from .watching import BenchmarkCallback, TrainingDiverged


__all__ = [
    "BenchmarkCallback",
    "Epigone",
    "Reconstruction",
    "TrainingDiverged",
    "TrainingInterrupted",
    "VWLMMTrainer",
    "VWLMMTrainingArguments",
    "attach_training_modules",
    "find_last_checkpoint",
    "tokenize_images",
]

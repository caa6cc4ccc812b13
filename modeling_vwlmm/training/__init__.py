# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The four training stages of VW-LMM as one trainer and its arguments."""

from .arguments import VWLMMTrainingArguments
from .checkpoints import TrainingInterrupted, find_last_checkpoint
from .trainer import VWLMMTrainer
from .training_modules import attach_training_modules
from .watching import BenchmarkCallback, TrainingDiverged


__all__ = [
    "BenchmarkCallback",
    "TrainingDiverged",
    "TrainingInterrupted",
    "VWLMMTrainer",
    "VWLMMTrainingArguments",
    "attach_training_modules",
    "find_last_checkpoint",
]

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of samples, for TRL's trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..objectives_vwlmm import Objective, find_supervised_positions


# What can be wrong with a sample: its messages or images, an image file, or messages that the template refuses.
SAMPLE_ERRORS = (ValueError, OSError, TemplateError)


@dataclass
class VWLMMDataCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator for vision data, whose errors name the sample, and which never supervises a placeholder.

    It adds what `objectives` read of a sample, and `supervised_positions`, as `forward` takes them: found here, on the
    host, they do not make it wait for the device.

    With `packing`, the samples of a batch stand behind each other in one row without padding: `[1, L]`, and
    `position_ids` that start again with every sample, by which attention keeps them apart.
    """

    packing: bool = False
    objectives: Mapping[str, Objective] = field(default_factory=dict)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """See `DataCollatorMixin.torch_call`."""
        try:
            batch = self._collate(examples)
        except SAMPLE_ERRORS:
            for example in examples:
                try:
                    self._collate([example])
                except SAMPLE_ERRORS as error:
                    raise ValueError(f"Sample {example.get('id')!r}: {error}") from error
            raise
        image_token_id = self.processor.image_token_id
        batch["labels"][batch["input_ids"] == image_token_id] = -100
        if self.packing:
            batch = pack(batch)
        batch["supervised_positions"] = find_supervised_positions(self.objectives, batch, image_token_id)
        return batch

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        for objective in self.objectives.values():
            batch |= objective.collate(examples, self.processor)
        return batch


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Puts the rows of a padded batch, `[B, L]`, into one without padding, `[1, L']`; images keep their order."""
    is_token = batch.pop("attention_mask").bool()  # [B, L]
    position_ids = is_token.cumsum(dim=1) - 1  # [B, L]
    # Nothing stands before the first token of a sample, so nothing can predict it.
    batch["labels"][position_ids == 0] = -100
    packed = {name: batch[name][is_token][None] for name in ("input_ids", "labels")}  # [1, L']
    return {**batch, **packed, "position_ids": position_ids[is_token][None]}

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The codes of a dataset's images, computed once."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin


def tokenize_images(model: PreTrainedModel, processor: ProcessorMixin) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """
    What `dataset.map(tokenize_images(model, processor), batched=True, batch_size=32)` calls.

    It adds the column `image_codes`, `[images][N]` codes of a sample and -1 for patches that are dropped, which the
    objective `codes` learns in place of what it would compute in every step.

    Args:
        model ([`VWLMMForConditionalGeneration`] or [`VWLMMVisualTokenizer`]): The tokenizer, or a model with one.
        processor ([`VWLMMProcessor`]): What makes pixel values of images.
    """
    tokenizer = getattr(getattr(model, "model", model), "visual_tokenizer", None) or model

    def add_codes(batch: dict[str, Any]) -> dict[str, Any]:
        images = [image for sample in batch["images"] for image in sample or []]
        codes: list[list[int]] = []
        if images:
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]  # [I, 3, H, W]
            codes = tokenizer.encode(pixel_values.to(tokenizer.device)).patch_codes.tolist()  # [I][N]
        rows, start = [], 0
        for sample in batch["images"]:
            rows.append(codes[start : start + len(sample or [])])
            start += len(sample or [])
        return {"image_codes": rows}

    return add_codes

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The codes of a dataset's images, computed once."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from ..visual_tokenizer_vwlmm import VWLMMVisualTokenizer


def tokenize_images(model: PreTrainedModel, processor: ProcessorMixin) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """
    What `dataset.map(tokenize_images(model, processor), batched=True, batch_size=32)` calls.

    It adds the column `image_codes`, `[images][N]` codes of a sample and -1 for patches that are dropped, which the
    objective `codes` learns in place of what it would compute in every step.

    Args:
        model ([`VWLMMForConditionalGeneration`] or [`VWLMMVisualTokenizer`]): The tokenizer, or a model with one.
        processor ([`VWLMMProcessor`]): What makes pixel values of images.

    Raises:
        ValueError: If the model has no visual tokenizer, or, when it is called, if the dataset has no column `images`,
            lists of images, or `image`.
    """
    is_tokenizer = isinstance(model, VWLMMVisualTokenizer)
    tokenizer = model if is_tokenizer else getattr(getattr(model, "model", None), "visual_tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"`model`, a {type(model).__name__}, has no visual tokenizer, which makes the codes. Pass the "
            "VWLMMVisualTokenizer itself, or a model that `from_visual_tokenizer` has made."
        )

    def add_codes(batch: dict[str, Any]) -> dict[str, Any]:
        if "images" not in batch and "image" not in batch:
            raise ValueError(
                f"The dataset has the columns {', '.join(batch)}, and codes are made of `images`, lists of images, or "
                "of `image`."
            )
        samples = batch.get("images") or [[] if image is None else [image] for image in batch["image"]]
        images = [image for sample in samples for image in sample or []]
        codes: list[list[int]] = []
        if images:
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]  # [I, 3, H, W]
            codes = tokenizer.encode(pixel_values.to(tokenizer.device)).patch_codes.tolist()  # [I][N]
        rows, start = [], 0
        for sample in samples:
            rows.append(codes[start : start + len(sample or [])])
            start += len(sample or [])
        return {"image_codes": rows}

    return add_codes

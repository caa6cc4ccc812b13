# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Images of the task in `small_world.yaml`."""

from pathlib import Path

from PIL import Image


def doc_to_visual(doc: dict, lmms_eval_specific_kwargs: dict) -> list[Image.Image]:
    """The image of a question, from the folder that the task's `lmms_eval_specific_kwargs` name."""
    return [Image.open(Path(lmms_eval_specific_kwargs["image_folder"]) / doc["image"])]

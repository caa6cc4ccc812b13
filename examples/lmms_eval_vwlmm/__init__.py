# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
VW-LMM in lmms-eval, which finds it by itself where both are installed:

    lmms-eval --model vwlmm --model_args pretrained=runs/vicuna_7b/stage4 --tasks gqa,pope --batch_size 16

`accelerate launch -m lmms_eval ...` in its place spreads the questions over all GPUs.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """
    The entry point that `pyproject.toml` names in the group `lmms_eval.models`. Every run of lmms-eval loads it, so it
    imports little.
    """
    # lmms-eval loads entry points while it imports its models. Outside this function, this would import them once
    # more.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vwlmm", chat_class_path="lmms_eval_vwlmm.model.VWLMM")

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
VW-LMM in lmms-eval, which finds it by itself where both are installed:

    lmms-eval --model vwlmm --model_args pretrained=runs/vicuna_7b/stage4 --tasks gqa,pope --batch_size 16

`accelerate launch -m lmms_eval ...` in its place spreads the questions over all GPUs.
"""


def manifest():
    """What `pyproject.toml` names as an entry point of the group `lmms_eval.models`, and no more: every run loads it."""
    # lmms-eval loads entry points while it imports its models. Outside this function, this would import them once more.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vwlmm", chat_class_path="lmms_eval_vwlmm.model.VWLMM")

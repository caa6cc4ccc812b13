# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What a batch without images runs in their place, so that all processes, and all batches, train the same modules."""

import torch

from ..adapters_vwlmm import selects_tokens
from ..modeling_vwlmm import VWLMMModel
from ..outputs_vwlmm import VWLMMImageFeaturesOutput
from ..vision_vwlmm import make_blank_image


def encode_no_images(model: VWLMMModel, runs_tower: bool, reads_codes: bool = False) -> VWLMMImageFeaturesOutput:
    """
    Image features without a row, made by every module that images pass and connected with their parameters, which get
    a gradient of zero.

    Args:
        model ([`VWLMMModel`]): The model.
        runs_tower (`bool`): Whether the vision tower is among these modules. It has to be where parameters are sharded
            (FSDP, ZeRO-3), for each module gathers its own on all processes together, and where it trains under DDP.
            Elsewhere it would run in vain.
        reads_codes (`bool`, *optional*, defaults to `False`): Whether the embeddings of codes are looked up.

    Returns:
        [`VWLMMImageFeaturesOutput`] for no images.
    """
    config = model.config
    options = {"device": model.device, "dtype": model.dtype}
    keep_mask = as_codes = None
    if reads_codes:
        as_codes = torch.full((1, config.image_seq_length), -1, device=model.device)
    if selects_tokens(config):
        # As other processes have it, which do not ask the visual tokenizer again.
        keep_mask = torch.ones(1, config.image_seq_length, dtype=torch.bool, device=model.device)
    if runs_tower:
        images = model.get_image_features(make_blank_image(model), keep_mask=keep_mask, read_as_codes=as_codes)
    else:
        features = torch.zeros(1, config.image_seq_length, model.get_patch_feature_size(), **options)
        images = model.adapt(features, keep_mask=keep_mask, read_as_codes=as_codes)
    return VWLMMImageFeaturesOutput(
        pooler_output=[features[:0] for features in images.pooler_output],
        image_features=[features[:0] for features in images.image_features],
        patch_features=images.patch_features[:0],
        keep_mask=None if images.keep_mask is None else images.keep_mask[:0],
        global_features=None if images.global_features is None else images.global_features[:0],
    )

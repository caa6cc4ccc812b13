# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Packed rows: samples behind each other, told apart by positions that start again."""

from typing import Any

import torch
from transformers import Cache
from transformers.utils import torch_compilable_check


def keep_samples_apart(
    position_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
) -> dict[str, Any]:
    """
    What the decoder has to be told so that no sample of a packed row attends to another: Transformers tells them apart
    by their positions, but not where there is a cache or a mask.

    Reads the device where a cache or a mask could come, which is not so in a step of training.

    Args:
        position_ids (`torch.LongTensor` of shape `[B, L]` or `[1, L]`, *optional*): Positions, from 0 again in every
            sample.
        attention_mask (`torch.Tensor` of shape `[B, L]`, *optional*): Whether each position is a token.
        past_key_values (`Cache`, *optional*): What the decoder has read before.
        use_cache (`bool`, *optional*): Whether it is to remember what it reads.

    Returns:
        `dict` of `attention_mask` and, for packed rows, `use_cache`.

    Raises:
        ValueError: If packed rows come with a cache to use, or with a mask that leaves out positions. In a compiled
            graph a `RuntimeError`, also for any mask or cache.
    """
    arguments = {"attention_mask": attention_mask}
    is_told = attention_mask is None and past_key_values is None and use_cache is False
    if position_ids is None or position_ids.ndim != 2 or is_told:
        return arguments
    is_compiling = torch.compiler.is_compiling()
    if is_compiling and attention_mask is None and past_key_values is None and use_cache is None:
        # A graph cannot look whether the rows are packed: as if they were, which others notice by their cache alone.
        return {"attention_mask": None, "use_cache": False}
    if attention_mask is not None:
        if attention_mask.shape[1:] != position_ids.shape[1:]:  # of more than these positions
            return arguments
        if len(position_ids) == 1:  # those of every row
            position_ids = position_ids.expand(len(attention_mask), -1)
    starts = position_ids.diff(dim=1) != 1  # [B, L - 1]
    if attention_mask is not None:
        starts &= (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    if is_compiling:
        torch_compilable_check(
            ~starts.any(),
            "`position_ids` start again within a row, as those of packed samples do. A compiled model keeps them "
            "apart with `use_cache=False`, and without `attention_mask`.",
        )
        return arguments
    if not starts.any():
        return arguments
    if use_cache or past_key_values is not None:
        raise ValueError(
            "`position_ids` start again within a row, as those of packed samples do, and a cache is to be used, which "
            "would mix the samples. Leave `use_cache` and `past_key_values` out, or pass a sample in each row."
        )
    if attention_mask is not None and not attention_mask.bool().all():
        raise ValueError(
            "`position_ids` start again within a row, as those of packed samples do, and `attention_mask` leaves out "
            "positions. Leave it out: in packed rows padding has position 0."
        )
    return {"attention_mask": None, "use_cache": False}

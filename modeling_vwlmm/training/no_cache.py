# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""A cache that keeps nothing, so that the host need not look for packed rows."""

from typing import Any

import torch
from transformers import DynamicCache


class NoCache(DynamicCache):
    """
    Keys and values pass through it. Beside a cache Transformers knows that a row is one sample; without, it looks into
    the positions of every batch, and the host waits for the device.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Cache.update`. Keys and values, `[B, heads, L, D / heads]`, are returned as they come."""
        return key_states, value_states

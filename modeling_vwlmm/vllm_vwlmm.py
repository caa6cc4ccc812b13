# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What vLLM needs of the model."""

import torch
from torch import nn


class _PlaceholderAsFirstToken:
    """Token embeddings, where any token can stand in for the placeholder, which has none."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids.masked_fill(input_ids >= self.num_embeddings, 0))  # [B, L, D]


def look_placeholders_up_as_first_token(embeddings: nn.Embedding) -> None:
    """
    Lets the placeholder, one past the vocabulary, be looked up: vLLM does so itself, past the model's own look-up. It
    swaps a bare `nn.Embedding` for its own, and keeps what a subclass adds.
    """
    embeddings.__class__ = type("TokenEmbedding", (_PlaceholderAsFirstToken, type(embeddings)), {})

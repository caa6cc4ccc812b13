# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Image placeholders in a text: replaced, found and checked against the images, also where Transformers or vLLM look
tokens up or propose them themselves.

Shapes: `B` batch, `L` sequence length, `I` images, `N` image tokens of one image, `D` hidden size of the decoder.
"""

from typing import Any

import torch
from torch import nn
from transformers.generation import CandidateGenerator
from transformers.utils import logging, torch_compilable_check

from .configuration_vwlmm import VWLMMConfig


logger = logging.get_logger(__name__)


def has_embedding(config: VWLMMConfig) -> bool:
    """Whether the placeholder is a token of the decoder's vocabulary. By default it is one past it."""
    return config.image_token_id < config.text_config.vocab_size


def replace_placeholders(token_ids: torch.Tensor, config: VWLMMConfig, token_id: int) -> torch.Tensor:
    """Token ids `[B, L]` with another one in place of placeholders that have no embedding and no logit."""
    if has_embedding(config):
        return token_ids
    return token_ids.masked_fill(token_ids == config.image_token_id, token_id)


def check_no_placeholder(
    input_ids: torch.Tensor | None,
    config: VWLMMConfig,
    image_positions: torch.Tensor | None = None,
    is_learned: bool = False,
) -> None:
    """
    Checks that a text without images has no placeholder.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, L]`, *optional*): The text.
        config ([`VWLMMConfig`]): Names the placeholder.
        image_positions (`torch.LongTensor` of shape `[I * N]`, *optional*): Where the placeholders are, if they have
            been found; else they are looked for here, and the host waits for it.
        is_learned (`bool`, *optional*, defaults to `False`): Whether the model learns from this text.

    Raises:
        ValueError: If there is one. Where it has an embedding, which LLaVA reads in silence, and nothing is learned,
            there is a warning.
    """
    # A decoding step feeds one token, its own: the check would only make the host wait.
    if input_ids is None or input_ids.shape[1] == 1 or (image_positions is not None and not len(image_positions)):
        return
    is_text = input_ids != config.image_token_id  # [B, L]
    message = (
        f"Found image tokens (id {config.image_token_id}) in `input_ids`, but no images. Pass `pixel_values`, as the "
        "processor returns them."
    )
    if is_learned or not has_embedding(config):
        torch_compilable_check(is_text.all(), message)
    elif not torch.compiler.is_compiling() and not is_text.all():
        logger.warning_once(message)


def place_image_features(
    inputs_embeds: torch.Tensor,
    image_features: torch.Tensor,
    input_ids: torch.Tensor | None,
    embeddings: nn.Module,
    config: VWLMMConfig,
    image_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Puts image features in place of the placeholders.

    Args:
        inputs_embeds (`torch.Tensor` of shape `[B, L, D]`): Embeddings of the text.
        image_features (`torch.Tensor` of shape `[I * N, D]`): What to place.
        input_ids (`torch.LongTensor` of shape `[B, L]`, *optional*): Token ids with placeholders. Without them,
            placeholders are recognised by their embedding, which only those inside the vocabulary have.
        embeddings (`nn.Module`): What makes embeddings.
        config ([`VWLMMConfig`]): Names the placeholder.
        image_positions (`torch.LongTensor` of shape `[I * N]`, *optional*): Where the placeholders are, counted
            through the rows (`n + L * row`), if they have been found; else they are looked for here, and the host
            waits for it, forward and backward.

    Returns:
        `torch.Tensor` of shape `[B, L, D]`.

    Raises:
        ValueError: If the number of placeholders and of image features differ.
    """
    if image_positions is not None:
        _check_numbers(len(image_positions), len(image_features), config)
        return inputs_embeds.flatten(0, 1).index_copy(0, image_positions, image_features).view_as(inputs_embeds)
    is_image = find_placeholders(inputs_embeds, input_ids, embeddings, config)  # [B, L]
    _check_numbers(is_image.sum(), len(image_features), config)
    return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), image_features)


def find_placeholders(
    inputs_embeds: torch.Tensor, input_ids: torch.Tensor | None, embeddings: nn.Module, config: VWLMMConfig
) -> torch.Tensor:
    """Where the placeholders are, `[B, L]`. Arguments are those of [`place_image_features`]."""
    if input_ids is not None:
        return input_ids == config.image_token_id
    if has_embedding(config):
        placeholder = embeddings(torch.tensor(config.image_token_id, device=inputs_embeds.device))  # [D]
        return (inputs_embeds == placeholder).all(dim=-1)
    raise ValueError(
        f"The image placeholder (id {config.image_token_id}) has no embedding: it is past the vocabulary of "
        f"{config.text_config.vocab_size} tokens. With `pixel_values`, pass `input_ids` instead of `inputs_embeds`."
    )


def _check_numbers(num_placeholders: int | torch.Tensor, num_image_features: int, config: VWLMMConfig) -> None:
    torch_compilable_check(
        num_placeholders == num_image_features,
        lambda: (
            f"Image features and image tokens do not match: found {num_placeholders} image tokens (id "
            f"{config.image_token_id}) in the text and {num_image_features} image features. Pass one image for each "
            "`<image>` of the prompts, and a `max_length` that does not cut image tokens."
        ),
    )


def propose_without_images(generator: CandidateGenerator, image_token_id: int) -> CandidateGenerator:
    """
    Lets a text-only decoder, or the prompt itself, propose tokens: it gets no images, so it neither knows the
    placeholder nor may propose it.

    Args:
        generator (`CandidateGenerator`): What proposes tokens. It is changed in place.
        image_token_id (`int`): Id of the placeholder.
    """
    propose = generator.get_candidates

    def get_candidates(input_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        text_ids = input_ids.masked_fill(input_ids == image_token_id, 0)  # [1, L]
        candidate_ids, candidate_logits = propose(text_ids, **kwargs)  # [1, L + candidates]
        candidate_ids = candidate_ids.masked_fill(candidate_ids == image_token_id, 0)
        candidate_ids[:, : input_ids.shape[1]] = input_ids
        return candidate_ids, candidate_logits

    generator.get_candidates = get_candidates
    return generator


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

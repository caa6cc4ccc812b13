"""How long a prompt may be."""

import math

from transformers import BatchFeature

from modeling_vwlmm import VWLMMForConditionalGeneration
from modeling_vwlmm.adapters_vwlmm import selects_tokens
from modeling_vwlmm.dropping_vwlmm import find_kept_positions


def check_length(model: VWLMMForConditionalGeneration, inputs: BatchFeature) -> float:
    """
    How many tokens the model can write behind prompts, infinitely many where nothing bounds what the LLM reads.

    Raises:
        ValueError: If prompts are longer than what the LLM reads, where dropped image tokens take no room.
    """
    is_read = inputs["attention_mask"].bool()  # [B, L]
    most = getattr(model.config.text_config, "max_position_embeddings", None) or math.inf
    if is_read.sum(dim=1).max() > most and "pixel_values" in inputs and selects_tokens(model.config):
        keep_mask, *_ = model.model.select_tokens(inputs["pixel_values"])  # [I, N]
        is_read &= find_kept_positions(keep_mask, inputs["input_ids"] == model.config.image_token_id)
    if (longest := int(is_read.sum(dim=1).max())) > most:
        raise ValueError(
            f"A prompt has {longest} tokens, and the model reads {most} at most. Put fewer examples in front of a "
            "question, or less into a conversation."
        )
    return most - longest

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Image tokens that an adapter drops. An image stays `N` placeholders, of which the decoder reads those that are kept:
what it returns is what it returns for a prompt without the others.

Shapes: `B` batch, `L` sequence length, `L'` most positions that a row keeps, `B'` rows that take what is kept, `I`
images, `N` image tokens of one image, `D` hidden size of the decoder.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.generation import CandidateGenerator

from .adapters_vwlmm import selects_tokens
from .placeholders_vwlmm import find_placeholders


def find_kept_positions(
    keep_mask: torch.Tensor, is_image: torch.Tensor, image_positions: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Which positions of a batch are kept: all but the placeholders of dropped image tokens.

    Args:
        keep_mask (`torch.BoolTensor` of shape `[I, N]`): Which image tokens are kept.
        is_image (`torch.BoolTensor` of shape `[B, L]`): Where the placeholders are.
        image_positions (`torch.LongTensor` of shape `[I * N]`, *optional*): The same, counted through the rows.

    Returns:
        `torch.BoolTensor` of shape `[B, L]`.
    """
    kept = keep_mask.flatten().to(is_image.device)  # [I * N]
    everywhere = torch.ones_like(is_image)
    if image_positions is not None:
        return everywhere.flatten().index_copy(0, image_positions.to(is_image.device), kept).view_as(is_image)
    return everywhere.masked_scatter(is_image, kept)


def count_positions(is_kept: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """
    Positions that count what is kept, `[B, L]`: from 0 in every row, or where `position_ids` start again, as those of
    packed samples do.
    """
    before = is_kept.long().cumsum(dim=1) - is_kept.long()  # [B, L]
    if position_ids is None:
        return before
    starts = torch.zeros_like(before)
    starts[:, 1:] = (position_ids.diff(dim=1) <= 0) * before[:, 1:]
    return before - starts.cummax(dim=1).values


def check_attention_reaches_all(config: PreTrainedConfig) -> None:
    """
    Raises `ValueError` for a decoder whose layers see a window of slots, or carry a state through them: they would
    count those of dropped placeholders.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention"} or (not layer_types and getattr(config, "sliding_window", None)):
        raise ValueError(
            f"This decoder ({config.model_type}) does not see all positions from all of its layers, so that dropped "
            "image tokens cannot be masked while there is a cache. Keep a fixed number of them, with "
            '`selection="top_k"` of the visual tokenizer, or call `forward` with `use_cache=False`.'
        )


def run_decoder(
    decoder: nn.Module,
    inputs_embeds: torch.Tensor,
    is_kept: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Mapping[str, Any]:
    """
    Runs a decoder over what is kept. Behind a dropped position stands the output of the last one that is kept, so that
    what comes next is predicted from there.

    Where nothing is cached, which is so in training, dropped positions are cut away and cost nothing: rows differ in
    what they keep, and short ones share a row with others. Else they keep their slots, and are masked, also for what
    reads the cache later: it remembers them.

    Args:
        decoder (`nn.Module`): The decoder.
        inputs_embeds (`torch.Tensor` of shape `[B, L, D]`): What it reads.
        is_kept (`torch.BoolTensor` of shape `[B, L]`, *optional*): The positions that are kept, if not all are.
        attention_mask (`torch.Tensor` of shape `[B, cached + L]`, *optional*): 0 where a position is padding.
        position_ids (`torch.LongTensor` of shape `[B, L]`, *optional*): Of packed samples, else they are not used.
        past_key_values, use_cache, kwargs: As the decoder takes them.

    Raises:
        ValueError: If dropped positions cannot be masked, or the mask is none of padding.
    """
    arguments = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
    if use_cache is not None:
        arguments["use_cache"] = use_cache
    cached = getattr(past_key_values, "is_kept", None)  # [B, cached]
    if is_kept is None:
        # For a static cache `generate` makes the whole mask itself, and of a prompt it has masked what is dropped.
        is_given = attention_mask is not None and position_ids is not None
        is_prepared = is_given and getattr(attention_mask, "ndim", None) != 2
        if cached is None or is_prepared or past_key_values.get_seq_length() == 0:
            return decoder(inputs_embeds=inputs_embeds, **arguments, **kwargs)
        is_kept = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    num_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    all_kept = _join(cached, num_cached, is_kept, attention_mask)  # [B, cached + L]
    is_kept = all_kept[:, num_cached:]
    positions = count_positions(all_kept, None if num_cached else position_ids)[:, num_cached:]  # [B, L]
    caches = num_cached > 0 or use_cache or (use_cache is None and not decoder.training)
    if caches:
        check_attention_reaches_all(decoder.config)
        arguments |= {"attention_mask": all_kept.long(), "position_ids": positions}
        slots = torch.arange(is_kept.numel(), device=is_kept.device).view_as(is_kept)  # [B, L]
    else:
        slots, shape = _find_slots(is_kept, shares_rows=reads_packed_rows(decoder))  # [B, L], (B', L')
        sources = torch.full((shape.numel() + 1,), -1, device=slots.device)  # the last one is of what is dropped
        places = torch.where(is_kept, slots, shape.numel()).flatten()  # [B * L]
        sources = sources.scatter(0, places, torch.arange(len(places), device=slots.device))[:-1]  # [B' * L']
        # What fills a row up stands behind it, at position 0 like the start of a sample, where nothing sees it.
        positions = (positions.flatten()[sources] * (sources >= 0)).view(shape)  # [B', L']
        index = sources.clamp_min(0).to(inputs_embeds.device)
        inputs_embeds = inputs_embeds.flatten(0, 1).index_select(0, index).unflatten(0, shape)  # [B', L', D]
        arguments |= {"attention_mask": None, "use_cache": False}
        if position_ids is not None or shape[0] < len(is_kept):
            # A cache, though it caches nothing, would tell the decoder that a row is one sample.
            arguments |= {"position_ids": positions, "past_key_values": None}
    outputs = decoder(inputs_embeds=inputs_embeds, **arguments, **kwargs)
    if caches and outputs.past_key_values is not None:
        outputs.past_key_values.is_kept = all_kept
    first = slots[:, :1]  # of each row of the batch
    last_kept = first + ((slots - first) * is_kept).cummax(dim=1).values  # [B, L]

    def spread(hidden: torch.Tensor) -> torch.Tensor:
        index = last_kept.to(hidden.device)
        return hidden.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)  # [B, L, D]

    outputs.last_hidden_state = spread(outputs.last_hidden_state)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(spread(hidden) for hidden in outputs.hidden_states)
    return outputs


def _join(
    cached: torch.Tensor | None, num_cached: int, is_kept: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """What is kept of all positions, those in a cache before those that are read: `[B, cached + L]`."""
    if cached is None:
        cached = is_kept.new_ones(len(is_kept), num_cached)
    if len(cached) != len(is_kept):
        raise ValueError(
            f"A cache of {len(cached)} rows is given for {len(is_kept)}, and which image tokens were dropped is known "
            "of the former alone. Leave `past_key_values` out, or let `generate` handle it."
        )
    more = is_kept.new_ones(len(is_kept), max(num_cached - cached.shape[1], 0))  # read by others, who drop nothing
    all_kept = torch.cat([cached[:, :num_cached].to(is_kept.device), more, is_kept], dim=1)
    if attention_mask is None:
        return all_kept
    if getattr(attention_mask, "shape", None) != all_kept.shape:
        raise ValueError(
            f"`attention_mask` is of another shape than {tuple(all_kept.shape)}, that of the tokens, those in a cache "
            "among them. Where image tokens are dropped it has to say what is padding, `[B, cached + L]`."
        )
    return all_kept & attention_mask.bool()


def reads_packed_rows(decoder: nn.Module) -> bool:
    """Whether a decoder keeps samples of one row apart by their positions: attention does, and no other state."""
    layer_types = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    return layer_types <= {"full_attention", "sliding_attention"} and not getattr(decoder, "_is_stateful", False)


def _find_slots(is_kept: torch.Tensor, shares_rows: bool) -> tuple[torch.Tensor, torch.Size]:
    """
    Where what is kept goes, counted through the rows that take it: each row of the batch, longest first, behind others
    in the first row with room. A dropped position has the slot of what was kept before it, or the first of its row.
    """
    lengths = is_kept.sum(dim=1).tolist()  # [B]
    longest = max(*lengths, 1)
    firsts, ends = [0] * len(lengths), []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room = (row for row, end in enumerate(ends) if shares_rows and end + lengths[index] <= longest)
        if (row := next(room, len(ends))) == len(ends):
            ends.append(0)
        firsts[index] = row * longest + min(ends[row], longest - 1)
        ends[row] += lengths[index]
    ranks = (is_kept.long().cumsum(dim=1) - 1).clamp_min(0)  # [B, L]
    return ranks + torch.tensor(firsts, device=ranks.device).unsqueeze(1), torch.Size([len(ends), longest])


class GeneratesFromKeptTokens:
    """A model whose adapter may drop image tokens: while it generates, their slots are masked."""

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args: Any
    ) -> dict[str, Any]:
        # Private: the one place behind the images and before prompts are repeated for beams. Every later step extends
        # mask and positions by itself.
        self._check_cache(inputs_tensor, model_kwargs)
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, model_kwargs, *args)
        images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        keep_mask = None if images is None else images.get("keep_mask")
        if keep_mask is None:
            return model_kwargs
        check_attention_reaches_all(self.config.text_config)
        input_ids = inputs_tensor if inputs_tensor.ndim == 2 else model_kwargs.get("input_ids")
        embeds = inputs_tensor if inputs_tensor.ndim == 3 else model_kwargs.get("inputs_embeds")
        is_image = find_placeholders(embeds, input_ids, self.get_input_embeddings(), self.config)  # [B, L]
        is_kept = find_kept_positions(keep_mask, is_image)  # [B, L]
        if model_kwargs.get("attention_mask") is not None:  # which `generate` leaves out where nothing is padding
            is_kept = is_kept & model_kwargs["attention_mask"].bool()
        images["keep_mask"] = None  # what it says is in the mask from here on
        masked = {"attention_mask": is_kept.long(), "position_ids": count_positions(is_kept)}
        return model_kwargs | masked | {"is_kept": is_kept}

    def prepare_inputs_for_generation(
        self,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,
        is_kept: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """See `GenerationMixin`. `is_kept`, of the prompt, `[B, L]`, is for who reads the cache later."""
        # Named, for `generate` takes embeddings from whoever names them.
        inputs = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        if is_kept is not None and inputs.get("past_key_values") is not None:
            inputs["past_key_values"].is_kept = is_kept
        return inputs

    def _get_candidate_generator(self, model_kwargs: dict[str, Any], **kwargs: Any) -> CandidateGenerator:
        # Private, as in the model: an assistant refuses what it does not know.
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "is_kept"}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    def _check_cache(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        cache = model_kwargs.get("past_key_values")
        if cache is None or inputs_tensor.ndim != 2 or not selects_tokens(self.config):
            return
        num_cached = int(cache.get_seq_length())
        if (inputs_tensor[:, :num_cached] == self.config.image_token_id).any():
            raise ValueError(
                f"A cache of {num_cached} tokens, with an image among them, is given, and which image tokens were "
                "dropped is not in it. Leave `past_key_values` out: the prompt is read again."
            )

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Images as codes of a visual tokenizer, read and written (LaVIT, arXiv 2309.04669).

Shapes: `B` batch, `L` sequence length, `I` images, `N` patches of one image.
"""

from typing import Any

import torch

from .patches_vwlmm import find_snapshots


class WithImageCodes:
    """What a model with a visual tokenizer and rows for its codes can do with them."""

    @torch.no_grad()
    def get_image_codes(
        self,
        pixel_values: torch.Tensor,
        keep_mask: torch.Tensor | None = None,
        patch_boxes: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """
        The codes of images.

        Args:
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.
            keep_mask (`torch.Tensor` of shape `[I, N]`, *optional*): Which patches to keep. By default what the visual
                tokenizer selects.
            patch_boxes (`torch.Tensor`, *optional*): As [`~VWLMMModel.get_image_features`] takes them. Codes are those
                of snapshots.

        Returns:
            A `torch.LongTensor` for each image, codes from 0 on. Their token ids are `config.code_offset` more.

        Raises:
            ValueError: If the model has no visual tokenizer.
        """
        self._check_has_codes()
        if patch_boxes is not None:
            pixel_values = pixel_values[find_snapshots(patch_boxes)]  # [I, 3, H, W]
        tokens = self.base_model.visual_tokenizer.encode(pixel_values, keep_mask=keep_mask)
        return list(tokens.code_ids.split(tokens.keep_mask.sum(dim=1).tolist()))

    @torch.no_grad()
    def generate_image_codes(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> list[torch.Tensor]:
        """
        Writes an image behind each prompt: `[IMG]`, then nothing but codes until `[/IMG]`.

        Args:
            input_ids (`torch.LongTensor` of shape `[B, L]`): Prompts, padded on the left.
            attention_mask (`torch.Tensor` of shape `[B, L]`, *optional*): 0 where they are padding.
            kwargs: What else `generate` takes. The authors sample, `do_sample=True, top_k=50`, with a `guidance_scale`
                of 4. By default as many codes as an image has patches are written at most.

        Returns:
            A `torch.LongTensor` for each prompt, codes from 0 on, which [`VWLMMVisualTokenizer.decode`] reads.

        Raises:
            ValueError: If the model has no visual tokenizer.
        """
        self._check_has_codes()
        config = self.config
        start = input_ids.new_full((len(input_ids), 1), config.image_start_token_id)
        input_ids = torch.cat([input_ids, start], dim=1)  # [B, L + 1]
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(start)], dim=1)
        first, end = config.code_offset, config.code_offset + config.visual_tokenizer_config.num_codes
        not_codes = {*range(first), *range(end, config.text_config.vocab_size)} - {config.image_end_token_id}
        not_codes |= {*kwargs.pop("suppress_tokens", ())}
        kwargs = {"max_new_tokens": config.visual_tokenizer_config.num_patches + 1, **kwargs}
        output = self.generate(
            input_ids,
            attention_mask=attention_mask,
            suppress_tokens=sorted(not_codes),
            eos_token_id=config.image_end_token_id,
            pad_token_id=config.image_end_token_id,
            **kwargs,
        )  # [B, L + 1 + new]
        written = output[:, input_ids.shape[1] :] - config.code_offset
        # Of an image that did not end there is one code more than it has patches, in the place of [/IMG].
        return [row[row >= 0][: config.visual_tokenizer_config.num_patches] for row in written]

    def _check_has_codes(self) -> None:
        if self.base_model.visual_tokenizer is None:
            raise ValueError(
                "The model has no visual tokenizer. Make one of a tokenizer and an LLM with "
                "`VWLMMForConditionalGeneration.from_visual_tokenizer`."
            )

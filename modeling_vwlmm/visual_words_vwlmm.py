# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Visual words: image features as distributions over the vocabulary, and what can be read from them.

Shapes: `I` images, `N` image tokens of one image, `D` hidden size of the decoder, `C` vocabulary size of the LLM.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .adapters_vwlmm import to_dtype_of
from .loss_vwlmm import max_chunk_rows
from .outputs_vwlmm import VisualWordsOutput


class VMHead(nn.Linear):
    """
    `W_VM`, which makes visual words `P' = softmax(W_VM x)` of image features `x`.

    A class of its own, so that bitsandbytes leaves it alone, as it does the MM head: the losses read both weights.
    """

    def forward(
        self, image_features: torch.Tensor, embeddings: torch.Tensor | None = None, temperature: float = 1.0
    ) -> torch.Tensor:
        """
        Args:
            image_features (`torch.Tensor` of shape `[..., D]`): Image features `x`.
            embeddings (`torch.Tensor` of shape `[C, D]`, *optional*): Token embeddings `E`.
            temperature (`float`, *optional*, defaults to 1.0): `T` of the visual words that are mixed of `embeddings`.

        Returns:
            `torch.Tensor` of shape `[..., C]`, the logits of the visual words; with `embeddings` `[..., D]`, the
            pseudo image features `softmax(W_VM x / T) E` (equation 8 of the paper). Rows of these pass in chunks,
            which backward computes again: nothing of size `[..., C]` outlives its chunk.
        """
        image_features = to_dtype_of(self, image_features)
        if embeddings is None:
            return super().forward(image_features)
        chunks = image_features.split(max_chunk_rows(image_features.device, 4 * self.out_features))
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(self._mix, chunk, embeddings, temperature, **options) for chunk in chunks])

    def _mix(self, image_features: torch.Tensor, embeddings: torch.Tensor, temperature: float) -> torch.Tensor:
        visual_words = get_distribution(super().forward, image_features, temperature)  # [R, C]
        return visual_words.to(embeddings) @ embeddings  # [R, D]


def get_distribution(
    vm_head: Callable[[torch.Tensor], torch.Tensor], image_features: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """The visual words `P' = softmax(W_VM x / T)` of image features `[..., D]`, in fp32: `[..., C]`."""
    logits = vm_head(image_features)  # [..., C]
    if temperature != 1:
        logits = logits.float() / temperature  # which may leave the range of fp16
    return logits.softmax(dim=-1, dtype=torch.float32)


class WithVisualWords:
    """What a model with a VM head can do with visual words, with or without an MM head on top."""

    @torch.no_grad()
    def get_visual_words(
        self,
        pixel_values: torch.Tensor,
        top_k: int = 1,
        patch_boxes: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
    ) -> VisualWordsOutput:
        """
        The most probable visual words of every image token, `argmax softmax(W_VM x)` (section 4.2), with their
        probabilities at `config.visual_word_temperature`.

        Args:
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.
            top_k (`int`, *optional*, defaults to 1): How many visual words to return for each image token.
            patch_boxes, keep_mask (`torch.Tensor`, *optional*): As [`~VWLMMModel.get_image_features`] takes them.

        Returns:
            [`VisualWordsOutput`] with `token_ids` and `probabilities`, both `[I, N, top_k]`: -1 and 0 where an image
            token is dropped.
        """
        images = self.get_image_features(pixel_values, patch_boxes=patch_boxes, keep_mask=keep_mask)
        image_features = torch.stack(images.image_features)  # [I, N, D]
        vm_head, temperature = self.base_model.vm_head, self.config.visual_word_temperature
        # One image at a time: a distribution over the vocabulary is large.
        words = (get_distribution(vm_head, features, temperature) for features in image_features)  # I x [N, C]
        top = [distribution.topk(top_k) for distribution in words]  # I x [N, top_k]
        token_ids = torch.stack([words.indices for words in top])
        probabilities = torch.stack([words.values for words in top])
        if images.get("keep_mask") is not None:
            is_dropped = ~images.keep_mask.unsqueeze(-1)  # [I, N, 1]
            token_ids, probabilities = token_ids.masked_fill(is_dropped, -1), probabilities.masked_fill(is_dropped, 0)
        return VisualWordsOutput(token_ids=token_ids, probabilities=probabilities)

    @torch.no_grad()
    def get_nearest_tokens(
        self,
        pixel_values: torch.Tensor,
        patch_boxes: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
    ) -> torch.LongTensor:
        """
        The token whose embedding is nearest to every image token by cosine (equation 3, figure 3c).

        Args:
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.
            patch_boxes, keep_mask (`torch.Tensor`, *optional*): As [`~VWLMMModel.get_image_features`] takes them.

        Returns:
            `torch.LongTensor` of shape `[I, N]`, -1 where an image token is dropped.
        """
        images = self.get_image_features(pixel_values, patch_boxes=patch_boxes, keep_mask=keep_mask)
        image_features = images.image_features  # I x [N, D]
        embeddings = self.get_vocabulary_embeddings(image_features[0].device)  # [C, D]
        directions = F.normalize(embeddings.float(), dim=-1)  # [C, D]
        # The length of x_n does not move the argmax over j of cos(x_n, E_j).
        nearest = torch.stack([(features.to(directions) @ directions.T).argmax(dim=-1) for features in image_features])
        keep_mask = images.get("keep_mask")  # [I, N]
        return nearest if keep_mask is None else nearest.masked_fill(~keep_mask, -1)  # [I, N]

    def get_vocabulary_embeddings(self, device: torch.device) -> torch.Tensor:
        """The embeddings `E` of all tokens, as the decoder reads them: `[C, D]`."""
        # Looked up, not read from the weight: some decoders scale what they look up (Gemma), the weight is whole only
        # inside the module's own call where it is sharded or offloaded, and serving engines pad it, while only its
        # first C rows are tokens.
        return self.get_input_embeddings()(torch.arange(self.config.text_config.vocab_size, device=device))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`. Visual words are tokens, so the VM head is resized, too."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        vm_head, num_tokens = self.base_model.vm_head, embeddings.num_embeddings
        if vm_head.out_features != num_tokens:
            # Private, for there is no public way to resize a head that is not the model's output. It makes a plain
            # linear layer.
            resized = self._get_resized_lm_head(vm_head, num_tokens, mean_resizing=mean_resizing)
            vm_head.weight, vm_head.out_features = resized.weight, num_tokens
        return embeddings

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the model returns.

Shapes: `B` batch, `L` sequence length, `I` images, `N` image tokens of one image, `D` hidden size of the decoder,
`C` vocabulary size of the LLM.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast


@dataclass
class VWLMMImageFeaturesOutput(BaseModelOutputWithPooling):
    """
    pooler_output (`list[torch.Tensor]`):
        What the decoder reads at the image positions, `[N, D]` an image: the image features, or the pseudo image
        features where `config.use_pseudo_image_features` is set.
    image_features (`list[torch.Tensor]`):
        The image features `x` (adapter output), `[N, D]` an image. Visual words are always computed from these.
    """

    image_features: list[torch.Tensor] | None = None


@dataclass
class VWLMMCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """
    loss (`torch.Tensor` of shape `()`, *optional*):
        Sum of the losses that were asked for (equation 7 of the paper), the visual one weighted.
    language_loss (`torch.Tensor` of shape `()`, *optional*):
        Mean cross-entropy over the supervised text positions, in nats (equation 2).
    visual_loss (`torch.Tensor` of shape `()`, *optional*):
        Mean Kullback-Leibler divergence over the supervised image positions, in nats (equation 6).
    num_text_positions, num_image_positions (`torch.Tensor` of shape `()`, *optional*):
        How many positions of this batch stand behind `language_loss` and `visual_loss`.
    visual_word_entropy (`torch.Tensor` of shape `()`, *optional*):
        Mean entropy of the visual words over the supervised image positions of this batch, in nats.
    logits (`torch.Tensor` of shape `[B, kept, C]`, *optional*):
        By default all, and none where a `visual_objective` is given.
    image_hidden_states (`torch.Tensor` of shape `[I * N, D]`, *optional*):
        The image features `x` (adapter output).
    """

    language_loss: torch.Tensor | None = None
    visual_loss: torch.Tensor | None = None
    num_text_positions: torch.Tensor | None = None
    num_image_positions: torch.Tensor | None = None
    visual_word_entropy: torch.Tensor | None = None


@dataclass
class VisualWordsOutput(ModelOutput):
    """
    token_ids (`torch.LongTensor` of shape `[I, N, top_k]`):
        The most probable visual words of every image token, best first.
    probabilities (`torch.Tensor` of shape `[I, N, top_k]`):
        Their probabilities under the VM head.
    """

    token_ids: torch.LongTensor | None = None
    probabilities: torch.Tensor | None = None

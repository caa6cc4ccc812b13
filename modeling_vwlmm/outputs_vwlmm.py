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

from .objectives_vwlmm import Term, at_least_one


@dataclass
class VWLMMImageFeaturesOutput(BaseModelOutputWithPooling):
    """
    pooler_output (`list[torch.Tensor]`):
        What the decoder reads at the image positions, `[N, D]` an image: the image features, or the pseudo image
        features where `config.use_pseudo_image_features` is set.
    image_features (`list[torch.Tensor]`):
        The image features `x` (adapter output), `[N, D]` an image. Visual words are always computed from these.
    patch_features (`torch.Tensor` of shape `[I, N, W]`):
        What the adapter reads: the selected features of the vision tower.
    keep_mask (`torch.BoolTensor` of shape `[I, N]`, *optional*):
        Which image tokens the adapter keeps, if it drops some.
    global_features (`torch.Tensor` of shape `[I, D]`, *optional*):
        One feature for each image, if the adapter makes one.
    patch_codes (`torch.LongTensor` of shape `[I, N]`, *optional*):
        Codes of the patches and -1 for dropped ones, if they were computed for images that are read as codes.
    """

    image_features: list[torch.Tensor] | None = None
    patch_features: torch.Tensor | None = None
    keep_mask: torch.Tensor | None = None
    global_features: torch.Tensor | None = None
    patch_codes: torch.Tensor | None = None


@dataclass
class VWLMMCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """
    loss (`torch.Tensor` of shape `()`, *optional*):
        Sum of the losses that were asked for, each with its weight (equation 7 of the paper). It alone has a gradient.
    language_loss (`torch.Tensor` of shape `()`, *optional*):
        Mean cross-entropy over the supervised text positions, in nats (equation 2).
    visual_loss (`torch.Tensor` of shape `()`, *optional*):
        Mean loss of the visual objective over the supervised image positions, for visual words the Kullback-Leibler
        divergence in nats (equation 6). Of several objectives, the mean by their weights.
    num_text_positions, num_image_positions (`torch.LongTensor` of shape `()`, *optional*):
        How many positions of this batch stand behind `language_loss` and `visual_loss`; of several visual objectives,
        those of the first.
    visual_word_entropy (`torch.Tensor` of shape `()`, *optional*):
        Mean entropy of the visual words over the supervised image positions of this batch, in nats.
    losses (`dict[str, torch.Tensor]`, *optional*):
        The mean loss of each objective, by name.
    terms (`dict[str, Term]`, *optional*):
        What the means are made of: each objective's sum, positions and metrics over this batch.
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
    losses: dict[str, torch.Tensor] | None = None
    terms: dict[str, Term] | None = None


@dataclass
class VisualWordsOutput(ModelOutput):
    """
    token_ids (`torch.LongTensor` of shape `[I, N, top_k]`):
        The most probable visual words of every image token, best first; -1 where it is dropped.
    probabilities (`torch.Tensor` of shape `[I, N, top_k]`):
        Their probabilities under the VM head.
    """

    token_ids: torch.LongTensor | None = None
    probabilities: torch.Tensor | None = None


def summarise(
    loss: torch.Tensor,
    terms: dict[str, Term],
    weights: dict[str, float],
    counts: dict[str, int | torch.Tensor],
) -> dict[str, torch.Tensor | dict]:
    """
    The fields of [`VWLMMCausalLMOutputWithPast`] on losses.

    Args:
        loss, terms: What the objectives made of this batch.
        weights: Their weights.
        counts: The positions of the whole optimiser step by objective, where they are known.
    """
    losses = {name: (t.total / at_least_one(counts.get(name, t.count))).detach() for name, t in terms.items()}
    fields = {"loss": loss, "losses": losses, "terms": terms}
    if "language" in terms:
        fields["language_loss"] = losses["language"]
        fields["num_text_positions"] = torch.as_tensor(terms["language"].count)
    if visual := [name for name in terms if name != "language"]:
        total_weight = sum(weights[name] for name in visual)
        fields["visual_loss"] = sum(weights[name] / total_weight * losses[name] for name in visual)
        fields["num_image_positions"] = torch.as_tensor(terms[visual[0]].count)
    for term in terms.values():
        if "visual_word_entropy" in term.metrics:
            fields["visual_word_entropy"] = term.metrics["visual_word_entropy"] / at_least_one(term.count)
    return fields

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""VW-LMM: LLaVA's architecture with a VM head that turns image features into visual words.

Shapes: `B` batch, `L` sequence length, `I` images, `N` image tokens of one image, `D` hidden size of the decoder,
`C` vocabulary size of the LLM.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import CandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaModelOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .adapters_vwlmm import make_adapter, to_dtype_of
from .configuration_vwlmm import VWLMMConfig
from .dropping_vwlmm import GeneratesFromKeptTokens, find_kept_positions, run_decoder
from .image_codes_vwlmm import WithImageCodes
from .image_features_vwlmm import EncodesImages
from .objectives_vwlmm import (
    ObjectiveInputs,
    SupervisedPositions,
    Weight,
    compute_loss,
    get_supervised_image_positions,
    leave_out_dropped,
    name_counts,
    parse_objectives,
    prepare_batch,
    reads_layers,
    teaches_decoder,
)
from .outputs_vwlmm import VWLMMCausalLMOutputWithPast, VWLMMImageFeaturesOutput, summarise
from .packed_vwlmm import keep_samples_apart
from .parts_vwlmm import MadeOfParts
from .placeholders_vwlmm import (
    check_no_placeholder,
    find_placeholders,
    look_placeholders_up_as_first_token,
    place_image_features,
    propose_without_images,
    replace_placeholders,
)
from .vision_vwlmm import FrozenVisionTower, GeneratesInLockstep
from .visual_tokenizer_vwlmm import VWLMMVisualTokenizer
from .visual_words_vwlmm import VMHead, WithVisualWords


class VWLMMModel(EncodesImages, FrozenVisionTower, WithVisualWords, LlavaModel):
    """
    Vision tower, adapter and decoder as in LLaVA, and the VM head, without the MM head.

    The VM head lives here and not beside the MM head because pseudo image features need it on the way in.
    """

    config: VWLMMConfig

    def __init__(self, config: VWLMMConfig) -> None:
        # Not LLaVA's own __init__, which knows one adapter alone.
        PreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.visual_tokenizer = None
        if config.visual_tokenizer_config is not None:
            self.visual_tokenizer = VWLMMVisualTokenizer(config.visual_tokenizer_config, self.vision_tower)
        self.multi_modal_projector = make_adapter(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.vm_head = VMHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.text_config._attn_implementation == "vllm":
            look_placeholders_up_as_first_token(self.get_input_embeddings())
        self.freeze_encoders()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_positions: torch.LongTensor | None = None,
        keep_mask: torch.Tensor | None = None,
        read_as_codes: torch.Tensor | None = None,
        patch_boxes: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaModelOutputWithPast:
        """
        Runs the decoder over text and images. Arguments are those of [`VWLMMForConditionalGeneration.forward`], and
        `image_positions`, where the image tokens are, `[I * N]`, for who has found them.

        Returns:
            `LlavaModelOutputWithPast`, or a tuple with `return_dict=False`.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given, if both `pixel_values` and
                `mm_encoder_outputs` are, or if the number of placeholders and of image features differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        images = self.encode_images(
            pixel_values,
            mm_encoder_outputs,
            vision_feature_layer,
            vision_feature_select_strategy,
            image_sizes,
            keep_mask,
            read_as_codes,
            patch_boxes,
            patch_features,
        )
        embed = self.get_input_embeddings()
        if inputs_embeds is None:
            # Any token can stand in for a placeholder without an embedding: image features take its place.
            inputs_embeds = embed(replace_placeholders(input_ids, self.config, token_id=0))  # [B, L, D]
        is_kept = None
        if images is None:
            check_no_placeholder(input_ids, self.config, image_positions)
        else:
            if images.get("keep_mask") is not None and len(images.keep_mask):
                is_image = find_placeholders(inputs_embeds, input_ids, embed, self.config)  # [B, L]
                is_kept = find_kept_positions(images.keep_mask, is_image, image_positions)  # [B, L]
            read = torch.cat(images.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)  # [I * N, D]
            inputs_embeds = place_image_features(
                inputs_embeds, read, input_ids, embed, self.config, image_positions
            )  # [B, L, D]

        kwargs |= keep_samples_apart(position_ids, attention_mask, past_key_values, kwargs.get("use_cache"))
        outputs = run_decoder(
            self.language_model,
            inputs_embeds,
            is_kept,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        # Those of a chunk of the prompt (`prefill_chunk_size`) are cut from what the decoder reads, and come without.
        image_features = None if images is None else images.get("image_features")  # I x [N, D]
        return LlavaModelOutputWithPast(
            **outputs,
            image_hidden_states=None if image_features is None else torch.cat(image_features),  # [I * N, D]
        )


class VWLMMForConditionalGeneration(
    MadeOfParts,
    GeneratesInLockstep,
    GeneratesFromKeptTokens,
    FrozenVisionTower,
    WithImageCodes,
    WithVisualWords,
    LlavaForConditionalGeneration,
):
    """
    VW-LMM: [`VWLMMModel`] with the MM head (`lm_head`), trained on text and images with one objective.

    Parameter names are LLaVA's, and `model.vm_head.weight`.
    """

    config: VWLMMConfig
    # Makes what stands for the images of a batch that has none, for training in lockstep.
    encode_no_images: Callable[[VWLMMModel], VWLMMImageFeaturesOutput] | None = None

    def __init__(self, config: VWLMMConfig) -> None:
        PreTrainedModel.__init__(self, config)
        # Not LLaVA's own __init__: it would build a LlavaModel, without a VM head and saved under legacy names.
        self.model = VWLMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel.save_pretrained`. Tensors get the same names however the model was made or loaded."""
        # Otherwise they would get the names they were loaded under, and what DeepSpeed ZeRO-3 loads is taken to have
        # had those of the earliest LLaVAs.
        wrapped = self.__class__
        # FSDP2 derives a class from this one, in a module of torch, whose files would travel in place of ours.
        self.__class__ = next(cls for cls in wrapped.__mro__ if not cls.__module__.startswith("torch."))
        try:
            super().save_pretrained(*args, **{"save_original_format": False, **kwargs})
        finally:
            self.__class__ = wrapped

    def _get_candidate_generator(self, **kwargs: Any) -> CandidateGenerator:
        # There is no public way to say what assisted decoding may propose.
        return propose_without_images(super()._get_candidate_generator(**kwargs), self.config.image_token_id)

    def get_training_module(self, name: str) -> nn.Module:
        """
        The module that an objective trains beside the model's own.

        Raises:
            ValueError: If it has not been attached.
        """
        if name not in getattr(self, "training_modules", {}):
            raise ValueError(
                f"`{name}` trains a module that the model does not have. `VWLMMTrainer` attaches it; a training loop "
                "of your own calls `modeling_vwlmm.training.attach_training_modules` before it makes the optimizer."
            )
        return self.training_modules[name]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        visual_objective: str | Mapping[str, Weight] | None = None,
        visual_loss_weight: float = 1.0,
        logits_to_keep: int | torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        supervised_positions: SupervisedPositions | None = None,
        num_items_in_batch: int | torch.Tensor | Mapping[str, int | torch.Tensor] | None = None,
        num_image_items_in_batch: int | torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        read_as_codes: torch.Tensor | None = None,
        patch_boxes: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VWLMMCausalLMOutputWithPast:
        """
        Runs the model, and computes the losses that are asked for.

        Args:
            input_ids (`torch.LongTensor` of shape `[B, L]`, *optional*):
                Token ids, every image expanded to its `N` placeholders.
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`, *optional*):
                Preprocessed images, in the order of their placeholders. With `patch_boxes`, of each its snapshot, then
                its high-resolution patches, in rows of their own.
            labels (`torch.LongTensor` of shape `[B, L]`, *optional*):
                Text to predict, -100 where nothing is supervised. Alone it gives LLaVA's loss and logits.
            visual_objective (`str` or mapping, *optional*):
                What image positions learn beside the text: the name of an objective, such as `"visual_words"` (stage
                IV) or `"vm_head"` (stage III, which learns no text), or names with their weights, or with mappings of
                `weight` and options. See [`parse_objectives`].
            visual_loss_weight (`float`, *optional*, defaults to 1.0):
                Weight of the objective that is given by name alone.
            logits_to_keep (`int` or `torch.Tensor`, *optional*):
                Positions to compute logits for: the last so many (0 for all), or their indices, `[kept]`. By default
                all of them, and none where a `visual_objective` is given. Losses need no logits.
            supervised_positions ([`SupervisedPositions`], *optional*):
                From [`find_supervised_positions`], if it ran before, on the host; else it runs here.
            num_items_in_batch, num_image_items_in_batch (`int`, `torch.Tensor` or mapping, *optional*):
                Supervised text and image positions, or as a mapping those of each objective, of the whole optimiser
                step. Losses are sums over this batch divided by them; without them, means over this batch.
            keep_mask (`torch.Tensor` of shape `[I, N]`, *optional*):
                Which image tokens to keep. By default all, or what the visual tokenizer selects for an adapter that
                drops some. The decoder does not read dropped ones, and no objective supervises them.
            read_as_codes (`torch.BoolTensor` of shape `[I]` or `torch.LongTensor` of shape `[I, N]`, *optional*):
                Images of which the decoder reads the embeddings of their codes, as it does where it writes them; or,
                for who has them, these codes, and -1 elsewhere.
            patch_boxes (`torch.Tensor` of shape `[rows, 4]`, *optional*):
                Where the patch in each row of `pixel_values` is, (y0, x0, y1, x1) in the unit square of its snapshot;
                zeros mark a snapshot. Without it every row is an image.
            patch_features (`torch.Tensor` of shape `[rows, N, W]`, *optional*):
                What the vision tower has made of these images before, so that it does not run again.
            kwargs:
                What objectives ask for beside these, such as `image_labels`, and what the decoder takes.

        Returns:
            [`VWLMMCausalLMOutputWithPast`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If an objective or weight is unknown, if a `visual_objective` comes without `input_ids` or
                without what it asks for, or for the reasons of [`VWLMMModel.forward`].
        """
        objectives, weights = parse_objectives(visual_objective, visual_loss_weight, labels is not None)
        labels = None if labels is None else replace_placeholders(labels, self.config, token_id=-100)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        batch |= {"pixel_values": pixel_values, "patch_boxes": patch_boxes}
        batch, supervised_positions = prepare_batch(
            objectives, {**batch, "labels": labels}, kwargs, supervised_positions, self.config.image_token_id
        )
        # Not in the decoder's call: what makes image features may learn where the decoder does not.
        images = self.model.encode_images(
            pixel_values,
            mm_encoder_outputs,
            vision_feature_layer,
            vision_feature_select_strategy,
            image_sizes,
            keep_mask,
            read_as_codes,
            patch_boxes,
            patch_features,
        )
        if supervised_positions is not None and images is not None:
            supervised_positions = leave_out_dropped(supervised_positions, images.get("keep_mask"), objectives)
        image_positions = None if supervised_positions is None else supervised_positions["image_tokens"]
        if objectives and images is None:
            check_no_placeholder(input_ids, self.config, image_positions, is_learned=True)
            images = None if self.encode_no_images is None else self.encode_no_images(self.model)
        options = {**kwargs, "output_hidden_states": True} if reads_layers(objectives) else kwargs
        with torch.set_grad_enabled(torch.is_grad_enabled() and teaches_decoder(objectives)):
            outputs = self.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                position_ids=batch["position_ids"],
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                mm_encoder_outputs=None if images is None else {"image": images},
                image_positions=image_positions,
                **options,
            )
        hidden_states = outputs.last_hidden_state  # [B, L, D]

        logits = None
        if logits_to_keep is None and visual_objective is None:
            logits_to_keep = 0
        if logits_to_keep is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(to_dtype_of(self.lm_head, hidden_states[:, kept]))  # [B, kept, C]

        losses = {}
        if objectives:
            keeps_all = isinstance(logits_to_keep, int) and logits.shape[1] == hidden_states.shape[1]
            all_logits = logits if visual_objective is None and keeps_all else None
            inputs = ObjectiveInputs(
                self, batch, hidden_states, outputs.hidden_states, images, all_logits, supervised_positions, kwargs
            )
            counts = name_counts(objectives, num_items_in_batch, num_image_items_in_batch)
            losses = summarise(*compute_loss(objectives, weights, inputs, counts), weights, counts)
        return VWLMMCausalLMOutputWithPast(
            **losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if options is kwargs or kwargs.get("output_hidden_states") else None,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


VWLMMModel.register_for_auto_class("AutoModel")
VWLMMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["VWLMMForConditionalGeneration", "VWLMMModel", "get_supervised_image_positions"]

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""VW-LMM: LLaVA's architecture with a VM head that turns image features into visual words.

Shapes: `B` batch, `L` sequence length, `I` images, `N` image tokens of one image, `D` hidden size of the decoder,
`C` vocabulary size of the LLM.
"""

from importlib import import_module
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import CandidateGenerator
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaModelOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_vwlmm import VWLMMConfig
from .loss_vwlmm import linear_loss
from .outputs_vwlmm import VisualWordsOutput, VWLMMCausalLMOutputWithPast, VWLMMImageFeaturesOutput
from .vllm_vwlmm import look_placeholders_up_as_first_token


logger = logging.get_logger(__name__)


def get_supervised_image_positions(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_token_id: int,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The image positions that the decoder predicts, `S_VM`: those with a predecessor that is not padding.

    Args:
        input_ids (`torch.LongTensor` of shape `[B, L]`): Token ids, every image expanded to its placeholders.
        attention_mask (`torch.Tensor` of shape `[B, L]`, *optional*): 0 where `input_ids` is padding.
        image_token_id (`int`): Id of the placeholder.
        position_ids (`torch.LongTensor` of shape `[B, L]`, *optional*): 0 where a sample begins, for several in a row.

    Returns:
        `torch.BoolTensor` of shape `[B, L]`.
    """
    is_supervised = input_ids == image_token_id  # [B, L]
    is_supervised[:, 0] = False
    if attention_mask is not None:
        is_supervised[:, 1:] &= attention_mask[:, :-1].bool()
    if position_ids is not None:
        is_supervised &= position_ids != 0
    return is_supervised


class VMHead(nn.Linear):
    """A linear layer that bitsandbytes leaves alone, as it does the MM head: the losses read the weights of both."""


class VWLMMModel(LlavaModel):
    """
    Vision tower, adapter and decoder as in LLaVA, and the VM head, without the MM head.

    The VM head lives here and not beside the MM head because pseudo image features need it on the way in.
    """

    config: VWLMMConfig

    def __init__(self, config: VWLMMConfig):
        super().__init__(config)
        self.vm_head = VMHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.text_config._attn_implementation == "vllm":
            look_placeholders_up_as_first_token(self.get_input_embeddings())
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        freeze_image_features: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VWLMMImageFeaturesOutput:
        """
        Encodes images into what the decoder reads at their positions: image features, or the pseudo image features
        `softmax(W_VM x) E` of equation 8.

        Args:
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.
            vision_feature_layer, vision_feature_select_strategy (*optional*): In place of those of the config.
            freeze_image_features (`bool`, *optional*, defaults to `False`): Whether to cut gradients to the vision
                tower, the adapter and the VM head.

        Returns:
            [`VWLMMImageFeaturesOutput`], or a tuple with `return_dict=False`.
        """
        if torch.is_grad_enabled():
            # No stage trains it, and frozen it keeps no activations. Loading would forget what was frozen before.
            self.vision_tower.requires_grad_(False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_image_features):
            outputs = super().get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
                **kwargs,
            )
            image_features = outputs.pooler_output  # I x [N, D]
            if self.config.use_pseudo_image_features:
                # One call for all images: where weights are sharded, every process must call a module equally often.
                visual_words = self._visual_word_distribution(torch.cat(tuple(image_features)))  # [I * N, C]
        if self.config.use_pseudo_image_features:
            # Outside, because the token embeddings belong to the decoder: they learn where it does.
            embeddings = self._vocabulary_embeddings(visual_words.device)  # [C, D]
            pseudo_image_features = visual_words.to(embeddings) @ embeddings  # [I * N, D]
            outputs.pooler_output = pseudo_image_features.split([len(features) for features in image_features])
        return VWLMMImageFeaturesOutput(**outputs, image_features=image_features)

    def _visual_word_distribution(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.vm_head(image_features).softmax(dim=-1, dtype=torch.float32)  # [N, C], P'

    def _vocabulary_embeddings(self, device: torch.device) -> torch.Tensor:
        # Looked up, not read from the weight: some decoders scale what they look up (Gemma), the weight is whole only
        # inside the module's own call where it is sharded or offloaded, and serving engines pad it, while only its first
        # C rows are tokens.
        token_ids = torch.arange(self.config.text_config.vocab_size, device=device)
        return self.get_input_embeddings()(token_ids)  # [C, D]

    def resize_token_embeddings(
        self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True
    ) -> nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`. Visual words are tokens, so the VM head is resized, too."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.resize_vm_head(embeddings.num_embeddings, mean_resizing)
        return embeddings

    def resize_vm_head(self, num_tokens: int, mean_resizing: bool = True) -> None:
        """Gives the VM head as many rows as there are tokens, new ones near the mean of the old or random."""
        if self.vm_head.out_features != num_tokens:
            self.vm_head = self._get_resized_lm_head(self.vm_head, num_tokens, mean_resizing=mean_resizing)

    def _embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.config.image_token_id >= self.config.text_config.vocab_size:
            # The placeholder has no embedding. Any token can stand in, for image features take its place.
            input_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        return self.get_input_embeddings()(input_ids)  # [B, L, D]

    def _run_on_blank_image(self, freeze_image_features: bool) -> torch.Tensor | float:
        # Zero, computed with every module that an image would pass. Where weights are sharded (FSDP, ZeRO-3), each module
        # gathers its own on all processes together, so a process whose batch is text must call what the others call.
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return 0.0
        vision_config = self.config.vision_config
        pixel_values = torch.zeros(
            (1, getattr(vision_config, "num_channels", 3), vision_config.image_size, vision_config.image_size),
            device=self.device,
            dtype=self.dtype,
        )
        images = self.get_image_features(pixel_values, freeze_image_features=freeze_image_features)
        return 0.0 * torch.cat(tuple(images.pooler_output)).sum()

    def _check_no_placeholder(self, input_ids: torch.Tensor | None, in_lockstep: bool) -> None:
        # A decoding step feeds one token, its own: the check would only make the device wait.
        if input_ids is None or input_ids.shape[1] == 1:
            return
        image_token_id = self.config.image_token_id
        is_text = input_ids != image_token_id  # [B, L]
        message = (
            f"Found image tokens (id {image_token_id}) in `input_ids`, but no images. Pass `pixel_values`, as the "
            "processor returns them."
        )
        if image_token_id >= self.config.text_config.vocab_size or in_lockstep:
            torch_compilable_check(is_text.all(), message)
        elif not torch.compiler.is_compiling() and not is_text.all():
            # Inside the vocabulary the placeholder has an embedding, which LLaVA's code reads in silence. Nobody should
            # train on it.
            logger.warning_once(message)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        Where the image features go, checked against their number.

        Args:
            input_ids (`torch.LongTensor` of shape `[B, L]`, *optional*): Token ids with placeholders. Without them,
                placeholders are recognised by their embedding, which only those inside the vocabulary have.
            inputs_embeds (`torch.Tensor` of shape `[B, L, D]`): Embeddings of the text.
            image_features (`torch.Tensor` of shape `[I * N, D]`): What to place.

        Returns:
            `torch.BoolTensor` of shape `[B, L, 1]`.

        Raises:
            ValueError: If the number of placeholders and of image features differ.
        """
        image_token_id = self.config.image_token_id
        if input_ids is not None:
            is_image = input_ids == image_token_id  # [B, L]
        elif image_token_id < self.config.text_config.vocab_size:
            placeholder = self.get_input_embeddings()(torch.tensor(image_token_id, device=inputs_embeds.device))  # [D]
            is_image = (inputs_embeds == placeholder).all(dim=-1)  # [B, L]
        else:
            raise ValueError(
                f"The image placeholder (id {image_token_id}) has no embedding: it is past the vocabulary of "
                f"{self.config.text_config.vocab_size} tokens. With `pixel_values`, pass `input_ids` instead of "
                "`inputs_embeds`."
            )
        num_placeholders = is_image.sum()
        torch_compilable_check(
            num_placeholders == image_features.shape[0],
            lambda: (
                f"Image features and image tokens do not match: found {num_placeholders} image tokens (id "
                f"{image_token_id}) in the text and {image_features.shape[0]} image features. Pass one image for each "
                "`<image>` of the prompts, and a `max_length` that does not cut image tokens."
            ),
        )
        return is_image.unsqueeze(-1)

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
        freeze_image_features: bool = False,
        in_lockstep: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaModelOutputWithPast:
        """
        Runs the decoder over text and images.

        Args:
            input_ids (`torch.LongTensor` of shape `[B, L]`, *optional*):
                Token ids, every image expanded to its `N` placeholders.
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`, *optional*):
                Preprocessed images, in the order of their placeholders.
            inputs_embeds (`torch.Tensor` of shape `[B, L, D]`, *optional*):
                Embeddings in place of `input_ids`.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": output of get_image_features}` in place of `pixel_values`; this is how `generate` encodes
                images once.
            freeze_image_features (`bool`, *optional*, defaults to `False`):
                See [`~VWLMMModel.get_image_features`].
            in_lockstep (`bool`, *optional*, defaults to `False`):
                Whether all processes make this call together, as they do in training and evaluation. A batch without
                images then runs the vision tower all the same, because others may run it.

        Returns:
            `LlavaModelOutputWithPast`, or a tuple with `return_dict=False`.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given, if both `pixel_values` and
                `mm_encoder_outputs` are, or if the number of placeholders and of image features differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if images is not None:
                raise ValueError("Pass images as `pixel_values` or as `mm_encoder_outputs`, not as both.")
            images = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                freeze_image_features=freeze_image_features,
            )

        nothing = self._run_on_blank_image(freeze_image_features) if images is None and in_lockstep else 0
        if inputs_embeds is None:
            inputs_embeds = self._embed_tokens(input_ids)  # [B, L, D]
        if images is None:
            self._check_no_placeholder(input_ids, in_lockstep)
            inputs_embeds = inputs_embeds + nothing
        else:
            image_embeds = torch.cat(images.pooler_output).to(inputs_embeds.device, inputs_embeds.dtype)  # [I * N, D]
            is_image = self.get_placeholder_mask(input_ids, inputs_embeds, image_embeds)  # [B, L, 1]
            inputs_embeds = inputs_embeds.masked_scatter(is_image, image_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        # Those of a chunk of the prompt (`prefill_chunk_size`) are cut from what the decoder reads, and come without.
        image_features = None if images is None else images.get("image_features")  # I x [N, D]
        return LlavaModelOutputWithPast(
            **outputs,
            image_hidden_states=None if image_features is None else torch.cat(image_features),  # [I * N, D]
        )

    @torch.no_grad()
    def get_visual_words(self, pixel_values: torch.Tensor, top_k: int = 1) -> VisualWordsOutput:
        """
        The most probable visual words of every image token, `argmax softmax(W_VM x)` (section 4.2).

        Args:
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.
            top_k (`int`, *optional*, defaults to 1): How many visual words to return for each image token.

        Returns:
            [`VisualWordsOutput`] with `token_ids` and `probabilities`, both `[I, N, top_k]`.
        """
        image_features = torch.stack(self.get_image_features(pixel_values).image_features)  # [I, N, D]
        # One image at a time: a distribution over the vocabulary is large.
        top = [self._visual_word_distribution(features).topk(top_k) for features in image_features]  # I x [N, top_k]
        return VisualWordsOutput(
            token_ids=torch.stack([words.indices for words in top]),
            probabilities=torch.stack([words.values for words in top]),
        )

    @torch.no_grad()
    def get_nearest_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """
        The token whose embedding is nearest to every image token by cosine (equation 3, figure 3c).

        Args:
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`): Preprocessed images.

        Returns:
            `torch.LongTensor` of shape `[I, N]`.
        """
        image_features = self.get_image_features(pixel_values).image_features  # I x [N, D]
        embeddings = self._vocabulary_embeddings(image_features[0].device)  # [C, D]
        directions = F.normalize(embeddings.float(), dim=-1)  # [C, D]
        # The length of x_n does not move the argmax over j of cos(x_n, E_j).
        return torch.stack(
            [(features.to(directions) @ directions.T).argmax(dim=-1) for features in image_features]
        )  # [I, N]


class VWLMMForConditionalGeneration(LlavaForConditionalGeneration):
    """
    VW-LMM: [`VWLMMModel`] with the MM head (`lm_head`), trained on text and images with one objective.

    Parameter names are LLaVA's, and `model.vm_head.weight`.
    """

    config: VWLMMConfig

    def __init__(self, config: VWLMMConfig):
        PreTrainedModel.__init__(self, config)
        # Not LLaVA's own __init__: it would build a LlavaModel, without a VM head and saved under legacy names.
        self.model = VWLMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str | PreTrainedModel, text: str | PreTrainedModel, **config
    ) -> "VWLMMForConditionalGeneration":
        """
        The model that stage I starts from: a pretrained vision tower, a pretrained LLM, a new adapter and VM head.

        Args:
            vision (`str` or `PreTrainedModel`):
                Vision tower: name, path or module. The checkpoint of an image-text model (CLIP, SigLIP) will do.
            text (`str` or `PreTrainedModel`):
                Decoder-only LLM with its head: name, path or module.
            config:
                Fields of [`VWLMMConfig`], such as `vision_feature_layer`, and `dtype` for what is loaded here.

        Returns:
            [`VWLMMForConditionalGeneration`]

        Raises:
            ValueError: If the LLM makes its logits by more than one matrix (a bias, soft-capping, scaling) or has no
                `embed_tokens`, or if the vision tower has register tokens.

        Example:

        ```python
        >>> model = VWLMMForConditionalGeneration.from_vision_text_pretrained(
        ...     "openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5"
        ... )
        ```
        """
        # Not a relative import: it would make the file travel with every checkpoint.
        return import_module("modeling_vwlmm.assembly").from_vision_text_pretrained(cls, vision, text, **config)

    @classmethod
    def from_llava(cls, name_or_path: str, **kwargs) -> "VWLMMForConditionalGeneration":
        """
        The model that stage III starts from where a LLaVA is at hand: all of it, and a new VM head.

        Args:
            name_or_path (`str`):
                A checkpoint of Transformers' LLaVA architecture, in any layout it has been published in.
            kwargs:
                Everything that `LlavaForConditionalGeneration.from_pretrained` takes, such as `dtype`.

        Returns:
            [`VWLMMForConditionalGeneration`]

        Raises:
            ValueError: If the checkpoint is of another architecture, or its tensors are not those of its config.

        Example:

        ```python
        >>> model = VWLMMForConditionalGeneration.from_llava("llava-hf/llava-1.5-7b-hf")
        ```
        """
        return import_module("modeling_vwlmm.assembly").from_llava(cls, name_or_path, **kwargs)

    def save_pretrained(self, *args, **kwargs) -> None:
        """See `PreTrainedModel.save_pretrained`. Tensors get the same names however the model was made or loaded."""
        # Otherwise they would get the names they were loaded under, and what DeepSpeed ZeRO-3 loads is taken to have
        # had those of the earliest LLaVAs.
        self._weight_conversions = None
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True
    ) -> nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`. Visual words are tokens, so the VM head is resized, too."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.model.resize_vm_head(embeddings.num_embeddings, mean_resizing)
        return embeddings

    def _get_candidate_generator(self, **kwargs) -> CandidateGenerator:
        # Assisted decoding. What proposes tokens, a text-only decoder or the prompt itself, gets no images: it neither
        # knows the placeholder nor may propose it.
        generator = super()._get_candidate_generator(**kwargs)
        propose = generator.get_candidates

        def get_candidates(input_ids, **kwargs):
            text_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)  # [1, L]
            candidate_ids, candidate_logits = propose(text_ids, **kwargs)  # [1, L + candidates]
            candidate_ids = candidate_ids.masked_fill(candidate_ids == self.config.image_token_id, 0)
            candidate_ids[:, : input_ids.shape[1]] = input_ids
            return candidate_ids, candidate_logits

        generator.get_candidates = get_candidates
        return generator

    def get_visual_words(self, pixel_values: torch.Tensor, top_k: int = 1) -> VisualWordsOutput:
        """See [`VWLMMModel.get_visual_words`]."""
        return self.model.get_visual_words(pixel_values, top_k=top_k)

    def get_nearest_tokens(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """See [`VWLMMModel.get_nearest_tokens`]."""
        return self.model.get_nearest_tokens(pixel_values)

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
        visual_objective: Literal["visual_words", "vm_head"] | None = None,
        visual_loss_weight: float = 1.0,
        logits_to_keep: int | torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        num_image_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VWLMMCausalLMOutputWithPast:
        """
        Runs the model, and computes the losses that are asked for.

        Args:
            input_ids (`torch.LongTensor` of shape `[B, L]`, *optional*):
                Token ids, every image expanded to its `N` placeholders.
            pixel_values (`torch.Tensor` of shape `[I, 3, H, W]`, *optional*):
                Preprocessed images, in the order of their placeholders.
            labels (`torch.LongTensor` of shape `[B, L]`, *optional*):
                Text to predict, -100 where nothing is supervised. Alone it gives LLaVA's loss and logits.
            visual_objective (`str`, *optional*):
                `"visual_words"` adds stage IV's `KL(P' || Q)`: the decoder predicts the visual words. `"vm_head"`
                computes stage III's `KL(Q || P')` alone: the VM head learns from what the decoder predicts.
            visual_loss_weight (`float`, *optional*, defaults to 1.0):
                Weight of the visual loss in `loss`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*):
                Positions to compute logits for: the last so many (0 for all), or their indices, `[kept]`. By default all
                of them, and none where a `visual_objective` is given. Losses need no logits.
            num_items_in_batch, num_image_items_in_batch (`int` or `torch.Tensor`, *optional*):
                Supervised text and image positions of the whole optimiser step, over all micro-batches and processes.
                Where given, losses are sums over this batch divided by these numbers; where not, means over the
                positions of this batch.

        Returns:
            [`VWLMMCausalLMOutputWithPast`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If `visual_objective` is unknown or comes without `input_ids`, or for the reasons of
                [`VWLMMModel.forward`].
        """
        if visual_objective not in (None, "visual_words", "vm_head"):
            raise ValueError(
                f"`visual_objective` is {visual_objective!r}; expected None, 'visual_words' or 'vm_head'."
            )
        if visual_objective is not None and input_ids is None:
            raise ValueError("A `visual_objective` needs `input_ids`: they say which positions are image tokens.")

        if labels is not None and self.config.image_token_id >= self.config.text_config.vocab_size:
            # `labels = input_ids` is common, and a placeholder without a logit cannot be predicted.
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
        if visual_objective == "vm_head":
            # What stands behind the last image token cannot reach what is predicted up to it.
            image_columns = (input_ids == self.config.image_token_id).any(dim=0).nonzero()  # [columns, 1]
            stop = int(image_columns[-1]) + 1 if len(image_columns) else 1
            input_ids = input_ids[:, :stop]
            attention_mask = None if attention_mask is None else attention_mask[:, :stop]
            position_ids = None if position_ids is None else position_ids[:, :stop]
        # Stage III teaches the VM head alone: its teacher, the decoder, runs without gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled() and visual_objective != "vm_head"):
            outputs = self.model(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                mm_encoder_outputs=mm_encoder_outputs,
                freeze_image_features=visual_objective is not None,
                in_lockstep=labels is not None or visual_objective is not None,
                **kwargs,
            )
        hidden_states = outputs.last_hidden_state  # [B, L, D]
        output = VWLMMCausalLMOutputWithPast(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

        if logits_to_keep is None and visual_objective is None:
            logits_to_keep = 0
        if logits_to_keep is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = self.lm_head(hidden_states[:, kept])  # [B, kept, C]
        if visual_objective is None and labels is not None and output.logits.shape[1] == labels.shape[1]:
            # All logits are there anyway: LLaVA's own loss, to the last digit. Every other loss does without them.
            output.num_text_positions = (labels[:, 1:] != -100).sum()
            output.loss = output.language_loss = self.loss_function(
                logits=output.logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        elif visual_objective is not None or labels is not None:
            self._compute_losses(
                output,
                hidden_states,
                input_ids,
                attention_mask,
                position_ids,
                None if visual_objective == "vm_head" else labels,
                visual_objective,
                visual_loss_weight,
                num_items_in_batch,
                num_image_items_in_batch,
            )
        return VWLMMCausalLMOutputWithPast(**output)  # anew, for the order of fields: those set later came last

    def _compute_losses(
        self,
        output: VWLMMCausalLMOutputWithPast,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        labels: torch.Tensor | None,
        visual_objective: str | None,
        visual_loss_weight: float,
        num_items_in_batch: int | torch.Tensor | None,
        num_image_items_in_batch: int | torch.Tensor | None,
    ) -> None:
        # The decoder predicts position n from h_{n-1}.
        device = hidden_states.device  # where the decoder ends, if a device map spreads the model
        predictors = hidden_states[:, :-1]  # [B, L - 1, D]
        text_hidden = image_hidden = image_features = predictors[0, :0]  # [0, D]
        targets = torch.empty(0, dtype=torch.long, device=device)  # [0]
        text_scale = image_scale = 0.0
        if labels is not None:
            labels = labels.to(device)
            is_text = labels[:, 1:] != -100  # [B, L - 1]
            text_hidden, targets = predictors[is_text], labels[:, 1:][is_text]  # [T, D], [T]
            output.num_text_positions = is_text.sum()
            text_scale = 1 / _count(num_items_in_batch, output.num_text_positions)
        if visual_objective is not None:
            image_token_id = self.config.image_token_id
            is_image = get_supervised_image_positions(
                input_ids, attention_mask, image_token_id, position_ids
            )  # [B, L]
            image_hidden = predictors[is_image[:, 1:].to(device)]  # [V, D], h_{n-1}
            if output.image_hidden_states is not None:
                is_kept = is_image[input_ids == image_token_id]  # [I * N]
                image_features = output.image_hidden_states.to(device)[is_kept.to(device)]  # [V, D], x_n
            output.num_image_positions = is_image.sum()
            image_scale = visual_loss_weight / _count(num_image_items_in_batch, output.num_image_positions)

        # Read here, inside this module's own forward, where DeepSpeed ZeRO-3 gathers what other modules hold. Without a
        # visual loss nothing meets the VM head, and reading it would gather it in vain.
        mm_head = self.lm_head.weight  # [C, D]
        vm_head = mm_head if visual_objective is None else self.model.vm_head.weight  # [C, D]
        if (mm_head.is_meta or vm_head.is_meta) and not hidden_states.is_meta:
            raise ValueError(
                "The heads' weights are offloaded, and this loss reads them. Load the model with a `device_map` that "
                "keeps `lm_head` and `model.vm_head` on a device."
            )
        if visual_objective == "vm_head":
            losses = linear_loss(image_features, vm_head, targets, image_hidden, mm_head, image_scale=image_scale)
            visual_word_entropy = losses.student_entropy
        else:
            hidden = torch.cat([text_hidden, image_hidden])  # [T + V, D]
            losses = linear_loss(hidden, mm_head, targets, image_features, vm_head, text_scale, image_scale)
            visual_word_entropy = losses.teacher_entropy

        output.loss = losses.loss
        if labels is not None:
            output.language_loss = losses.cross_entropy * text_scale
        if visual_objective is not None:
            output.visual_loss = losses.kl_div / _count(num_image_items_in_batch, output.num_image_positions)
            output.visual_word_entropy = visual_word_entropy / output.num_image_positions.clamp(min=1)


def _count(num_items_in_batch: int | torch.Tensor | None, num_positions: torch.Tensor) -> torch.Tensor:
    count = torch.as_tensor(num_positions if num_items_in_batch is None else num_items_in_batch)
    return count.where(count > 0, 1)  # without such positions their loss is zero, not 0 / 0


VWLMMModel.register_for_auto_class("AutoModel")
VWLMMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["VWLMMForConditionalGeneration", "VWLMMModel"]

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
From pixels to what the decoder reads.

Shapes: `R` rows of `pixel_values`, one an image or more, `I` images, `N` image tokens of one image, `W` width of the
patch features, `D` hidden size of the decoder, `C` vocabulary size of the LLM.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .adapters_vwlmm import adapt, drops_tokens
from .outputs_vwlmm import VWLMMImageFeaturesOutput
from .patches_vwlmm import split_patches
from .vision_vwlmm import run_vision_tower
from .visual_tokenizer_vwlmm import check_codes
from .visual_words_vwlmm import VMHead, get_distribution


class EncodesImages:
    """A model with a vision tower, an adapter, and perhaps a visual tokenizer that says what of an image is kept."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Of an adapter's parts, some begin otherwise than Transformers lets them, which also makes what a checkpoint
        # lacks.
        if hasattr(module, "init_parameters"):
            module.init_parameters()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
        read_as_codes: torch.Tensor | None = None,
        patch_boxes: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VWLMMImageFeaturesOutput:
        """
        Encodes images into what the decoder reads at their positions: image features, or the pseudo image features
        `softmax(W_VM x) E` of equation 8.

        Args:
            pixel_values (`torch.Tensor` of shape `[R, 3, H, W]`): Preprocessed images; with `patch_boxes`, of each its
                snapshot, then its high-resolution patches.
            vision_feature_layer, vision_feature_select_strategy (*optional*): In place of those of the config.
            image_sizes (`torch.Tensor` of shape `[I, 2]`, *optional*): Sizes in pixels, for towers that need them.
            keep_mask (`torch.Tensor` of shape `[I, N]`, *optional*): Which image tokens to keep. By default all, or
                what the visual tokenizer selects for an adapter that drops some.
            read_as_codes (`torch.BoolTensor` of shape `[I]` or `torch.LongTensor` of shape `[I, N]`, *optional*):
                Images of which the decoder reads the embeddings of their codes, or, for who has them, these codes, and
                -1 elsewhere.
            patch_boxes (`torch.Tensor` of shape `[R, 4]`, *optional*): Where each patch is, (y0, x0, y1, x1) in the
                unit square of its snapshot; zeros mark a snapshot. By default all rows are snapshots.
            patch_features (`torch.Tensor` of shape `[R, N, W]`, *optional*): What the tower has made of these images
                before, so that it does not run again.

        Returns:
            [`VWLMMImageFeaturesOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: If `keep_mask` or `patch_boxes` do not fit the images, or the adapter reads no patches.
        """
        if patch_features is not None:
            return self.adapt(patch_features, None, keep_mask, read_as_codes, patch_boxes)
        num_patches = None
        if image_sizes is not None:
            kwargs["image_sizes"] = image_sizes
            num_patches = (torch.as_tensor(image_sizes) // self.vision_tower.patch_size).prod(dim=-1).tolist()
        patch_features, outputs = run_vision_tower(
            self.vision_tower,
            self.config,
            pixel_values,
            vision_feature_layer,
            vision_feature_select_strategy,
            **{**kwargs, "return_dict": True},
        )
        return VWLMMImageFeaturesOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **self.adapt(patch_features, num_patches, keep_mask, read_as_codes, patch_boxes),
        )

    @torch.no_grad()
    def select_tokens(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Which image tokens the visual tokenizer keeps of images `[I, 3, H, W]`, `torch.BoolTensor` of shape `[I, N]`,
        and the patch features `[I, N, W]` by which it does.
        """
        patch_features, _ = run_vision_tower(self.vision_tower, self.config, pixel_values.to(self.dtype))
        return self.visual_tokenizer.select_patches(patch_features), patch_features

    def get_patch_feature_size(self) -> int:
        """Width `W` of the patch features that the adapter reads."""
        layers = self.config.vision_feature_layer
        return self.config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))

    def adapt(
        self,
        patch_features: torch.Tensor,
        num_patches: list[int] | None = None,
        keep_mask: torch.Tensor | None = None,
        read_as_codes: torch.Tensor | None = None,
        patch_boxes: torch.Tensor | None = None,
    ) -> VWLMMImageFeaturesOutput:
        """
        What the adapter, and the VM head where it has a part in it, make of patch features.

        Args:
            patch_features (`torch.Tensor` of shape `[R, N, W]`): The selected features of the vision tower.
            num_patches (`list[int]`, *optional*): Those of each image, for towers that put all images into one row.
            keep_mask, read_as_codes, patch_boxes (*optional*): See [`~VWLMMModel.get_image_features`].

        Returns:
            [`VWLMMImageFeaturesOutput`] without what the tower alone knows.
        """
        patches = None
        if patch_boxes is not None:
            patch_features, patches = split_patches(patch_features, patch_boxes)  # [I, N, W]
        keeps_fixed_number = False
        if keep_mask is not None:
            keep_mask = keep_mask.to(patch_features.device).bool()
            if num_patches is None and keep_mask.shape != patch_features.shape[:2]:
                raise ValueError(
                    f"`keep_mask` has shape {tuple(keep_mask.shape)}; expected {tuple(patch_features.shape[:2])}, one "
                    "value for each patch of each image."
                )
        elif drops_tokens(self.config):
            keep_mask = self.visual_tokenizer.select_patches(patch_features)
            keeps_fixed_number = self.visual_tokenizer.config.selection == "top_k"
        adapted = adapt(self.multi_modal_projector, patch_features, num_patches, keep_mask, patches)
        read = adapted.image_features  # I x [N, D]
        if self.config.use_pseudo_image_features:
            # One call for all images: where weights are sharded, every process must call a module equally often.
            sizes = [len(features) for features in read]
            read = self._pseudo_image_features(torch.cat(read)).split(sizes)
        patch_codes = None
        if read_as_codes is not None:
            codes = read_as_codes.to(patch_features.device)
            if codes.dtype != torch.bool:
                num_codes = self.config.visual_tokenizer_config.num_codes
                check_codes(codes, patch_features.shape[:2], num_codes, "read_as_codes")
            else:
                patch_codes = self.find_codes(patch_features, adapted.keep_mask)  # [I, N]
                codes = patch_codes.where(codes[:, None], -1)
            embeddings = self.get_input_embeddings()(codes.clamp_min(0) + self.config.code_offset)  # [I, N, D]
            read = list(torch.where((codes >= 0)[..., None], embeddings, torch.stack(list(read))))
        adapted = {**adapted, "pooler_output": read, "patch_features": patch_features, "patch_codes": patch_codes}
        if keeps_fixed_number:
            # The processor writes a placeholder for each token that is kept, and none for others.
            for name in ("pooler_output", "image_features"):
                adapted[name] = [rows[kept] for rows, kept in zip(adapted[name], keep_mask, strict=True)]
            adapted["patch_features"] = patch_features[keep_mask].unflatten(0, (len(keep_mask), -1))  # [I, kept, W]
            adapted["keep_mask"] = adapted["patch_codes"] = None
        return VWLMMImageFeaturesOutput(**adapted)

    def _pseudo_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        embeddings = self.get_vocabulary_embeddings(image_features.device)  # [C, D]
        temperature = self.config.pseudo_image_feature_temperature
        if not isinstance(self.vm_head, VMHead):  # but a layer of vLLM's or PEFT's, which takes no embeddings
            return get_distribution(self.vm_head, image_features, temperature).to(embeddings) @ embeddings
        return self.vm_head(image_features, embeddings, temperature)  # [I * N, D]

    def find_codes(self, patch_features: torch.Tensor, keep_mask: torch.Tensor | None) -> torch.Tensor:
        """
        The visual tokenizer's codes of patch features `[I, N, W]`, `torch.LongTensor` of shape `[I, N]`, -1 where
        `keep_mask` `[I, N]` says that a patch is dropped. Without it all are kept.
        """
        if keep_mask is None:
            keep_mask = torch.ones(patch_features.shape[:2], dtype=torch.bool, device=patch_features.device)
        return self.visual_tokenizer.encode(patch_features=patch_features, keep_mask=keep_mask).patch_codes  # [I, N]

    def encode_images(
        self,
        pixel_values: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        *options: Any,
    ) -> BaseModelOutputWithPooling | None:
        """
        The images of a `forward`, however they come. `options` are those of [`~VWLMMModel.get_image_features`].

        Raises:
            ValueError: If they come twice.
        """
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is None or not len(pixel_values):
            return images
        if images is not None:
            raise ValueError("Pass images as `pixel_values` or as `mm_encoder_outputs`, not as both.")
        return self.get_image_features(pixel_values, *options)

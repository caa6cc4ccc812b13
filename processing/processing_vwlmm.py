# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The VW-LMM processor: a conversation with images becomes token ids and pixel values.

This file, `building_vwlmm.py` and `chat_templates_vwlmm.py` are saved with every checkpoint, so that it also loads
where this package is not installed. They import nothing but Transformers, the `tokenizers` that it needs, and each
other.
"""

import os
from typing import Any

from transformers import (
    AutoConfig,
    BatchEncoding,
    BatchFeature,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.audio_utils import AudioInput
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ProcessingKwargs, Unpack
from transformers.video_utils import VideoInput

from .building_vwlmm import IMAGE_TOKEN, load_image_processor, load_tokenizer, make_llava_processor
from .chat_templates_vwlmm import CHAT_TEMPLATES


class VWLMMProcessor(LlavaProcessor):
    """
    Prepares text and images for VW-LMM: LLaVA's image processor (padding to a square with the mean colour, then
    resizing) and the LLM's tokenizer, which knows the image placeholder `<image>`.

    Use `apply_chat_template` for conversations: any number of images, or none, in any user message, and the literal
    text `<image>` inside a message stays text. In a prompt passed to `processor(text=..., images=...)` every `<image>`
    is the placeholder of one image. Each becomes as many placeholder tokens as the vision tower gives features, 576
    for CLIP-ViT-L/14-336px.

    Calling the processor returns `input_ids` and `attention_mask`, both `[batch, length]`, and, if there are images,
    `pixel_values`, `[images, 3, height, width]`, the images of all samples in order.
    """

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike | PreTrainedTokenizerBase,
        chat_template: str = "vicuna_v1",
    ) -> "VWLMMProcessor":
        """
        Makes the processor for a vision tower and an LLM, the counterpart of
        `VWLMMForConditionalGeneration.from_vision_text_pretrained`.

        The id of `<image>` is the one that the tokenizer already has for it, or else the first free one: one past the
        LLM's vocabulary, unless its embedding has more rows than its tokenizer has tokens. The tokenizer pads on the
        left, as generation needs; TRL's collator asks for the right by itself.

        Args:
            vision (`str`, `os.PathLike` or `PreTrainedModel`):
                Name or path of a CLIP-, SigLIP- or DINOv2-like vision tower with its `preprocessor_config.json`, or
                the loaded model (its image processor is then read from `name_or_path`). A tower whose model type
                starts with `siglip` has no class token; every other is taken to have one, which is dropped from the
                features. Where the tower's own processor keeps only the middle of an image, as DINOv2's does, the
                whole image is resized to the tower's `image_size` instead.
            text (`str`, `os.PathLike` or `PreTrainedTokenizerBase`):
                Name or path of the LLM, or its tokenizer. A Llama tokenizer that comes from a `tokenizer.model`
                tokenizes as the authors' code did, `legacy` flag included; every other is kept as it is.
            chat_template (`str`, *optional*, defaults to `"vicuna_v1"`):
                `"vicuna_v1"`, `"mistral"`, or `"plain"`, the captions of stage I.

        Returns:
            [`VWLMMProcessor`]

        Raises:
            ValueError: If there is no such template, if a loaded tower has no `name_or_path`, if its image processor
                makes images of another size than it takes, or if the tokenizer has no `tokenizers` backend or no
                `eos_token`.
        """
        vision_config, image_processor = load_image_processor(vision)
        tokenizer = load_tokenizer(text)
        has_class_token = not vision_config.model_type.startswith("siglip")
        processor = cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=vision_config.patch_size,
            vision_feature_select_strategy="default" if has_class_token else "full",
            num_additional_image_tokens=1 if has_class_token else 0,
            image_token=IMAGE_TOKEN,
        )
        processor.chat_template = processor.get_chat_template(chat_template)
        return processor

    @classmethod
    def from_llava(cls, name_or_path: str | os.PathLike, chat_template: str | None = None) -> "VWLMMProcessor":
        """
        Makes the processor of a LLaVA checkpoint, the counterpart of `VWLMMForConditionalGeneration.from_llava`: its
        tokenizer and image processor, with the images as that LLaVA has learned to see them.

        Args:
            name_or_path (`str` or `os.PathLike`): A checkpoint of Transformers' LLaVA architecture.
            chat_template (`str`, *optional*):
                `"vicuna_v1"` or `"mistral"`. By default the checkpoint's own template, which serves inference;
                training needs one that marks what the assistant says.

        Returns:
            [`VWLMMProcessor`]

        Raises:
            ValueError: If there is no such template, or if the tokenizer has no `tokenizers` backend or no
                `eos_token`.
        """
        config = AutoConfig.from_pretrained(name_or_path)
        llava = LlavaProcessor.from_pretrained(name_or_path)
        has_class_token = not config.vision_config.model_type.startswith("siglip")
        processor = cls(
            image_processor=llava.image_processor,
            tokenizer=load_tokenizer(llava.tokenizer),
            # Early checkpoints leave these to the config.
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1 if has_class_token else 0,
            image_token=IMAGE_TOKEN,
        )
        processor.chat_template = processor.get_chat_template(chat_template) if chat_template else llava.chat_template
        return processor

    def to_llava(self) -> LlavaProcessor:
        """
        Transformers' own LLaVA processor, the counterpart of `VWLMMForConditionalGeneration.to_llava`: the same token
        ids and pixel values for the same conversations. Its template leaves BOS to the tokenizer, as those of LLaVAs
        do, wherever the tokenizer adds it with the same ids.

        Returns:
            `LlavaProcessor`
        """
        return make_llava_processor(self)

    def get_chat_template(self, name: str) -> str:
        """
        One of the templates of the paper's stages, as this processor's tokenizer needs it.

        Args:
            name (`str`): `"vicuna_v1"`, `"mistral"` or `"plain"`.

        Returns:
            `str`, the Jinja template, which opens with BOS where the tokenizer itself would add one.

        Raises:
            ValueError: If there is no template of that name.
        """
        if name not in CHAT_TEMPLATES:
            raise ValueError(f"`chat_template` is {name!r}, expected one of {sorted(CHAT_TEMPLATES)}.")
        adds_bos = self.tokenizer.bos_token_id is not None and (
            self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id
        )
        return ("{{- bos_token -}}" if adds_bos else "") + CHAT_TEMPLATES[name]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: VideoInput | None = None,
        audio: AudioInput | None = None,
        # Not `Any`: vLLM reads from this annotation which arguments a processor takes.
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        Makes a batch of prompts and images.

        Args:
            images (`ImageInput`, *optional*): The images of all prompts in order, or a list of them for each prompt.
            text (`str` or `list[str]`, *optional*): Prompts, `<image>` in the place of each image.
            videos, audio (*optional*): Not read: the model has no such inputs.
            kwargs: What tokenizer and image processor take, such as `padding` and `return_tensors`.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, `[batch, length]`, and, if there are images,
            `pixel_values`, `[images, 3, height, width]`.

        Raises:
            ValueError: If there are not as many images as placeholders, or if `max_length` cuts image tokens.
        """
        if isinstance(images, (list, tuple)) and all(isinstance(i, (list, tuple)) and not i for i in images):
            images = None  # `[]` or `[[], []]`: text-only samples
        # A prompt that `apply_chat_template` has written opens with BOS, and must not get a second one.
        first = text[0] if isinstance(text, (list, tuple)) and text else text
        has_bos = isinstance(first, str) and self.tokenizer.bos_token and first.startswith(self.tokenizer.bos_token)
        if has_bos and "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Checks that there are as many images as `<image>` placeholders, in each sample if the images are given by
        sample.

        Args:
            images (`ImageInput`, *optional*): The images of all prompts in order, or a list of them for each prompt.
            text (`str` or `list[str]`, *optional*): Prompts.
            kwargs: What else the processor was called with.

        Raises:
            ValueError: If the numbers differ, with both of them and the sample's index.
        """
        if isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            by_sample = isinstance(images, (list, tuple)) and all(isinstance(i, (list, tuple)) for i in images)
            if by_sample and len(images) != len(text):
                raise ValueError(
                    f"Found {len(text)} texts and images for {len(images)} samples, expected one list of images per "
                    "text."
                )
            expected = [sample.count(self.image_token) for sample in text]
            if by_sample:  # totals could agree while an image goes to the neighbouring sample
                counts = zip(expected, map(len, images), strict=True)
            else:
                counts = [(sum(expected), 0 if images is None else len(make_flat_list_of_images(images)))]
            for index, (placeholders, found) in enumerate(counts):
                if placeholders != found:
                    where = f"Sample {index}" if by_sample else "The prompts"
                    raise ValueError(
                        f"{where}: found {placeholders} `{self.image_token}` and {found} images, expected as many of "
                        "one as of the other. Write the placeholder once for each image, and pass them all; for the "
                        f"literal text `{self.image_token}`, pass messages to `apply_chat_template`."
                    )
        super().validate_inputs(images=images, text=text, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> list[str]:
        """See `ProcessorMixin.save_pretrained`. What the last call and the loading have left behind is not saved."""
        # The backend keeps the truncation and padding of its last call, and a tokenizer that is saved with them
        # applies them to every call once it is loaded.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        # How it was loaded is no property of the tokenizer, and would change the file from one machine to the next.
        for name in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(name, None)
        return super().save_pretrained(save_directory, **kwargs)

    # Private, as no public hook sees the token ids; Transformers' own error names neither the sample nor a remedy.
    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchEncoding, modalities: list[str]) -> None:
        # `text` has every placeholder expanded; truncation is the one thing that can take tokens away from it.
        for index, (sample, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=True)):
            ids = ids if isinstance(ids, list) else ids.tolist()
            try:
                super()._check_special_mm_tokens([sample], {"input_ids": [ids]}, modalities)
            except ValueError as error:
                expected, found = sample.count(self.image_token), ids.count(self.image_token_id)
                raise ValueError(
                    f"Sample {index}: `max_length`={len(ids)} cuts image tokens, {found} of {expected} are left. "
                    "Raise `max_length` above the number of image tokens, use fewer images, or leave the sample out."
                ) from error


VWLMMProcessor.register_for_auto_class("AutoProcessor")

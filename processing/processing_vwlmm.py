# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The VW-LMM processor: a conversation with images becomes token ids and pixel values.

This file, `building_vwlmm.py`, `chat_templates_vwlmm.py`, `cutting_vwlmm.py`, `images_vwlmm.py` and
`messages_vwlmm.py` are saved with every checkpoint, so that it also loads where this package is not installed. They
import nothing but Transformers, what it needs itself, and each other.
"""

import json
import os
from itertools import islice
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import (
    AutoConfig,
    BaseImageProcessor,
    BatchEncoding,
    BatchFeature,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.audio_utils import AudioInput
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack
from transformers.utils.chat_template_utils import _get_template_variables
from transformers.video_utils import VideoInput

from .building_vwlmm import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    count_extra_tokens,
    load_image_processor,
    load_tokenizer,
    make_llava_processor,
    make_whole_image_processor,
    remove_marks,
)
from .chat_templates_vwlmm import CHAT_TEMPLATES
from .cutting_vwlmm import cut, fit_grid, get_boxes
from .images_vwlmm import add_image_rules
from .messages_vwlmm import check_conversation, check_text, get_hidden_control_tokens, hide_control_tokens


# What `_add_bos_to_each` pads itself, and with what.
PADDING = {"offset_mapping": (0, 0), "mm_token_type_ids": 0}


class VWLMMProcessor(LlavaProcessor):
    """
    Prepares text and images for VW-LMM: LLaVA's image processor (padding to a square with the mean colour, then
    resizing) and the LLM's tokenizer, which knows the image placeholder `<image>`.

    Use `apply_chat_template` for conversations: any number of images, or none, in any user message. What looks like a
    control token inside a message, `<image>` or `</s>`, stays text. In a prompt passed to
    `processor(text=..., images=...)` every `<image>` is the placeholder of one image. Each becomes as many placeholder
    tokens as the vision tower gives features, 576 for CLIP-ViT-L/14-336px.

    Images are PIL images, arrays, paths, URLs or the content of a file; `images_vwlmm.py` says what becomes of those
    that are no upright RGB images of 8 bits.

    Calling the processor returns `input_ids` and `attention_mask`, both `[batch, length]`, and, if there are images,
    `pixel_values`, `[images, 3, height, width]`, the images of all samples in order.

    With `max_patches`, which an adapter that reads high-resolution patches needs, an image has several rows of
    `pixel_values`: its snapshot, which is the whole image as above, and one to `max_patches` patches in raster order.
    They are cut from the image at its own resolution, padded with the mean colour to the next multiple of a snapshot's
    size; an image that does not fit is shrunk. `patch_boxes`, `[rows, 4]`, says where each patch is, (y0, x0, y1, x1)
    in the unit square of its snapshot; zeros mark a snapshot. An image stays as many placeholder tokens as before.
    """

    # Transformers reads the names of the arguments from here.
    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        num_additional_image_tokens: int = 0,
        image_start_token: str = "",
        image_end_token: str = "",
        num_image_tokens: int | None = None,
        max_patches: int | None = None,
        **kwargs: Any,
    ) -> None:
        is_number = isinstance(max_patches, int) and not isinstance(max_patches, bool)
        if max_patches is not None and (not is_number or max_patches < 1):
            raise ValueError(
                f"`max_patches` is {max_patches!r}; expected a whole number from 1 on, or None for no patches."
            )
        remove_marks(tokenizer.backend_tokenizer)  # of a folder that was saved before, or made by hand
        super().__init__(
            image_processor=add_image_rules(image_processor),
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.image_start_token, self.image_end_token = image_start_token, image_end_token
        self.num_image_tokens = num_image_tokens
        self.max_patches = max_patches

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """
        See `LlavaProcessor.replace_image_token`. With a visual tokenizer `[IMG]` and `[/IMG]` stand around the
        placeholders of an image, of which there are `num_image_tokens` where it keeps a fixed number.
        """
        if self.num_image_tokens is None:
            placeholders = super().replace_image_token(image_inputs, image_idx, **kwargs)
        else:
            placeholders = self.image_token * self.num_image_tokens
        return self.image_start_token + placeholders + self.image_end_token

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        # Private: serving engines ask here how many placeholders an image has.
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        if self.num_image_tokens is not None and image_sizes is not None:
            data.num_image_tokens = [self.num_image_tokens] * len(image_sizes)
        if self.max_patches is not None and image_sizes is not None:
            size = self._get_image_settings({**kwargs, **kwargs.get("images_kwargs", {})})["crop_size"]
            grids = [fit_grid(*image, size["height"], size["width"], self.max_patches) for image in image_sizes]
            # Rows of `pixel_values`: the snapshot is one of them.
            data.num_image_patches = [1 + grid.rows * grid.columns for grid in grids]
        return data

    @property
    def model_input_names(self) -> list[str]:
        """See `ProcessorMixin.model_input_names`."""
        return [*super().model_input_names, *(["patch_boxes"] if self.max_patches is not None else [])]

    def _get_image_settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """What the image processor does, with the options of a call."""
        names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_pad", "image_mean")
        of_processor = {name: getattr(self.image_processor, name, None) for name in names}
        return of_processor | {name: options[name] for name in names if options.get(name) is not None}

    def _process_images(self, images: ImageInput, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        # Private: the one place that sees images and what becomes of them, and not the text.
        if self.max_patches is None:
            return super()._process_images(images, **kwargs)
        images = [self.image_processor.convert_to_8_bits(i, **kwargs) for i in make_flat_list_of_images(images)]
        inputs, replacements = super()._process_images(images, **kwargs)
        snapshots, settings = inputs["pixel_values"], self._get_image_settings(kwargs)
        size = tuple(snapshots[0].shape[-2:])  # of a snapshot, and of a patch
        color = tuple(int(mean * 255) for mean in settings["image_mean"])
        resample = getattr(PIL.Image.Resampling, getattr(settings["resample"], "name", ""), settings["resample"])
        cuts = [cut(image, *size, self.max_patches, color, resample) for image in images]
        as_they_are = {"do_resize": False, "do_pad": False, "do_center_crop": False}
        patches = [patch for of_image in cuts for patch in of_image]
        patches = iter(self.image_processor(patches, **{**kwargs, **as_they_are})["pixel_values"])
        rows, boxes = [], []
        for image, snapshot, of_image in zip(images, snapshots, cuts, strict=True):
            rows += [snapshot, *islice(patches, len(of_image))]
            boxes += [[0.0] * 4, *get_boxes(image.height, image.width, *size, self.max_patches, settings)]
        stack = torch.stack if isinstance(snapshots, torch.Tensor) else list
        stack = np.stack if isinstance(snapshots, np.ndarray) else stack
        return {**inputs, "pixel_values": stack(rows), "patch_boxes": boxes}, replacements

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike | PreTrainedTokenizerBase,
        chat_template: str = "vicuna_v1",
        max_patches: int | None = None,
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
                the loaded model (its image processor is then read from `name_or_path`). A class token, where the
                tower has one, is dropped from the features. Where the tower's own processor keeps only the middle of
                an image, as DINOv2's does, the whole image is resized to the tower's `image_size` instead.
            text (`str`, `os.PathLike` or `PreTrainedTokenizerBase`):
                Name or path of the LLM, or its tokenizer. A Llama tokenizer that comes from a `tokenizer.model`
                tokenizes as the authors' code did, `legacy` flag included; every other is kept as it is.
            chat_template (`str`, *optional*, defaults to `"vicuna_v1"`):
                `"vicuna_v1"`, `"mistral"`, or `"plain"`, the captions of stage I.
            max_patches (`int`, *optional*):
                Most high-resolution patches of an image, for an adapter that reads them. By default none are made.

        Returns:
            [`VWLMMProcessor`]

        Raises:
            ValueError: If there is no such template, if a loaded tower has no `name_or_path`, if its image processor
                makes images of another size than it takes, if the tower has other tokens than patches and a class
                token, or if the tokenizer has no `tokenizers` backend or no `eos_token`.
        """
        vision_config, image_processor = load_image_processor(vision)
        tokenizer = load_tokenizer(text)
        num_extra_tokens = count_extra_tokens(vision_config)
        processor = cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=vision_config.patch_size,
            vision_feature_select_strategy="default" if num_extra_tokens else "full",
            num_additional_image_tokens=num_extra_tokens,
            image_token=IMAGE_TOKEN,
            max_patches=max_patches,
        )
        processor.chat_template = processor.get_chat_template(chat_template)
        return processor

    @classmethod
    def from_visual_tokenizer(
        cls,
        config: PreTrainedConfig,
        text: str | os.PathLike | PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor | None = None,
        num_text_tokens: int | None = None,
        chat_template: str = "lavit",
        max_patches: int | None = None,
    ) -> "VWLMMProcessor":
        """
        Makes the processor of a model with a visual tokenizer: behind the tokens of the LLM stand `[IMG]`, `[/IMG]`,
        the codes and the image placeholder.

        Args:
            config ([`VWLMMVisualTokenizerConfig`]): Of the tokenizer.
            text (`str`, `os.PathLike` or `PreTrainedTokenizerBase`): Name or path of the LLM, or its tokenizer.
            image_processor (`BaseImageProcessor`, *optional*): By default with the tower's own mean and deviation,
                and its size, to which images are resized as a whole, as LaVIT's authors do.
            num_text_tokens (`int`, *optional*): Id of `[IMG]`, by default the number of the LLM's tokens.
            chat_template (`str`, *optional*, defaults to `"lavit"`): See [`~VWLMMProcessor.get_chat_template`].
            max_patches (`int`, *optional*): See [`~VWLMMProcessor.from_vision_text_pretrained`].

        Returns:
            [`VWLMMProcessor`]

        Raises:
            ValueError: If there are more tokens than ids below `num_text_tokens`, or if the mean and deviation of the
                tower are not known.
        """
        tokenizer = load_tokenizer(text, num_codes=config.num_codes, num_text_tokens=num_text_tokens)
        vision = config.vision_config
        has_class_token = config.vision_feature_select_strategy == "default"
        processor = cls(
            image_processor=image_processor or make_whole_image_processor(vision),
            tokenizer=tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=int(has_class_token),
            image_token=IMAGE_TOKEN,
            image_start_token=IMAGE_START_TOKEN,
            image_end_token=IMAGE_END_TOKEN,
            num_image_tokens=config.num_fixed_tokens,
            max_patches=max_patches,
        )
        processor.chat_template = processor.get_chat_template(chat_template)
        return processor

    @classmethod
    def from_llava(
        cls, name_or_path: str | os.PathLike, chat_template: str | None = None, max_patches: int | None = None
    ) -> "VWLMMProcessor":
        """
        Makes the processor of a LLaVA checkpoint, the counterpart of `VWLMMForConditionalGeneration.from_llava`: its
        tokenizer and image processor, with the images as that LLaVA has learned to see them.

        Args:
            name_or_path (`str` or `os.PathLike`): A checkpoint of Transformers' LLaVA architecture.
            chat_template (`str`, *optional*):
                `"vicuna_v1"` or `"mistral"`. By default the checkpoint's own template, which serves inference;
                training needs one that marks what the assistant says.
            max_patches (`int`, *optional*): See [`~VWLMMProcessor.from_vision_text_pretrained`].

        Returns:
            [`VWLMMProcessor`]

        Raises:
            ValueError: If there is no such template, or if the tokenizer has no `tokenizers` backend or no
                `eos_token`.
        """
        config = AutoConfig.from_pretrained(name_or_path)
        llava = LlavaProcessor.from_pretrained(name_or_path)
        processor = cls(
            image_processor=llava.image_processor,
            tokenizer=load_tokenizer(llava.tokenizer),
            # Early checkpoints leave these to the config.
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=count_extra_tokens(config.vision_config),
            image_token=IMAGE_TOKEN,
            max_patches=max_patches,
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

        Raises:
            ValueError: If images have high-resolution patches, which no LLaVA of this architecture reads.
        """
        if self.max_patches is not None:
            raise ValueError(
                f"`max_patches` is {self.max_patches}, and a LLaVA's processor cuts no patches. Set it to None if the "
                "snapshots alone are what you want."
            )
        return make_llava_processor(self)

    def get_chat_template(self, name: str) -> str:
        """
        One of the templates of the paper's stages, as this processor's tokenizer needs it.

        Args:
            name (`str`): `"vicuna_v1"`, `"mistral"` or `"plain"`.

        Returns:
            `str`, the Jinja template, which opens with BOS where the tokenizer itself would add one, and knows the
            tokenizer's control tokens.

        Raises:
            ValueError: If there is no template of that name.
        """
        if name not in CHAT_TEMPLATES:
            raise ValueError(f"`chat_template` is {name!r}, expected one of {sorted(CHAT_TEMPLATES)}.")
        adds_bos = self.tokenizer.bos_token_id is not None and (
            self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id
        )
        hidden = json.dumps(list(get_hidden_control_tokens(self.tokenizer).items()), ensure_ascii=False)
        return (
            ("{{- bos_token -}}" if adds_bos else "")
            + f"{{%- set control_tokens = {hidden} -%}}\n"
            + CHAT_TEMPLATES[name]
        )

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict[str, str]] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[list[int]] | BatchFeature:
        """
        See `ProcessorMixin.apply_chat_template`.

        The control tokens that are typed in a conversation are text, with any template: those of the prompt are the
        template's alone. `sanitize_control_tokens`, which asks Transformers for it, changes nothing.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): A conversation or several: messages of `role` and
                `content`, a string or a list of parts of type `"text"` or `"image"`.
            chat_template (`str`, *optional*): A Jinja template, by default the processor's own.
            tools, documents (*optional*): For templates that have a place for them.
            kwargs: What else `ProcessorMixin.apply_chat_template`, the template and the processor take.

        Raises:
            ValueError: If a message or part is none, with its index, or if something is passed that the template, the
                model or the processor has no place for.
        """
        kwargs.pop("sanitize_control_tokens", None)
        templates = self.chat_template if isinstance(self.chat_template, dict) else {}
        name = chat_template or ("default" if templates else None)
        template = templates.get(name, name) or self.chat_template
        variables = _get_template_variables(template)  # private: there is no other way to know
        for name, value in (("tools", tools), ("documents", documents)):
            if value and name not in variables:
                raise ValueError(f"`{name}` is set, and the chat template has no place for it. Leave it out.")
        if kwargs.get("load_audio_from_video"):
            raise ValueError("`load_audio_from_video` is set: the model has no audio and no video. Leave it out.")
        if kwargs.get("return_assistant_tokens_mask") and not (kwargs.get("tokenize") and kwargs.get("return_dict")):
            raise ValueError("`return_assistant_tokens_mask` needs `tokenize=True` and `return_dict=True`.")
        known = super().apply_chat_template.__func__.__code__.co_varnames
        self._check_arguments({k: v for k, v in kwargs.items() if k not in variables and k not in known})

        is_batch = isinstance(conversation, (list, tuple)) and isinstance((*conversation, None)[0], (list, tuple))
        for index, messages in enumerate(conversation if is_batch else [conversation]):
            check_conversation(messages, template or "", f"conversation {index}, " if is_batch else "")
        hidden = get_hidden_control_tokens(self.tokenizer)
        typed = {name: hide_control_tokens(value, hidden) for name, value in kwargs.items() if name in variables}
        return super().apply_chat_template(
            hide_control_tokens(conversation, hidden),
            chat_template=chat_template,
            tools=hide_control_tokens(tools, hidden),
            documents=hide_control_tokens(documents, hidden),
            **{**kwargs, **typed},
        )

    def _check_arguments(self, arguments: dict[str, Any]) -> None:
        """Raises `ValueError` if the processor would ignore an argument."""
        groups = ProcessingKwargs.__annotations__
        image_kwargs = getattr(self.image_processor, "valid_kwargs", None)
        known = {
            "text_kwargs": {*groups["text_kwargs"].__annotations__},
            "images_kwargs": {*groups["images_kwargs"].__annotations__, *getattr(image_kwargs, "__annotations__", {})},
        }
        of_processor = {*known, *groups, "common_kwargs", "return_metadata"} - {"videos_kwargs", "audio_kwargs"}
        for name, value in arguments.items():
            if name in known:
                unknown = {*value} - known[name]
                name = f"{name}[{sorted(unknown)[0]!r}]" if unknown else None
            elif name in of_processor or any(name in names for names in known.values()):
                continue
            if name and value:
                raise ValueError(
                    f"`{name}` is set, and neither the tokenizer, the image processor nor the chat template has a "
                    "place for it. Leave it out."
                )

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
            videos, audio (*optional*): Refused: the model has no such inputs.
            kwargs: What tokenizer and image processor take, such as `padding` and `return_tensors`.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, `[batch, length]`, and, if there are images,
            `pixel_values`, `[images, 3, height, width]`; with `max_patches` `[rows, 3, height, width]`, and
            `patch_boxes`, `[rows, 4]`.

        Raises:
            ValueError: If there are not as many images as placeholders, if `max_length` cuts image tokens, if an image
                or a text is none, or if something is passed that would be ignored.
        """
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None and len(value):
                raise ValueError(f"`{name}` is set: the model reads text and images alone. Leave it out.")
        self._check_arguments(kwargs)
        if {**kwargs, **kwargs.get("text_kwargs", {})}.get("return_overflowing_tokens"):
            raise ValueError(
                "`return_overflowing_tokens` is set: the rest of a prompt would be a sample without its images. Leave "
                "it out, and raise `max_length`."
            )
        if isinstance(images, (list, tuple)) and all(isinstance(i, (list, tuple)) and not i for i in images):
            images = None  # `[]` or `[[], []]`: text-only samples
        texts = [text] if isinstance(text, str) else text if isinstance(text, (list, tuple)) else []
        for index, sample in enumerate(texts):
            if not isinstance(sample, str):
                raise ValueError(f"text[{index}] is a {type(sample).__name__}, expected a string.")
            check_text(sample, f"text[{index}]")
        # A prompt that `apply_chat_template` has written opens with BOS, and must not get a second one.
        bos = self.tokenizer.bos_token
        has_bos = [bool(bos) and sample.startswith(bos) for sample in texts]
        groups = (kwargs, kwargs.get("text_kwargs", {}), kwargs.get("common_kwargs", {}))
        if any(has_bos) and not any("add_special_tokens" in group for group in groups):
            if not all(has_bos):
                return self._add_bos_to_each(images, texts, kwargs)
            kwargs["add_special_tokens"] = False
        return super().__call__(images=images, text=text, **kwargs)

    def _add_bos_to_each(self, images: ImageInput | None, text: list[str], kwargs: dict[str, Any]) -> BatchFeature:
        """A batch of prompts of which some open with BOS: each is tokenized by itself, then they are padded."""
        images = None if images is None else self.image_processor.fetch_images(images)
        self.validate_inputs(images=images, text=list(text))
        images = [] if images is None else make_flat_list_of_images(images)
        options = {**kwargs.get("common_kwargs", {}), **kwargs.get("text_kwargs", {}), **kwargs}
        of_batch = ("padding", "pad_to_multiple_of", "return_tensors")
        kwargs = {
            name: {k: v for k, v in value.items() if k not in of_batch} if isinstance(value, dict) else value
            for name, value in kwargs.items()
            if name not in of_batch
        }
        batch, start = {}, 0
        for sample in text:
            end = start + sample.count(self.image_token)
            row = self(images=list(images[start:end]) or None, text=[sample], **kwargs)
            start = end
            for name, values in row.items():
                batch.setdefault(name, []).extend(values)
        if padding := options.get("padding"):
            side = options.get("padding_side") or self.tokenizer.padding_side
            names = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")
            batch |= self.tokenizer.pad(
                {name: batch[name] for name in names if name in batch},
                padding=padding,
                max_length=options.get("max_length"),
                pad_to_multiple_of=options.get("pad_to_multiple_of"),
                padding_side=side,
            )
            for name in PADDING.keys() & batch.keys():
                for index, (values, ids) in enumerate(zip(batch[name], batch["input_ids"], strict=True)):
                    filling = [PADDING[name]] * (len(ids) - len(values))
                    batch[name][index] = [*filling, *values] if side == "left" else [*values, *filling]
        return BatchFeature(
            batch, tensor_type=options.get("return_tensors"), skip_tensor_conversion=self.skip_tensor_conversion
        )

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

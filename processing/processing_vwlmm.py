# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The VW-LMM processor: a conversation with images becomes token ids and pixel values.

This file, `building_vwlmm.py` and `chat_templates_vwlmm.py` are saved with every checkpoint, so that it also loads where
this package is not installed. They import nothing but Transformers, the `tokenizers` that it needs, and each other.
"""

from transformers import AutoConfig, LlavaProcessor
from transformers.image_utils import make_flat_list_of_images

from .building_vwlmm import IMAGE_TOKEN, load_image_processor, load_tokenizer
from .chat_templates_vwlmm import CHAT_TEMPLATES


class VWLMMProcessor(LlavaProcessor):
    """
    Prepares text and images for VW-LMM: LLaVA's image processor (padding to a square with the mean colour, then
    resizing) and the LLM's tokenizer, which knows the image placeholder `<image>`.

    Use `apply_chat_template` for conversations: any number of images, or none, in any user message, and the literal text
    `<image>` inside a message stays text. In a prompt passed to `processor(text=..., images=...)` every `<image>` is the
    placeholder of one image. Each becomes as many placeholder tokens as the vision tower gives features, 576 for
    CLIP-ViT-L/14-336px.

    Calling the processor returns `input_ids` and `attention_mask`, both `[batch, length]`, and, if there are images,
    `pixel_values`, `[images, 3, height, width]`, the images of all samples in order.
    """

    @classmethod
    def from_vision_text_pretrained(cls, vision, text, chat_template="vicuna_v1"):
        """
        Makes the processor for a vision tower and an LLM, the counterpart of
        `VWLMMForConditionalGeneration.from_vision_text_pretrained`.

        Args:
            vision (`str`, `os.PathLike` or `PreTrainedModel`):
                Name or path of a CLIP-, SigLIP- or DINOv2-like vision tower with its `preprocessor_config.json`, or the
                loaded model (its image processor is then read from `name_or_path`). A tower whose model type starts with
                `siglip` has no class token; every other is taken to have one, which is dropped from the features.
                Where the tower's own processor keeps but the middle of an image, as DINOv2's does, the whole image is
                resized to the tower's `image_size` instead.
            text (`str`, `os.PathLike` or `PreTrainedTokenizerBase`):
                Name or path of the LLM, or its tokenizer. A Llama tokenizer that comes from a `tokenizer.model`
                tokenizes as the authors' code did, `legacy` flag included; every other is kept as it is.
            chat_template (`str`, *optional*, defaults to `"vicuna_v1"`):
                `"vicuna_v1"`, `"mistral"`, or `"plain"`, the captions of stage I.

        The id of `<image>` is the one that the tokenizer already has for it, or else the first free one: one past the
        LLM's vocabulary, unless its embedding has more rows than its tokenizer has tokens. The tokenizer pads on the
        left, as generation needs; TRL's collator asks for the right by itself.
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
    def from_llava(cls, name_or_path, chat_template=None):
        """
        Makes the processor of a LLaVA checkpoint, the counterpart of `VWLMMForConditionalGeneration.from_llava`: its
        tokenizer and image processor, with the images as that LLaVA has learned to see them.

        Args:
            name_or_path (`str` or `os.PathLike`): A checkpoint of Transformers' LLaVA architecture.
            chat_template (`str`, *optional*):
                `"vicuna_v1"` or `"mistral"`. By default the checkpoint's own template, which serves inference;
                training needs one that marks what the assistant says.
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

    def get_chat_template(self, name):
        """
        One of the templates of the paper's stages, as this processor's tokenizer needs it.

        Args:
            name (`str`): `"vicuna_v1"`, `"mistral"` or `"plain"`.

        Returns:
            `str`: The Jinja template, which opens with BOS where the tokenizer itself would add one.

        Raises:
            ValueError: If there is no template of that name.
        """
        if name not in CHAT_TEMPLATES:
            raise ValueError(f"`chat_template` is {name!r}, expected one of {sorted(CHAT_TEMPLATES)}.")
        adds_bos = self.tokenizer.bos_token_id is not None and (
            self.tokenizer("a").input_ids[0] == self.tokenizer.bos_token_id
        )
        return ("{{- bos_token -}}" if adds_bos else "") + CHAT_TEMPLATES[name]

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if isinstance(images, (list, tuple)) and all(isinstance(i, (list, tuple)) and not i for i in images):
            images = None  # `[]` or `[[], []]`: text-only samples
        # A prompt that `apply_chat_template` has written opens with BOS, and must not get a second one.
        first = text[0] if isinstance(text, (list, tuple)) and text else text
        has_bos = isinstance(first, str) and self.tokenizer.bos_token and first.startswith(self.tokenizer.bos_token)
        if has_bos and "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs):
        """
        Checks that there are as many images as `<image>` placeholders, in each sample if the images are given by sample.

        Raises:
            `ValueError`: with both numbers, and the sample's index.
        """
        if isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            by_sample = isinstance(images, (list, tuple)) and all(isinstance(i, (list, tuple)) for i in images)
            if by_sample and len(images) != len(text):
                raise ValueError(
                    f"Found {len(text)} texts and images for {len(images)} samples, expected one list of images per text."
                )
            expected = [sample.count(self.image_token) for sample in text]
            if by_sample:  # totals could agree while an image goes to the neighbouring sample
                counts = zip(expected, map(len, images), strict=True)
            else:
                counts = [(sum(expected), 0 if images is None else len(make_flat_list_of_images(images)))]
            for index, (placeholders, found) in enumerate(counts):
                if placeholders != found:
                    raise ValueError(
                        f"{f'Sample {index}' if by_sample else 'The prompts'}: found {placeholders} `{self.image_token}` and "
                        f"{found} images, expected as many of one as of the other. Write the placeholder once for each "
                        f"image, and pass them all; for the literal text `{self.image_token}`, pass messages to `apply_chat_template`."
                    )
        super().validate_inputs(images=images, text=text, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        # The backend keeps the truncation and padding of its last call, and a tokenizer that is saved with them applies
        # them to every call once it is loaded.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        # How it was loaded is no property of the tokenizer, and would change the file from one machine to the next.
        for name in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(name, None)
        return super().save_pretrained(save_directory, **kwargs)

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        # `text` has every placeholder expanded; truncation is the one thing that can take tokens away from it.
        for index, (sample, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=True)):
            ids = ids if isinstance(ids, list) else ids.tolist()
            expected, found = sample.count(self.image_token), ids.count(self.image_token_id)
            if found != expected:
                raise ValueError(
                    f"Sample {index}: `max_length`={len(ids)} cuts image tokens, {found} of {expected} are left. Raise "
                    "`max_length` above the number of image tokens, use fewer images, or leave the sample out."
                )


VWLMMProcessor.register_for_auto_class("AutoProcessor")

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
The VW-LMM processor: a conversation with images becomes token ids and pixel values.

This file and `chat_templates_vwlmm.py` are saved with every checkpoint, so that it also loads where this package is not
installed. They import nothing but Transformers, the `tokenizers` that it needs, and each other.
"""

import copy
import re

from tokenizers import AddedToken, Regex, normalizers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    LlamaTokenizer,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import make_flat_list_of_images
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file, is_torchvision_available

from .chat_templates_vwlmm import CHAT_TEMPLATES, LITERAL_MARK


if is_torchvision_available():
    from transformers import LlavaImageProcessor
else:
    from transformers import LlavaImageProcessorPil as LlavaImageProcessor


IMAGE_TOKEN = "<image>"


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
        vision_config, image_processor = _load_image_processor(vision)
        tokenizer = _load_tokenizer(text)
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
            tokenizer=_load_tokenizer(llava.tokenizer),
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


def _load_image_processor(vision):
    """The config of a vision tower, and LLaVA's image processor with the tower's size, crop, mean, std and resampling."""
    loaded = isinstance(vision, PreTrainedModel)
    source = vision.name_or_path if loaded else vision
    if not source:
        raise ValueError(
            "The vision tower has no `name_or_path` that its `preprocessor_config.json` could be read from. Pass the "
            "tower's name or path instead of the model."
        )
    config = vision.config if loaded else AutoConfig.from_pretrained(source)
    config = getattr(config, "vision_config", config)  # the vision half of a whole CLIP or SigLIP
    settings = AutoImageProcessor.from_pretrained(source).to_dict()
    settings.pop("image_processor_type")

    # `crop_size` is where LLaVA's processor looks up the size of its output, even if nothing is left to crop.
    crops = settings.get("do_center_crop") or False
    crop_size = settings["crop_size"] if crops else settings["size"]
    expected = {"height": config.image_size, "width": config.image_size}
    if min(crop_size.values()) < min(settings["size"].values()):
        # A classifier's transform, and most often for smaller images. What is asked here may be about the edge.
        settings["size"] = crop_size = expected
    if set(crop_size) == {"shortest_edge"}:  # of a square, that is the height and the width
        crop_size = {"height": crop_size["shortest_edge"], "width": crop_size["shortest_edge"]}
    if crop_size != expected:
        raise ValueError(
            f"The image processor of {source} makes images of {crop_size}, but the vision tower expects {expected}. "
            "Correct `size` and `crop_size` in its `preprocessor_config.json`."
        )
    settings.update(do_pad=True, do_center_crop=crops, crop_size=crop_size)
    return config, LlavaImageProcessor(**settings)


def _load_tokenizer(text):
    """The LLM's tokenizer, tokenizing exactly as the original, with `<image>` as a special token and a pad token."""
    if isinstance(text, PreTrainedTokenizerBase):
        tokenizer = text
    elif _is_sentencepiece_llama(text):
        # Without the flag, Transformers 4 (the authors' code) meant the legacy behaviour and Transformers 5 the other.
        tokenizer = LlamaTokenizer.from_pretrained(text, legacy=get_tokenizer_config(text).get("legacy") is not False)
    else:
        tokenizer = AutoTokenizer.from_pretrained(text)
        if cached_file(text, "tokenizer.json", _raise_exceptions_for_missing_entries=False):
            # The specific classes rebuild normalizer and pre-tokenizer; the generic one takes the file as it is.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(text, **tokenizer.special_tokens_map)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"{type(tokenizer).__name__} has no `tokenizers` backend, which the processor needs for offsets."
        )
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has no `eos_token`, which the chat templates close every answer with. Set one."
        )

    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    if isinstance(tokenizer, LlamaTokenizer) and str(getattr(tokenizer, "vocab_file", None)).endswith(".model"):
        _tokenize_like_sentencepiece(backend, tokenizer)
    # Added tokens that are not normalized are found before the normalizer runs. The mark in a literal `<image>` hides it
    # from that search; here it disappears, and what is left is tokenized as ordinary text.
    remove_mark = normalizers.Replace(LITERAL_MARK, "")
    backend.normalizer = normalizers.Sequence([remove_mark] + ([backend.normalizer] if backend.normalizer else []))
    backend.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])

    # The generic class saves the backend to `tokenizer.json` and loads it back verbatim.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # LLaVA pads with the unknown token. Padding is masked, so that any token serves.
        **{"pad_token": tokenizer.unk_token or tokenizer.eos_token, **tokenizer.special_tokens_map},
    )


def _is_sentencepiece_llama(source):
    names = {"LlamaTokenizer", "LlamaTokenizerFast"}
    return get_tokenizer_config(source).get("tokenizer_class") in names and bool(
        cached_file(source, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
    )


def _tokenize_like_sentencepiece(backend, tokenizer):
    """
    Gives a Llama backend the segmentation of the SentencePiece tokenizer with which the authors' code worked.

    That code cuts a prompt at `<image>` and tokenizes each piece by itself, and SentencePiece puts a `▁` in front of what
    it tokenizes. With `legacy=True` there is a `▁` behind other special tokens too, with `legacy=False` there is not.
    """
    backend.pre_tokenizer = None
    start = normalizers.Prepend("▁")
    if not tokenizer.legacy:
        # A normalized token is found after the normalizer has run, so that what follows it is not a start any more. The
        # token itself is normalized as well, hence the exception.
        backend.add_special_tokens([AddedToken(tokenizer.eos_token, normalized=True, special=True)])
        start = normalizers.Replace(Regex(rf"\A(?!{re.escape(tokenizer.eos_token)})"), "▁")
    backend.normalizer = normalizers.Sequence([start, normalizers.Replace(" ", "▁")])

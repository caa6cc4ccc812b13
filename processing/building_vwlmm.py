# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The parts of a processor, made from those of a vision tower and an LLM; and a LLaVA's processor of them."""

import copy
import json
import os
import re

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    LlamaTokenizer,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file, is_torchvision_available

from .chat_templates_vwlmm import LITERAL_MARK, NORMALIZED_LITERAL_MARK


if is_torchvision_available():
    from transformers import LlavaImageProcessor
else:
    from transformers import LlavaImageProcessorPil as LlavaImageProcessor


IMAGE_TOKEN = "<image>"
# What stands around an image that a visual tokenizer has read, and what its codes begin with.
IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<|image_start|>", "<|image_end|>"
IMAGE_CODE_PREFIX = "<|image_code_"
# Towers that read images with CLIP's mean and deviation, wherever they come from.
OF_CLIP = ("clip_vision_model", "blip_2_vision_model")
# A row of the LLM's embeddings that no token has a name for.
UNUSED_PREFIX = "<|unused_"
# What opens a template that writes BOS itself.
WRITES_BOS = re.compile(r"\A\s*\{\{-?\s*bos_token\s*-?\}\}")
ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})")


def load_image_processor(
    vision: str | os.PathLike | PreTrainedModel,
) -> tuple[PreTrainedConfig, LlavaImageProcessor]:
    """
    LLaVA's image processor with the size, crop, mean, std and resampling that a vision tower was trained with.

    Args:
        vision (`str`, `os.PathLike` or `PreTrainedModel`): The tower: name, path or module.

    Returns:
        `PreTrainedConfig` of the tower, and `LlavaImageProcessor`.

    Raises:
        ValueError: If the module does not say where its `preprocessor_config.json` is, or if its own image processor
            makes images of another size than it takes.
    """
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
        # A classifier's processor: it keeps only the middle of an image, most often smaller than the tower takes it.
        # What a question is about may be at the edge.
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


def make_whole_image_processor(vision_config: PreTrainedConfig) -> LlavaImageProcessor:
    """
    LLaVA's image processor that makes squares of whole images without a border, as LaVIT's authors do, with the mean,
    deviation and resampling that a vision tower was trained with.

    Args:
        vision_config (`PreTrainedConfig`): Config of the tower. Where it comes from is in its `name_or_path`; of CLIP
            and EVA-CLIP it need not be known.

    Raises:
        ValueError: If the tower is another, and its config does not say where it comes from.
    """
    size = {"height": vision_config.image_size, "width": vision_config.image_size}
    whole = {"do_pad": False, "do_center_crop": False, "size": size, "crop_size": size}
    if vision_config.name_or_path:
        _, image_processor = load_image_processor(vision_config.name_or_path)
        settings = image_processor.to_dict()
        settings.pop("image_processor_type", None)
        return LlavaImageProcessor(**{**settings, **whole})
    if vision_config.model_type not in OF_CLIP:
        raise ValueError(
            f"A vision tower of type {vision_config.model_type!r} has no `name_or_path` that its "
            "`preprocessor_config.json` could be read from, and its mean and deviation need not be CLIP's. Load the "
            "tower from its name or path, or pass `image_processor`."
        )
    return LlavaImageProcessor(**whole)


def load_tokenizer(
    text: str | os.PathLike | PreTrainedTokenizerBase, num_codes: int = 0, num_text_tokens: int | None = None
) -> PreTrainedTokenizerFast:
    """
    The LLM's tokenizer, tokenizing exactly as the original, with `<image>` as a special token and a pad token.

    Args:
        text (`str`, `os.PathLike` or `PreTrainedTokenizerBase`): The LLM: name or path, or its tokenizer.
        num_codes (`int`, *optional*): Codes of a visual tokenizer: then it and `[IMG]` and `[/IMG]` have tokens, too.
        num_text_tokens (`int`, *optional*): Id of `[IMG]`, by default the first free one.

    Returns:
        `PreTrainedTokenizerFast`, a new one: a tokenizer that was passed is not changed.

    Raises:
        ValueError: If it has no `tokenizers` backend, or no `eos_token`.
    """
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
    remove_marks(backend)
    names = []
    if num_codes:
        num_known = backend.get_vocab_size()
        if backend.token_to_id(IMAGE_TOKEN) is not None:
            raise ValueError(
                f"The tokenizer has {IMAGE_TOKEN} already, at id {backend.token_to_id(IMAGE_TOKEN)}, and [IMG], "
                "[/IMG] and the codes stand in front of it. Pass the LLM's own tokenizer."
            )
        if num_text_tokens is not None and num_text_tokens < num_known:
            raise ValueError(
                f"The LLM's tokenizer has {num_known} tokens, and [IMG] the id {num_text_tokens}. Is this the "
                "tokenizer of another LLM?"
            )
        # Nothing stands in front of a prompt, no BOS either.
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
        names += [f"{UNUSED_PREFIX}{index}|>" for index in range(num_known, num_text_tokens or num_known)]
        names += [IMAGE_START_TOKEN, IMAGE_END_TOKEN, *(f"{IMAGE_CODE_PREFIX}{code}|>" for code in range(num_codes))]
    backend.add_special_tokens([AddedToken(n, normalized=False, special=True) for n in [*names, IMAGE_TOKEN]])

    # The generic class saves the backend to `tokenizer.json` and loads it back verbatim.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # LLaVA pads with the unknown token. Padding is masked, so that any token serves.
        **{"pad_token": tokenizer.unk_token or tokenizer.eos_token, **tokenizer.special_tokens_map},
    )


def remove_marks(backend: Tokenizer) -> None:
    """
    Lets a tokenizer remove the marks in what is text and looks like a control token, if it does not yet.

    Added tokens are found before the normalizer runs, or those that are normalized, behind it. A mark hides them from
    that search; then it disappears, and what is left is tokenized as ordinary text.
    """
    # In place of their Python objects, whose steps cannot be read. Only what a component is told stands in there.
    if not _mentions(backend.normalizer, LITERAL_MARK):
        steps = [normalizers.Replace(LITERAL_MARK, "")] + ([backend.normalizer] if backend.normalizer else [])
        backend.normalizer = normalizers.Sequence(steps)
    if not _mentions(backend.pre_tokenizer, NORMALIZED_LITERAL_MARK):
        steps = [pre_tokenizers.Split(NORMALIZED_LITERAL_MARK, "removed")]
        steps += [backend.pre_tokenizer] if backend.pre_tokenizer else []
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)


def _mentions(component: object, mark: str) -> bool:
    return component is not None and mark in json.dumps(json.loads(component.__getstate__()), ensure_ascii=False)


def count_extra_tokens(vision_config: PreTrainedConfig) -> int:
    """
    How many tokens a vision tower has beside its patches: 1 if it has a class token, 0 if not. The tower itself is
    asked, by a run without weights.

    Args:
        vision_config (`PreTrainedConfig`): Config of the tower.

    Raises:
        ValueError: If it has more, as those with register tokens, or is none that makes a sequence of features of an
            image of `image_size` and `patch_size`.
    """
    try:
        if not (isinstance(vision_config.image_size, int) and isinstance(vision_config.patch_size, int)):
            raise ValueError("`image_size` and `patch_size` are not one number each")
        with torch.device("meta"), torch.no_grad():
            tower = AutoModel.from_config(copy.deepcopy(vision_config), dtype=torch.float32).eval()
            size, patch = vision_config.image_size, vision_config.patch_size
            images = torch.zeros(1, getattr(vision_config, "num_channels", 3), size, size)  # [1, 3, H, W]
            features = tower(images, output_hidden_states=True).hidden_states[-1]  # [1, N (+ 1), W]
        if features.ndim != 3:
            raise ValueError(f"its features have the shape {tuple(features.shape)}")
    except Exception as error:  # whatever another kind of tower makes of images
        raise ValueError(
            f"A vision tower of type {vision_config.model_type!r} cannot be used ({type(error).__name__}: {error}). "
            "Expected one that makes `[images, tokens, width]` of square images, as CLIP, SigLIP, DINOv2 and AIMv2 do."
        ) from error
    num_extra_tokens = features.shape[1] - (size // patch) ** 2
    if num_extra_tokens not in (0, 1):
        raise ValueError(
            f"A vision tower of type {vision_config.model_type!r} has {features.shape[1]} tokens for "
            f"{(size // patch) ** 2} patches, {num_extra_tokens} beside them, such as register tokens. Expected "
            "patches, and a class token at most."
        )
    return num_extra_tokens


def _is_sentencepiece_llama(source: str | os.PathLike) -> bool:
    names = {"LlamaTokenizer", "LlamaTokenizerFast"}
    return get_tokenizer_config(source).get("tokenizer_class") in names and bool(
        cached_file(source, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
    )


def _tokenize_like_sentencepiece(backend: Tokenizer, tokenizer: LlamaTokenizer) -> None:
    """
    Gives a Llama backend the segmentation of the SentencePiece tokenizer with which the authors' code worked.

    That code cuts a prompt at `<image>` and tokenizes each piece by itself, and SentencePiece puts a `▁` in front of
    what it tokenizes. With `legacy=True` there is a `▁` behind other special tokens too, with `legacy=False` there is
    not.
    """
    backend.pre_tokenizer = None
    start = normalizers.Prepend("▁")
    if not tokenizer.legacy:
        # A normalized token is found after the normalizer has run, so that what follows it is not a start any more.
        # The token itself is normalized as well, hence the exception.
        backend.add_special_tokens([AddedToken(tokenizer.eos_token, normalized=True, special=True)])
        start = normalizers.Replace(Regex(rf"\A(?!{re.escape(tokenizer.eos_token)})"), "▁")
    backend.normalizer = normalizers.Sequence([start, normalizers.Replace(" ", "▁")])


def make_llava_processor(processor: LlavaProcessor) -> LlavaProcessor:
    """
    Transformers' own LLaVA processor, of copies of the parts of ours.

    The templates of LLaVAs leave BOS to the tokenizer, and tools add it there. Ours write it; here it is taken out of
    the template where the tokenizer adds the same. Characters that are escaped become themselves: llama.cpp's Jinja
    knows no `\\u`.

    Args:
        processor ([`VWLMMProcessor`]): What makes the same token ids and pixel values.

    Returns:
        `LlavaProcessor`
    """
    tokenizer = copy.deepcopy(processor.tokenizer)
    # The backend keeps the truncation and padding of its last call, and would be saved with them.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    # How it was loaded, and code of ours that a LLaVA does not need.
    for name in ("auto_map", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    settings = {name: value for name, value in processor.image_processor.to_dict().items() if name != "auto_map"}
    template, bos = processor.chat_template, tokenizer.bos_token
    if template:
        template = ESCAPED.sub(lambda match: chr(int(match[1], 16)), template)
    # Not the same where a tokenizer puts a `▁` at the start of a text, and none behind BOS.
    if template and bos and tokenizer(bos + "a", add_special_tokens=False)["input_ids"] == tokenizer("a")["input_ids"]:
        template = WRITES_BOS.sub("", template)
    return LlavaProcessor(
        image_processor=type(processor.image_processor)(**settings),
        tokenizer=tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        image_token=processor.image_token,
        chat_template=template,
    )

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a model makes of one image, patch by patch: its visual words, its nearest tokens, what the decoder predicted
before it saw the patch, and what each layer would say. Figures, the patch lens and the app are made from this.

Shapes: `N` image tokens of the image, `L` sequence length, `S` layers, `D` hidden size of the decoder, `C` vocabulary
size of the LLM.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from processing_vwlmm import VWLMMProcessor

from .adapters_vwlmm import drops_tokens, to_dtype_of
from .modeling_vwlmm import VWLMMForConditionalGeneration
from .visual_words_vwlmm import get_distribution


DROPPED = -1  # in place of a token, where there is none


@dataclass
class TopTokens:
    """
    token_ids (`torch.LongTensor` of shape `[N, k]`, or `[S, N, k]` of layers):
        The first `k` tokens of each patch, best first; -1 where the image token is dropped, or there is no prediction.
    values (`torch.Tensor` of the same shape):
        Their probabilities, or cosines of nearest tokens; 0 where there is no token.
    """

    token_ids: torch.LongTensor
    values: torch.Tensor


@dataclass
class InspectedImage:
    """
    One image through one model. All tensors are on the CPU.

    image (`PIL.Image.Image`):
        The image as the vision tower sees it: resized, cropped or padded. Of an image with high-resolution patches its
        snapshot.
    grid (`tuple[int, int]`):
        Rows and columns of patches, `N` in all, in raster order.
    visual_words (`torch.Tensor` of shape `[N, C]`):
        Logarithms of the visual words `P'` (equation 4) at `config.visual_word_temperature`.
    predictions (`torch.Tensor` of shape `[N, C]`):
        Logarithms of `Q`, what the decoder predicted at the position before the patch, which it had not seen. NaN
        where no position is before it: some prompts begin with the image.
    cosines (`torch.Tensor` of shape `[N, C]`):
        Cosines of the image features and the token embeddings (equation 3).
    keep_mask (`torch.BoolTensor` of shape `[N]`):
        Which image tokens the decoder reads: all of them, unless the adapter drops some.
    codes (`torch.LongTensor` of shape `[N]`, *optional*):
        The visual tokenizer's codes, -1 where it drops a patch.
    layers (`tuple[int, ...]`):
        The `S` decoder layers of `layer_tokens`. Layer 0 is what the decoder reads.
    layer_tokens ([`TopTokens`]):
        What the MM head makes of each layer's hidden states at the patches (logit lens), `[S, N, k]`.
    tokenizer (`PreTrainedTokenizerBase`):
        Of the model.
    has_visual_words (`bool`):
        Whether the VM head has been trained. Else its visual words say nothing.
    """

    image: Image.Image
    grid: tuple[int, int]
    visual_words: torch.Tensor
    predictions: torch.Tensor
    cosines: torch.Tensor
    keep_mask: torch.Tensor
    codes: torch.Tensor | None
    layers: tuple[int, ...]
    layer_tokens: TopTokens
    tokenizer: PreTrainedTokenizerBase
    has_visual_words: bool

    def get_top_words(self, top_k: int = 1) -> TopTokens:
        """The most probable visual words of each patch, `[N, top_k]`."""
        return _take_top(self.visual_words, top_k, self.keep_mask, is_log=True)

    def get_top_predictions(self, top_k: int = 1) -> TopTokens:
        """What the decoder predicted most probably before it saw each patch, `[N, top_k]`."""
        return _take_top(self.predictions, top_k, self.keep_mask, is_log=True)

    def get_nearest_tokens(self, top_k: int = 1) -> TopTokens:
        """The tokens whose embeddings are nearest to each image feature by cosine, `[N, top_k]`."""
        return _take_top(self.cosines, top_k, self.keep_mask, is_log=False)

    def get_kl(self) -> torch.Tensor:
        """
        `KL(P' || Q)` of each patch in nats, the loss of stage IV (equation 6): `[N]`, NaN where it is dropped, or
        nothing is before it.
        """
        words = self.visual_words.exp()
        return self._mark_dropped((torch.xlogy(words, words) - words * self.predictions).sum(dim=-1))

    def get_entropy(self) -> torch.Tensor:
        """Entropy of each patch's visual words in nats: `[N]`, NaN where it is dropped."""
        return self._mark_dropped(torch.special.entr(self.visual_words.exp()).sum(dim=-1))

    def find_word(self, word: str) -> torch.Tensor:
        """
        Where a word is: its probability among the visual words of each patch, `[N]`, NaN where it is dropped. Of
        several tokens that read as the word, as with and without a space before it, the sum.

        Raises:
            ValueError: If no token of the vocabulary reads as the word.
        """
        return self._mark_dropped(self.visual_words[:, self._find_tokens(word)].exp().sum(dim=-1))

    def find_near(self, word: str) -> torch.Tensor:
        """
        How near a word is: the cosine of its embedding and each image feature, `[N]`, NaN where it is dropped. Of
        several tokens that read as the word, the nearest.

        Raises:
            ValueError: If no token of the vocabulary reads as the word.
        """
        return self._mark_dropped(self.cosines[:, self._find_tokens(word)].amax(dim=-1))

    def get_text(self, token_id: int) -> str:
        """
        A token as it can be shown: without the space before it, and by its name where it has no letters, in quotes if
        that has none either.
        """
        return "" if token_id == DROPPED else _read_token(self.tokenizer, token_id)

    def _find_tokens(self, word: str) -> list[int]:
        tokens = [token for token in range(self.visual_words.shape[1]) if self.get_text(token) == word.strip()]
        if not tokens:
            pieces = ", ".join(map(repr, self.tokenizer.tokenize(word))) or "nothing"
            raise ValueError(
                f"No token reads {word!r}; expected a word of the vocabulary, which has "
                f"{self.visual_words.shape[1]} tokens. The tokenizer makes {pieces} of it: try one of these, or "
                "another word."
            )
        return tokens

    def _mark_dropped(self, values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~self.keep_mask, torch.nan)


@torch.inference_mode()
def inspect_image(
    model: VWLMMForConditionalGeneration,
    processor: VWLMMProcessor,
    image: Image.Image | str,
    layers: Sequence[int] | None = None,
    top_k: int = 5,
) -> InspectedImage:
    """
    Runs one image through a model, without dropout, behind the beginning of the model's prompt. What follows the image
    does not matter: no position of a decoder sees what is behind it.

    Args:
        model ([`VWLMMForConditionalGeneration`]): The model, as it is or with PEFT's adapters in it.
        processor ([`VWLMMProcessor`]): Its processor.
        image (`PIL.Image.Image` or `str`): The image, or its path.
        layers (`Sequence[int]`, *optional*): Decoder layers to read with the MM head, 0 for what the decoder reads;
            `()` for none. By default up to eight, evenly spaced, the last one among them.
        top_k (`int`, *optional*, defaults to 5): Tokens to keep of each layer.

    Returns:
        [`InspectedImage`]

    Raises:
        ValueError: If there are several images, if a layer does not exist, if the vocabulary has fewer tokens than
            `top_k`, or the decoder has no final norm to read layers with, if there are any.
    """
    if isinstance(image, list | tuple):
        raise ValueError(
            f"`image` is a {type(image).__name__} of {len(image)}; expected one image. Call this for each."
        )
    model = model.get_base_model() if is_peft_model(model) else model
    decoder = model.model.language_model
    num_layers = model.config.text_config.num_hidden_layers
    if layers is None:
        layers = sorted({round(num_layers * (step + 1) / 8) for step in range(8)} - {0})
    if missing := [layer for layer in layers if not 0 <= layer <= num_layers]:
        raise ValueError(
            f"`layers` has {missing}; expected numbers from 0 to {num_layers}, the layers of the decoder."
        )
    num_tokens = model.config.text_config.vocab_size
    if not 1 <= top_k <= num_tokens:
        raise ValueError(
            f"`top_k` is {top_k}; expected a number from 1 to {num_tokens}, the tokens of the vocabulary."
        )
    if layers and not hasattr(decoder, "norm"):
        raise ValueError(
            f"The decoder ({type(decoder).__name__}) has no `norm` behind its last layer; expected one, as Llama's, "
            "to read hidden states of other layers with. Pass `layers=()`, or `--layers` without a number to the "
            "lens, to inspect all else."
        )
    # A placeholder for each patch, also where prompts have one for each token that is kept (`selection="top_k"`).
    processor = copy.copy(processor)
    processor.num_image_tokens = None
    message = {"role": "user", "content": [{"type": "image", "image": image}]}
    inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    pixel_values = inputs["pixel_values"].to(model.dtype)
    with _evaluation(model):
        kept, patch_features = model.model.select_tokens(pixel_values) if drops_tokens(model.config) else (None, None)
        encoded = model.get_image_features(
            pixel_values, patch_boxes=inputs.get("patch_boxes"), keep_mask=kept, patch_features=patch_features
        )
        features = encoded.image_features[0]  # [N, D]
        grid = _get_grid(pixel_values, model.config.vision_config.patch_size, len(features))
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_encoder_outputs={"image": encoded},
            output_hidden_states=len(layers) > 0,
            use_cache=False,
        )
    is_image = inputs["input_ids"][0] == model.config.image_token_id  # [L]
    keep_mask = encoded.get("keep_mask")  # [1, N]
    keep_mask = torch.ones(len(features), dtype=torch.bool) if keep_mask is None else keep_mask[0].cpu()  # [N]
    words = get_distribution(model.model.vm_head, features, model.config.visual_word_temperature)  # [N, C]
    predictions = outputs.logits[0, :-1][is_image[1:]].float().log_softmax(dim=-1)  # [N, C], or [N - 1, C]
    predictions = F.pad(predictions, (0, 0, len(features) - len(predictions), 0), value=torch.nan)  # [N, C]
    embeddings = F.normalize(model.get_vocabulary_embeddings(features.device).float(), dim=-1)  # [C, D]
    shape = (len(layers), len(features), top_k)
    layer_tokens = TopTokens(torch.empty(shape, dtype=torch.long), torch.empty(shape))  # [S, N, k] each
    for place, layer in enumerate(layers):
        hidden = outputs.hidden_states[layer][0, is_image]  # [N, D]
        hidden = hidden if layer == num_layers else decoder.norm(hidden)  # that of the last layer has passed it
        logits = model.lm_head(to_dtype_of(model.lm_head, hidden)).float().log_softmax(dim=-1)  # [N, C]
        top = _take_top(logits.cpu(), top_k, keep_mask, is_log=True)
        layer_tokens.token_ids[place], layer_tokens.values[place] = top.token_ids, top.values
    codes = None
    if model.model.visual_tokenizer is not None:
        codes = model.model.find_codes(encoded.patch_features, encoded.get("keep_mask"))[0].cpu()  # [N]
    return InspectedImage(
        image=_to_image(inputs["pixel_values"][0].float().cpu(), processor),
        grid=grid,
        visual_words=words.log().cpu(),
        predictions=predictions.cpu(),
        cosines=(F.normalize(features.to(embeddings), dim=-1) @ embeddings.T).cpu(),
        keep_mask=keep_mask,
        codes=codes,
        layers=tuple(layers),
        layer_tokens=layer_tokens,
        tokenizer=processor.tokenizer,
        has_visual_words=3 in model.config.trained_stages,
    )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model without dropout, and afterwards as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _take_top(values: torch.Tensor, top_k: int, keep_mask: torch.Tensor, is_log: bool) -> TopTokens:
    """The highest of values `[N, C]`, nothing where an image token is dropped or there are no values."""
    top = values.topk(top_k, dim=-1)  # [N, k]
    is_none = ~keep_mask.unsqueeze(-1) | top.values.isnan()  # [N, k]
    values = top.values.exp() if is_log else top.values
    return TopTokens(top.indices.masked_fill(is_none, DROPPED), values.masked_fill(is_none, 0))


def _get_grid(pixel_values: torch.Tensor, patch_size: int, num_patches: int) -> tuple[int, int]:
    rows, columns = (size // patch_size for size in pixel_values.shape[-2:])
    if rows * columns != num_patches:
        raise ValueError(
            f"The model makes {num_patches} image tokens of an image of {rows} x {columns} patches; expected one a "
            "patch, to know where each is. Inspect a model whose adapter keeps them all in place."
        )
    return rows, columns


def _to_image(pixel_values: torch.Tensor, processor: VWLMMProcessor) -> Image.Image:
    """The picture that pixel values `[3, H, W]` were made of."""
    images = processor.image_processor
    if images.do_normalize:
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (images.image_mean, images.image_std))
        pixel_values = pixel_values * std + mean
    factor = images.rescale_factor if images.do_rescale else 1
    pixels = (pixel_values / factor).round().clamp(0, 255).to(torch.uint8)  # [3, H, W]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@cache
def _read_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    text = tokenizer.decode([token_id]).strip()
    if _can_be_read(text):
        return text
    # A space, a byte of a letter, a line break, or a row that embeddings have beyond the vocabulary.
    name = tokenizer.convert_ids_to_tokens(token_id) or f"token {token_id}"
    return name if _can_be_read(name) else repr(name)


def _can_be_read(text: str) -> bool:
    """Whether a text has letters, and nothing but these and what joins them, in Persian for example."""
    letters = text.replace("\u200c", "").replace("\u200d", "")
    return bool(letters.strip(" \ufffd")) and letters.isprintable()

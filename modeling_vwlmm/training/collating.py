# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of samples, for TRL's trainer."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..objectives_vwlmm import Objective, find_supervised_positions
from .untrusted import check_sample


# What can be wrong with a sample: its messages or images, an image file, or messages that the template refuses.
SAMPLE_ERRORS = (ValueError, OSError, TemplateError)
# Marks a sample whose image stands behind its text.
TEXT_FIRST = "_text_first"


@dataclass
class VWLMMDataCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator for vision data, whose errors name the sample, and which never supervises a placeholder.

    It adds what `objectives` read of a sample, and `supervised_positions`, as `forward` takes them: found here, on the
    host, they do not make it wait for the device.

    Of pairs of an image and its caption, `text_first_share` are put the other way round, by `seed` and sample: there
    the image is written, and the decoder reads its codes (LaVIT, section 3.2).

    With `packing`, samples stand behind each other without padding, and `position_ids` that start again with every
    sample keep them apart in attention. A batch is one row, `[1, L]`, of its samples; or, of rows that are lists of
    samples, as many rows, `[B, L]`, padded to the longest. Where `flattens_rows` is set, these become one row, too: so
    FlashAttention wants them, which never makes a mask of `L * L`.
    """

    packing: bool = False
    text_first_share: float = 0.0
    seed: int = 0
    flattens_rows: bool = False
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    image_seq_length: int | None = None

    def torch_call(self, examples: list[dict[str, Any]] | list[list[dict[str, Any]]]) -> dict[str, Any]:
        """See `DataCollatorMixin.torch_call`."""
        rows = examples if isinstance(examples[0], list) else [examples]
        rows = [[to_images(sample) for sample in row] for row in rows]
        if self.assistant_only_loss:
            rows = [[to_messages(sample) for sample in row] for row in rows]
        if self.text_first_share:
            rows = [[self._put_text_first(sample) for sample in row] for row in rows]
        samples = [sample for row in rows for sample in row]
        try:
            batch = self._collate(samples)
        except SAMPLE_ERRORS:
            for sample in samples:
                try:
                    self._collate([sample])
                except SAMPLE_ERRORS as error:
                    raise ValueError(f"Sample {sample.get('id')!r}: {error}") from error
            raise
        image_token_id = self.processor.image_token_id
        batch["labels"][batch["input_ids"] == image_token_id] = -100
        num_tokens = int(batch["attention_mask"].sum())
        if isinstance(examples[0], list):
            self._check_rows(rows, batch["attention_mask"].sum(dim=1))
        if self.packing:
            row_sizes = [len(samples)] if self.flattens_rows else [len(row) for row in rows]
            batch = pack(batch, row_sizes, self.pad_to_multiple_of)
        batch["supervised_positions"] = find_supervised_positions(self.objectives, batch, image_token_id)
        batch["supervised_positions"]["num_padding"] = batch["input_ids"].numel() - num_tokens
        if self.text_first_share and "pixel_values" in batch:
            is_read = [TEXT_FIRST in sample for sample in samples for _ in sample.get("images") or []]
            as_codes = torch.tensor(is_read)  # [I]
            if "image_codes" in batch:
                # Without one to read, too: where weights are sharded, all processes have to look up embeddings.
                batch["read_as_codes"] = batch["image_codes"].where(as_codes[:, None], -1)  # [I, N]
            elif as_codes.any():
                batch["read_as_codes"] = as_codes
        return batch

    def _put_text_first(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A pair of an image and its caption the other way round, if the seed says so: then the image is written."""
        messages = sample.get("messages") or []
        contents = [message["content"] for message in messages]
        is_pair = len(messages) == 2 and len(sample.get("images") or []) == 1 and _is_image_alone(contents[0])
        if not is_pair or zlib.crc32(f"{self.seed} {sample.get('id')} {contents[1]}".encode()) >= (
            self.text_first_share * 2**32
        ):
            return sample
        caption = contents[1] if isinstance(contents[1], list) else [{"type": "text", "text": contents[1]}]
        message = {"role": "user", "content": [*caption, {"type": "image"}], "is_caption": True}
        return {**sample, "messages": [message], TEXT_FIRST: True}

    def count_image_tokens(self) -> int:
        """Tokens of one image: its placeholders, and what the processor puts around them."""
        around = self.processor.image_start_token + self.processor.image_end_token
        return self.image_seq_length + len(self.processor.tokenizer(around, add_special_tokens=False)["input_ids"])

    def _check_rows(self, rows: list[list[dict[str, Any]]], lengths: torch.Tensor) -> None:
        for row, row_lengths in zip(rows, lengths.split([len(row) for row in rows]), strict=True):
            if len(row) > 1 and row_lengths.sum() > self.max_length:
                raise ValueError(
                    f"Samples {[sample.get('id') for sample in row]} were packed into a row of {self.max_length} "
                    f"tokens, and have {row_lengths.tolist()}: the dataset's column of lengths says less. It counts "
                    "tokens, image tokens included; leave it out to have them counted."
                )

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for example in examples:
            check_sample(example)
        batch = super().torch_call(examples)
        for objective in self.objectives.values():
            batch |= objective.collate(examples, self.processor, self.image_seq_length)
        if self.assistant_only_loss and self.objectives:
            self._check_teaches(examples, batch)
        return batch

    def _check_teaches(self, examples: list[dict[str, Any]], batch: dict[str, torch.Tensor]) -> None:
        """Refuses samples without an answer of which nothing is learned: their losses would be 0 without a word."""
        if not any(is_unanswered(example) for example in examples):
            return
        has_images = torch.tensor([bool(example.get("images")) for example in examples])  # [S]
        learns = torch.zeros_like(has_images)  # [S]
        for objective in self.objectives.values():
            if objective.counts_images:
                learns |= has_images
            else:
                learns |= objective.positions(batch, self.processor.image_token_id).any(dim=1)
        if not all(learns[row] for row, example in enumerate(examples) if is_unanswered(example)):
            raise ValueError(
                f"It has no answer, and nothing else of it is learned by {', '.join(self.objectives)}. Leave it out, "
                "or train it in a stage with an objective that learns from its images, such as `visual_words`."
            )


def is_unanswered(sample: dict[str, Any]) -> bool:
    """Whether a sample has messages, and none of the assistant's."""
    roles = {message["role"] for message in sample.get("messages") or []}
    return bool(roles) and "assistant" not in roles


def _is_image_alone(content: str | list[dict[str, Any]]) -> bool:
    # Columns of parts have a text of None beside an image.
    return isinstance(content, list) and [part.get("type") for part in content] == ["image"]


def to_images(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of one `image`, or of None where it has none, with a list of `images`; any other as it is."""
    if "image" not in sample:
        return sample
    rest = {name: value for name, value in sample.items() if name != "image"}
    return {**rest, "images": [] if sample["image"] is None else [sample["image"]]}


def to_messages(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample of `prompt` and `completion`, both lists of messages, as one conversation; any other as it is."""
    prompt, completion = sample.get("prompt"), sample.get("completion")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        return sample
    rest = {name: value for name, value in sample.items() if name not in ("prompt", "completion")}
    return {**rest, "messages": [*prompt, *completion]}


def pack(
    batch: dict[str, torch.Tensor], row_sizes: Sequence[int] | None = None, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """
    Puts the samples of a padded batch behind each other. Images keep their order.

    Args:
        batch (`dict[str, torch.Tensor]`): A sample in each row, `[S, L]`.
        row_sizes (`Sequence[int]`, *optional*): How many samples go into each row. By default one row takes all.
        pad_to_multiple_of (`int`, *optional*): What the length of the rows is to be a multiple of.

    Returns:
        The batch with `input_ids`, `labels` and `position_ids`, `[rows, L']`, and without `attention_mask`. What fills
        a row up to the longest has position 0, like the beginning of a sample, so that attention keeps it apart.
    """
    is_token = batch.pop("attention_mask").bool()  # [S, L]
    position_ids = is_token.cumsum(dim=1) - 1  # [S, L]
    # Nothing stands before the first token of a sample, so nothing can predict it.
    batch["labels"][position_ids == 0] = -100
    row_sizes = [len(is_token)] if row_sizes is None else row_sizes
    packed = {}
    for name, rows, filling in (
        ("input_ids", batch["input_ids"], 0),
        ("labels", batch["labels"], -100),
        ("position_ids", position_ids, 0),
    ):
        parts = zip(rows.split(row_sizes), is_token.split(row_sizes), strict=True)
        tokens = pad_sequence([part[is_part] for part, is_part in parts], True, filling)  # [rows, L']
        packed[name] = F.pad(tokens, (0, -tokens.shape[1] % (pad_to_multiple_of or 1)), value=filling)
    return {**batch, **packed}

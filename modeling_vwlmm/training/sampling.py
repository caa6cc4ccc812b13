# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches of similar length and one modality, as LLaVA's training has them."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from processing_vwlmm.transforms import count_images_in, find_image_column, get_transform

from ..objectives_vwlmm import OBJECTIVES


# A rough average for English, good enough to put like beside like.
BYTES_PER_TOKEN = 4


class ModalityLengthGroupedSampler(Sampler):
    """
    Draws samples so that consecutive ones are of similar length, and the samples of a batch have images, all or none.

    Batches of text then pass no vision tower, and little of any batch is padding. The order is random, the same for
    the same seed and epoch.

    Args:
        batch_size (`int`): Samples that belong together, those of one optimiser step.
        lengths (`Sequence[int]`): Length of each sample, in tokens or any other unit.
        has_images (`Sequence[bool]`): Whether each sample has images.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], has_images: Sequence[bool], seed: int = 0) -> None:
        self.batch_size = batch_size
        self.lengths = lengths
        self.has_images = np.asarray(has_images, dtype=bool)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer tells; a resumed run goes on in the order it had."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        batches, rest = [], []
        for modality in (self.has_images, ~self.has_images):
            members = np.flatnonzero(modality).tolist()
            if not members:
                continue
            order = get_length_grouped_indices(
                [self.lengths[i] for i in members], self.batch_size, generator=generator
            )
            grouped = [members[i] for i in order]
            whole = len(grouped) - len(grouped) % self.batch_size
            batches += [grouped[start : start + self.batch_size] for start in range(0, whole, self.batch_size)]
            rest += grouped[whole:]
        order = torch.randperm(len(batches), generator=generator)
        return iter([sample for index in order for sample in batches[index]] + rest)


def has_image_column(dataset: Dataset) -> bool:
    """Whether the samples have images, `images` or one `image`."""
    return find_image_column(dataset.column_names) is not None


def count_images(dataset: Dataset) -> np.ndarray:
    """How many images each sample has, `[samples]`, without reading any."""
    return count_images_in(dataset.select_columns(find_image_column(dataset.column_names)).with_format("arrow")[:])


def estimate_lengths(dataset: Dataset, image_seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """
    About how many tokens each sample has, without reading an image or running the tokenizer.

    Args:
        dataset (`datasets.Dataset`): A column `images` or `image`, those that objectives read, and text in any other.
            What a transform adds to samples is counted where it has `estimate_added_tokens`.
        image_seq_length (`int`): Tokens of one image.

    Returns:
        Lengths in tokens and whether there are images, both `[samples]`.
    """
    table = dataset.with_format("arrow")[:]
    num_images = count_images(dataset)
    of_objectives = (column for o in OBJECTIVES.values() for column in (*o.columns, *o.optional_columns))
    not_text = {"images", "image", *of_objectives}
    num_bytes = sum(
        np.concatenate([_num_bytes(chunk) for chunk in table[name].chunks])
        for name in table.column_names
        if name not in not_text
    )
    lengths = num_bytes // BYTES_PER_TOKEN + num_images * image_seq_length
    transform = get_transform(dataset)
    if hasattr(transform, "estimate_added_tokens"):
        lengths = lengths + transform.estimate_added_tokens(table)
    return lengths, num_images > 0


def _num_bytes(array: pa.Array) -> np.ndarray:
    if pa.types.is_struct(array.type):
        return sum(_num_bytes(field) for field in array.flatten())
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        ends = np.concatenate([[0], np.cumsum(_num_bytes(array.values))])
        offsets = array.offsets.to_numpy()
        return ends[offsets[1:]] - ends[offsets[:-1]]
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.zeros(len(array), dtype=np.int64)

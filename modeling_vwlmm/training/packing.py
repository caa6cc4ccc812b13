# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Packing: samples of a whole dataset, put into rows with little padding."""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from trl.data_utils import prepare_multimodal_messages

from processing_vwlmm.transforms import get_transform

from .collating import VWLMMDataCollator, to_messages
from .sampling import count_images


def pack_rows(lengths: Sequence[int], max_length: int, seed: int = 0, epoch: int = 0) -> list[tuple[int, ...]]:
    """
    Puts samples into rows by best fit: from the longest to the shortest, each goes where it leaves the least room.

    Which of several samples of one length goes where, and the order of the rows, are random, the same for the same
    seed and epoch. How many rows there are is the same in all epochs.

    Args:
        lengths (`Sequence[int]`): Length of each sample in tokens.
        max_length (`int`): Tokens of a row. Longer samples have a row of their own.
        seed, epoch (`int`, *optional*, default to 0): What the random choices follow from.

    Returns:
        `list[tuple[int, ...]]`: Indices of the samples of each row.
    """
    generator = np.random.default_rng([seed, epoch])
    lengths = np.minimum(lengths, max_length)
    shuffled = generator.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    rows_by_room: list[list[list[int]]] = [[] for _ in range(max_length + 1)]
    rooms = 0  # bit `n` is set where a row has room for `n` tokens: the least that suffices is one shift away
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if enough := rooms >> length:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = max_length, []
            rows.append(row)
        row.append(sample)
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return [tuple(rows[index]) for index in generator.permutation(len(rows))]


class PackedDataset(TorchDataset):
    """
    A dataset in rows: what is read is the samples of one row, by their indices.

    Args:
        dataset (`datasets.Dataset`): The samples.
        sampler ([`PackingSampler`]): What draws the rows.
    """

    def __init__(self, dataset: Dataset, sampler: "PackingSampler") -> None:
        self.dataset = dataset
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, row: tuple[int, ...]) -> list[dict]:
        return [self.dataset[index] for index in row]


class PackingSampler(Sampler):
    """
    Draws rows, as tuples of the indices of their samples, packed anew in every epoch.

    Args:
        lengths (`Sequence[int]`): Length of each sample in tokens.
        max_length (`int`): Tokens of a row.
        seed (`int`, *optional*, defaults to 0): Seed of the packing.
    """

    def __init__(self, lengths: Sequence[int], max_length: int, seed: int = 0) -> None:
        self.lengths = lengths
        self.max_length = max_length
        self.seed = seed
        self.epoch = 0
        self._num_rows = len(pack_rows(lengths, max_length))

    def set_epoch(self, epoch: int) -> None:
        """The trainer tells; a resumed run goes on with the rows it had."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(pack_rows(self.lengths, self.max_length, self.seed, self.epoch))


def count_tokens(
    dataset: Dataset, collator: VWLMMDataCollator, length_column_name: str = "length", num_proc: int | None = None
) -> np.ndarray:
    """
    How many tokens the collator makes of each sample, without reading an image, but where a transform has to for what
    it adds to a conversation.

    Args:
        dataset (`datasets.Dataset`): Columns `messages` and `images`, or `length`.
        collator ([`VWLMMDataCollator`]): Knows the template, the tokenizer and the number of tokens of an image.
        length_column_name (`str`, *optional*, defaults to `"length"`): A column that has the lengths already.
        num_proc (`int`, *optional*): Processes that count.

    Returns:
        `np.ndarray` of shape `[samples]`.

    Raises:
        ValueError: If the dataset has neither.
    """
    if length_column_name in dataset.column_names:
        return np.asarray(dataset[length_column_name][:])
    columns = [name for name in ("messages", "prompt", "completion") if name in dataset.column_names]
    if not columns:
        raise ValueError(
            f"`packing` has to know how long samples are, and the dataset has {', '.join(dataset.column_names)}. Give "
            f"it `messages`, or a column `{length_column_name}` with the number of tokens of each sample."
        )
    num_images = count_images(dataset)
    processor = collator.processor
    transform = get_transform(dataset)
    adds = hasattr(transform, "add")
    # Images stay files. All columns are those that a transform reads.
    dataset = dataset.with_format(None) if adds else dataset.select_columns(columns)

    def count(samples: dict[str, list], indices: list[int]) -> dict[str, list[int]]:
        samples = transform.add(samples) if adds else samples
        conversations = [
            to_messages({name: samples[name][row] for name in columns})["messages"] for row in range(len(indices))
        ]
        messages = [
            prepare_multimodal_messages(conversation, images=[None] * num_images[index])
            for index, conversation in zip(indices, conversations, strict=True)
        ]
        texts = processor.apply_chat_template(messages, chat_template=collator.chat_template)
        token_ids = processor.tokenizer(texts, add_special_tokens=False).input_ids
        # In the text an image is one placeholder.
        further = (collator.count_image_tokens() - 1) * num_images[indices]
        return {"length": [len(ids) + more for ids, more in zip(token_ids, further.tolist(), strict=True)]}

    counted = dataset.map(
        count,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc="Counting tokens",
    )
    return np.asarray(counted["length"][:])

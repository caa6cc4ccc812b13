# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
VLSA's cognition alignment (section 3.3): questions about pixels and codebook indices, answered as text.

A question is about a quarter of an image's area, half as wide and half as high as the image. Its top left corner is
given in hundredths of width and height, 0 to 50. The answer is a table of `grid x grid` values at the centres of its
cells: `r,g,b` of the original image, or the indices that a VQ model gave these places.
"""

import hashlib
import math
import os
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset
from transformers.utils import logging

from .images_vwlmm import convert_to_rgb
from .transforms import (
    check_is_file,
    count_images_in,
    decode_images,
    find_image_column,
    get_image_feature,
    get_transform,
    set_decoding,
)
from .vq_indices import VQIndices


logger = logging.get_logger(__name__)

KINDS = ("pixel", "index")
# Where the top left corner of a quarter can lie, in hundredths of width and height.
LAST_CORNER = 50
QUESTIONS = {
    "pixel": (
        "A quarter of {image} starts at {x}% of its width and {y}% of its height. Give its colours as {grid} rows of "
        "{grid} values r,g,b.",
        "Read the pixels of {image} on a {grid} x {grid} grid over the quarter whose top left corner is ({x}, {y}). "
        "Write red,green,blue for each.",
        "Which RGB values has {image} in the quarter from ({x}, {y}) on? Sample {grid} x {grid} points.",
        "Cut out the part of {image} that is half as wide and half as high, with its corner at {x}% from the left and "
        "{y}% from the top. What is it as a {grid} x {grid} table of r,g,b?",
        "({x}, {y}) is where a quarter of {image} begins. List {grid} lines of {grid} colours, r,g,b from 0 to 255.",
        "Copy the quarter of {image} at x = {x}, y = {y} as numbers: {grid} by {grid} pixels, each r,g,b.",
    ),
    "index": (
        "A quarter of {image} starts at {x}% of its width and {y}% of its height. Give its codes as {grid} rows of "
        "{grid} codebook indices.",
        "Encode {image} on a {grid} x {grid} grid over the quarter whose top left corner is ({x}, {y}). Write one "
        "codebook index for each place.",
        "Which codebook entries has {image} in the quarter from ({x}, {y}) on? Sample {grid} x {grid} points.",
        "Cut out the part of {image} that is half as wide and half as high, with its corner at {x}% from the left and "
        "{y}% from the top. What is it as a {grid} x {grid} table of visual codes?",
        "({x}, {y}) is where a quarter of {image} begins. List {grid} lines of {grid} indices of its visual codes.",
        "Copy the quarter of {image} at x = {x}, y = {y} as codes: {grid} by {grid} codebook indices.",
    ),
}
# Tokens of one value in an answer, for the order of samples: between those of a tokenizer whose numbers are one token
# each (LLaMA-3: 5.9 for a pixel, 2.8 for an index) and of one that splits digits (10.4 and 4.8).
TOKENS_PER_VALUE = {"pixel": 8, "index": 4}
TOKENS_OF_QUESTION = 35
NUMBER = re.compile("[0-9]{1,5}")


def add_cognition_alignment(
    dataset: Dataset | IterableDataset,
    seed: int,
    pixel_share: float = 0.25,
    index_share: float = 0.25,
    grid: int = 8,
    indices: str | os.PathLike | VQIndices | None = None,
) -> Dataset | IterableDataset:
    """
    Adds to some conversations about images a question on an image's pixels or on its codebook indices, and the answer.

    Each such pair stands at a random place behind the turn with its image: between two pairs of the conversation or at
    its end. A sample gets one pair or none, so that the shares cannot sum to more than 1. What is drawn follows from
    `seed` and the sample's id alone, whatever other samples there are and in whatever order. Samples without an image
    stay as they are, and so do images without an answer, behind which a pair could stand.

    Nothing is read until a sample is: a map-style dataset gets a transform (`datasets.Dataset.with_transform`), which
    `group_by_length`, `packing` and [`mix_datasets`] know of; a streamed one a `map`. There every process reads the
    images of all samples that get a question, also of those that others train on.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Columns `id`, `messages` and `images` (or `image`) of type `datasets.Image`. Without a column of images it
            is returned as it is.
        seed (`int`): Of all that is drawn.
        pixel_share, index_share (`float`, *optional*, default to 0.25):
            Of the samples with images and an answer, the share that gets a question of each kind.
        grid (`int`, *optional*, defaults to 8): Rows and columns of an answer.
        indices (`str`, `os.PathLike` or [`VQIndices`], *optional*):
            The `.npy` file that `examples/vq_indices.py` has written. Without it no question is about indices, and a
            warning says so.

    Returns:
        The dataset with the pairs added when samples are read.

    Raises:
        ValueError: If a share lies outside of 0 to 1 or they sum to more, if `grid` is not positive, if an image
            of the dataset is not among those of `indices` (of a stream this is seen when the sample is read), if a
            column is missing, or if the dataset has a transform already.

    Example:

    ```python
    >>> dataset = load_llava_dataset("llava_v1_5_mix665k.json", "images")
    >>> dataset = add_cognition_alignment(dataset, seed=0, index_share=0)
    ```
    """
    _check_settings(seed, pixel_share, index_share, grid)
    if index_share and indices is None:
        logger.warning(
            f"`index_share` is {index_share}, and there are no `indices`: no question is about them. Compute them "
            "with `examples/vq_indices.py` and pass its `.npy` file, or set `index_share=0`."
        )
        index_share = 0.0
    indices = VQIndices(indices) if index_share and not isinstance(indices, VQIndices) else indices
    alignment = CognitionAlignment(seed, pixel_share, index_share, grid, indices if index_share else None)
    if isinstance(dataset, IterableDataset):
        return _align_stream(dataset, alignment)

    column = find_image_column(dataset.column_names)
    if column is None:
        return dataset
    for name in ("id", "messages"):
        if name not in dataset.column_names:
            raise ValueError(
                f"The dataset has the columns {', '.join(dataset.column_names)}, and no `{name}`. Give every sample "
                "`messages`, and an `id` by which its questions are drawn."
            )
    feature = get_image_feature(dataset.features)
    if feature is None:
        raise ValueError(
            f"The column `{column}` is {dataset.features[column]}. Make images of it: "
            '`dataset.cast_column("images", datasets.List(datasets.Image()))`.'
        )
    if get_transform(dataset) is not None:
        raise ValueError(
            "The dataset has a transform already, which another would replace. Add all questions in one call, and "
            "what else changes samples with `map` before."
        )
    if alignment.indices is not None:
        alignment.indices.check_files(_get_paths(dataset, column))
    alignment.image_feature = Image(mode=feature.mode)
    aligned = set_decoding(dataset, False).with_transform(alignment)
    content = repr((dataset._fingerprint, alignment.settings))
    aligned._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    return aligned


def _check_settings(seed: Any, pixel_share: Any, index_share: Any, grid: Any) -> None:
    for name, value in (("seed", seed), ("grid", grid)):
        if isinstance(value, bool) or not isinstance(value, int) or (name == "grid" and value < 1):
            raise ValueError(f"`{name}` is {value!r}, expected {'a positive' if name == 'grid' else 'an'} integer.")
    for name, share in (("pixel_share", pixel_share), ("index_share", index_share)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(
                f"`{name}` is {share!r}, expected a number from 0 to 1: of the samples with images, the share that "
                "gets such a question."
            )
    if pixel_share + index_share > 1 and not math.isclose(pixel_share + index_share, 1):
        raise ValueError(
            f"`pixel_share` is {pixel_share} and `index_share` {index_share}, {pixel_share + index_share} together, "
            "expected 1 at most: a sample gets one question or none. Lower one of them."
        )


def _get_paths(dataset: Dataset, column: str) -> pa.Array:
    """Of the images that are files. Those that lie in the table are looked up when they are read."""
    images = dataset.select_columns(column).with_format("arrow")[:][column].combine_chunks()
    images = images.flatten() if column == "images" else images
    paths = images.field("path").filter(images.field("bytes").is_null())
    return paths.drop_null()


def _align_stream(dataset: IterableDataset, alignment: "CognitionAlignment") -> IterableDataset:
    if dataset.features is None:  # a generator, which tells nothing: samples are as it makes them
        return dataset.map(partial(_align_sample, alignment.add))
    feature = get_image_feature(dataset.features)
    if feature is None or not feature.decode:
        return dataset.map(partial(_align_sample, alignment.add), features=dataset.features)
    alignment.image_feature = Image(mode=feature.mode)
    # The features come last: a `map` that knows them takes them as applied, and leaves images as files.
    return dataset.decode(False).map(partial(_align_sample, alignment.add)).cast(dataset.features)


def _align_sample(add: Callable[[dict], dict], sample: dict[str, Any]) -> dict[str, Any]:
    return {name: values[0] for name, values in add({name: [value] for name, value in sample.items()}).items()}


class CognitionAlignment:
    """
    The transform of [`add_cognition_alignment`], whose arguments it takes: of a batch of samples with images as files
    it makes one with questions added and images decoded.
    """

    def __init__(
        self, seed: int, pixel_share: float, index_share: float, grid: int, indices: VQIndices | None = None
    ) -> None:
        self.seed = seed
        self.pixel_share = pixel_share
        self.index_share = index_share
        self.grid = grid
        self.indices = indices
        self.image_feature = Image()

    @property
    def settings(self) -> tuple:
        """What the questions follow from, beside the samples."""
        shares = (float(self.pixel_share), float(self.index_share))
        return (self.seed, *shares, self.grid, None if self.indices is None else self.indices.fingerprint)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, CognitionAlignment) and other.settings == self.settings

    def __hash__(self) -> int:
        return hash(self.settings)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        decoded = decode_images(batch, self.image_feature)
        if "messages" not in batch:
            return decoded
        column = find_image_column(batch)
        return {**decoded, "messages": self.add(batch, decoded.get(column))["messages"]}

    def add(self, batch: dict[str, list], decoded: list | None = None) -> dict[str, list]:
        """
        Adds questions to a batch of samples.

        Args:
            batch (`dict[str, list]`): Columns `id`, `messages` and `images` or `image`: decoded, or as files.
            decoded (`list`, *optional*): The column of images, decoded, so that no file is decoded twice.

        Returns:
            The batch with other `messages`; images are as they were. Without `messages` the batch itself.

        Raises:
            ValueError: If a column is missing, or a sample's image cannot be read (with its id).
        """
        if "messages" not in batch:
            return batch
        column = find_image_column(batch)
        if column is None or "id" not in batch:
            raise ValueError(
                f"Samples are read as {', '.join(batch)} alone, and questions on images follow from `id`, `messages` "
                "and `images`. Keep these columns."
            )
        columns = (batch["id"], batch["messages"], batch[column], batch[column] if decoded is None else decoded)
        messages = [
            self._add_pair(sample_id, messages, *(i if isinstance(i, list) else [i] for i in (files, images)))
            if files and messages
            else messages
            for sample_id, messages, files, images in zip(*columns, strict=True)
        ]
        return {**batch, "messages": messages}

    def find_added(self, before: dict[str, Any], sample: dict[str, Any]) -> list[tuple[str, int]]:
        """
        What was added to a sample.

        Args:
            before, sample (`dict`): Without and with what was added.

        Returns:
            `list[tuple[str, int]]`: The kind of question, and which message is its answer; nothing if nothing was.
        """
        if len(sample["messages"]) == len(before["messages"]):
            return []
        kind, *_, place, _ = self._draw(sample["id"], before["messages"], before[find_image_column(before)])
        return [(kind, place + 1)]

    def draw_kind(self, sample_id: str | int) -> str | None:
        """Which question a sample with images and an answer gets: `"pixel"`, `"index"` or none."""
        return (*KINDS, None)[self._draw_kinds([sample_id])[0]]

    def estimate_added_tokens(self, table: pa.Table) -> np.ndarray:
        """About how many tokens each row of a dataset's table gets added, `[samples]`, without reading an image."""
        added = np.zeros(len(table), dtype=np.int64)
        rows = np.flatnonzero((count_images_in(table) > 0) & _have_answers(table["messages"]))
        tokens = [self.grid**2 * TOKENS_PER_VALUE[kind] + TOKENS_OF_QUESTION for kind in KINDS]
        ids = table.column("id").take(pa.array(rows)).to_pylist()
        added[rows] = np.array([*tokens, 0])[self._draw_kinds(ids)]
        return added

    def _draw_kinds(self, ids: list[str | int]) -> np.ndarray:
        """For each sample an index of `KINDS`, or behind them for no question, `[samples]`."""
        digests = b"".join(map(self._digest, ids))
        drawn = np.frombuffer(digests, dtype=">u8") / 2**64  # from 0 to 1
        bounds = np.cumsum([self.pixel_share, self.index_share])
        return np.searchsorted(bounds, drawn, side="right")

    def _digest(self, sample_id: str | int) -> bytes:
        return hashlib.blake2b(f"{self.seed}/{sample_id}".encode("utf-8", "replace"), digest_size=8).digest()

    def _draw(self, sample_id: str | int, messages: list[dict], images: Any) -> tuple | None:
        """The kind of question, which image it is about, the corner, the place in `messages`, and the wording."""
        kind = self.draw_kind(sample_id)
        if kind is None:
            return None
        rng = random.Random(self._digest(sample_id) + b"pair")
        number = rng.randrange(len(images)) if isinstance(images, list) else 0
        corner = (rng.randint(0, LAST_CORNER), rng.randint(0, LAST_CORNER))
        wording = rng.choice(QUESTIONS[kind])
        places = _find_places(messages, number)
        return (kind, number, corner, rng.choice(places), wording) if places else None

    def _add_pair(self, sample_id: str | int, messages: list[dict], files: list, images: list) -> list[dict]:
        drawn = self._draw(sample_id, messages, files)
        if drawn is None:
            return messages
        kind, number, corner, place, wording = drawn
        try:
            answer = self.answer(kind, (files if kind == "index" else images)[number], corner)
        except (ValueError, OSError) as error:
            raise ValueError(f"Sample {sample_id!r}: {error}") from error
        question = ask(wording, corner, self.grid, number if len(files) > 1 else None)
        pair = [
            {"role": role, "content": _as_content(text, messages[0]["content"])}
            for role, text in (("user", question), ("assistant", answer))
        ]
        return [*messages[:place], *pair, *messages[place:]]

    def answer(self, kind: str, image: Any, corner: tuple[int, int]) -> str:
        """
        What is right of one image.

        Args:
            kind (`str`): `"pixel"` or `"index"`.
            image (`PIL.Image.Image` or `dict`): The image, or its file as `datasets` has it. Indices need the file.
            corner (`tuple[int, int]`): Of the quarter, x and y in hundredths.

        Returns:
            `str`
        """
        if kind == "pixel":
            return format_pixels(read_pixels(self._decode(image), corner, self.grid))
        indices = self.indices.get(*_read_file(image))
        return format_indices(sample_quarter(indices, corner, self.grid))

    def _decode(self, image: Any) -> PIL.Image.Image:
        if isinstance(image, dict):
            check_is_file(image)
            image = self.image_feature.decode_example(image)
        return convert_to_rgb(image)


def _find_places(messages: list[dict], number: int) -> list[int]:
    """Where a pair about an image can stand: behind each answer from the turn with the image on."""
    turns = [
        turn
        for turn, message in enumerate(messages)
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]
    # Texts that are strings have all images in front of the first.
    turn = turns[number] if number < len(turns) else 0
    return [
        place
        for place in range(turn + 1, len(messages) + 1)
        if messages[place - 1]["role"] == "assistant" and (place == len(messages) or messages[place]["role"] == "user")
    ]


def _have_answers(messages: pa.ChunkedArray) -> np.ndarray:
    """Which rows of a column of messages have one of the assistant's, `[samples]`."""
    have_answers, begin = np.zeros(len(messages), dtype=bool), 0
    for chunk in messages.chunks:
        is_answer = pc.equal(chunk.flatten().field("role"), "assistant")
        have_answers[begin + pc.list_parent_indices(chunk).filter(is_answer).to_numpy()] = True
        begin += len(chunk)
    return have_answers


def _as_content(text: str, content: Any) -> str | list[dict[str, str]]:
    """A text in the form that a conversation's texts have."""
    return text if isinstance(content, str) else [{"type": "text", "text": text}]


def _read_file(image: Any) -> tuple[bytes, str]:
    """The content of an image's file, and its name."""
    if not isinstance(image, dict):
        raise ValueError(
            "an image is there as pixels, and codebook indices are found by its file. Give the dataset a column of "
            "type `datasets.Image`"
        )
    check_is_file(image)
    if image["bytes"] is not None:
        return image["bytes"], image.get("path") or f"an image of {len(image['bytes'])} bytes"
    return Path(image["path"]).read_bytes(), image["path"]


def ask(wording: str, corner: tuple[int, int], grid: int, number: int | None = None) -> str:
    """A question in one of the wordings of `QUESTIONS`. `number` says which of several images it is about, from 0."""
    image = "the image" if number is None else f"image {number + 1}"
    return wording.format(image=image, x=corner[0], y=corner[1], grid=grid)


def sample_quarter(values: np.ndarray, corner: tuple[int, int], grid: int) -> np.ndarray:
    """
    The values at the centres of the cells of a quarter.

    Args:
        values (`np.ndarray` of shape `[H, W, ...]`): Of a whole image.
        corner (`tuple[int, int]`): The quarter's top left corner, x and y in hundredths of width and height, 0 to 50.
        grid (`int`): Cells in each direction. Where there are fewer values, neighbouring cells share one.

    Returns:
        `np.ndarray` of shape `[grid, grid, ...]`
    """
    rows, columns = (
        # The centre of cell i is corner / 100 + (i + 1/2) / (2 grid) of the side; in integers, so that it is exact.
        [side * (start * grid + 25 * (2 * cell + 1)) // (100 * grid) for cell in range(grid)]
        for side, start in ((values.shape[0], corner[1]), (values.shape[1], corner[0]))
    )
    return values[np.ix_(rows, columns)]


def read_pixels(image: PIL.Image.Image, corner: tuple[int, int], grid: int) -> np.ndarray:
    """Pixels of an RGB image as [`sample_quarter`] has them, `[grid, grid, 3]` of uint8."""
    return sample_quarter(np.asarray(image), corner, grid)


def format_pixels(pixels: np.ndarray) -> str:
    """Pixels, `[rows, columns, 3]`, as `r,g,b r,g,b`, with a line for each row."""
    return "\n".join(" ".join(",".join(map(str, pixel)) for pixel in row) for row in pixels.tolist())


def format_indices(indices: np.ndarray) -> str:
    """Indices, `[rows, columns]`, separated by spaces, with a line for each row."""
    return "\n".join(" ".join(map(str, row)) for row in indices.tolist())


def parse_pixels(text: str, grid: int) -> np.ndarray | None:
    """The pixels of an answer, `[grid, grid, 3]`; `None` if it is no such table of numbers from 0 to 255."""
    table = _parse(text, grid, lambda value: [*map(_parse_number, value.split(","))])
    pixels = [pixel for row in table or () for pixel in row]
    is_valid = table is not None and all(len(pixel) == 3 and all(0 <= n <= 255 for n in pixel) for pixel in pixels)
    return np.array(table) if is_valid else None


def parse_indices(text: str, grid: int) -> np.ndarray | None:
    """The indices of an answer, `[grid, grid]`; `None` if it is no such table of numbers."""
    table = _parse(text, grid, _parse_number)
    return None if table is None or any(n < 0 for row in table for n in row) else np.array(table)


def _parse(text: str, grid: int, parse_value: Callable[[str], Any]) -> list[list] | None:
    rows = [line.split() for line in text.strip().splitlines()]
    if len(rows) != grid or any(len(row) != grid for row in rows):
        return None
    return [[parse_value(value) for value in row] for row in rows]


def _parse_number(text: str) -> int:
    """The number, or -1 for what is none."""
    return int(text) if NUMBER.fullmatch(text) else -1

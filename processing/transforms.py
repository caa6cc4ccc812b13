# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What changes samples as they are read, and how several datasets that are changed in different ways become one."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List
from datasets.arrow_dataset import update_metadata_with_features


# Which dataset of a mixture a sample comes from. Samples are read without it.
PART_COLUMN = "mixture_part"
# Columns of images, as TRL reads them.
IMAGE_COLUMNS = ("images", "image")


def get_transform(dataset: Dataset) -> Any:
    """What a dataset applies to samples as they are read (`with_transform`), `None` for nothing."""
    return dataset.format["format_kwargs"].get("transform") if dataset.format["type"] == "custom" else None


def find_image_column(names: Sequence[str]) -> str | None:
    """`"images"` or `"image"`, whichever there is."""
    return next((name for name in IMAGE_COLUMNS if name in names), None)


def get_image_feature(features: Features) -> Image | None:
    """The feature of the images in a dataset's image column, `None` if there is none of type `Image`."""
    feature = features.get(find_image_column(features))
    feature = feature.feature if isinstance(feature, List) else feature
    return feature if isinstance(feature, Image) else None


def set_decoding(dataset: Dataset, decode: bool) -> Dataset:
    """A dataset whose images are decoded as they are read, or stay files. Nothing of its table is copied."""
    column = find_image_column(dataset.column_names)
    feature = get_image_feature(dataset.features)
    if feature is None or feature.decode == decode:
        return dataset
    image = Image(mode=feature.mode, decode=decode)
    # As `cast_column`, which writes a column of lists anew; and with it a copy keeps what was set on the dataset.
    dataset = copy.deepcopy(dataset)
    dataset._info.features[column] = image if column == "image" else List(image)
    dataset._data = update_metadata_with_features(dataset._data, dataset._info.features)
    return dataset


def decode_images(batch: Mapping[str, Any], feature: Image | None) -> dict[str, Any]:
    """
    A batch of samples with its image files decoded, as a dataset that decodes them has it.

    Raises:
        ValueError: If an image is an address: what data name is not fetched.
    """
    column = find_image_column(batch)
    if column is None or feature is None:
        return dict(batch)
    feature = Image(mode=feature.mode)

    def decode(image: Any) -> Any:
        if isinstance(image, list):
            return [decode(one) for one in image]
        if not isinstance(image, dict):
            return image
        check_is_file(image)
        return feature.decode_example(image)

    return {**batch, column: [decode(image) for image in batch[column]]}


def check_is_file(image: Mapping[str, Any]) -> None:
    """Raises `ValueError` if an image, `{"bytes": ..., "path": ...}`, is no file of this machine."""
    if image.get("bytes") is None and "://" in (image.get("path") or ""):
        raise ValueError(
            f"An image is the address {image['path']!r}, which is not fetched. Store images on this machine."
        )


class TransformByPart:
    """
    Applies to each sample of a mixture what its own dataset applies.

    Args:
        transforms (`Sequence`): Of each dataset its transform, or `None`. One that has `add` takes images as files,
            and decodes them itself.
        image_feature (`datasets.Image`, *optional*): How images are decoded for the others.
    """

    def __init__(self, transforms: Sequence[Any], image_feature: Image | None = None) -> None:
        self.transforms = list(transforms)
        self.image_feature = image_feature

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, TransformByPart) and other.transforms == self.transforms

    __hash__ = None

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        def transform(part: int, samples: dict[str, list]) -> dict[str, list]:
            transform = self.transforms[part]
            if hasattr(transform, "add"):
                return transform(samples)
            samples = decode_images(samples, self.image_feature)
            return samples if transform is None else transform(samples)

        return self._apply(batch, transform)

    def add(self, batch: dict[str, list]) -> dict[str, list]:
        """As a call, for what is added to conversations alone: images stay files."""

        def add(part: int, samples: dict[str, list]) -> dict[str, list]:
            transform = self.transforms[part]
            return transform.add(samples) if hasattr(transform, "add") else samples

        return self._apply(batch, add)

    def estimate_added_tokens(self, table: pa.Table) -> np.ndarray:
        """About how many tokens each sample gets added, `[samples]`."""
        parts = table.column(PART_COLUMN).to_numpy()
        added = np.zeros(len(parts), dtype=np.int64)
        for part, transform in enumerate(self.transforms):
            if hasattr(transform, "estimate_added_tokens"):
                is_of_part = parts == part
                added[is_of_part] = transform.estimate_added_tokens(table.filter(pa.array(is_of_part)))
        return added

    def find_added(self, before: dict[str, Any], sample: dict[str, Any]) -> list[tuple[str, int]]:
        """What was added to a sample, as the transform of its own dataset says."""
        transform = self.transforms[before[PART_COLUMN]]
        return transform.find_added(before, sample) if hasattr(transform, "find_added") else []

    def _apply(self, batch: dict[str, list], transform: Any) -> dict[str, list]:
        if PART_COLUMN not in batch:
            if "messages" in batch:
                raise ValueError(
                    f"Samples of a mixture are read without their column `{PART_COLUMN}`, which says what is to "
                    "be applied to them. Read whole samples, or apply `map` to each dataset before they are mixed."
                )
            return decode_images(batch, self.image_feature)
        rows_by_part: dict[int, list[int]] = {}
        for row, part in enumerate(batch[PART_COLUMN]):
            rows_by_part.setdefault(part, []).append(row)
        columns: dict[str, list] = {}
        for part, rows in rows_by_part.items():
            samples = {name: [batch[name][row] for row in rows] for name in batch if name != PART_COLUMN}
            for name, values in transform(part, samples).items():
                column = columns.setdefault(name, [None] * len(batch[PART_COLUMN]))
                for row, value in zip(rows, values, strict=True):
                    column[row] = value
        return columns


def count_images_in(table: pa.Table) -> np.ndarray:
    """How many images each row of a table has, `[samples]`."""
    name = find_image_column(table.column_names)
    if name is None:
        return np.zeros(len(table), dtype=np.int64)
    images = table.column(name)
    if name == "image":
        return np.asarray(images.is_valid()).astype(np.int64)
    return pc.fill_null(pc.list_value_length(images), 0).to_numpy().astype(np.int64)

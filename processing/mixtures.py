# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Several datasets as one, each with a weight."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets

from .cognition_alignment import CognitionAlignment
from .transforms import PART_COLUMN, TransformByPart, get_image_feature, get_transform, set_decoding


LABELS = "image_labels"
WORDS = List(List(Value("string")))
IDS = (List(List(Value("int32"))), List(List(Value("int64"))))


def mix_datasets(datasets: Sequence[Dataset], weights: Sequence[float], seed: int = 0) -> Dataset:
    """
    Puts datasets together, each as often as its weight says: of one with weight 2.5, every sample is there twice, and
    half of them, drawn by `seed`, once more. The samples stand in order, dataset by dataset: a sampler mixes them.

    Where datasets change their samples as they are read (`add_cognition_alignment`, `with_transform`), each sample is
    changed as its own dataset has it. If they do so in different ways, a column `mixture_part` of the mixture says
    which dataset a sample is from; samples are read without it.

    Args:
        datasets (`Sequence[datasets.Dataset]`):
            With the same columns. Where some have `image_labels` and others have not, these get a column of nulls;
            where some are words and others ids, all become strings.
        weights (`Sequence[float]`): How often a sample of each is seen in one pass; positive.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `datasets.Dataset`. Its fingerprint follows from those of `datasets`, the weights and the seed.

    Raises:
        ValueError: If there is no dataset, not one weight for each, a weight that is not positive and finite or that
            leaves no sample, or if columns or their types differ, or if datasets have codebook indices of different VQ
            models.
    """
    datasets = list(datasets)
    if not datasets or len(datasets) != len(weights):
        raise ValueError(f"Found {len(datasets)} datasets and {len(weights)} weights, expected one for each.")
    datasets, transform = _join_transforms(_add_labels(datasets))
    for number, (dataset, weight) in enumerate(zip(datasets, weights, strict=True)):
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or weight <= 0:
            raise ValueError(
                f"The weight of dataset {number} is {weight!r}, expected a positive finite number: how often each of "
                "its samples is seen in a pass. Leave out a dataset that is not to be seen."
            )
        if dataset.features != datasets[0].features:
            raise ValueError(
                f"Dataset {number} has the columns {dataset.features}, and dataset 0 has {datasets[0].features}. "
                "Give all of them the same columns, of the same types."
            )

    parts = []
    for number, (dataset, weight) in enumerate(zip(datasets, weights, strict=True)):
        copies, share = divmod(weight, 1)
        num_drawn = round(share * len(dataset))
        # A draw of its own for each, so that another dataset's weight does not change it.
        drawn = np.random.default_rng([seed, number]).choice(len(dataset), num_drawn, replace=False)
        if copies or num_drawn:
            parts.append(dataset.select([*range(len(dataset))] * int(copies) + np.sort(drawn).tolist()))
        elif len(dataset):
            raise ValueError(
                f"No sample is left of dataset {number}: its weight is {weight}, and it has {len(dataset)}. Raise the "
                "weight, or leave the dataset out."
            )
    if not parts:
        raise ValueError("No sample is left: all datasets are empty.")
    mixed = concatenate_datasets(parts)
    if transform is not None:
        mixed = mixed.with_transform(transform)
    mixed.num_skipped_samples = sum(getattr(dataset, "num_skipped_samples", 0) for dataset in datasets)
    content = repr(([dataset._fingerprint for dataset in datasets], [float(weight) for weight in weights], seed))
    mixed._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    return mixed


def _add_labels(datasets: list[Dataset]) -> list[Dataset]:
    """
    The datasets, all with `image_labels` of one type if one has them: samples that have none are learned without, and
    ids become strings if there are words as well.
    """
    found = [dataset.features[LABELS] for dataset in datasets if LABELS in dataset.column_names]
    if not found:
        return datasets
    feature = WORDS if WORDS in found else found[0]
    return [_set_labels(dataset, feature) for dataset in datasets]


def _set_labels(dataset: Dataset, feature: Any) -> Dataset:
    if LABELS not in dataset.column_names:
        nulls = pa.nulls(len(dataset), Features({LABELS: feature}).arrow_schema.field(LABELS).type)
        changed = dataset.add_column(LABELS, nulls, feature=feature)
    elif dataset.features[LABELS] != feature and dataset.features[LABELS] in IDS and feature in (*IDS, WORDS):
        changed = dataset.cast_column(LABELS, feature)
    else:
        return dataset
    changed._fingerprint = dataset._fingerprint
    changed.num_skipped_samples = getattr(dataset, "num_skipped_samples", 0)
    return changed


def _join_transforms(datasets: list[Dataset]) -> tuple[list[Dataset], TransformByPart | None]:
    """
    Where datasets have different transforms: the datasets without, each sample with the number of its own, and all
    transforms as one.
    """
    transforms = [get_transform(dataset) for dataset in datasets]
    if all(transform == transforms[0] for transform in transforms):
        return datasets, None
    models = {
        transform.indices.model_digest: transform.indices
        for transform in transforms
        if isinstance(transform, CognitionAlignment) and transform.indices is not None
    }
    if len(models) > 1:
        found = " and ".join(f"{indices.path} of {indices.model!r}" for indices in models.values())
        raise ValueError(
            f"The datasets have codebook indices of different VQ models, {found}: the same number would mean "
            "different things. Compute all of them with one model."
        )
    if any(PART_COLUMN in dataset.column_names for dataset in datasets):
        raise ValueError(
            f"A dataset has the column `{PART_COLUMN}`: it is a mixture of datasets that change their samples in "
            "different ways. Mix all of them in one call."
        )
    features = next((f for f in map(get_image_feature, (d.features for d in datasets)) if f is not None), None)
    numbered = []
    for number, dataset in enumerate(datasets):
        fingerprint = dataset._fingerprint
        dataset = set_decoding(dataset.with_format(None), False)
        dataset = dataset.add_column(PART_COLUMN, np.full(len(dataset), number, dtype=np.int16))
        dataset._fingerprint = fingerprint
        numbered.append(dataset)
    for dataset, given in zip(numbered, datasets, strict=True):
        dataset.num_skipped_samples = getattr(given, "num_skipped_samples", 0)
    return numbered, TransformByPart(transforms, features)

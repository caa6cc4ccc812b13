# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
What samples may not hold: templates, and addresses of images. Libraries underneath would render the ones and open the
others, so that whoever writes a sample could have any URL fetched from the machine that trains, and any file read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset


IMAGES = ("images", "image")
CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")
# Where Transformers looks for the image of a part of a message.
ADDRESSES = ("image", "url", "path", "base64")
# TRL passes what is in it on to `apply_chat_template`, which takes a template, too.
TEMPLATES = "chat_template_kwargs"


def check_dataset(dataset: Dataset | IterableDataset) -> None:
    """
    Raises for a dataset whose samples would have something fetched, opened or rendered. Of a streamed one it is the
    first sample that is looked at; the collator looks at all.

    Raises:
        ValueError: If there is a column of template arguments, or if images, in a column or in messages, are strings
            or files elsewhere.
    """
    if not isinstance(dataset, Dataset):
        check_sample(next(iter(dataset), {}))
        return
    _check_names(dataset.column_names)
    for name in dataset.column_names:
        find = _find_addresses if name in IMAGES else _find_in_messages if name in CONVERSATIONS else None
        if find is None:
            continue
        # Of the whole table first: rows that have been selected would be copied.
        for column in (dataset.data.column(name), dataset.select_columns(name).with_format("arrow")[:][name]):
            found = next((address for chunk in column.chunks for address in find(chunk)), None)
            if found is None:
                break
        else:
            raise _refusal(name, found)


def check_sample(sample: Mapping[str, Any]) -> None:
    """As [`check_dataset`], for one sample."""
    _check_names(sample)
    for name in IMAGES:
        images = sample.get(name)
        for image in images if isinstance(images, (list, tuple)) else [images]:
            _check_image(name, image)
    for name in CONVERSATIONS:
        messages = sample.get(name)
        for message in messages if isinstance(messages, (list, tuple)) else []:
            content = message.get("content")
            for part in content if isinstance(content, (list, tuple)) else []:
                for key in ADDRESSES:
                    _check_image(name, part.get(key))


def _check_names(columns: Mapping[str, Any] | list[str]) -> None:
    if TEMPLATES in columns:
        raise ValueError(
            f"The dataset has a column `{TEMPLATES}`, which could bring a template of its own. Templates come from "
            "the processor, or from `chat_template` of the arguments. Remove the column."
        )


def _check_image(name: str, image: Any) -> None:
    if isinstance(image, str):
        raise _refusal(name, image)
    if isinstance(image, Mapping) and image.get("bytes") is None and "://" in (image.get("path") or ""):
        raise _refusal(name, image["path"])


def _refusal(name: str, address: str) -> ValueError:
    address = address if len(address) < 80 else f"{address[:77]}..."
    return ValueError(
        f"An image in `{name}` is the string {address!r}. What data name is neither fetched nor opened. Store images "
        "on this machine, put their paths into a column `images`, and make them images with "
        '`dataset.cast_column("images", datasets.List(datasets.Image()))`.'
    )


def _flatten(array: pa.Array) -> pa.Array:
    while (
        pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type)
    ):
        array = array.flatten()
    return array


def _find_addresses(images: pa.Array) -> Iterator[str]:
    images = _flatten(images)
    if pa.types.is_string(images.type) or pa.types.is_large_string(images.type):
        yield from images.drop_null().to_pylist()[:1]
    elif pa.types.is_struct(images.type) and {"bytes", "path"} <= {field.name for field in images.type}:
        paths = pc.struct_field(images, "path").filter(pc.is_null(pc.struct_field(images, "bytes")))
        yield from paths.filter(pc.match_substring(paths, "://")).to_pylist()[:1]


def _find_in_messages(messages: pa.Array) -> Iterator[str]:
    messages = _flatten(messages)
    for field in messages.type if pa.types.is_struct(messages.type) else []:
        if field.name in ADDRESSES:
            yield from _find_addresses(pc.struct_field(messages, field.name))
        elif field.name == "content":
            yield from _find_in_messages(pc.struct_field(messages, "content"))

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Which samples of a dataset have an answer, found in its columns without making a sample of any row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset


# What is looked through at a time.
ROWS_AT_ONCE = 10_000


def find_answers(dataset: Dataset) -> tuple[list[int], list[int]]:
    """
    The rows whose `messages`, or whose messages in `completion`, have no answer, and those with an answer that is
    text and says nothing.
    """
    column = next((name for name in ("messages", "completion") if name in dataset.column_names), None)
    without, empty = [], []
    if column is None:
        return without, empty
    for number, table in enumerate(dataset.select_columns(column).with_format("arrow").iter(ROWS_AT_ONCE)):
        conversations = table[column].combine_chunks()
        if not _is_list(conversations):
            break
        messages, rows = _flatten(conversations)
        is_answer = np.asarray(pc.fill_null(pc.equal(_get_field(messages, "role"), "assistant"), False))
        has_answer = np.zeros(len(conversations), bool)
        has_answer[rows[is_answer]] = True
        is_there = np.asarray(conversations.is_valid())
        if column == "messages":  # without any it may be a sample of another form
            is_there[np.setdiff1d(np.arange(len(conversations)), rows)] = False
        contents = _get_field(messages, "content")
        is_empty = is_answer & np.asarray(contents.is_valid()) & ~_says_something(contents)
        first = number * ROWS_AT_ONCE
        without += (first + np.flatnonzero(is_there & ~has_answer)).tolist()
        empty += (first + np.unique(rows[is_empty])).tolist()
    return without, empty


def _is_list(array: pa.Array) -> bool:
    return pa.types.is_list(array.type) or pa.types.is_large_list(array.type)


def _flatten(lists: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The values of lists, and of each the index of its list."""
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))
    return lists.flatten(), np.repeat(np.arange(len(lists)), lengths)


def _get_field(structs: pa.Array, name: str) -> pa.Array:
    """A field of structs, None for all where they have no such field."""
    is_there = pa.types.is_struct(structs.type) and structs.type.get_field_index(name) >= 0
    return structs.field(name) if is_there else pa.nulls(len(structs), pa.string())


def _says_something(contents: pa.Array) -> np.ndarray:
    """Whether texts, or lists of parts, have a character or an image, `[contents]`. What is neither says something."""
    if pa.types.is_string(contents.type) or pa.types.is_large_string(contents.type):
        return np.asarray(pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(contents), ""), False))
    if not _is_list(contents):
        return np.ones(len(contents), bool)
    parts, indices = _flatten(contents)
    is_text = np.asarray(pc.fill_null(pc.equal(_get_field(parts, "type"), "text"), False))
    says = np.zeros(len(contents), bool)
    says[indices[~is_text | _says_something(_get_field(parts, "text"))]] = True
    return says


def name_sample(dataset: Dataset, rows: Sequence[int]) -> Any:
    """The `id` of the first of some rows, or its number."""
    return dataset.select_columns("id")[rows[0]]["id"] if "id" in dataset.column_names else rows[0]

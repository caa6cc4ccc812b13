# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Reading LLaVA's data format: one JSON list of conversations, and a folder of images."""

import gc
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value
from datasets.config import HF_DATASETS_CACHE
from datasets.utils import tqdm
from filelock import FileLock

from .images_vwlmm import find_problem


IMAGE_MARKER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
    }
)
# Part of the cache key: raise it whenever the same input gives different rows.
CACHE_VERSION = 4
LABEL_COLUMNS = {"ids": "int32", "words": "string"}  # before it is known which of them it is
# Rows of a batch, and characters that are read at once: what is in memory at one time.
BATCH_SIZE, BLOCK_SIZE = 1000, 1 << 20
# Where the text that has been read ends in the middle of a value, the decoder finds its fault this near to the end.
CUT = 16
# A token's id, written as a string. A word that looks like one could not be told from it.
NUMBER = re.compile("-?[0-9]+")
WHITE_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which is no character
URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*://|data:")


def load_llava_dataset(
    json_file: str | os.PathLike,
    image_folder: str | os.PathLike,
    on_bad_image: str = "raise",
    num_threads: int | None = None,
) -> Dataset:
    """
    Reads a dataset in LLaVA's format: a JSON list of records.

    A record has `id`, `image` (a path relative to `image_folder`, a list of them, or missing for a text-only sample),
    `conversations`, a list of `{"from": "human" | "gpt", "value": str}`, and where there are hard visual words for the
    objective `token_labels`, `image_labels`: for each image a list with one token for each of its image tokens, its id
    or a word, and -100 for none.

    Everything is checked before the dataset is returned: each record's form, and each image by decoding it once. The
    result is kept in the cache folder of `datasets` and memory-mapped, so that the next call, and every other process
    of a training run, only reads it. It is made anew when the JSON file or an image (its size or time of change) has
    changed.

    As in LLaVA, the one `<image>` of a human turn moves to its front, and a conversation's leading gpt turn is
    dropped, as is a human turn at its end, on which there is nothing to learn. Several `<image>` in one turn stay
    where they are. In a gpt or system turn `<image>` is text. A record with images may have one human turn and no
    answer: for the objectives that learn from images alone.

    A record with `text` in place of `conversations`, and without an image, is a text of a corpus, which is learned
    whole: one `assistant` message that answers nothing. Of the chat templates LaVIT's alone has a form for it.

    Args:
        json_file (`str` or `os.PathLike`): The JSON file.
        image_folder (`str` or `os.PathLike`): The folder that every image lies in.
        on_bad_image (`str`, *optional*, defaults to `"raise"`):
            For a missing, truncated or non-image file: `"raise"`, or `"skip"` to leave out the samples that use it,
            with one warning that counts them.
        num_threads (`int`, *optional*): Threads that check the images; one per CPU core by default.

    Returns:
        `datasets.Dataset` with the columns `id` (a string), `messages` (`role` and `content`, a list of text and image
        parts, as `VWLMMProcessor.apply_chat_template` takes them) and `images` (decoded when a row is used, with its
        EXIF orientation applied; empty for a text-only sample). If a record has `image_labels`, there is a column of
        that name, `[images][N]`, `None` for records without: integers, or if there is a word in the file strings, and
        the ids among them in digits. Its attribute `num_skipped_samples` counts those that are left out.

    Raises:
        ValueError: If a record is malformed (with its index and the field), if its numbers of `<image>`, of images and
            of lists of labels differ (with its id), if an image path leaves `image_folder`, or if an image is bad
            (with its path and the sample's id).
    """
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"`on_bad_image` is {on_bad_image!r}, expected 'raise' or 'skip'.")
    image_folder = Path(image_folder).resolve()
    json_digest = _file_digest(json_file)
    key = hashlib.sha256(repr((CACHE_VERSION, str(image_folder), on_bad_image, json_digest)).encode()).hexdigest()[:32]
    cache_file = Path(HF_DATASETS_CACHE) / "llava_format" / f"{key}.arrow"
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    if not _is_current(cache_file):
        with FileLock(f"{cache_file}.lock"):
            if not _is_current(cache_file):  # another process may have made it meanwhile
                _make(cache_file, json_file, image_folder, on_bad_image, num_threads)

    dataset = Dataset.from_file(str(cache_file))
    notes = _notes(cache_file)
    # Of the content alone, wherever it lies: by it a checkpoint knows its data again on another machine.
    content = repr((CACHE_VERSION, json_digest, notes["content"]))
    dataset._fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
    dataset.num_skipped_samples = notes["skipped"]
    if notes["bad_images"]:
        shown = "".join(f"\n  {path}: {reason}" for path, reason in list(notes["bad_images"].items())[:5])
        warnings.warn(
            f"{json_file}: left out {notes['skipped']} of {notes['skipped'] + len(dataset)} samples because of "
            f"{len(notes['bad_images'])} bad images, the first of them:{shown}",
            stacklevel=2,
        )
    return dataset


def find_rejected(
    json_file: str | os.PathLike, image_folder: str | os.PathLike, num_threads: int | None = None
) -> dict[int, tuple[str, str, bool]]:
    """
    All records that [`load_llava_dataset`] would refuse, of which it names the first, or leave out.

    Args:
        json_file, image_folder, num_threads: As in [`load_llava_dataset`].

    Returns:
        `dict[int, tuple[str, str, bool]]`: By the record's index its id, what is wrong with it, and whether
        `on_bad_image="skip"` leaves it out.

    Raises:
        ValueError: If the file is no JSON list of records.
    """
    image_folder = Path(image_folder).resolve()
    rejected, uses = {}, {}
    for index, record in enumerate(read_records(json_file)):
        name = str(record.get("id")) if isinstance(record, dict) else f"record {index}"
        try:
            row = read_record(index, record, image_folder)
        except ValueError as error:
            rejected[index] = name, str(error).partition(": ")[2], False
        else:
            for image in row["images"]:
                uses.setdefault(image["path"], []).append((index, name))
    tasks = [(path, image_folder) for path in uses]
    with ThreadPool(num_threads) as pool:
        for (path, _), (leaves, problem) in zip(tasks, pool.imap(_check_image, tasks, chunksize=32), strict=True):
            if problem:
                reason = "an image is a link that leaves the image folder" if leaves else f"bad image: {problem}"
                rejected |= {index: (name, reason, not leaves) for index, name in uses[path]}
    return rejected


def _make(
    cache_file: Path,
    json_file: str | os.PathLike,
    image_folder: Path,
    on_bad_image: str,
    num_threads: int | None,
) -> None:
    unchecked, unfinished = cache_file.with_suffix(".unchecked"), cache_file.with_suffix(".unfinished")
    try:
        with _paused_collector():
            num_rows, first_use, label_type = _write_rows(unchecked, json_file, image_folder)
        # From before the check, so that no later change goes unnoticed.
        states = {path: _state(path) for path in first_use}
        bad_images = _find_bad_images(first_use, image_folder, on_bad_image, num_threads)

        num_kept, watched = num_rows, states.keys()
        if bad_images:
            kept = [
                paths
                for batch in _batches(unchecked)
                for paths in _paths(batch)
                if bad_images.keys().isdisjoint(paths)
            ]
            num_kept = len(kept)
            watched = set().union(*kept) | bad_images.keys()
        if not num_kept:
            raise ValueError(f"No sample is left: all {num_rows} use a bad image. Is the image folder the right one?")
        watched = {path: states[path] for path in sorted(watched)}
        notes = {
            "digest": _digest(watched),
            "content": _content_digest(watched, bad_images, image_folder),
            "bad_images": bad_images,
            "skipped": num_rows - num_kept,
        }
        _write_checked(unfinished, unchecked, label_type, notes)
        os.replace(unfinished, cache_file)
    finally:
        unchecked.unlink(missing_ok=True)


@contextmanager
def _paused_collector() -> Iterator[None]:
    """Without garbage collection, which would walk over all records again and again. There are no cycles in them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_records(json_file: str | os.PathLike) -> Iterator[Any]:
    """The records one by one, of a file that need not fit into memory."""
    with open(json_file, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
    try:
        # As `json.load` decodes; and a newline stays what it is.
        with open(json_file, encoding=encoding, errors="surrogatepass", newline="") as file:
            found = yield from _read_list(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{json_file} is not valid JSON ({error}), expected one list of records.") from error
    if found:
        raise ValueError(f"{json_file} holds {found}, expected a list of records.")


def _read_list(file: TextIO) -> Iterator[Any]:
    """Yields the values of a JSON list; returns what there is in place of such a list."""
    decode, text, position, passed = json.JSONDecoder().raw_decode, "", 0, 0

    def skip(position: int) -> int:
        """Behind white space; where the text ends before, more of it is read."""
        nonlocal text, passed
        while True:
            position = WHITE_SPACE.match(text, position).end()
            if position < len(text) or not (more := file.read(BLOCK_SIZE)):
                return position
            passed, text, position = passed + position, more, 0

    def fault(message: str, position: int) -> ValueError:
        return ValueError(f"{message}: char {passed + position}")

    position = skip(0)
    if text[position : position + 1] != "[":
        value = json.loads(text[position:] + file.read())
        return f"a value of type {type(value).__name__}"
    position, number = skip(position + 1), 0
    while number or text[position : position + 1] != "]":
        while True:
            try:
                value, end = decode(text, position)
                message = None
            except json.JSONDecodeError as error:
                message, end = error.msg, error.pos
            # At the end of the text a value may go on; only what lies before is as it is.
            is_whole = end < len(text) - CUT and not (message or "").startswith("Unterminated string")
            # Twice as much each time: a long value is not decoded often.
            if is_whole or not (more := file.read(max(BLOCK_SIZE, len(text) - position))):
                break
            passed, text, position = passed + position, text[position:] + more, 0
        if message:
            raise fault(message, end)
        yield value
        number += 1
        position = skip(end)
        delimiter = text[position : position + 1]
        if delimiter == "]":
            break
        if delimiter != ",":
            raise fault("Expecting ',' delimiter", position)
        position = skip(position + 1)
    position = skip(position + 1)
    if position < len(text):
        raise fault("Extra data", position)
    return None if number else "an empty list"


def read_record(index: int, record: Any, image_folder: Path) -> dict[str, Any]:
    """
    The row of a record.

    Args:
        index (`int`): Its place in the file, for errors to name.
        record (`Any`): What stands there.
        image_folder (`Path`): The folder of the images, resolved.

    Returns:
        `dict`: `id`, `messages`, `images` with the paths of files that nobody has looked at yet, and `image_labels` if
        there are some.

    Raises:
        ValueError: If it is malformed.
    """
    if not isinstance(record, dict):
        raise ValueError(f"record {index}: found a value of type {type(record).__name__}, expected an object.")
    if isinstance(record.get("id"), bool) or not isinstance(record.get("id"), (str, int)):
        raise _malformed(index, "id", record.get("id"), "a string or an integer")
    _check_encodable(index, "id", str(record["id"]))
    images = record.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    paths = []
    for image in images:
        if not isinstance(image, str) or not image:
            raise _malformed(index, "image", record["image"], "a path, a list of paths, or no such field")
        _check_encodable(index, "image", image)
        if URL.match(image) or "\0" in image:
            raise _malformed(index, "image", image, "a path below the image folder: URLs are never fetched")
        paths.append(os.path.normpath(os.path.join(image_folder, image)))
        if os.path.isabs(image) or not _lies_in(paths[-1], image_folder):
            raise ValueError(
                f"record {index} (id {record['id']!r}): the image path {image!r} leaves the image folder "
                f"{image_folder}, expected a path relative to it. Correct the path, or pass a folder that contains "
                "all images."
            )

    if record.get("text") is not None:
        messages = _document(index, record)
    else:
        messages = _messages(index, record.get("conversations"), len(images))
    markers = sum(part["type"] == "image" for message in messages for part in message["content"])
    if markers != len(images):
        last = (record.get("conversations") or [{}])[-1]
        is_left_out = messages[-1]["role"] != "user" and last.get("from") == "human" and IMAGE_MARKER in last["value"]
        raise ValueError(
            f"record {index} (id {record['id']!r}): found {markers} '{IMAGE_MARKER}' in its human turns and "
            f"{len(images)} paths in 'image', expected as many of one as of the other. "
            + ("Its last turn, which no gpt turn answers, is left out with what it shows. " if is_left_out else "")
            + "Add what is missing or remove the record."
        )
    row = {
        "id": str(record["id"]),
        "messages": messages,
        "images": [{"bytes": None, "path": path} for path in paths],
    }
    if record.get("image_labels") is not None:
        row["image_labels"] = _image_labels(index, record, len(images))
    return row


def _image_labels(index: int, record: dict[str, Any], num_images: int) -> list[list[int | str]]:
    labels = record["image_labels"]
    if not isinstance(labels, list):
        raise _malformed(index, "image_labels", labels, "a list with one list for each image, or no such field")
    if len(labels) != num_images:
        raise ValueError(
            f"record {index} (id {record['id']!r}): found {len(labels)} lists in 'image_labels' and {num_images} "
            "paths in 'image', expected one list for each image. Add what is missing or remove the field."
        )
    for number, image in enumerate(labels):
        if not isinstance(image, list):
            raise _malformed(index, f"image_labels[{number}]", image, "a list of token ids or words")
        # Distinct labels are checked, for a large file has hundreds of millions. Types first: `True` is `1` in a set.
        if set(map(type, image)) <= {int, str} and all(map(_is_label, set(image))):
            continue
        position = next(position for position, label in enumerate(image) if not _is_label(label))
        field = f"image_labels[{number}][{position}]"
        raise _malformed(index, field, image[position], "a token id as an integer, a word, or -100 for none")
    return labels


def _is_label(label: Any) -> bool:
    if type(label) is int:
        return label == -100 or 0 <= label < 2**31
    return type(label) is str and label != "" and not NUMBER.fullmatch(label) and not SURROGATE.search(label)


def _document(index: int, record: dict[str, Any]) -> list[dict[str, Any]]:
    for field in ("conversations", "image"):
        if record.get(field) is not None:
            raise ValueError(
                f"record {index}: it has 'text' and {field!r}, and a text alone has no {field}. Leave one of them "
                "out, or put the text into 'conversations'."
            )
    if not isinstance(record["text"], str) or not record["text"].strip():
        raise _malformed(index, "text", record["text"], "a text that is not empty")
    _check_encodable(index, "text", record["text"])
    return [{"role": "assistant", "content": [_text(record["text"])]}]


def _messages(index: int, conversations: Any, num_images: int) -> list[dict[str, Any]]:
    if not isinstance(conversations, list) or not conversations:
        alone = ', of an image without text [{"from": "human", "value": "<image>"}]'
        raise _malformed(index, "conversations", conversations, f"a list of turns{alone}")
    for number, turn in enumerate(conversations):
        if not isinstance(turn, dict):
            raise _malformed(index, f"conversations[{number}]", turn, "an object with 'from' and 'value'")
        if turn.get("from") not in [*ROLES]:  # a list, as the value may be anything
            raise _malformed(
                index, f"conversations[{number}].from", turn.get("from"), "'human' or 'gpt' (or 'system')"
            )
        if not isinstance(turn.get("value"), str):
            raise _malformed(index, f"conversations[{number}].value", turn.get("value"), "a string")
        _check_encodable(index, f"conversations[{number}].value", turn["value"])

    turns = list(enumerate(conversations))
    messages = []
    if turns[0][1]["from"] == "system":
        messages.append({"role": "system", "content": [_text(turns.pop(0)[1]["value"])]})
    if turns and turns[0][1]["from"] == "gpt":  # an answer to nothing
        turns.pop(0)
    shows_image = num_images > 0 and len(turns) == 1  # which some objectives learn from without an answer
    if turns and turns[-1][1]["from"] == "human" and not shows_image:  # a question that nothing answers
        turns.pop()
    for position, (number, turn) in enumerate(turns):
        expected = ("human", "gpt")[position % 2]
        if turn["from"] != expected:
            raise _malformed(
                index, f"conversations[{number}].from", turn["from"], f"{expected!r}: human and gpt alternate"
            )
        content = _human_content(turn["value"]) if expected == "human" else [_text(turn["value"])]
        messages.append({"role": ROLES[expected], "content": content})
    if not turns or (turns[-1][1]["from"] != "gpt" and not shows_image):
        raise ValueError(
            f"record {index}: 'conversations' has no human turn with a gpt turn behind it, expected both in turn, or "
            "of an image without text one human turn alone."
        )
    return messages


def _human_content(value: str) -> list[dict[str, str | None]]:
    """Text and image parts that render as LLaVA's prompt; the chat template writes the newline behind an image."""
    if IMAGE_MARKER not in value:
        return [_text(value)]
    if value.count(IMAGE_MARKER) == 1:
        value = IMAGE_MARKER + value.replace(IMAGE_MARKER, "").strip()
    before, *behind = value.strip().split(IMAGE_MARKER)
    content = [_text(before)] if before else []
    for text in behind:
        content.append({"type": "image", "text": None})
        text = text.removeprefix("\n")
        content += [_text(text)] if text else []
    return content


def _text(text: str) -> dict[str, str | None]:
    return {"type": "text", "text": text}


def _check_encodable(index: int, field: str, text: str) -> None:
    if not text.isascii() and (match := SURROGATE.search(text)):
        raise _malformed(index, field, text, f"characters; {match.group()!r} is half of a surrogate pair")


def _malformed(index: int, field: str, found: Any, expected: str) -> ValueError:
    found = "missing" if found is None else repr(found) if len(repr(found)) < 80 else f"{repr(found)[:77]}..."
    return ValueError(f"record {index}: {field!r} is {found}, expected {expected}")


def _find_bad_images(
    first_use: Mapping[str, str], image_folder: Path, on_bad_image: str, num_threads: int | None
) -> dict[str, str]:
    """Decodes every image once. Returns `{path: reason}` of the bad ones, in the order of the dataset."""
    bad_images = {}
    # Threads, because decoding releases the interpreter: a fork would come after the process group and CUDA are up.
    tasks = [(path, image_folder) for path in first_use]
    with ThreadPool(num_threads) as pool:
        results = pool.imap(_check_image, tasks, chunksize=32)
        progress = tqdm(results, total=len(tasks), desc="Checking images", unit=" images")
        for (path, _), (leaves_folder, problem) in zip(tasks, progress, strict=True):
            if leaves_folder:
                raise ValueError(
                    f"{path} (sample {first_use[path]!r}) is a link to {problem}, outside the image folder "
                    f"{image_folder}. Move the file into the folder, or pass a folder that contains all images."
                )
            if problem and on_bad_image == "raise":
                raise ValueError(
                    f"{path} (sample {first_use[path]!r}) is no readable image: {problem}. Restore the file, or pass "
                    '`on_bad_image="skip"` to leave such samples out.'
                )
            if problem:
                bad_images[path] = problem
    return bad_images


def _check_image(task: tuple[str, Path]) -> tuple[bool, str | None]:
    """Whether the path leads out of the folder, and what is wrong with the file, or `None`."""
    path, image_folder = task
    target = os.path.realpath(path)
    if not _lies_in(target, image_folder):
        return True, target
    return False, find_problem(path)


def _file_digest(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lies_in(path: str, folder: Path) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _paths(batch: pa.RecordBatch) -> list[list[str]]:
    """The paths of each row's images."""
    return [[image["path"] for image in images] for images in batch.column("images").to_pylist()]


def _state(path: str) -> tuple[int, int] | None:
    """Size and time of change of a file, `None` if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _digest(states: Mapping[str, tuple[int, int] | None]) -> str:
    digest = hashlib.sha256()
    for item in sorted(states.items()):
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _content_digest(
    states: Mapping[str, tuple[int, int] | None], bad_images: Mapping[str, str], image_folder: Path
) -> str:
    """Of the images' names and sizes, and of which are bad; not of where they lie and when they were written."""
    digest = hashlib.sha256()
    for path, state in states.items():
        size = None if path in bad_images or state is None else state[0]
        digest.update(repr((os.path.relpath(path, image_folder), size)).encode())
    return digest.hexdigest()


def _next_rows(records: Iterator[tuple[int, Any]], image_folder: Path) -> list[dict[str, Any]]:
    try:
        return [read_record(index, record, image_folder) for index, record in islice(records, BATCH_SIZE)]
    except ValueError:
        for _ in records:  # a file that is no JSON has that fault first
            pass
        raise


def _write_rows(
    unchecked: Path, json_file: str | os.PathLike, image_folder: Path
) -> tuple[int, dict[str, str], str | None]:
    """
    Writes the rows of all records as they are read. Labels that are ids and labels with a word among them have a
    column each, as the type of all is known at the end.

    Returns:
        The number of rows, for each path of an image the id of the first row with it, and the type of the labels
        (`None` without any).
    """
    schema = Features({**FEATURES, **{name: List(List(Value(dtype))) for name, dtype in LABEL_COLUMNS.items()}})
    schema = schema.arrow_schema
    num_rows, first_use, label_type = 0, {}, None
    records = enumerate(tqdm(read_records(json_file), desc="Reading conversations", unit=" samples"))
    with pa.OSFile(str(unchecked), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while rows := _next_rows(records, image_folder):
            num_rows += len(rows)
            for row in rows:
                for image in row["images"]:
                    first_use.setdefault(image["path"], row["id"])
                if (labels := row.pop("image_labels", None)) is not None:
                    has_words = any(str in map(type, image) for image in labels)
                    row["words" if has_words else "ids"] = (
                        [[str(label) for label in image] for image in labels] if has_words else labels
                    )
                    label_type = "string" if has_words else label_type or "int32"
            writer.write(pa.RecordBatch.from_pylist(rows, schema=schema))
    return num_rows, first_use, label_type


def _write_checked(unfinished: Path, unchecked: Path, label_type: str | None, notes: dict[str, Any]) -> None:
    """Writes the dataset: the rows without a bad image, and their labels in one column, whose ids become strings if
    there are words as well."""
    labels = {"image_labels": List(List(Value(label_type)))} if label_type else {}
    schema = Features({**FEATURES, **labels}).arrow_schema
    schema = schema.with_metadata({**schema.metadata, "llava_format": json.dumps(notes)})
    with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in tqdm(_batches(unchecked), desc="Writing the dataset", unit="k samples"):
            if notes["bad_images"]:
                batch = batch.filter(pa.array([notes["bad_images"].keys().isdisjoint(p) for p in _paths(batch)]))
            columns = [batch.column(name) for name in FEATURES]
            if label_type == "int32":
                columns.append(batch.column("ids"))
            elif label_type == "string":
                ids = batch.column("ids").cast(schema.field("image_labels").type)
                columns.append(pc.coalesce(batch.column("words"), ids))
            writer.write(pa.RecordBatch.from_arrays(columns, schema=schema))


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


def _notes(cache_file: Path) -> dict[str, Any]:
    with pa.memory_map(str(cache_file)) as file:
        return json.loads(pa.ipc.open_stream(file).schema.metadata[b"llava_format"])


def _is_current(cache_file: Path) -> bool:
    if not cache_file.exists():
        return False
    images = pc.list_flatten(Dataset.from_file(str(cache_file)).data.column("images"))
    notes = _notes(cache_file)
    watched = set(pc.struct_field(images, "path").to_pylist()) | notes["bad_images"].keys()
    return _digest({path: _state(path) for path in watched}) == notes["digest"]

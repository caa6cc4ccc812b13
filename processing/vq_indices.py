# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
A file of codebook indices, one map for each image of a data set, that `examples/vq_indices.py` computes once.

`NAME.npy` holds the indices, `[images, h', w']` of uint16, and is memory-mapped. `NAME.json` beside it says what they
are of: the images by name, each with a digest of its file, and the model, its codebook's size, its grid and the size
that images were resized to. An image is found by the content of its file, wherever that lies.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


# Rows of an index file by which it is known as the one that its description is of.
NUM_CHECKED_ROWS = 64
# Files of a data set whose content is looked at before any sample is read.
NUM_CHECKED_FILES = 16
FIELDS = ("model", "model_digest", "codebook_size", "grid", "image_size", "images", "check", "fingerprint")
REMEDY = "Make it with `examples/vq_indices.py`"


class VQIndices:
    """
    Codebook indices of images, memory-mapped.

    Args:
        path (`str` or `os.PathLike`): The `.npy` file. Its description lies beside it, `.json` in place of `.npy`.
        fingerprint (`str`, *optional*): What it has to have: another process says which file it has seen.

    Attributes:
        model (`str`), model_digest (`str`): What computed them: its name, and a digest of its config and weights.
        codebook_size (`int`): Entries of the codebook; indices are below.
        grid (`tuple[int, int]`): Height `h'` and width `w'` of an image's map.
        fingerprint (`str`): Of images, model and indices.

    Raises:
        ValueError: If one of the two files is missing, is none, or does not belong to the other.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str | None = None) -> None:
        self.path = Path(path)
        description = self.path.with_suffix(".json")
        if self.path.suffix != ".npy":
            raise ValueError(f"The file of codebook indices is {self.path}, expected a `.npy` file. {REMEDY}.")
        for file in (self.path, description):
            if not file.is_file():
                raise ValueError(f"There is no {file}, which codebook indices are read from. {REMEDY}.")
        try:
            fields = json.loads(description.read_text())
            indices = np.lib.format.open_memmap(self.path, "r")
        except ValueError as error:
            raise ValueError(f"{self.path} or {description.name} is no file of indices: {error}. {REMEDY}.") from error
        if not isinstance(fields, dict) or (missing := [name for name in FIELDS if name not in fields]):
            missing = missing if isinstance(fields, dict) else FIELDS
            raise ValueError(f"{description} lacks {', '.join(missing)}. {REMEDY}.")
        self.model, self.model_digest = fields["model"], fields["model_digest"]
        self.codebook_size, self.grid = fields["codebook_size"], tuple(fields["grid"])
        self.image_size, self.fingerprint = fields["image_size"], fields["fingerprint"]
        self.images: dict[str, str] = fields["images"]
        expected = (len(self.images), *self.grid)
        if indices.shape != expected or indices.dtype != np.uint16:
            raise ValueError(
                f"{self.path} has the shape {indices.shape} of {indices.dtype}, and {description.name} describes "
                f"{expected} of uint16: they are of different data sets or VQ models. {REMEDY} anew."
            )
        if compute_check(indices) != fields["check"] or compute_fingerprint(fields) != self.fingerprint:
            raise ValueError(
                f"{self.path} does not hold the indices that {description.name} describes, of {len(self.images)} "
                f"images by {self.model!r}: one of the two is of another data set or another VQ model, or was "
                f"changed. {REMEDY} anew."
            )
        if fingerprint not in (None, self.fingerprint):
            raise ValueError(f"{self.path} has changed since training began. Begin anew.")
        self._indices = indices
        self._order: tuple[np.ndarray, np.ndarray] | None = None

    def __reduce__(self) -> tuple:
        return VQIndices, (self.path, self.fingerprint)  # not what is mapped

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, VQIndices) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __len__(self) -> int:
        return len(self.images)

    def get(self, content: bytes, name: str) -> np.ndarray:
        """
        The indices of an image.

        Args:
            content (`bytes`): Its file.
            name (`str`): What errors call it.

        Returns:
            `np.ndarray` of shape `[h', w']`, `uint16`.

        Raises:
            ValueError: If it is none of the images that there are indices of.
        """
        if self._order is None:
            digests = np.array([int(digest, 16) for digest in self.images.values()], dtype=np.uint64)
            order = np.argsort(digests, kind="stable")
            self._order = digests[order], order
        digests, order = self._order
        digest = np.uint64(int(compute_digest(content), 16))
        place = int(np.searchsorted(digests, digest))
        if place == len(digests) or digests[place] != digest:
            raise ValueError(
                f"{self.path} has no codebook indices of {name}: its {len(self)} images are of another data set, or "
                f"the image has changed since. {REMEDY} of this data set."
            )
        return self._indices[order[place]]

    def check_files(self, paths: pa.Array) -> None:
        """
        Checks that all image files of a data set are among the images, by their names, and of some the content.

        Args:
            paths (`pa.Array`): The files' paths.

        Raises:
            ValueError: If one is not, with its path.
        """
        names = pa.array(list(self.images), paths.type)
        paths = rest = pc.unique(paths)
        while len(rest):
            # A name is the end of a path. What stands in front of it is the folder of many images.
            first = rest[0].as_py()
            parts = PurePosixPath(Path(first).as_posix()).parts
            ends = ("/".join(parts[start:]) for start in range(1 if parts[0] == "/" else 0, len(parts)))
            name = next((end for end in ends if end in self.images), None)
            if name is None:
                raise ValueError(
                    f"{self.path} has no codebook indices of {first}, one of {len(rest)} such images: it is of "
                    f"another data set. {REMEDY} of this data set."
                )
            folder = first[: len(first) - len(name)]
            in_folder = pc.binary_join_element_wise(pa.scalar(folder, paths.type), names, pa.scalar("", paths.type))
            rest = rest.filter(pc.invert(pc.is_in(rest, value_set=in_folder)))
        for row in sorted({*np.linspace(0, len(paths) - 1, NUM_CHECKED_FILES).astype(int)} if len(paths) else ()):
            path = paths[int(row)].as_py()
            self.get(Path(path).read_bytes(), path)


def compute_digest(content: bytes) -> str:
    """Of an image file, 64 bits in hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def compute_check(indices: np.ndarray) -> int:
    """Of some rows of an index file, `[images, h', w']`, so that a large one is not read whole."""
    if not len(indices):
        return 0
    rows = np.unique(np.linspace(0, len(indices) - 1, NUM_CHECKED_ROWS).astype(int))
    return zlib.crc32(np.ascontiguousarray(indices[rows]).tobytes())


def compute_fingerprint(fields: dict[str, Any]) -> str:
    """Of all that the description of an index file says."""
    digest = hashlib.sha256()
    for name in FIELDS:
        if name != "fingerprint":
            value = (
                "\0".join((*fields[name], *fields[name].values())) if name == "images" else json.dumps(fields[name])
            )
            digest.update(f"{name}\0{value}\0".encode())
    return digest.hexdigest()[:16]


def write_description(path: Path, images: dict[str, str], indices: np.ndarray, fields: Mapping[str, Any]) -> None:
    """Writes the `.json` of an index file. `fields` are those of [`VQIndices`] that name the model."""
    description = {**fields, "images": images, "check": compute_check(indices)}
    description["fingerprint"] = compute_fingerprint(description)
    unfinished = path.with_suffix(".json.unfinished")
    unfinished.write_text(json.dumps(description))
    os.replace(unfinished, path.with_suffix(".json"))

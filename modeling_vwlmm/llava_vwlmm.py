# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Loads LLaVA checkpoints, and says what is wrong with one that is not as it should be."""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, LlavaForConditionalGeneration
from transformers.utils import cached_file


# What readers of weights raise for a file that is cut off, or none of theirs.
UNREADABLE = (UnpicklingError, SafetensorError, RuntimeError, EOFError, IndexError, OSError, struct.error)
# What says where a checkpoint is, for all of its files.
WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def load_llava(name_or_path: str, **kwargs) -> LlavaForConditionalGeneration:
    """
    A LLaVA of which every tensor was in its checkpoint, and whose checkpoint has no others.

    Args:
        name_or_path (`str`): A checkpoint of Transformers' LLaVA architecture.
        kwargs: Everything else that `LlavaForConditionalGeneration.from_pretrained` takes.

    Raises:
        ValueError: If the checkpoint is of another architecture, if its tensors are not those of its config, or if a
            file is damaged or holds more than tensors.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    config = AutoConfig.from_pretrained(name_or_path, **where)
    if config.model_type != "llava":
        raise ValueError(
            f"{name_or_path} has the model type {config.model_type!r}; expected 'llava', Transformers' LLaVA."
        )
    try:
        llava, loading = LlavaForConditionalGeneration.from_pretrained(
            # Shapes that differ are an error below.
            name_or_path,
            **{**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True},
        )
    except UNREADABLE:
        _find_tensors(name_or_path, **where)  # says which file it is
        raise
    _check_tensors(name_or_path, loading, **where)
    return llava


def _check_tensors(name_or_path: str, loading: dict, **where) -> None:
    if unexpected := sorted(loading["unexpected_keys"]):
        file = next(
            (f for name, f in _find_tensors(name_or_path, **where).items() if name.endswith(unexpected[0])),
            name_or_path,
        )
        raise ValueError(
            f"{file} has tensors that its config.json does not announce, {len(unexpected)} in all, {unexpected[0]} among "
            "them. Expected a layout that Transformers' LLaVA has been published in, and a config.json of these weights."
        )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{cached_file(name_or_path, 'config.json', **where)} announces {len(missing)} tensors that the weights "
            f"beside it lack, {missing[0]} among them. Is a file of weights missing, or is this the config of another "
            "checkpoint?"
        )
    for name, found, expected in sorted(loading["mismatched_keys"]):
        # Layouts differ in what stands before the module's own path.
        path = re.sub(r"^(model\.)?(language_model|vision_tower)\.", "", name)
        file = next((f for n, f in _find_tensors(name_or_path, **where).items() if n.endswith(path)), name_or_path)
        raise ValueError(
            f"{file} has {name} of shape {tuple(found)}, config.json announces {tuple(expected)}. Is that the "
            "config.json of another checkpoint?"
        )


def _find_tensors(name_or_path: str, **where) -> dict[str, Path]:
    """The file of every tensor, under the name it has there. Raises `ValueError` for a file that cannot be read."""
    folder = Path(cached_file(name_or_path, "config.json", **where)).parent
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with explain_unreadable(file):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as content:
                    tensors |= dict.fromkeys(content.keys(), file)
            else:
                tensors |= dict.fromkeys(torch.load(file, map_location="meta", weights_only=True), file)
    return tensors


@contextmanager
def explain_unreadable(file: Path) -> Iterator[None]:
    """Raises `ValueError`, with the file and what to do, where a file of weights cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        # What begins neither as a zip file nor as a pickle is another file under this name, such as a Git LFS pointer.
        with file.open("rb") as content:
            is_pickle = content.read(1) in (b"P", b"\x80")
        if isinstance(error, UnpicklingError) and is_pickle:
            raise ValueError(
                f"{file} holds more than tensors, and reading it could run any code. Ask its authors for safetensors."
            ) from error
        reason = "no file of weights" if isinstance(error, UnpicklingError) else str(error) or "empty"
        raise ValueError(f"{file} is damaged ({reason}). Download it again.") from error

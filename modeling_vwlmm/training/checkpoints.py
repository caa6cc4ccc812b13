# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there, that know the run they are of, and that a signal asks for."""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..configuration_vwlmm import VISUAL_WORD_FIELDS, VWLMMConfig, VWLMMVisualTokenizerConfig
from .arguments import VWLMMTrainingArguments


logger = logging.get_logger(__name__)

# What a checkpoint says of itself: its files, the run, its data and the sums of the losses since the last log.
RUN_STATE = "run_state.json"
# Checkpoints are written here, beside those that are whole. `push_to_hub` leaves out what begins like this.
INCOMPLETE = "_incomplete_checkpoints"
# How a run ends that SIGTERM or SIGUSR1 stopped: as a shell reports a process that SIGTERM ended.
EXIT_CODE = 128 + signal.SIGTERM


class TrainingInterrupted(SystemExit):
    """SIGTERM or SIGUSR1 stopped a run, which has saved a checkpoint. Its `code`, that of the process, is 143."""

    def __init__(self, checkpoint: str | Path) -> None:
        super().__init__(EXIT_CODE)
        self.checkpoint = str(checkpoint)


class StopSignals:
    """While it is entered, SIGTERM and SIGUSR1 end nothing: `received` says whether one came."""

    def __init__(self) -> None:
        self.received = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.received = False
        if threading.current_thread() is threading.main_thread():  # only it may
            for number in (signal.SIGTERM, signal.SIGUSR1):
                if signal.getsignal(number) is signal.SIG_DFL:  # and not a handler of the user's own
                    self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def publish_checkpoint(written: Path, checkpoint: Path, run_state: dict[str, Any]) -> None:
    """
    Gives a checkpoint its place, once all of it is on the disk.

    Args:
        written (`Path`): Folder, on the same file system, that it was written to.
        checkpoint (`Path`): Where it shall be. A checkpoint that lies there is replaced.
        run_state (`dict`): What the checkpoint says of its run.
    """
    files = {str(file.relative_to(written)): file.stat().st_size for file in _files(written)}
    (written / RUN_STATE).write_text(json.dumps({"files": files, **run_state}, indent=1))
    for file in _files(written):
        _sync(file)
    for folder in (written, *(path for path in written.rglob("*") if path.is_dir())):
        _sync(folder)
    replaced = written.with_name(f"replaced-{checkpoint.name}")
    if checkpoint.exists():
        os.rename(checkpoint, replaced)
    os.rename(written, checkpoint)
    _sync(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_incomplete_checkpoints(output_dir: str | Path) -> None:
    """Removes what a run that was killed had begun to save, and names it in the log."""
    for folder in sorted(Path(output_dir, INCOMPLETE).glob("*")):
        logger.warning(f"{folder} is incomplete: the run ended while it was saved. It is removed.")
        shutil.rmtree(folder, ignore_errors=True)


def find_damage(checkpoint: str | Path) -> str | None:
    """What is missing of a checkpoint, in words, or None if it is whole."""
    checkpoint = Path(checkpoint)
    try:
        files = json.loads((checkpoint / RUN_STATE).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no {RUN_STATE} that says what belongs to it ({error})"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"no {name}"
        if file.stat().st_size != size:
            return f"{file.stat().st_size} bytes of the {size} of {name}"
    return None


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest checkpoint of a run that is whole. Others are named in the log.

    Args:
        output_dir (`str` or `Path`): The run's folder, which need not exist.

    Returns:
        `str`: Its folder, or None where there is none.
    """
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    for checkpoint in sorted((path for path in steps if steps[path]), key=lambda path: -int(steps[path][1])):
        damage = find_damage(checkpoint)
        if damage is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is not whole: there is {damage}. It is passed over.")
    return None


def describe_data(dataset: Dataset | IterableDataset | None) -> dict[str, Any]:
    """What tells data apart: of a stream, whose samples are not known before they are read, little."""
    if isinstance(dataset, Dataset):
        return {
            "fingerprint": dataset._fingerprint,  # of all that made the data; there is no public name for it
            "number of samples": len(dataset),
            "columns": dataset.column_names,
        }
    if isinstance(dataset, IterableDataset):
        # Undecoded: names of files and pixels are no text.
        stream = dataset if dataset.features is None or dataset._formatting else dataset.decode(False)
        digest = hashlib.sha256(json.dumps(_texts(next(iter(stream), None))).encode("utf-8", "replace"))
        return {
            "columns": dataset.column_names,
            "number of shards": dataset.num_shards,
            "text of the first sample": digest.hexdigest()[:16],
        }
    return {}


def _texts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _texts(item) for key, item in value.items() if key not in ("path", "bytes")}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return value if isinstance(value, str | int | float | None) else None


def describe_run(
    args: VWLMMTrainingArguments,
    config: VWLMMConfig | VWLMMVisualTokenizerConfig,
    data: dict[str, Any],
    uses_peft: bool,
) -> dict[str, dict[str, Any]]:
    """What a run has to agree on with a checkpoint that it goes on from: what it trains, and on which samples."""
    parts = {"decoder": getattr(config, "text_config", None), "vision tower": config.vision_config}
    objectives, _ = args.get_objectives()
    run = {
        "method": args.method,
        "stage": args.stage,
        "trained modules": "of PEFT" if uses_peft else sorted(args.get_trained_modules()),
        "objectives": sorted(objectives),
    }
    for name, part in parts.items():
        if part is not None:
            run[name] = f"{part.model_type}, {part.num_hidden_layers} layers of {part.hidden_size}"
    if isinstance(config, VWLMMConfig):  # what is learned, or read, of visual words
        run |= {name: getattr(config, name) for name in VISUAL_WORD_FIELDS}
    order = {
        "data_seed": args.seed if args.data_seed is None else args.data_seed,
        "global_batch_size": args.global_batch_size,
        "train_sampling_strategy": str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)),
        "packing": args.packing,
        "max_length": args.max_length,
        "dataloader_drop_last": args.dataloader_drop_last,
    }
    return {"run": run, "data": {**data, **order}}


def check_run(checkpoint: str | Path, run: dict[str, dict[str, Any]], ignore_data_changes: bool) -> None:
    """
    Refuses a checkpoint that is not whole, or of another run.

    Args:
        checkpoint (`str` or `Path`): Its folder.
        run (`dict`): What [`describe_run`] says of the run that goes on from it.
        ignore_data_changes (`bool`): Whether it may have seen other data, or the same in another order.

    Raises:
        ValueError: If the checkpoint is damaged, was made by another stage, method or model, or on other data.
    """
    if damage := find_damage(checkpoint):
        raise ValueError(
            f"{checkpoint} is not a whole checkpoint of this trainer: there is {damage}. Resume from another, or pass "
            "`resume_from_checkpoint=True` for the newest that is whole."
        )
    saved = json.loads(Path(checkpoint, RUN_STATE).read_text())
    if changes := _changes(saved["run"], run["run"]):
        raise ValueError(
            f"{checkpoint} was made by another run: {changes}. Give this run an `output_dir` of its own, or go on "
            "with what the checkpoint was made with."
        )
    if changes := _changes(saved["data"], run["data"]):
        if not ignore_data_changes:
            raise ValueError(
                f"{checkpoint} was made on other data, or in another order of them: {changes}. Samples would be left "
                "out and others seen twice. (A `map` with a function that `datasets` cannot hash has another "
                "fingerprint each time.) Go on with the same data and settings, or set `ignore_data_changes=True` to "
                "go on nevertheless."
            )
        logger.warning(f"{checkpoint} was made on other data, or in another order of them: {changes}.")


def _changes(saved: dict[str, Any], now: dict[str, Any]) -> str:
    now = json.loads(json.dumps(now))
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    return "; ".join(f"{name} was {saved.get(name)!r} and is {now.get(name)!r}" for name in names)

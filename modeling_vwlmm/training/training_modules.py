# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Modules that objectives train beside the model's own, and that inference does without: attached, saved, loaded."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers.utils import logging

from ..modeling_vwlmm import VWLMMForConditionalGeneration
from ..objectives_vwlmm import Objective


logger = logging.get_logger(__name__)

# Beside a checkpoint. `push_to_hub` leaves out what begins like this.
FOLDER = "_training_modules"


def attach_training_modules(
    model: VWLMMForConditionalGeneration,
    objectives: Mapping[str, Objective],
    seed: int = 0,
    folder: str | Path | None = None,
) -> None:
    """
    Gives the model new modules that objectives train, as `model.training_modules`, before it is wrapped and the
    optimizer is made: they are trained and sharded like any other. Those of before go.

    Args:
        model ([`VWLMMForConditionalGeneration`]): The model.
        objectives (`Mapping[str, Objective]`): As `parse_objectives` returns them.
        seed (`int`, *optional*, defaults to 0): Seed of their weights.
        folder (`str` or `Path`, *optional*): Checkpoint that the model comes from. Objectives that say so go on with
            the modules that lie beside it.

    Raises:
        ValueError: If they are other modules.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {name: objective.make_modules(model) for name, objective in objectives.items()}
    modules = nn.ModuleDict({name: module for name, module in made.items() if module is not None})
    if hasattr(model, "training_modules"):
        del model.training_modules
    if modules:
        model.training_modules = modules.to(model.device, model.dtype)
    for name, module in modules.items():
        if objectives[name].continues_module and folder:
            _continue_module(module, Path(folder, FOLDER, f"{name}.safetensors"))
    # Names, not patterns; collected when the model is made, so those of modules that come later are added here.
    ignored = {name for name in model._keys_to_ignore_on_save or () if not name.startswith("training_modules.")}
    model._keys_to_ignore_on_save = ignored | {f"training_modules.{name}" for name in modules.state_dict()}


def _continue_module(module: nn.Module, file: Path) -> None:
    if not file.exists():
        return
    saved, own = load_file(file), module.state_dict()
    unfit = [name for name, value in saved.items() if name not in own or own[name].shape != value.shape]
    if unfit:
        raise ValueError(
            f"{file} is of another module than this run trains: {unfit[0]} {tuple(saved[unfit[0]].shape)} has no "
            "place in it. Go on with the options that the earlier run had, or remove the file to begin anew."
        )
    module.load_state_dict(saved, strict=False)  # what was frozen is not in it
    logger.info(f"Goes on with {file}.")


def save_training_modules(
    model: VWLMMForConditionalGeneration, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """
    Writes a model's training modules beside its checkpoint, one file for each objective.

    Args:
        model ([`VWLMMForConditionalGeneration`]): The model.
        folder (`str` or `Path`): The checkpoint's.
        state_dict (`Mapping[str, torch.Tensor]`, *optional*): All weights, where those of the model are sharded.
    """
    for name, module in getattr(model, "training_modules", {}).items():
        tensors = module.state_dict()
        if state_dict is not None:
            # PEFT and wrappers put names of their own in front.
            mark = f"training_modules.{name}."
            tensors = {key.partition(mark)[2]: value for key, value in state_dict.items() if mark in key}
            if not tensors:  # sharded, and nobody has put them together
                continue
        file = Path(folder, FOLDER, f"{name}.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)
        if hasattr(module, "options"):  # for who makes it again
            file.with_suffix(".json").write_text(json.dumps(module.options, indent=1))


def load_training_modules(model: VWLMMForConditionalGeneration, folder: str | Path) -> None:
    """
    Reads what [`save_training_modules`] wrote, also into sharded modules.

    Raises:
        FileNotFoundError: If there is nothing for one of the modules.
    """
    for name, module in getattr(model, "training_modules", {}).items():
        file = Path(folder, FOLDER, f"{name}.safetensors")
        if not file.exists():
            raise FileNotFoundError(
                f"{folder} has no {FOLDER}/{file.name}, which the objective `{name}` trains. Go on with the "
                "`visual_objective` that this run began with, or start a new one."
            )
        set_model_state_dict(module, load_file(file), options=StateDictOptions(full_state_dict=True))

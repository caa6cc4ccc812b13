# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What the stages of each method train, on which loss, with which defaults. VW-LMM's: section 3.1, tables 3 and 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel


ADAPTER = "model.multi_modal_projector"
DECODER = "model.language_model"
MM_HEAD = "lm_head"
VM_HEAD = "model.vm_head"
VISION_TOWER = "model.vision_tower"

# What `trains` may name.
MODULES = {
    "adapter": ADAPTER,
    "decoder": DECODER,
    "mm_head": MM_HEAD,
    "vm_head": VM_HEAD,
    "vision_tower": VISION_TOWER,
}


@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Args:
        name: What the paper calls it.
        trains: The modules whose parameters train. Every other parameter is frozen.
        visual_objective: The visual term of the loss, as `VWLMMForConditionalGeneration.forward` names it.
        builds_on: The stages that must stand behind the weights it starts from.
        global_batch_size: Samples of one optimiser step.
        learning_rate: Peak learning rate.
        chat_template: Template of the prompts; `None` for the processor's own.
    """

    name: str
    trains: tuple[str, ...]
    visual_objective: str | dict | None
    builds_on: tuple[int, ...]
    global_batch_size: int
    learning_rate: float
    chat_template: Literal["plain", "lavit"] | None


STAGES = {
    1: Stage("adapter alignment", (ADAPTER,), None, (), 256, 1e-3, "plain"),
    2: Stage("instruction tuning", (DECODER, MM_HEAD, ADAPTER), None, (1,), 128, 2e-5, None),
    3: Stage("learning the visual words", (VM_HEAD,), "vm_head", (1, 2), 256, 1e-3, "plain"),
    4: Stage("multi-modal auto-regression", (DECODER, MM_HEAD), "visual_words", (1, 2, 3), 128, 2e-5, None),
}

# LaVIT (arXiv 2309.04669, section 3.3). Stage 1 has a trainer of its own: it trains no model with an LLM. Stage 2
# divides the losses of text and codes by all positions of both (equation 5).
TOGETHER = {"codes": {"normalization": "together"}}
LAVIT_STAGES = {
    1: Stage("visual tokenizer", (), None, (), 2048, 1e-4, None),
    2: Stage("unified pre-training", (DECODER, MM_HEAD, ADAPTER), TOGETHER, (), 2048, 1e-4, "lavit"),
}

# The table of stages that `method` names.
METHODS: dict[str, dict[int, Stage]] = {"vw-lmm": STAGES, "lavit": LAVIT_STAGES}


def record_name(method: str, stage: int) -> int | str:
    """What `config.trained_stages` calls a stage: VW-LMM's by number, others with their method."""
    return stage if method == "vw-lmm" else f"{method}-{stage}"


def set_trainable_parameters(model: PreTrainedModel, modules: int | Sequence[str]) -> None:
    """
    Lets the parameters of modules train, and freezes every other.

    Args:
        model (`PreTrainedModel`): The model.
        modules (`int` or `Sequence[str]`): Paths of the modules, or the stage of VW-LMM that trains them.

    Raises:
        ValueError: If a parameter that trains is fp16, which AdamW's steps are too small for.
    """
    if isinstance(modules, int):
        modules = STAGES[modules].trains
    prefixes = ("training_modules.", *(f"{module}." for module in modules))  # and what objectives have added
    # Under all of their names: a head that is tied to the embeddings trains with either.
    parameters = list(model.named_parameters(remove_duplicate=False))
    trained = {id(parameter) for name, parameter in parameters if name.startswith(prefixes)}
    for name, parameter in parameters:
        parameter.requires_grad_(id(parameter) in trained)
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(f"{name} would train in float16. Load the model with `dtype=torch.float32`.")

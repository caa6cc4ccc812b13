# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What the stages of each method train, on which loss, with which defaults. VW-LMM's: section 3.1, tables 3 and 4."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
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
        objective_options: Options of objectives, by name, where a run leaves them open.
        text_first_share: Share of pairs of an image and its caption in which the caption stands first.
    """

    name: str
    trains: tuple[str, ...]
    visual_objective: str | dict | None
    builds_on: tuple[int, ...]
    global_batch_size: int
    learning_rate: float
    chat_template: Literal["plain", "lavit"] | None
    objective_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text_first_share: float = 0.0


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
    2: Stage("unified pre-training", (DECODER, MM_HEAD, ADAPTER), TOGETHER, (), 2048, 1e-4, "lavit", {}, 0.5),
}

# VLSA (OpenReview RLhEGWt94S, section 4.1). Its text has no table of settings: rates and batches are LLaVA's. In stage
# 1 a pretrained denoiser is frozen: one that trains lowers the loss by itself, and leaves the features less to learn.
FROZEN_DENOISER = {"reconstruction": {"trains_denoiser": "if_new"}}
RECONSTRUCTION = "reconstruction"
VLSA_STAGES = {
    1: Stage("alignment", (ADAPTER,), RECONSTRUCTION, (), 256, 1e-3, "plain", FROZEN_DENOISER),
    2: Stage("alignment with the vision tower", (ADAPTER, VISION_TOWER), RECONSTRUCTION, (1,), 128, 2e-5, None),
    3: Stage("instruction tuning", (DECODER, MM_HEAD, ADAPTER, VISION_TOWER), RECONSTRUCTION, (1, 2), 128, 2e-5, None),
}

# The table of stages that `method` names.
METHODS: dict[str, dict[int, Stage]] = {"vw-lmm": STAGES, "lavit": LAVIT_STAGES, "vlsa": VLSA_STAGES}


def record_name(method: str, stage: int) -> int | str:
    """What `config.trained_stages` calls a stage: VW-LMM's by number, others with their method."""
    return stage if method == "vw-lmm" else f"{method}-{stage}"


def set_trainable_parameters(model: PreTrainedModel, modules: int | Sequence[str]) -> None:
    """
    Lets the parameters of modules train, and freezes every other. Layers of the vision tower behind those that the
    adapter reads stay frozen: no loss depends on them, and DDP waits for the gradients of all that trains.

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
    unread = find_unread_parameters(model)
    trained = {id(p) for name, p in parameters if name.startswith(prefixes) and name not in unread}
    for name, parameter in parameters:
        parameter.requires_grad_(id(parameter) in trained)
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(f"{name} would train in float16. Load the model with `dtype=torch.float32`.")


def find_unread_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of a model's vision tower that stand behind the last layer that the adapter reads."""
    if not hasattr(model.config, "vision_feature_layer"):  # a visual tokenizer
        return set()
    num_layers, read = model.config.vision_config.num_hidden_layers, model.config.vision_feature_layer
    read = [read] if isinstance(read, int) else read
    num_read = max(layer if layer >= 0 else num_layers + 1 + layer for layer in read)
    tower = model.get_submodule(VISION_TOWER)
    lists = [
        name
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if num_read >= num_layers or not lists:
        return set()
    # In the order in which they are read; what follows the layers, a norm or a head, does so, too.
    names = [f"{VISION_TOWER}.{name}" for name, _ in tower.named_parameters()]
    first = next(n for n, name in enumerate(names) if name.startswith(f"{VISION_TOWER}.{lists[0]}.{num_read}."))
    return set(names[first:])

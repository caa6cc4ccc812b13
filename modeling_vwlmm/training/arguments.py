# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`VWLMMTrainer`]."""

import os
from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from .stages import STAGES


@dataclass
class VWLMMTrainingArguments(SFTConfig):
    r"""
    Arguments of [`VWLMMTrainer`]: those of TRL's `SFTConfig`, with the defaults of the paper's stage.

    Args:
        stage (`int`):
            Training stage, 1 to 4. It sets what trains and on which loss, and the defaults of `global_batch_size`,
            `learning_rate` and `chat_template`; what is passed explicitly wins.
        visual_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the visual loss in stage IV (the paper's equation 7 has 1). At 0 the visual loss is not computed:
            the ablation "- visual modeling".
        global_batch_size (`int`, *optional*):
            Samples of one optimiser step over all processes. `gradient_accumulation_steps` follows from it. By default
            the paper's: 256 in stages I and III, 128 in stages II and IV.
        chat_template (`str`, *optional*):
            Template of the training prompts: `"vicuna_v1"`, `"mistral"`, `"plain"`, or any Jinja template. The
            processor keeps its own. By default `"plain"` in stages I and III, the processor's in stages II and IV.

    > [!NOTE]
    > These arguments have defaults different from `SFTConfig`: `learning_rate` (the stage's),
    > `gradient_accumulation_steps` (from `global_batch_size`), `lr_scheduler_type="cosine"`, `warmup_steps=0.03` (a
    > share of all steps), `num_train_epochs=1`, `max_length=2048`, `assistant_only_loss=True`, and `bf16` only where a
    > GPU has it.

    Raises:
        ValueError: If `stage` is not one of the four, or `global_batch_size` is no multiple of what one micro-step of
            all processes takes.

    Example:

    ```python
    >>> args = VWLMMTrainingArguments("runs/stage2", stage=2, per_device_train_batch_size=16)
    >>> args.gradient_accumulation_steps  # one process
    8
    ```
    """

    stage: int | None = field(default=None, metadata={"help": "Training stage, 1 to 4."})
    visual_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the visual loss in stage IV."})
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Samples of one optimiser step over all processes. By default the stage's."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "'vicuna_v1', 'mistral', 'plain' or a Jinja template. By default the stage's."},
    )

    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. By default the stage's: 1e-3 or 2e-5."}
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "By default what `global_batch_size` needs."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or below 1 a share of all steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    max_length: int | None = field(
        default=2048, metadata={"help": "Longest sequence in tokens, image tokens included."}
    )
    assistant_only_loss: bool = field(default=True, metadata={"help": "Supervise what the assistant says, alone."})

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"`stage` is {self.stage!r}; expected 1, 2, 3 or 4.")
        stage = STAGES[self.stage]
        if self.learning_rate is None:
            self.learning_rate = stage.learning_rate
        if self.chat_template is None:
            self.chat_template = stage.chat_template
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False
        self._resolve_batch_size(stage.global_batch_size)
        super().__post_init__()
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` would shrink the global batch without a word. Lower "
                "`per_device_train_batch_size` instead: accumulation steps make up for it."
            )

    @property
    def visual_objective(self) -> str | None:
        """The visual term that the stage trains on, as `forward` takes it."""
        objective = STAGES[self.stage].visual_objective
        return None if objective == "visual_words" and self.visual_loss_weight == 0 else objective

    def _resolve_batch_size(self, default: int) -> None:
        # The launcher says how many processes there are before the process group, or DeepSpeed's config, exists.
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
        micro_step = self.per_device_train_batch_size * num_processes
        if self.gradient_accumulation_steps is not None:
            size = micro_step * self.gradient_accumulation_steps
            if self.global_batch_size not in (None, size):
                raise ValueError(
                    f"`global_batch_size` is {self.global_batch_size}, but per_device_train_batch_size="
                    f"{self.per_device_train_batch_size} x {num_processes} processes x gradient_accumulation_steps="
                    f"{self.gradient_accumulation_steps} is {size}. Leave `gradient_accumulation_steps` out: it "
                    "follows from the other three."
                )
            self.global_batch_size = size
            return
        if self.global_batch_size is None:
            self.global_batch_size = default
        if self.global_batch_size < 1 or self.global_batch_size % micro_step:
            below = self.global_batch_size // micro_step * micro_step
            sizes = " or ".join(str(size) for size in (below, below + micro_step) if size)
            per_process = self.global_batch_size // num_processes
            fitting = [
                size
                for size in range(1, self.per_device_train_batch_size + 1)
                if self.global_batch_size == per_process * num_processes > 0 and per_process % size == 0
            ]
            remedy = f", or set `per_device_train_batch_size` to {fitting[-1]}" if fitting else ""
            raise ValueError(
                f"`global_batch_size` is {self.global_batch_size}, not a multiple of the {micro_step} samples of one "
                f"micro-step (per_device_train_batch_size={self.per_device_train_batch_size} x {num_processes} "
                f"processes). Set it to {sizes}{remedy}."
            )
        self.gradient_accumulation_steps = self.global_batch_size // micro_step

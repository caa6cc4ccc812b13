# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`VWLMMTrainer`]."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_torch_bf16_gpu_available, logging
from trl import SFTConfig

from ..objectives_vwlmm import Objective, parse_objectives
from .stages import METHODS, MODULES, VISION_TOWER
from .untrusted import check_dataset


logger = logging.get_logger(__name__)

# Arguments that follow from others where they are not given.
STAGE_DEFAULTS = (
    "learning_rate",
    "chat_template",
    "visual_objective",
    "global_batch_size",
    "gradient_accumulation_steps",
    "text_first_share",
)


class StageDefault:
    """A value that follows from the stage or from the batch sizes, and does so anew when arguments are copied."""


class StageDefaultFloat(StageDefault, float):
    """See [`StageDefault`]."""


class StageDefaultInt(StageDefault, int):
    """See [`StageDefault`]."""


class StageDefaultStr(StageDefault, str):
    """See [`StageDefault`]."""


class StageDefaultDict(StageDefault, dict):
    """See [`StageDefault`]."""


@dataclass
class VWLMMTrainingArguments(SFTConfig):
    """
    Arguments of [`VWLMMTrainer`]: those of TRL's `SFTConfig`, with the defaults of the paper's stage.

    Args:
        stage (`int`):
            Training stage, 1 to 4. It sets what trains and on which loss, and the defaults of `global_batch_size`,
            `learning_rate` and `chat_template`; what is passed explicitly wins.
        method (`str`, *optional*, defaults to `"vw-lmm"`):
            Whose stages they are.
        trains (`list[str]`, *optional*):
            Modules that train, in place of the stage's: of `"adapter"`, `"decoder"`, `"mm_head"`, `"vm_head"` and
            `"vision_tower"`. Every other is frozen.
        visual_objective (`str` or `dict`, *optional*):
            What image positions learn, in place of the stage's: the name of an objective, or names with their weights,
            as `VWLMMForConditionalGeneration.forward` takes them. `{}` for nothing.
        visual_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a visual loss that is given by name, as stage IV's is (the paper's equation 7 has 1). At 0 it is
            not computed: the ablation "- visual modeling". Stage III has no other loss, and ignores it.
        global_batch_size (`int`, *optional*):
            Samples of one optimiser step over all processes. `gradient_accumulation_steps` follows from it. By default
            the paper's: 256 in stages I and III, 128 in stages II and IV.
        chat_template (`str`, *optional*):
            Template of the training prompts: `"vicuna_v1"`, `"mistral"`, `"plain"`, or any Jinja template. The
            processor keeps its own. By default `"plain"` in stages I and III, the processor's in stages II and IV.
        spike_threshold (`float`, *optional*, defaults to 20.0):
            A run stops before a step whose loss or gradient norm lies so many deviations above the median of the last
            100 steps that learned the same, in logarithms (see `History`). At 0 only what is no finite number stops
            it.
        text_first_share (`float`, *optional*):
            Of LaVIT's stage 2: the share of pairs of an image and its caption in which the caption stands first, and
            the model learns to write the image as codes. By default 0.5, for the paper has both orders, and 0 where no
            codes are learned.
        random_mask_steps, continuous_steps (`float`, *optional*, defaults to 0.2 and 0.58):
            Of LaVIT's stage 1: how many steps keep patches at random, and how many in all, these included, pass before
            there is a codebook. Below 1 they are shares of all steps.
        vision_tower_learning_rate (`float`, *optional*):
            Peak learning rate of the vision tower, where it trains. By default that of all else.
        ignore_data_changes (`bool`, *optional*, defaults to `False`):
            Whether a run goes on from a checkpoint that was made on other data, or in another order of them: without,
            it is refused.

    > [!NOTE]
    > These arguments have defaults different from `SFTConfig`: `learning_rate` (the stage's),
    > `gradient_accumulation_steps` (from `global_batch_size`), `lr_scheduler_type="cosine"`, `warmup_steps=0.03` (a
    > share of all steps), `num_train_epochs=1`, `max_length=2048`, `assistant_only_loss=True`, `bf16` only where a
    > GPU has it, and `logging_nan_inf_filter=False`: a loss that is no number stops the run.

    Raises:
        ValueError: If `stage`, `method`, a module or an objective is unknown, a weight is negative or not finite, or
            `global_batch_size` is no multiple of what one micro-step of all processes takes.

    Example:

    ```python
    >>> args = VWLMMTrainingArguments("runs/stage2", stage=2, per_device_train_batch_size=16)
    >>> args.gradient_accumulation_steps  # one process
    8
    ```
    """

    # Fields that the command line takes as JSON.
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "visual_objective"]

    stage: int | None = field(
        default=None, metadata={"help": "Training stage, 1 to 4; of LaVIT 1 or 2, of VLSA 1 to 3."}
    )
    method: str = field(default="vw-lmm", metadata={"help": "Whose stages they are: 'vw-lmm', 'lavit' or 'vlsa'."})
    trains: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules that train: 'adapter', 'decoder', 'mm_head', 'vm_head', 'vision_tower'. By default the "
            "stage's."
        },
    )
    visual_objective: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "What image positions learn: a name, or names with weights. By default the stage's."},
    )
    visual_loss_weight: float = field(
        default=1.0, metadata={"help": "Weight of a `visual_objective` that is given by name."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Samples of one optimiser step over all processes. By default the stage's."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "'vicuna_v1', 'mistral', 'plain' or a Jinja template. By default the stage's."},
    )
    spike_threshold: float = field(
        default=20.0,
        metadata={"help": "Deviations above their median at which loss or gradient norm stop a run."},
    )
    ignore_data_changes: bool = field(
        default=False,
        metadata={"help": "Whether to resume from a checkpoint that was made on other data, or in another order."},
    )

    vision_tower_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of a vision tower that trains. By default `learning_rate`."},
    )
    text_first_share: float | None = field(
        default=None,
        metadata={
            "help": "LaVIT, stage 2: share of captioned images that are written behind their caption. By default 0.5 "
            "where codes are learned."
        },
    )
    random_mask_steps: float = field(
        default=0.2,
        metadata={"help": "LaVIT, stage 1: steps that keep patches at random, or below 1 a share of all steps."},
    )
    continuous_steps: float = field(
        default=0.58,
        metadata={"help": "LaVIT, stage 1: steps before there is a codebook, or below 1 a share of all steps."},
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
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Whether to log the mean of other steps in place of a loss that is no number."},
    )
    assistant_only_loss: bool = field(default=True, metadata={"help": "Supervise what the assistant says, alone."})

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` is {self.method!r}; expected {' or '.join(map(repr, METHODS))}.")
        stages = METHODS[self.method]
        if self.stage not in stages:
            *others, last = stages
            raise ValueError(f"`stage` is {self.stage!r}; expected {', '.join(map(str, others))} or {last}.")
        stage = stages[self.stage]
        for name in STAGE_DEFAULTS:
            if isinstance(getattr(self, name), StageDefault):  # of another instance: see `dataclasses.replace`
                setattr(self, name, None)
        if self.learning_rate is None:
            self.learning_rate = StageDefaultFloat(stage.learning_rate)
        if self.chat_template is not None and self.chat_template_path is not None:
            raise ValueError(
                "`chat_template` and `chat_template_path` are both set, and prompts have one template. Leave one of "
                "the two out."
            )
        if self.chat_template is None and self.chat_template_path is None and stage.chat_template is not None:
            self.chat_template = StageDefaultStr(stage.chat_template)
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False
        self._resolve_batch_size(stage.global_batch_size)
        if self.accelerator_config is None:
            # Batches are cut and handed out by rows elsewhere, and images are no rows of a batch.
            self.accelerator_config = {"dispatch_batches": False}
        super().__post_init__()
        is_fsdp = bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
        if self.trains_tokenizer and (is_fsdp or is_deepspeed_zero3_enabled()):
            raise ValueError(
                "Stage 1 of LaVIT trains a visual tokenizer, whose modules are called outside of its forward where "
                f"the codebook starts, and here {'FSDP' if is_fsdp else 'ZeRO-3'} shards their weights. A tokenizer "
                "is small: launch with DDP or ZeRO-2, as `examples/accelerate_configs/zero2.yaml` says."
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint` is set. `VWLMMTrainer` saves a checkpoint at SIGTERM and at SIGUSR1 without. "
                "Leave it out."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` would shrink the global batch without a word. Lower "
                "`per_device_train_batch_size` instead: accumulation steps make up for it."
            )
        if self.trains is not None and not (
            isinstance(self.trains, list) and self.trains and set(self.trains) <= MODULES.keys()
        ):
            raise ValueError(f"`trains` is {self.trains}; expected some of {', '.join(map(repr, MODULES))}.")
        if not 0 <= self.visual_loss_weight < math.inf:
            raise ValueError(
                f"`visual_loss_weight` is {self.visual_loss_weight}; expected a finite number that is not negative."
            )
        if self.text_first_share is not None and (
            not 0 <= self.text_first_share <= 1 or self.text_first_share and (self.method, self.stage) != ("lavit", 2)
        ):
            raise ValueError(
                f"`text_first_share` is {self.text_first_share} with method={self.method!r} and stage={self.stage}; "
                "expected a share from 0 to 1, in LaVIT's stage 2: no other writes images."
            )
        if not 0 <= self.random_mask_steps <= self.continuous_steps:
            raise ValueError(
                f"`random_mask_steps` is {self.random_mask_steps} and `continuous_steps` {self.continuous_steps}; "
                "expected numbers that are not negative, and the second no smaller than the first, which it includes."
            )
        rate = self.vision_tower_learning_rate
        if rate is not None and not 0 <= rate < math.inf:
            raise ValueError(f"`vision_tower_learning_rate` is {rate}; expected a finite number that is not negative.")
        if rate is not None and VISION_TOWER not in self.get_trained_modules():
            raise ValueError(
                f"`vision_tower_learning_rate` is {rate}, and stage {self.stage} keeps the vision tower frozen. Leave "
                "it out, or name `vision_tower` in `trains`."
            )
        if not 0 <= self.spike_threshold < math.inf:
            raise ValueError(
                f"`spike_threshold` is {self.spike_threshold}; expected a finite number that is not negative."
            )
        if self.visual_objective is None and stage.visual_objective is not None:
            is_dropped = stage.visual_objective == "visual_words" and self.visual_loss_weight == 0
            is_name = isinstance(stage.visual_objective, str)
            default = StageDefaultStr(stage.visual_objective) if is_name else StageDefaultDict(stage.visual_objective)
            self.visual_objective = None if is_dropped else default
        is_dropped = self.visual_objective is None and self.visual_loss_weight == 0
        if self.visual_loss_weight != 1 and not isinstance(self.visual_objective, str) and not is_dropped:
            raise ValueError(
                f"`visual_loss_weight` is {self.visual_loss_weight}, and `visual_objective` is "
                f"{self.visual_objective}, no name that it could weigh. Write the weight into the mapping of "
                "`visual_objective`."
            )
        if self.visual_objective == "vm_head" and self.visual_loss_weight != 1:
            logger.warning(
                f"`visual_loss_weight` is {self.visual_loss_weight}, and the loss of the VM head is the only one: its "
                "weight would be another learning rate. It is 1."
            )
            self.visual_loss_weight = 1.0
        objectives, _ = self.get_objectives()
        if self.text_first_share is None:
            self.text_first_share = StageDefaultFloat(stage.text_first_share if "codes" in objectives else 0.0)

    @property
    def trains_tokenizer(self) -> bool:
        """Whether this stage trains a visual tokenizer, and no model with an LLM."""
        return (self.method, self.stage) == ("lavit", 1)

    def get_visual_objective(self) -> dict[str, Any] | str | None:
        """`visual_objective`, with the stage's options where it leaves them open."""
        open_options = METHODS[self.method][self.stage].objective_options
        objective = self.visual_objective
        if isinstance(objective, str) and objective in open_options:
            objective = {objective: self.visual_loss_weight}
        if not isinstance(objective, dict):
            return objective
        return {
            name: {**open_options[name], **(options if isinstance(options, dict) else {"weight": options})}
            if name in open_options
            else options
            for name, options in objective.items()
        }

    def get_objectives(self) -> tuple[dict[str, Objective], dict[str, float]]:
        """The objectives of this run with their weights, by name. See `parse_objectives`."""
        objectives, weights = parse_objectives(self.get_visual_objective(), self.visual_loss_weight)
        if not objectives:
            raise ValueError(f"`visual_objective` is {self.visual_objective!r}, which leaves nothing to learn.")
        return objectives, weights

    def get_trained_modules(self) -> tuple[str, ...]:
        """The modules that train, as paths in the model."""
        if self.trains is None:
            return METHODS[self.method][self.stage].trains
        return tuple(MODULES[module] for module in self.trains)

    def check_columns(self, dataset: Dataset | IterableDataset) -> None:
        """
        Checks that a dataset has the columns that the objectives read, and no templates or addresses of images.

        Raises:
            ValueError: If it has not, or has.
        """
        check_dataset(dataset)
        objectives, _ = self.get_objectives()
        needed = {column: name for name, objective in objectives.items() for column in objective.columns}
        if not needed:
            return
        columns = getattr(dataset, "column_names", None) or list(next(iter(dataset), {}))
        for column, name in needed.items():
            if column not in columns:
                raise ValueError(
                    f"The objective `{name}` learns from a column `{column}`, and the dataset has "
                    f"{', '.join(columns)}. Add the column, or choose another `visual_objective`."
                )

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
            self.global_batch_size = StageDefaultInt(size)
            return
        if self.global_batch_size is None:
            self.global_batch_size = StageDefaultInt(default)
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
        self.gradient_accumulation_steps = StageDefaultInt(self.global_batch_size // micro_step)

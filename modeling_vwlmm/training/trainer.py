# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""One trainer for the four stages of VW-LMM."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..modeling_vwlmm import VWLMMForConditionalGeneration, get_supervised_image_positions
from .arguments import VWLMMTrainingArguments
from .model_card import TAGS, is_hub_id, make_model_card, read_training_procedure
from .sampling import ModalityLengthGroupedSampler, estimate_lengths
from .stages import STAGES


logger = logging.get_logger(__name__)


# What can be wrong with a sample: its messages or images, an image file, or messages that the template refuses.
SAMPLE_ERRORS = (ValueError, OSError, TemplateError)


@dataclass
class VWLMMDataCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator for vision data, whose errors name the sample, and which never supervises a placeholder.

    With `packing`, the samples of a batch stand behind each other in one row without padding: `[1, L]`, and
    `position_ids` that start again with every sample, by which attention keeps them apart.
    """

    packing: bool = False

    def torch_call(self, examples):
        try:
            batch = super().torch_call(examples)
        except SAMPLE_ERRORS:
            for example in examples:
                try:
                    super().torch_call([example])
                except SAMPLE_ERRORS as error:
                    raise ValueError(f"Sample {example.get('id')!r}: {error}") from error
            raise
        batch["labels"][batch["input_ids"] == self.processor.image_token_id] = -100
        return pack(batch) if self.packing else batch


def pack(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Puts the rows of a padded batch, `[B, L]`, into one without padding, `[1, L']`; images keep their order."""
    is_token = batch.pop("attention_mask").bool()  # [B, L]
    position_ids = is_token.cumsum(dim=1) - 1  # [B, L]
    # Nothing stands before the first token of a sample, so nothing can predict it.
    batch["labels"][position_ids == 0] = -100
    packed = {name: batch[name][is_token][None] for name in ("input_ids", "labels")}  # [1, L']
    return {**batch, **packed, "position_ids": position_ids[is_token][None]}


class VWLMMTrainer(SFTTrainer):
    """
    Trainer of VW-LMM's four stages, on top of TRL's `SFTTrainer`.

    `args.stage` says which: the trainer freezes what the stage does not train and adds the visual-word KL term where
    the stage has one. Text and image positions are normalised separately, each over the whole optimiser step: every
    accumulated micro-batch and every process.

    Logged beside `loss`: `language_loss` and `visual_loss` (nats a position), `num_text_positions` and
    `num_image_positions` behind them, `visual_word_entropy` (nats) and `padding_share`, all since the last log.

    `train_sampling_strategy="group_by_length"` makes batches of similar length and one modality. `packing=True` puts the
    samples of a micro-batch, images included, into one row without padding and without attention across samples.

    Args:
        model ([`VWLMMForConditionalGeneration`] or `str`): Model, or name or path of a checkpoint.
        args ([`VWLMMTrainingArguments`]): Arguments. Unlike TRL's they are required: they name the stage.
        train_dataset (`Dataset` or `IterableDataset`): Columns `messages` and `images`, and `id` for errors to name.
        processing_class ([`VWLMMProcessor`], *optional*): By default the one saved with the model.
        kwargs: Everything else that `SFTTrainer` takes, such as `eval_dataset`, `peft_config` and `callbacks`.

    Raises:
        TypeError: If `model` is no VW-LMM, or `args` no [`VWLMMTrainingArguments`].
        ValueError: If model and processor disagree on the image placeholder, `max_length` would cut image tokens, or
            Transformers (not PEFT) has attached an adapter to the model.
        FloatingPointError: While training, if a loss is NaN or infinite.

    Example:

    ```python
    >>> trainer = VWLMMTrainer(
    ...     model="runs/stage3",
    ...     args=VWLMMTrainingArguments("runs/stage4", stage=4),
    ...     train_dataset=load_llava_dataset("llava_v1_5_mix665k.json", "images"),
    ... )
    >>> trainer.train()
    ```
    """

    _name = "VW-LMM"
    _tag_names = [*TAGS, "trl", "sft"]
    _paper = {"title": "Multi-modal Auto-regressive Modeling via Visual Words", "id": "2403.07720"}
    # Losses are divided by the positions of the whole optimiser step, so accumulation must not divide them again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: VWLMMForConditionalGeneration | str,
        args: VWLMMTrainingArguments,
        train_dataset: Dataset | None = None,
        processing_class: ProcessorMixin | None = None,
        peft_config: "PeftConfig | None" = None,  # noqa: F821 (an optional dependency)
        **kwargs,
    ):
        if not isinstance(args, VWLMMTrainingArguments):
            raise TypeError(
                f"`args` is a {type(args).__name__}; expected VWLMMTrainingArguments, which name the stage."
            )
        if isinstance(model, str):
            model = VWLMMForConditionalGeneration.from_pretrained(
                model, **{"dtype": torch.float32, **(args.model_init_kwargs or {})}
            )
            args.model_init_kwargs = None
        base_model = model.get_base_model() if is_peft_model(model) else model
        if not isinstance(base_model, VWLMMForConditionalGeneration):
            raise TypeError(f"`model` is a {type(base_model).__name__}; expected VWLMMForConditionalGeneration.")
        if base_model._hf_peft_config_loaded:
            raise ValueError(
                "`model` has a PEFT adapter attached by Transformers: saving it would write that adapter alone, and lose "
                "what this stage trains. Merge it first, `PeftModel.from_pretrained(base_model, "
                "adapter).merge_and_unload()`, or pass the `PeftModel` to go on training the adapter."
            )
        check_options(args, kwargs, uses_peft=is_peft_model(model) or peft_config is not None)
        warn_about_untrained_modules(base_model, args)
        if not is_peft_model(model) and peft_config is None:
            set_trainable_parameters(base_model, args.stage)

        # TRL packs text only, and refuses `packing` with images: here the collator packs both.
        packing, args.packing = args.packing, False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        args.packing = packing

        self._config = base_model.config
        self._num_image_items_in_batch = None
        self._check_processor()
        self._check_max_length(train_dataset)
        if args.chat_template is not None and not self._is_vision_dataset:
            raise ValueError(
                f"Stage {args.stage} renders its prompts with `chat_template={args.chat_template!r}`, which needs a "
                "dataset with an `images` column; the training dataset has none."
            )
        # A collator of the user's own, even one derived from TRL's, stays.
        if type(self.data_collator) is DataCollatorForVisionLanguageModeling:
            self.data_collator = VWLMMDataCollator(**vars(self.data_collator), packing=packing)
            if args.chat_template is not None:
                is_jinja = "{" in args.chat_template
                self.data_collator.chat_template = (
                    args.chat_template if is_jinja else self.processing_class.get_chat_template(args.chat_template)
                )
        elif packing:
            raise ValueError(
                f"`packing` is set, and batches come from a {type(self.data_collator).__name__}, which does not pack. It "
                "needs a dataset with an `images` column and no `data_collator` of your own; else leave it out."
            )
        self._sums = {"train": Counter(), "eval": Counter()}

    def _check_processor(self) -> None:
        if self.processing_class.image_token_id != self._config.image_token_id:
            raise ValueError(
                f"The processor's image placeholder has id {self.processing_class.image_token_id}, the model expects "
                f"{self._config.image_token_id}. Use the processor that was saved with the model, or build the model "
                "with `image_token_index=processor.image_token_id`."
            )

        strategy = self.processing_class.vision_feature_select_strategy
        if strategy != self._config.vision_feature_select_strategy:
            raise ValueError(
                f"The processor has vision_feature_select_strategy={strategy!r}, the model "
                f"{self._config.vision_feature_select_strategy!r}: they count different numbers of image tokens. Use "
                "the processor that was saved with the model."
            )

    def _check_max_length(self, dataset: Dataset) -> None:
        if self.args.max_length is None or not isinstance(dataset, Dataset) or "images" not in dataset.column_names:
            return
        names = [name for name in ("id", "images") if name in dataset.column_names]
        table = dataset.select_columns(names).with_format("arrow")[:]  # file names, not pixels
        num_images = pc.list_value_length(table["images"])
        most = pc.max(num_images).as_py() or 0
        num_image_tokens = most * self._config.image_seq_length
        if num_image_tokens >= self.args.max_length:
            index = pc.index(num_images, most).as_py()
            name = table["id"][index].as_py() if "id" in names else index
            raise ValueError(
                f"`max_length` is {self.args.max_length}, which would cut image tokens: sample {name!r} has {most} "
                f"images of {self._config.image_seq_length} tokens each. Set `max_length` above {num_image_tokens} "
                "plus the text, or to None."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "id" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "id"]

    def train(self, *args, **kwargs):
        if self.args.stage not in self._config.trained_stages:
            self._config.trained_stages = [*self._config.trained_stages, self.args.stage]
        return super().train(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        groups = self.args.train_sampling_strategy == "group_by_length"
        if not groups or not isinstance(dataset, Dataset) or "images" not in dataset.column_names:
            return super()._get_train_sampler(train_dataset)
        lengths, has_images = estimate_lengths(dataset, self._config.image_seq_length)
        if self.args.length_column_name in dataset.column_names:
            lengths = dataset[self.args.length_column_name][:]  # a list: a column would be read sample by sample
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ModalityLengthGroupedSampler(self.args.global_batch_size, lengths, has_images, seed)

    def _get_num_items_in_batch(self, batch_samples, device):
        """The text positions that the loss of an optimiser step is a mean over; the image positions are kept aside."""
        num_text_positions = sum((batch["labels"][:, 1:] != -100).sum() for batch in batch_samples)
        num_image_positions = sum(
            get_supervised_image_positions(
                batch["input_ids"],
                batch.get("attention_mask"),
                self._config.image_token_id,
                position_ids=batch.get("position_ids"),
            ).sum()
            for batch in batch_samples
        )
        counts = torch.tensor([num_text_positions, num_image_positions], device=device)
        if self.args.average_tokens_across_devices:
            # The gradients of all processes will be averaged: positions a process make that an average over positions.
            counts = self.accelerator.reduce(counts, "sum") / self.accelerator.num_processes
        num_items_in_batch, self._num_image_items_in_batch = counts.unbind()
        return num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        num_image_items_in_batch = None if num_items_in_batch is None else self._num_image_items_in_batch
        outputs = model(
            **inputs,
            # Logits for a caller who asks for outputs, else for no position at all.
            logits_to_keep=0 if return_outputs else torch.empty(0, dtype=torch.long),
            visual_objective=self.args.visual_objective,
            visual_loss_weight=self.args.visual_loss_weight if self.args.stage == 4 else 1.0,
            num_items_in_batch=num_items_in_batch,
            num_image_items_in_batch=num_image_items_in_batch,
            use_cache=False,
        )
        loss = outputs.loss
        if self.model.training and not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()} (language loss "
                f"{outputs.language_loss}, visual loss {outputs.visual_loss}). Training stops before this step "
                f"changes the weights; checkpoints in {self.args.output_dir} are untouched. Lower the learning rate, "
                "or look at the data of this step."
            )
        self._add_to_sums(inputs, outputs, num_items_in_batch, num_image_items_in_batch)
        if self.model.training and self.args.stage == 1 and "pixel_values" not in inputs:
            # A micro-batch without images: the adapter, all that trains, took no part in it.
            loss.requires_grad_()
        return (loss, outputs) if return_outputs else loss

    def _add_to_sums(self, inputs, outputs, num_text_items, num_image_items) -> None:
        sums = self._sums["train" if self.model.training else "eval"]
        sums["positions"] += inputs["input_ids"].numel()
        sums["padding_share"] += (inputs["attention_mask"] == 0).sum().item() if "attention_mask" in inputs else 0
        if outputs.language_loss is not None:
            num_positions = outputs.num_text_positions.item()
            denominator = num_positions if num_text_items is None else float(num_text_items)
            sums["num_text_positions"] += num_positions
            sums["language_loss"] += outputs.language_loss.item() * denominator
        if outputs.visual_loss is not None:
            num_positions = outputs.num_image_positions.item()
            denominator = num_positions if num_image_items is None else float(num_image_items)
            sums["num_image_positions"] += num_positions
            sums["visual_loss"] += outputs.visual_loss.item() * denominator
            sums["visual_word_entropy"] += outputs.visual_word_entropy.item() * num_positions

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        sums, self._sums[mode] = self._sums[mode], Counter()
        totals = Counter()
        for process_sums in gather_object([sums]):
            totals.update(process_sums)
        prefix = "eval_" if mode == "eval" else ""
        for name, total in totals.items():
            if name in POSITIONS_BEHIND:
                total /= max(totals[POSITIONS_BEHIND[name]], 1)
            if name != "positions":
                logs[prefix + name] = total
        super().log(logs, start_time)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **metadata,
    ) -> None:
        """
        Writes the model card, `README.md` in the output folder.

        Args:
            model_name, dataset_name, tags (*optional*): As in TRL. `dataset_name` takes ids on the Hub.
            metadata: What else [`make_model_card`] takes, such as `license`, `base_model` and `eval_results`.
                `push_to_hub` passes them on.
        """
        if not self.is_world_process_zero():
            return
        # TRL's card describes a language model. What it knows of this run stays: tags, versions, links to trackers.
        super().create_model_card(model_name=model_name, tags=tags)
        file = Path(self.args.output_dir, "README.md")
        draft = ModelCard.load(file)
        if is_peft_model(self.model):
            # The folder holds an adapter, which was made from a VW-LMM and not from an LLM and a vision tower.
            metadata = {
                "library_name": "peft",
                "base_model": [name] if is_hub_id(name := self._config.name_or_path) else [],
                **metadata,
            }
        make_model_card(
            self._config,
            self.hub_model_id or model_name or Path(self.args.output_dir).name,
            training_procedure=read_training_procedure(draft),
            tags=sorted(draft.data.tags),
            datasets=dataset_name,
            **metadata,
        ).save(file)


# What each logged mean is a mean over.
POSITIONS_BEHIND = {
    "language_loss": "num_text_positions",
    "visual_loss": "num_image_positions",
    "visual_word_entropy": "num_image_positions",
    "padding_share": "positions",
}


def check_options(args: VWLMMTrainingArguments, kwargs: dict, uses_peft: bool) -> None:
    """Refuses what `SFTTrainer` offers and the losses of the stages would ignore."""
    ignored = {
        "loss_type": args.loss_type != "nll",
        "label_smoothing_factor": args.label_smoothing_factor > 0,
        "compute_loss_func": kwargs.get("compute_loss_func") is not None,
        "router_aux_loss_coef": bool(args.router_aux_loss_coef),
    }
    for name, is_set in ignored.items():
        if is_set:
            raise ValueError(f"`{name}` is set, and the losses of VW-LMM's stages have no place for it. Leave it out.")
    if args.stage == 3 and kwargs.get("compute_metrics") is not None:
        raise ValueError("`compute_metrics` is set, and stage 3 computes no logits of text. Leave it out.")
    if uses_peft and args.stage in (1, 3):
        raise ValueError(
            f"Stage {args.stage} trains {', '.join(STAGES[args.stage].trains)} alone, which PEFT would freeze. Use PEFT "
            "in stages 2 and 4, or leave `peft_config` out."
        )


def set_trainable_parameters(model: PreTrainedModel, stage: int) -> None:
    """
    Lets the parameters of a stage train, and freezes every other.

    Raises:
        ValueError: If a parameter that trains is fp16, which AdamW's steps are too small for.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(f"{module}." for module in STAGES[stage].trains)))
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(f"{name} would train in float16. Load the model with `dtype=torch.float32`.")


def warn_about_untrained_modules(model: VWLMMForConditionalGeneration, args: VWLMMTrainingArguments) -> None:
    """Warns about modules that a stage relies on and that no stage has trained."""
    stage = STAGES[args.stage]
    if args.stage == 3 and 3 not in model.config.trained_stages:
        logger.warning("Stage 3: the VM head has never been trained. It starts from random weights, as in the paper.")
    missing = [number for number in stage.builds_on if number not in model.config.trained_stages]
    if args.visual_objective is None and 3 in missing:
        missing.remove(3)
    for number in missing:
        logger.warning(
            f"Stage {args.stage} ({stage.name}) builds on stage {number} ({STAGES[number].name}), which has not run "
            f"on these weights: {', '.join(STAGES[number].trains)} may never have been trained. Run stage {number} "
            f"first, or start from a checkpoint whose config.json lists it under `trained_stages`."
        )

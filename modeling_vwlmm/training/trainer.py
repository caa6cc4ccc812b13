# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""One trainer for the four stages of VW-LMM."""

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging
from trl import SFTTrainer
from trl.chat_template_utils import has_generation_markers
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from processing_vwlmm import VWLMMProcessor
from processing_vwlmm.transforms import PART_COLUMN

from ..adapters_vwlmm import selects_tokens
from ..assembly import check_is_dense
from ..configuration_vwlmm import VWLMMConfig
from ..dropping_vwlmm import reads_packed_rows
from ..modeling_vwlmm import VWLMMForConditionalGeneration
from ..objectives_vwlmm import find_supervised_positions, leave_out_dropped
from ..outputs_vwlmm import VWLMMCausalLMOutputWithPast
from ..patches_vwlmm import find_snapshots
from ..placeholders_vwlmm import replace_placeholders
from ..visual_tokenizer_vwlmm import VWLMMVisualTokenizer
from .arguments import VWLMMTrainingArguments
from .checks import (
    all_datasets,
    check_answers,
    check_form,
    check_max_length,
    check_options,
    check_processor,
    check_stream_options,
    check_taught_modules,
    check_trained_modules,
    restrict_all_linear,
    warn_about_config_of_adapter,
    warn_about_unread_temperatures,
)
from .collating import VWLMMDataCollator
from .data_loading import LoadsInOrder
from .lockstep import encode_no_images
from .means import PositionMeans
from .model_card import PAPERS, TAGS, is_hub_id, make_model_card, read_training_procedure
from .no_cache import NoCache
from .saving import SavesWholeCheckpoints
from .stages import METHODS, record_name, set_trainable_parameters
from .tokenizer_trainer import VisualTokenizerTrainer
from .training_modules import attach_training_modules
from .watching import StopsWhenDiverged, measure_gradient_norms, measure_memory


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say where a checkpoint is.
SOURCE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class VWLMMTrainer(SavesWholeCheckpoints, StopsWhenDiverged, LoadsInOrder, SFTTrainer):
    """
    Trainer of VW-LMM's four stages, on top of TRL's `SFTTrainer`.

    `args.stage` says which: the trainer freezes what the stage does not train and adds the visual-word KL term where
    the stage has one. Text and image positions are normalised separately, each over the whole optimiser step: every
    accumulated micro-batch and every process.

    Logged beside `loss`: `language_loss` and `visual_loss` (nats a position), `num_text_positions` and
    `num_image_positions` behind them, `visual_word_entropy` (nats) and `padding_share`, all since the last log; the
    norms of the gradients by part, before clipping, of the last step (`decoder_grad_norm`, ...; not with DeepSpeed);
    `tokens_per_second` and `images_per_second` of all processes, `data_wait_share`, `seconds_left`, `memory_gib` and
    `total_flos`; and `skipped_samples`, which the dataset has left out when it was read, where it has such a number.

    `train_sampling_strategy="group_by_length"` makes batches of similar length and one modality. `packing=True` puts
    samples of the whole dataset, images included, into rows of up to `max_length` tokens, without attention across
    samples; batch sizes then count rows.

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
        TrainingDiverged: While training, if the loss or the norm of the gradients is NaN or infinite, or far outside
            of its own history (`spike_threshold`).

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

    _tag_names = [*TAGS, "trl", "sft"]
    # Losses are divided by the positions of the whole optimiser step, so accumulation must not divide them again.
    loss_is_scaled_for_ga = True

    def __new__(
        cls,
        model: VWLMMForConditionalGeneration | VWLMMVisualTokenizer | str | None = None,
        args: VWLMMTrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: ProcessorMixin | None = None,
        peft_config: "PeftConfig | None" = None,  # noqa: F821 (an optional dependency)
        **kwargs: Any,
    ) -> "VWLMMTrainer | VisualTokenizerTrainer":
        """A visual tokenizer has no LLM, and what trains one knows nothing of text: it is a trainer of its own."""
        if cls is VWLMMTrainer and isinstance(args, VWLMMTrainingArguments) and args.trains_tokenizer:
            if peft_config is not None:
                raise ValueError("`peft_config` is set: a visual tokenizer trains as a whole. Leave it out.")
            return VisualTokenizerTrainer(model, args, train_dataset, processing_class, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        model: VWLMMForConditionalGeneration | str,
        args: VWLMMTrainingArguments,
        train_dataset: Dataset | IterableDataset | None = None,
        processing_class: ProcessorMixin | None = None,
        peft_config: "PeftConfig | None" = None,  # noqa: F821 (an optional dependency)
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, VWLMMTrainingArguments):
            raise TypeError(
                f"`args` is a {type(args).__name__}; expected VWLMMTrainingArguments, which name the stage."
            )
        if isinstance(train_dataset, Dataset) and not len(train_dataset):
            raise ValueError("The training dataset has no samples; expected one at least.")
        for dataset in (*all_datasets(train_dataset), *all_datasets(kwargs.get("eval_dataset"))):
            if not isinstance(dataset, Dataset | IterableDataset):
                raise TypeError(
                    f"A dataset is a {type(dataset).__name__}; expected `datasets.Dataset` or `IterableDataset`. "
                    "`Dataset.from_list` makes one of a list of samples."
                )
            args.check_columns(dataset)
            if kwargs.get("data_collator") is None and kwargs.get("formatting_func") is None:
                check_form(dataset, args)
                check_answers(dataset, args, is_trained=dataset is train_dataset)
        model_init_kwargs = args.model_init_kwargs
        if isinstance(model, str):
            args.model_init_kwargs = None  # TRL would say that they are ignored
            model, processing_class = load_model_and_processor(
                model, processing_class, model_init_kwargs or {}, kwargs.pop("quantization_config", None)
            )
        base_model = model.get_base_model() if is_peft_model(model) else model
        if not isinstance(base_model, VWLMMForConditionalGeneration):
            raise TypeError(f"`model` is a {type(base_model).__name__}; expected VWLMMForConditionalGeneration.")
        if base_model._hf_peft_config_loaded:
            raise ValueError(
                "`model` has a PEFT adapter attached by Transformers: saving it would write that adapter alone, and "
                "lose what this stage trains. Merge it first, `PeftModel.from_pretrained(base_model, "
                "adapter).merge_and_unload()`, or pass the `PeftModel` to go on training the adapter."
            )
        check_is_dense(base_model.config.text_config)
        uses_peft = is_peft_model(model) or peft_config is not None
        check_options(args, kwargs, uses_peft)
        if isinstance(train_dataset, IterableDataset):
            check_stream_options(args)
        warn_about_untrained_modules(base_model.config, args)
        warn_about_unread_temperatures(base_model.config, args)
        if uses_peft:
            warn_about_config_of_adapter(base_model.config)
        else:
            check_trained_modules(args, base_model.config.use_pseudo_image_features)
            set_trainable_parameters(base_model, args.get_trained_modules())

        if processing_class is None:
            processing_class = VWLMMProcessor.from_pretrained(base_model.config.name_or_path)
        if peft_config is not None:
            peft_config = restrict_all_linear(peft_config, base_model, args.get_trained_modules())
        # TRL packs text only, and refuses `packing` with images: here the collator packs both. And it would ask the
        # processor's own template for the tags that the template of the prompts has to have.
        packing, args.packing = args.packing, False
        assistant_only_loss = args.assistant_only_loss
        if args.chat_template is not None:
            chat_template = read_chat_template(args, processing_class)
            args.assistant_only_loss = False
        elif args.assistant_only_loss and args.chat_template_path is None:
            check_generation_markers(processing_class.chat_template, "The processor's chat template")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        args.packing, args.model_init_kwargs = packing, model_init_kwargs
        args.assistant_only_loss = assistant_only_loss

        self._prepare_run(base_model, train_dataset)
        self._objectives, self._weights = args.get_objectives()
        check_taught_modules(base_model, self._objectives)
        # Now, so that PEFT leaves them alone, and not later, because the optimizer has to know them.
        attach_training_modules(base_model, self._objectives, args.seed, base_model.config.name_or_path)
        self._encode_no_images = partial(
            encode_no_images,
            runs_tower=self._runs_tower_without_images(),
            reads_codes=args.text_first_share > 0,
        )
        check_processor(self.processing_class, self._config)
        check_max_length(train_dataset, args.max_length, self._config.image_seq_length)
        if args.chat_template is not None and not self._is_vision_dataset:
            raise ValueError(
                f"Stage {args.stage} renders its prompts with `chat_template={args.chat_template!r}`, which needs a "
                "dataset with an `images` column; the training dataset has none."
            )
        # What answers of a prompt and its completion are, the messages of both say.
        is_of_messages = isinstance((next(iter(train_dataset), None) or {}).get("prompt"), list)
        completion_only_loss = self.completion_only_loss and not (is_of_messages and assistant_only_loss)
        # A collator of the user's own, even one derived from TRL's, stays.
        if type(self.data_collator) is DataCollatorForVisionLanguageModeling:
            self.data_collator = VWLMMDataCollator(
                **{**vars(self.data_collator), "completion_only_loss": completion_only_loss},
                packing=packing,
                text_first_share=args.text_first_share,
                seed=args.seed if args.data_seed is None else args.data_seed,
                flattens_rows=self._config.text_config._attn_implementation.startswith("flash_attention"),
                objectives=self._objectives,
                image_seq_length=self._config.image_seq_length,
            )
            if args.chat_template is not None:
                self.data_collator.chat_template = chat_template
                self.data_collator.assistant_only_loss = assistant_only_loss
        elif packing:
            raise ValueError(
                f"`packing` is set, and batches come from a {type(self.data_collator).__name__}, which does not pack. "
                "It needs a dataset with an `images` column and no `data_collator` of your own; else leave it out."
            )
        if packing and isinstance(train_dataset, IterableDataset):
            logger.warning("`packing` of streamed data puts the samples of a micro-batch into one row, and no others.")
        self._num_skipped_samples = getattr(train_dataset, "num_skipped_samples", None)
        self._means = {mode: PositionMeans(self._weights) for mode in ("train", "eval")}
        self._grad_norms: dict[str, torch.Tensor] = {}
        self._has_seen_images = False
        self.add_callback(UntrainedParameters(self))

    def _runs_tower_without_images(self) -> bool:
        if self.accelerator.num_processes == 1:
            return False
        return self._tower_learns() or self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def _tower_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self._base_model.model.vision_tower.parameters())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See `Trainer.create_optimizer`. The vision tower is a group of its own where it has a rate of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.vision_tower_learning_rate is not None:
            set_learning_rate(
                optimizer, self._base_model.model.vision_tower.parameters(), self.args.vision_tower_learning_rate
            )
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        # Private: Transformers has no public list of the columns that a collator reads.
        super()._set_signature_columns_if_needed()
        objectives = self._objectives.values()
        needed = ["id", PART_COLUMN, *(column for o in objectives for column in (*o.columns, *o.optional_columns))]
        self._signature_columns += [column for column in needed if column not in self._signature_columns]

    def _record_stage(self) -> None:
        # Once a run, also if it stood there before: they are in order. And not again where a run is resumed from a
        # checkpoint of its last step.
        stages, takes_steps = self._config.trained_stages, self.state.global_step > self._num_steps_taken
        record = record_name(self.args.method, self.args.stage)
        if not self._has_recorded_stage and (takes_steps or stages[-1:] != [record]):
            self._config.trained_stages = [*stages, record]
        self._has_recorded_stage = True

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], dict[str, int | torch.Tensor]]:
        """The micro-batches of an optimiser step, and the positions in them that each loss is a mean over, by name."""
        begun = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        self._stopwatch.waited += time.perf_counter() - begun
        for module in getattr(self._base_model, "training_modules", {}).values():
            if hasattr(module, "set_step"):  # whose random numbers follow from it, whatever else draws some
                module.set_step(self.state.global_step)
        counts = dict.fromkeys(self._objectives, 0)
        for batch in batches:
            if "supervised_positions" not in batch:  # from a collator of the user's own
                columns = ("labels", *(c for objective in self._objectives.values() for c in objective.columns))
                if missing := [column for column in columns if column not in batch]:
                    raise ValueError(
                        f"`data_collator` makes batches of {', '.join(batch)}; the objectives read "
                        f"{', '.join(missing)}, too. Let it add them."
                    )
                labels = replace_placeholders(batch["labels"], self._config, token_id=-100)
                batch["supervised_positions"] = find_supervised_positions(
                    self._objectives, {**batch, "labels": labels}, self._config.image_token_id
                )
            if batch.pop("is_filler", False):
                ignore_all_positions(batch)
            if selects_tokens(self._config) and len(batch.get("pixel_values", ())):
                # Before the step: its losses are means over the image tokens that are kept.
                if "keep_mask" not in batch:
                    batch |= self._select_tokens(batch["pixel_values"].to(device))
                batch["supervised_positions"] = leave_out_dropped(
                    batch["supervised_positions"], batch["keep_mask"], self._objectives
                )
            for name, positions in batch["supervised_positions"]["by_objective"].items():
                counts[name] += len(positions)
        self._num_positions = counts
        if self.accelerator.num_processes > 1:
            # Whole numbers: FSDP casts what has a point, and bf16 counts to 256.
            votes = int(self._stop_signals.received)
            *total, self._stop_votes = self.accelerator.reduce(
                torch.tensor([*counts.values(), votes], device=device), "sum"
            )
            self._num_positions = dict(zip(counts, total, strict=True))
            if self.args.average_tokens_across_devices:
                counts = self._num_positions
        return batches, counts

    def _select_tokens(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "The visual tokenizer selects image tokens before a step, and here its weights are sharded. Write the "
                "codes once, `dataset.map(tokenize_images(...))`, and train on what that returns."
            )
        with self.compute_loss_context_manager():
            keep_mask, patch_features = self._base_model.model.select_tokens(pixel_values)
        # A tower that learns has to run in the step.
        return {"keep_mask": keep_mask} | ({} if self._tower_learns() else {"patch_features": patch_features})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, int | torch.Tensor] | torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, VWLMMCausalLMOutputWithPast]:
        """See `Trainer.compute_loss`. In training `num_items_in_batch` are the counts of `get_batch_samples`."""
        if inputs.pop("is_filler", False):  # of an evaluation
            ignore_all_positions(inputs)
        means = self._means["train" if self.model.training else "eval"]
        means.add_batch(inputs["input_ids"].numel(), count_padding(inputs), count_images_of_batch(inputs))
        self._has_seen_images |= self.model.training and len(inputs.get("pixel_values", ())) > 0
        if isinstance(self.data_collator, VWLMMDataCollator):
            # It pads on the right, which no position before sees. Without a mask attention is cheaper, and the host
            # need not look into it.
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        self._base_model.encode_no_images = self._encode_no_images  # in this call, and in none of the user's own
        try:
            outputs = self._run_model(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._base_model.encode_no_images = None
        loss = outputs.loss
        if isinstance(num_items_in_batch, Mapping):
            if self.args.average_tokens_across_devices:
                # Gradients are averaged over processes, and each process has divided by the positions of all.
                loss = loss * self.accelerator.num_processes
            self._watch_loss(loss, outputs.losses)
        means.add_terms(outputs.terms)
        return (loss, outputs) if return_outputs else loss

    def _run_model(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool,
        num_items_in_batch: Mapping[str, int | torch.Tensor] | torch.Tensor | int | None,
    ) -> VWLMMCausalLMOutputWithPast:
        return model(
            **inputs,
            # Logits for a caller who asks for outputs, else for no position at all.
            logits_to_keep=0 if return_outputs else torch.empty(0, dtype=torch.long),
            visual_objective=self.args.get_visual_objective(),
            visual_loss_weight=self.args.visual_loss_weight,
            # What evaluation counts are positions of text alone.
            num_items_in_batch=num_items_in_batch if isinstance(num_items_in_batch, Mapping) else None,
            use_cache=False,
            past_key_values=None if return_outputs else self._make_no_cache(inputs),
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        # Private: the one place that knows the norm before the weights change.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:  # whose engine keeps gradients to itself
            steps = self.state.logging_steps
            if self.args.logging_strategy != "steps" or not (self.state.global_step + 1) % max(steps, 1):
                self._grad_norms = measure_gradient_norms(model, grad_norm)
        return grad_norm

    @property
    def _name(self) -> str:
        return PAPERS[self.args.method].name  # in TRL's model card

    @property
    def _paper(self) -> dict[str, str]:
        paper = PAPERS[self.args.method]
        arxiv_id = paper.url.partition("arxiv.org/abs/")[2]
        return {"title": paper.title, "id": arxiv_id} if arxiv_id else {}

    def _make_no_cache(self, inputs: dict[str, Any]) -> NoCache | None:
        # A layer with checkpointed activations refuses any cache with a warning, and some layers keep other states.
        is_plain = "attention_mask" not in inputs and "position_ids" not in inputs
        is_attention = reads_packed_rows(self._base_model.get_decoder())
        # Not by `is_gradient_checkpointing`, which is deprecated, nor by what replaces it, which 5.19 does not know.
        checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in self._base_model.modules())
        return NoCache() if is_plain and is_attention and not checkpoints else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`. In training it adds the mean of each loss and metric since the last."""
        if self.model.training and (means := self._means["train"].pop()):
            logs |= self._stopwatch.pop(self.state, means.pop("num_tokens"), means.pop("num_images"))
            logs |= means | {name: norm.item() for name, norm in self._grad_norms.items()}
            logs |= {"memory_gib": measure_memory(self.args.device), "total_flos": self.state.total_flos}
            if self._num_skipped_samples is not None:
                logs["skipped_samples"] = self._num_skipped_samples
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        See `Trainer.evaluation_loop`. The metrics have the mean of each loss and metric over all of its positions, and
        `loss` is their weighted sum: no batch counts for more than its positions. A stage without a language loss
        makes no predictions, for it runs the decoder no further than the last image.
        """
        if "language" not in self._objectives:
            prediction_loss_only = True
        self._means["eval"] = PositionMeans(self._weights)  # whatever an evaluation that failed has left
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means = self._means["eval"].pop()
        means.pop("num_tokens", None), means.pop("num_images", None)
        if f"{metric_key_prefix}_loss" in output.metrics and means:
            means["loss"] = sum(weight * means.get(f"{name}_loss", 0.0) for name, weight in self._weights.items())
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **metadata: Any,
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


class UntrainedParameters(TrainerCallback):
    """Names what trains and has got no gradient, in the first step with an image. DeepSpeed shows no gradients."""

    def __init__(self, trainer: VWLMMTrainer) -> None:
        self.trainer = trainer
        self.has_looked = trainer.is_deepspeed_enabled

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_pre_optimizer_step`."""
        if self.has_looked or not self.trainer._has_seen_images:
            return
        self.has_looked = True
        parameters = self.trainer.model.named_parameters()
        untrained = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if untrained:
            shown = ", ".join(untrained[:3]) + (f" and {len(untrained) - 3} more" if len(untrained) > 3 else "")
            logger.warning(
                f"{shown} shall train, and no loss of this run depends on them: they stay as they are. Leave them "
                "out, with PEFT of `target_modules` and `modules_to_save`."
            )


def set_learning_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Moves parameters into groups of their own, with a learning rate of their own."""
    moved = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in moved]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
            optimizer.add_param_group({**group, "params": own, "lr": rate})


def ignore_all_positions(batch: dict[str, Any]) -> None:
    """Leaves no position of a batch supervised, and counts all as padding."""
    positions = batch["supervised_positions"]
    positions["by_objective"] = {name: indices[:0] for name, indices in positions["by_objective"].items()}
    positions["num_padding"] = batch["input_ids"].numel()


def count_padding(batch: dict[str, Any]) -> int | torch.Tensor:
    """Positions of a batch that are padding, without a read of the device."""
    if "num_padding" in batch.get("supervised_positions", {}):
        return batch["supervised_positions"]["num_padding"]
    return (batch["attention_mask"] == 0).sum() if "attention_mask" in batch else 0


def count_images_of_batch(batch: dict[str, Any]) -> int | torch.Tensor:
    """Images of a batch, each of which may have several rows of `pixel_values`, without a read of the device."""
    if "patch_boxes" in batch:
        return find_snapshots(batch["patch_boxes"]).sum()
    return len(batch.get("pixel_values", ()))


def load_model_and_processor(
    name_or_path: str,
    processing_class: ProcessorMixin | None,
    model_init_kwargs: Mapping[str, Any],
    quantization_config: Any,
) -> tuple[VWLMMForConditionalGeneration, ProcessorMixin]:
    """The model of a checkpoint, in fp32 unless it says otherwise, and the processor from the same place."""
    model_init_kwargs = dict(model_init_kwargs)
    if quantization_config is not None:
        if "quantization_config" in model_init_kwargs:
            raise ValueError(
                "`quantization_config` is passed to the trainer and in `model_init_kwargs`. Leave it out of one."
            )
        model_init_kwargs["quantization_config"] = quantization_config
    model = VWLMMForConditionalGeneration.from_pretrained(
        name_or_path, **{"dtype": torch.float32, **model_init_kwargs}
    )
    if processing_class is None:
        source = {name: value for name, value in model_init_kwargs.items() if name in SOURCE_OPTIONS}
        processing_class = VWLMMProcessor.from_pretrained(name_or_path, **source)
    return model, processing_class


def read_chat_template(args: VWLMMTrainingArguments, processing_class: ProcessorMixin) -> str:
    """The template that `args.chat_template` names, or is."""
    is_jinja = "{" in args.chat_template
    template = args.chat_template if is_jinja else processing_class.get_chat_template(args.chat_template)
    if args.assistant_only_loss:
        check_generation_markers(template, "`chat_template`")
    return template


def check_generation_markers(template: str | dict[str, str], name: str) -> None:
    """Raises `ValueError` if a template does not say what the assistant's part of a prompt is."""
    if not has_generation_markers(template):
        raise ValueError(
            f"{name} has no `{{% generation %}}` tags, which say what the assistant's part of a prompt is. Enclose "
            "the answer and the token that closes it in `{% generation %}` and `{% endgeneration %}`, set "
            "`chat_template='vicuna_v1'` or another that has them, or `assistant_only_loss=False` to learn the whole "
            "prompt."
        )


def warn_about_untrained_modules(config: VWLMMConfig, args: VWLMMTrainingArguments) -> None:
    """Warns about modules that a stage relies on and that no stage has trained."""
    stages, trained_stages = METHODS[args.method], config.trained_stages
    stage = stages[args.stage]
    if args.method == "vw-lmm" and args.stage == 3 and 3 not in trained_stages:
        logger.warning("Stage 3: the VM head has never been trained. It starts from random weights, as in the paper.")
    missing = [number for number in stage.builds_on if record_name(args.method, number) not in trained_stages]
    objectives, _ = args.get_objectives()
    learns_visual_words = any(objective.reads_visual_words for objective in objectives.values())
    reads_vm_head = learns_visual_words or config.use_pseudo_image_features
    if not reads_vm_head and 3 in missing:
        missing.remove(3)
    for number in missing:
        logger.warning(
            f"Stage {args.stage} ({stage.name}) builds on stage {number} ({stages[number].name}), which has not run "
            f"on these weights: {', '.join(stages[number].trains)} may never have been trained. Run stage {number} "
            f"first, or start from a checkpoint whose config.json lists it under `trained_stages`."
        )

# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What the trainer refuses before it begins."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import ProcessorMixin
from transformers.utils import logging

from ..adapters_vwlmm import get_max_patches
from ..configuration_vwlmm import VISUAL_WORD_FIELDS, VWLMMConfig
from ..objectives_vwlmm import Objective
from .answers import find_answers, name_sample
from .arguments import VWLMMTrainingArguments
from .sampling import count_images, has_image_column
from .stages import DECODER, METHODS, MODULES


if TYPE_CHECKING:
    from peft import PeftConfig  # an optional dependency


logger = logging.get_logger(__name__)


def all_datasets(datasets: Any) -> list[Dataset | IterableDataset]:
    """The datasets of what a trainer takes as one, none, or several by name."""
    return [] if datasets is None else list(datasets.values()) if isinstance(datasets, dict) else [datasets]


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
    if args.packing and args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "`packing` puts samples of unlike length together, `train_sampling_strategy='group_by_length'` those of "
            "like length. Leave one of them out."
        )
    if args.packing_strategy != "bfd" and (args.packing or args.eval_packing):
        raise ValueError(
            f"`packing_strategy` is {args.packing_strategy!r}, and samples with images are packed by best fit alone, "
            "'bfd', which cuts none. Leave it out."
        )
    if args.shuffle_dataset and args.train_sampling_strategy == "sequential":
        raise ValueError(
            "`shuffle_dataset` is set, and `train_sampling_strategy='sequential'` keeps the order of the dataset. "
            "Leave both out: 'random' shuffles anew in every epoch."
        )
    parallelism = args.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "`parallelism_config` shares one sequence among processes (`cp_size` or `sp_size`), where no process has "
            "all positions that the losses read. Leave both at 1; FSDP and ZeRO share weights."
        )
    if (args.packing or args.eval_packing) and args.max_length is None:
        raise ValueError("`packing` fills rows of `max_length` tokens, which is None. Set it.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs, and would cut batches into parts that images do not follow. Start "
            "one process for each with `accelerate launch` or `torchrun`, or show it one with `CUDA_VISIBLE_DEVICES`."
        )
    objectives, _ = args.get_objectives()
    if "language" not in objectives and kwargs.get("compute_metrics") is not None:
        raise ValueError(f"`compute_metrics` is set, and stage {args.stage} computes no logits of text. Leave it out.")
    if uses_peft and args.trains is not None:
        raise ValueError(
            f"`trains` is {args.trains}, and PEFT says itself what trains. Name whole modules in `modules_to_save` of "
            "its config, or leave one of the two out."
        )
    if uses_peft and DECODER not in args.get_trained_modules():
        stages = " and ".join(str(n) for n, stage in METHODS[args.method].items() if DECODER in stage.trains)
        raise ValueError(
            f"Stage {args.stage} trains {', '.join(args.get_trained_modules())} alone, which PEFT would freeze. Use "
            f"PEFT where the decoder trains, in stage {stages}, or leave `peft_config` out."
        )


def check_form(dataset: Dataset | IterableDataset, args: VWLMMTrainingArguments) -> None:
    """Refuses samples, of which it looks at the first, that would be read otherwise than they are meant."""
    sample = next(iter(dataset), None) or {}
    columns, prompt = ", ".join(sample), sample.get("prompt")
    has_images = "images" in sample or "image" in sample
    texts = [sample[name] for name in ("messages", "prompt", "completion") if isinstance(sample.get(name), list)]
    messages = [message for text in texts for message in text]
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    if not has_images and any(part.get("type") == "image" for part in parts):
        raise ValueError(
            f"The dataset has {columns}, and images inside of its messages. Put the images of each sample into a "
            'column `images`, in the order of the parts of type "image", which then say where they stand.'
        )
    if has_images and isinstance(prompt, list) and any(message["role"] == "assistant" for message in prompt):
        raise ValueError(
            "A `prompt` has answers of its own, and only the `completion` would be learned. Make one column "
            "`messages` of both, where every answer is learned, or leave the earlier answers out."
        )
    if "prompt" in sample and not {"completion", "messages", args.dataset_text_field} & sample.keys():
        raise ValueError(
            f"The dataset has {columns}, and a `prompt` without `completion` has no answer. Add the column, or put "
            "the conversation with its answers into `messages`."
        )
    if args.assistant_only_loss and sample and not messages:
        raise ValueError(
            f"The dataset has {columns}, and no conversation that says what the assistant's part is. Give it "
            "`messages`, or `prompt` and `completion` that are lists of messages; with `assistant_only_loss=False` "
            "all of a text is learned."
        )


def check_answers(dataset: Dataset | IterableDataset, args: VWLMMTrainingArguments, is_trained: bool) -> None:
    """
    Refuses samples without an answer where answers alone are learned, before a step that would meet one, and names
    empty answers that are trained.
    """
    objectives, _ = args.get_objectives()
    if not isinstance(dataset, Dataset) or not args.assistant_only_loss or "language" not in objectives:
        return
    without, empty = find_answers(dataset)
    if without and ([*objectives] == ["language"] or not has_image_column(dataset)):
        raise ValueError(
            f"{len(without)} of {len(dataset)} samples have no answer, the first of them "
            f"{name_sample(dataset, without)!r}, and this run learns answers alone. Leave them out, or train them, if "
            "they have images, in a stage with an objective that learns from these, such as `visual_words`."
        )
    if empty and is_trained:
        logger.warning(
            f"{len(empty)} of {len(dataset)} samples have an empty answer, the first of them "
            f"{name_sample(dataset, empty)!r}: they teach to end without a word. Leave them out if that is not meant."
        )


def check_stream_options(args: VWLMMTrainingArguments) -> None:
    """Refuses, or names, what streamed training data cannot follow."""
    ignored = {
        "train_sampling_strategy": args.train_sampling_strategy != "random",
        "length_column_name": args.length_column_name != "length",
    }
    for name, is_set in ignored.items():
        if is_set:
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, and the training data are streamed: they come in their own "
                "order, and nothing is known of a sample before it is read. Leave it out, or load the data without "
                "`streaming`. `IterableDataset.shuffle` draws from a buffer."
            )
    if args.dataloader_num_workers > 1 and not args.dataloader_in_order:
        raise ValueError(
            "`dataloader_in_order` is off, and the training data are streamed: which sample comes in which step would "
            "be left to chance. Leave it on."
        )
    if args.num_train_epochs != 1:
        logger.warning(
            f"`num_train_epochs` is {args.num_train_epochs}, and the training data are streamed: `max_steps`, "
            f"{args.max_steps}, says how long they train, in as many passes over the data as that takes."
        )


def restrict_all_linear(peft_config: "PeftConfig", model: nn.Module, modules: Sequence[str]) -> "PeftConfig":
    """
    A copy of a PEFT config whose `target_modules="all-linear"` are those of the modules that a stage trains.

    Args:
        peft_config (`PeftConfig`): The config. One that names its target modules stays as it is.
        model (`nn.Module`): The model.
        modules (`Sequence[str]`): Paths of the modules that the stage trains.
    """
    if getattr(peft_config, "target_modules", None) != "all-linear":
        return peft_config
    trained = tuple(f"{module}." for module in modules)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    left_out = [name for name in linear if not f"{name}.".startswith(trained)]
    logger.warning(
        f"`target_modules='all-linear'` takes those of {', '.join(modules)}, which the stage trains, and leaves out "
        f"the {len(left_out)} linear layers of other modules. Name the modules to have adapters elsewhere, too."
    )
    excluded = peft_config.exclude_modules
    if isinstance(excluded, str):
        excluded = "|".join([f"(?:{excluded})", *map(re.escape, left_out)])
    else:
        excluded = [*(excluded or ()), *left_out]
    return replace(peft_config, exclude_modules=excluded)


def warn_about_config_of_adapter(config: VWLMMConfig) -> None:
    """Names what a model has been set to and the folder of a PEFT adapter, which has no config, does not say."""
    defaults = VWLMMConfig()
    fields = [name for name in VISUAL_WORD_FIELDS if getattr(config, name) != getattr(defaults, name)]
    changed = [f"{name}={getattr(config, name)}" for name in fields]
    if changed:
        logger.warning(
            f"The folder of an adapter has no config.json: {', '.join(changed)} will be there again if that of the "
            f"base, {config.name_or_path!r}, says so. If not, set them on `config` of what you load or merge."
        )


def warn_about_unread_temperatures(config: VWLMMConfig, args: VWLMMTrainingArguments) -> None:
    """Names temperatures that a model has been set to and that nothing in a stage reads."""
    objectives, _ = args.get_objectives()
    if config.visual_word_temperature != 1 and not any(o.reads_visual_words for o in objectives.values()):
        logger.warning(
            f"`visual_word_temperature` is {config.visual_word_temperature}, and this run learns no visual words, but "
            f"{', '.join(objectives)}: it does nothing here, and stays in the config."
        )
    if config.pseudo_image_feature_temperature != 1 and not config.use_pseudo_image_features:
        logger.warning(
            f"`pseudo_image_feature_temperature` is {config.pseudo_image_feature_temperature}, and the model reads no "
            "pseudo image features: it does nothing until `use_pseudo_image_features` is set."
        )


def check_trained_modules(args: VWLMMTrainingArguments, use_pseudo_image_features: bool) -> None:
    """Raises if a module that trains can learn from none of the objectives."""
    objectives, _ = args.get_objectives()
    taught = {module for objective in objectives.values() for module in objective.teaches}
    if use_pseudo_image_features and "decoder" in taught:
        taught.add("vm_head")  # it makes what the decoder reads
    for module, path in MODULES.items():
        if path in args.get_trained_modules() and module not in taught:
            raise ValueError(
                f"Stage {args.stage} trains {path}, which learns nothing from {', '.join(objectives)}: it would stay "
                f"as it is. Leave `{module}` out of `trains`, or choose a `visual_objective` that teaches it."
            )


def check_taught_modules(model: nn.Module, objectives: Mapping[str, Objective]) -> None:
    """Raises if an objective that has to teach a module of the model teaches frozen ones alone."""
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, objective in objectives.items():
        teaches = objective.teaches
        is_taught = any(parameter.startswith(f"{MODULES[module]}.") for module in teaches for parameter in learning)
        if objective.must_teach and not is_taught:
            raise ValueError(
                f"The objective `{name}` teaches {' and '.join(teaches)}, and all of that is frozen: nothing would "
                "learn from it but what it trains beside the model. Name one of them in `trains` (with PEFT in "
                "`modules_to_save`), or leave the objective out of this stage."
            )


def check_processor(processor: ProcessorMixin, config: VWLMMConfig) -> None:
    """Raises unless processor and model agree on the image placeholder, how many an image has, and on its patches."""
    if processor.image_token_id != config.image_token_id:
        raise ValueError(
            f"The processor's image placeholder has id {processor.image_token_id}, the model expects "
            f"{config.image_token_id}. Use the processor that was saved with the model, or build the model with "
            "`image_token_index=processor.image_token_id`."
        )
    if processor.vision_feature_select_strategy != config.vision_feature_select_strategy:
        raise ValueError(
            f"The processor has vision_feature_select_strategy={processor.vision_feature_select_strategy!r}, the "
            f"model {config.vision_feature_select_strategy!r}: they count different numbers of image tokens. Use the "
            "processor that was saved with the model."
        )
    found, expected = getattr(processor, "max_patches", None), get_max_patches(config)
    if found != expected:
        raise ValueError(
            f"The processor has max_patches={found}, and the model, whose adapter is {config.adapter!r}, expects "
            f"{expected}. Set `processor.max_patches = {expected}`"
            + (", or `adapter_config={'max_patches': " + f"{found}}}` of the model." if expected and found else ".")
        )


def check_max_length(dataset: Any, max_length: int | None, image_seq_length: int) -> None:
    """Raises if the images of a sample alone are longer than `max_length` tokens."""
    if max_length is None or not isinstance(dataset, Dataset) or not has_image_column(dataset):
        return
    num_images = count_images(dataset)
    most = max(num_images, default=0)
    if most * image_seq_length >= max_length:
        index = int(num_images.argmax())
        name = dataset["id"][index] if "id" in dataset.column_names else index
        raise ValueError(
            f"`max_length` is {max_length}, which would cut image tokens: sample {name!r} has {most} images of "
            f"{image_seq_length} tokens each. Set `max_length` above {most * image_seq_length} plus the text, or to "
            "None."
        )

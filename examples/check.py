# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""A dry run: what a recipe makes of its data, found by the real collator, without weights and without training."""

import json
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig, get_peft_config

from modeling_vwlmm import (
    VWLMMConfig,
    VWLMMForConditionalGeneration,
    VWLMMTrainingArguments,
    VWLMMVisualTokenizer,
    VWLMMVisualTokenizerConfig,
)
from modeling_vwlmm.training.answers import find_answers, name_sample
from modeling_vwlmm.training.arguments import StageDefault
from modeling_vwlmm.training.checks import restrict_all_linear
from modeling_vwlmm.training.collating import VWLMMDataCollator
from modeling_vwlmm.training.data_order import RandomOrderSampler
from modeling_vwlmm.training.packing import pack_rows
from modeling_vwlmm.training.sampling import ModalityLengthGroupedSampler, estimate_lengths
from modeling_vwlmm.training.stages import set_trainable_parameters
from modeling_vwlmm.training.trainer import read_chat_template
from modeling_vwlmm.training.training_modules import attach_training_modules
from processing_vwlmm import VWLMMProcessor, load_llava_dataset
from processing_vwlmm.cognition_alignment import KINDS
from processing_vwlmm.llava_dataset import FEATURES, find_rejected, read_records
from processing_vwlmm.transforms import get_transform


BAR = 40  # characters of the longest bar


class CheckingReader:
    """Reads data as `load_llava_dataset` does, and counts by reason what that would refuse or leave out."""

    def __init__(self) -> None:
        self.refused: dict[str, list[str]] = defaultdict(list)
        self.skipped: dict[str, list[str]] = defaultdict(list)

    def __call__(self, json_file: str, image_folder: str, on_bad_image: str) -> Dataset:
        """The samples that are left."""
        rejected = find_rejected(json_file, image_folder)
        for name, reason, can_be_skipped in rejected.values():
            (self.skipped if can_be_skipped and on_bad_image == "skip" else self.refused)[reason].append(name)
        if not rejected:
            return load_llava_dataset(json_file, image_folder, on_bad_image)
        records = [record for index, record in enumerate(read_records(json_file)) if index not in rejected]
        if not records:
            return Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, Path(json_file).name)
            file.write_text(json.dumps(records))
            return load_llava_dataset(file, image_folder, on_bad_image)


class AddedAnswers:
    """Tokens of the answers on pixels and codebook indices that cognition alignment has added to conversations."""

    def __init__(self, dataset: Dataset, processor: VWLMMProcessor) -> None:
        self.transform = get_transform(dataset)
        self.files = dataset.with_format(None)  # without what is added
        self.tokenizer = processor.tokenizer
        self.lengths: dict[str, list[int]] = {kind: [] for kind in KINDS}

    def count(self, index: int, sample: dict) -> None:
        """Counts the answer that was added to a sample."""
        if not hasattr(self.transform, "find_added"):
            return
        for kind, place in self.transform.find_added(self.files[index], sample):
            content = sample["messages"][place]["content"]
            text = content if isinstance(content, str) else content[0]["text"]
            self.lengths[kind].append(len(self.tokenizer(text, add_special_tokens=False).input_ids))

    def print(self, num_supervised: int) -> None:
        """Prints what they cost, of so many supervised tokens of all samples."""
        for kind, lengths in self.lengths.items():
            if lengths:
                print(
                    f"{kind} questions added: {len(lengths)}, {np.mean(lengths):.1f} tokens an answer, "
                    f"{sum(lengths) / max(num_supervised, 1):.1%} of the supervised tokens"
                )


def check(
    dataset: Dataset,
    args: VWLMMTrainingArguments,
    processor: VWLMMProcessor,
    model: VWLMMForConditionalGeneration,
    model_args: ModelConfig,
    reader: CheckingReader,
    num_processes: int = 1,
    tflops: float | None = None,
) -> int:
    """
    Prints what training on `dataset` would meet. The weights of `model` are counted, not read: they may be on `meta`.

    Returns:
        How many samples would stop the run.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError("The data are streamed, and nothing of them was checked: load them without `streaming`.")
    config = model.config
    global_batch_size = _get_global_batch_size(args, num_processes)
    collator = VWLMMDataCollator(
        processor,
        max_length=args.max_length,
        assistant_only_loss=args.assistant_only_loss,
        objectives={} if args.trains_tokenizer else args.get_objectives()[0],  # it learns from images alone
        image_seq_length=config.num_patches if args.trains_tokenizer else config.image_seq_length,
    )
    if args.chat_template is not None:
        collator.chat_template = read_chat_template(args, processor)
    num_bytes, model = _count_bytes(args, model, model_args)  # refuses what does not fit, before samples are read
    lengths, num_images, refused = [], [], reader.refused
    added, num_supervised = AddedAnswers(dataset, processor), 0
    num_rejected = sum(map(len, [*refused.values(), *reader.skipped.values()]))
    begun = time.perf_counter()
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
            batch = collator([sample])
        except (ValueError, OSError) as error:
            name = name_sample(dataset, [index])
            refused[str(error).replace(f"Sample {name!r}: ", "")].append(name)
        else:
            lengths.append(int(batch["attention_mask"].sum()))
            num_images.append(len(sample["images"] or []))
            num_supervised += int((batch["labels"] != -100).sum())
            added.count(index, sample)
    rate = len(dataset) / (time.perf_counter() - begun)
    num_refused = sum(map(len, refused.values()))
    print(f"{len(dataset) + num_rejected} samples, {num_refused} would stop the run")
    _print_reasons(refused)
    if reader.skipped:
        print(f"{sum(map(len, reader.skipped.values()))} would be skipped")
        _print_reasons(reader.skipped)
    _, empty = find_answers(dataset)
    if empty and args.assistant_only_loss and "language" in collator.objectives:
        first = name_sample(dataset, empty)
        print(f"{len(empty)} have an empty answer, which teaches to end without a word, the first of them {first!r}")
    if lengths:
        edges = np.unique(np.linspace(min(lengths), max(lengths) + 1, 9).astype(int))
        counts, edges = np.histogram(lengths, edges)
        pairs = zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True)
        _print_bars("tokens", {f"{low}-{high}": n for (low, high), n in zip(pairs, counts.tolist(), strict=True)})
        _print_bars("images", dict(sorted(Counter(num_images).items())))
        added.print(num_supervised)
        if args.max_length is not None:
            print(f"{sum(n >= args.max_length for n in lengths)} samples have {args.max_length} tokens, or were cut")
    print(
        f"memory of weights, gradients and AdamW's states, unsharded: {num_bytes / 1e9:.3f} GB (activations are not "
        "counted)"
    )
    if not num_refused and lengths:
        num_tokens, num_passes = _print_steps(dataset, args, lengths, config, global_batch_size)
        num_workers = max(args.dataloader_num_workers, 1) * num_processes
        hours = len(lengths) * num_passes / rate / num_workers / 3600
        print(f"reading: {rate:.1f} samples/s here and in one process; {hours:.3g} h by {num_workers} of them")
        # As Transformers counts `total_flos`.
        flops = 6 * num_tokens * num_passes * model.num_parameters(exclude_embeddings=True)
        print(f"FLOPs of the run: {flops:.3e}")
        if tflops is None:
            print("time: without `--tflops` of a device only FLOPs and reading are estimated")
        else:
            hours = flops / (tflops * 1e12 * num_processes) / 3600
            print(f"time: {hours:.3g} h at {tflops:g} TFLOP/s on each of {num_processes} devices")
    return num_refused


def _get_global_batch_size(args: VWLMMTrainingArguments, num_processes: int) -> int:
    micro_step = args.per_device_train_batch_size * num_processes
    if not isinstance(args.gradient_accumulation_steps, StageDefault):  # given, and the global batch follows from it
        return micro_step * args.gradient_accumulation_steps
    if args.global_batch_size % micro_step:
        raise ValueError(
            f"`global_batch_size` is {args.global_batch_size}, not a multiple of the {micro_step} samples that "
            f"{num_processes} processes take together."
        )
    return args.global_batch_size


def _print_reasons(names_by_reason: dict[str, list[str]]) -> None:
    for reason, names in names_by_reason.items():
        print(f"  {len(names)}: {reason} ({', '.join(map(repr, names[:3]))})")


def _print_bars(title: str, counts: dict[object, int]) -> None:
    print(f"{title} of a sample:")
    for name, count in counts.items():
        print(f"  {name!s:>12} {count:>8} {'#' * math.ceil(BAR * count / max(counts.values()))}")


def _print_steps(
    dataset: Dataset, args: VWLMMTrainingArguments, lengths: Sequence[int], config: VWLMMConfig, global_batch_size: int
) -> tuple[int, float]:
    """Returns the tokens of the first epoch's batches, padding included, and how many epochs there are."""
    seed = args.seed if args.data_seed is None else args.data_seed
    if args.packing:
        way, order = "packed", pack_rows(lengths, args.max_length, seed)
        sizes = [sum(lengths[sample] for sample in row) for row in order]
    else:
        if args.train_sampling_strategy == "group_by_length":
            estimated = estimate_lengths(dataset, config.image_seq_length)
            way, sampler = "grouped", ModalityLengthGroupedSampler(global_batch_size, *estimated, seed)
        else:
            way, sampler = "plain", RandomOrderSampler(len(dataset), seed)
        sizes = [lengths[sample] for sample in sampler]
    width = args.per_device_train_batch_size
    batches = [sizes[start : start + width] for start in range(0, len(sizes), width)]
    multiple = args.pad_to_multiple_of or 1
    places = sum(math.ceil(max(batch) / multiple) * multiple * len(batch) for batch in batches)
    print(f"padding of the first epoch's batches ({way}): {1 - sum(sizes) / places:.1%}")
    round_steps = math.floor if args.dataloader_drop_last else math.ceil
    steps_of_epoch = round_steps(len(sizes) / global_batch_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_of_epoch * args.num_train_epochs)
    print(f"optimizer steps: {steps}")
    return places, steps / max(steps_of_epoch, 1)


def make_model(
    name: str | None, vision_tower: str, language_model: str, image_token_id: int, **config: Any
) -> PreTrainedModel:
    """The model that a recipe starts from, without weights. `config` are other fields of its config."""
    with torch.device("meta"):
        if name is not None:
            return VWLMMForConditionalGeneration(VWLMMConfig.from_pretrained(name, **config))
        vision_config = AutoConfig.from_pretrained(vision_tower)
        vision = AutoModel.from_config(getattr(vision_config, "vision_config", vision_config))
        text = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(language_model))
        return VWLMMForConditionalGeneration.from_vision_text_pretrained(
            vision, text, image_token_index=image_token_id, **config
        )


def make_tokenizer(name: str | None, vision_tower: str, fields: dict[str, Any]) -> VWLMMVisualTokenizer:
    """The visual tokenizer that stage 1 of LaVIT starts from, without weights."""
    with torch.device("meta"):
        if name is not None:
            return VWLMMVisualTokenizer(VWLMMVisualTokenizerConfig.from_pretrained(name))
        config = AutoConfig.from_pretrained(vision_tower)
        config = getattr(config, "vision_config", config)
        config.name_or_path = vision_tower
        return VWLMMVisualTokenizer.from_vision_pretrained(AutoModel.from_config(config), **fields)


def make_model_with_tokenizer(
    visual_tokenizer: str, language_model: str, **config: Any
) -> VWLMMForConditionalGeneration:
    """The model that stage 2 of LaVIT starts from, without weights. `config` are other fields of its config."""
    with torch.device("meta"):
        tokenizer = VWLMMVisualTokenizer(VWLMMVisualTokenizerConfig.from_pretrained(visual_tokenizer))
        text = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(language_model))
        return VWLMMForConditionalGeneration.from_visual_tokenizer(tokenizer, text, **config)


def _count_bytes(
    args: VWLMMTrainingArguments, model: VWLMMForConditionalGeneration, model_args: ModelConfig
) -> tuple[float, PreTrainedModel]:
    """Returns bytes, and the model with what is trained beside or in place of its weights."""
    dtype = model_args.dtype or "float32"
    model.to(getattr(torch, dtype) if dtype != "auto" else model.config.dtype or torch.float32)
    peft_config = get_peft_config(model_args)
    bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None
    # Adapter and heads stay whole. Beside 64 weights of 4 bits stands a scale, and beside a row of 8 bits.
    narrow = {}
    for path in ("language_model", "vision_tower") if bits else ():
        for module in model.model.get_submodule(path).modules():
            if isinstance(module, nn.Linear):
                group = 64 if bits == 4 else module.in_features
                narrow[id(module.weight)] = bits / 8 + 4 / group
    with torch.device("meta"):
        if args.trains_tokenizer:
            model.requires_grad_(True).freeze_encoders()
            trained = model
        elif peft_config is None:
            set_trainable_parameters(model, args.get_trained_modules())
            trained = model
        else:
            peft_config = restrict_all_linear(peft_config, model, args.get_trained_modules())
            trained = get_peft_model(model, peft_config)
        attach_training_modules(model, args.get_objectives()[0])
    num_bytes = 0.0
    for parameter in trained.parameters():
        size = narrow.get(id(parameter), parameter.element_size())
        # Of what trains also the gradient and two moments.
        num_bytes += parameter.numel() * size * (4 if parameter.requires_grad else 1)
    return num_bytes, model

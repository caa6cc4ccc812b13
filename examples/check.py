# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""A dry run: what a recipe makes of its data, found by the real collator, without weights and without training."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration, VWLMMTrainingArguments
from modeling_vwlmm.training.collating import VWLMMDataCollator
from modeling_vwlmm.training.data_order import RandomOrderSampler
from modeling_vwlmm.training.packing import pack_rows
from modeling_vwlmm.training.sampling import ModalityLengthGroupedSampler, estimate_lengths
from modeling_vwlmm.training.stages import set_trainable_parameters
from modeling_vwlmm.training.trainer import read_chat_template
from processing_vwlmm import VWLMMProcessor


BAR = 40  # characters of the longest bar


def check(
    dataset: Dataset, args: VWLMMTrainingArguments, processor: VWLMMProcessor, model: VWLMMForConditionalGeneration
) -> int:
    """
    Prints what training on `dataset` would meet. The weights of `model` are counted, not read: they may be on `meta`.

    Returns:
        How many samples would stop the run.
    """
    config = model.config
    collator = VWLMMDataCollator(
        processor,
        max_length=args.max_length,
        assistant_only_loss=args.assistant_only_loss,
        objectives=args.get_objectives()[0],
        image_seq_length=config.image_seq_length,
    )
    if args.chat_template is not None:
        collator.chat_template = read_chat_template(args, processor)
    lengths, num_images, refused = [], [], defaultdict(list)
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
            batch = collator([sample])
        except (ValueError, OSError) as error:
            name = dataset.select_columns("id")[index]["id"] if "id" in dataset.column_names else index
            refused[str(error).replace(f"Sample {name!r}: ", "")].append(name)
        else:
            lengths.append(int(batch["attention_mask"].sum()))
            num_images.append(len(sample["images"] or []))
    num_refused = sum(map(len, refused.values()))
    print(f"{len(dataset)} samples, {num_refused} would stop the run")
    for reason, names in refused.items():
        print(f"  {len(names)}: {reason} ({', '.join(map(repr, names[:3]))})")
    if lengths:
        edges = np.unique(np.linspace(min(lengths), max(lengths) + 1, 9).astype(int))
        counts, edges = np.histogram(lengths, edges)
        pairs = zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True)
        _print_bars("tokens", {f"{low}-{high}": n for (low, high), n in zip(pairs, counts.tolist(), strict=True)})
        _print_bars("images", dict(sorted(Counter(num_images).items())))
        if args.max_length is not None:
            print(f"{sum(n >= args.max_length for n in lengths)} samples have {args.max_length} tokens, or were cut")
    if not num_refused:
        _print_steps(dataset, args, lengths, config)
    print(f"memory of weights, gradients and AdamW's states: {_count_bytes(args, model) / 1e9:.3f} GB in fp32")
    print("time: not estimated")
    return num_refused


def _print_bars(title: str, counts: dict[object, int]) -> None:
    print(f"{title} of a sample:")
    for name, count in counts.items():
        print(f"  {name!s:>12} {count:>8} {'#' * math.ceil(BAR * count / max(counts.values()))}")


def _print_steps(dataset: Dataset, args: VWLMMTrainingArguments, lengths: Sequence[int], config: VWLMMConfig) -> None:
    seed = args.seed if args.data_seed is None else args.data_seed
    if args.packing:
        way, order = "packed", pack_rows(lengths, args.max_length, seed)
        sizes = [sum(lengths[sample] for sample in row) for row in order]
    else:
        if args.train_sampling_strategy == "group_by_length":
            estimated = estimate_lengths(dataset, config.image_seq_length)
            way, sampler = "grouped", ModalityLengthGroupedSampler(args.global_batch_size, *estimated, seed)
        else:
            way, sampler = "plain", RandomOrderSampler(len(dataset), seed)
        sizes = [lengths[sample] for sample in sampler]
    width = args.per_device_train_batch_size
    batches = [sizes[start : start + width] for start in range(0, len(sizes), width)]
    places = sum(max(batch) * len(batch) for batch in batches)
    print(f"padding of the first epoch's batches ({way}): {1 - sum(sizes) / places:.1%}")
    steps = math.ceil(len(sizes) / args.global_batch_size) * args.num_train_epochs
    print(f"optimizer steps: {args.max_steps if args.max_steps > 0 else math.ceil(steps)}")


def make_model(name: str | None, vision_tower: str, language_model: str, image_token_id: int) -> PreTrainedModel:
    """The model that a recipe starts from, without weights."""
    with torch.device("meta"):
        if name is not None:
            return VWLMMForConditionalGeneration(VWLMMConfig.from_pretrained(name))
        vision_config = AutoConfig.from_pretrained(vision_tower)
        vision = AutoModel.from_config(getattr(vision_config, "vision_config", vision_config))
        text = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(language_model))
        return VWLMMForConditionalGeneration.from_vision_text_pretrained(
            vision, text, image_token_index=image_token_id
        )


def _count_bytes(args: VWLMMTrainingArguments, model: VWLMMForConditionalGeneration) -> int:
    set_trainable_parameters(model.float(), args.get_trained_modules())
    # Of what trains also the gradient and two moments.
    return sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())

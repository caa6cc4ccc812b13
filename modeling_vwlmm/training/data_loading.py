# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Data loaders of a trainer: whose order any layout follows, and whose rows may be packed."""

from dataclasses import replace
from typing import Any

from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.utils import logging

from .collating import VWLMMDataCollator
from .data_order import FilledBatchCollator, FilledDataset, FullMicroStepSampler, GlobalStream, RandomOrderSampler
from .packing import PackedDataset, PackingSampler, count_tokens
from .sampling import ModalityLengthGroupedSampler, estimate_lengths, has_image_column


logger = logging.get_logger(__name__)


class LoadsInOrder:
    """The part of [`VWLMMTrainer`] that loads data."""

    def get_train_dataloader(self) -> DataLoader:
        """See `Trainer.get_train_dataloader`. With `packing` its batches are rows of samples."""
        samples = self.train_dataset
        if self.args.packing and isinstance(samples, Dataset):
            self.train_dataset = self._pack(samples)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = samples

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """See `Trainer.get_eval_dataloader`. Raises if the data lack a column that an objective reads."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            self.args.check_columns(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _pack(self, dataset: Dataset) -> PackedDataset:
        with self.args.main_process_first():
            lengths = count_tokens(
                dataset, self.data_collator, self.args.length_column_name, self.args.dataset_num_proc
            )
        sampler = PackingSampler(lengths, self.args.max_length, self._get_data_seed())
        logger.info(
            f"Packed {len(lengths)} samples into {len(sampler)} rows of {self.args.max_length} tokens, "
            f"{len(lengths) / max(len(sampler), 1):.1f} in each. Batch sizes count rows."
        )
        return PackedDataset(dataset, sampler)

    def _get_data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        # Private: Transformers has no public way to bring a sampler.
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, PackedDataset):
            return dataset.sampler
        if self.args.train_sampling_strategy == "random":
            return RandomOrderSampler(len(dataset), self._get_data_seed())
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        if has_image_column(dataset):
            lengths, has_images = estimate_lengths(dataset, self._config.image_seq_length)
        else:  # text, which TRL has made tokens of
            lengths, has_images = [len(ids) for ids in dataset["input_ids"]], [False] * len(dataset)
        if self.args.length_column_name in dataset.column_names:
            lengths = dataset[self.args.length_column_name][:]  # a list: a column would be read sample by sample
        return ModalityLengthGroupedSampler(self.args.global_batch_size, lengths, has_images, self._get_data_seed())

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        # Private, and the one place where the data, their sampler and their collator meet.
        if not is_training:
            return self._get_eval_or_test_dataloader(dataset, *args, **kwargs)
        config, processes = self.args, self.accelerator
        if processes.split_batches or processes.dispatch_batches:
            raise ValueError(
                "`accelerator_config` has `split_batches` or `dispatch_batches`, which cut batches by rows; images "
                "are no rows of a batch. Leave them out: processes read batches of their own."
            )
        collator, self.data_collator = self.data_collator, FilledBatchCollator(self.data_collator)
        try:
            if isinstance(dataset, IterableDataset):
                if dataset.column_names is not None:  # which a generator does not tell
                    dataset = self._remove_unused_columns(dataset, "Training")
                stream = GlobalStream(
                    dataset,
                    config.max_steps,
                    config.global_batch_size,
                    config.per_device_train_batch_size,
                    processes.num_processes,
                    processes.process_index,
                    config.dataloader_drop_last,
                )
                stream.num_steps_taken = self._num_steps_taken
                loader = super()._get_dataloader(stream, *args, is_training=True, **kwargs)
                if isinstance(loader.dataset, IterableDatasetShard):  # it has shared the samples out already
                    loader.dataset.num_processes, loader.dataset.process_index = 1, 0
                return loader
            sampler = kwargs.pop("sampler_fn")(dataset)
            if not isinstance(sampler, BatchRebalanceSampler):  # whose micro-batches are of different sizes
                sampler = FullMicroStepSampler(
                    sampler,
                    config.per_device_train_batch_size * processes.num_processes,
                    config.global_batch_size,
                    config.dataloader_drop_last,
                )
                self.remove_callback(SamplerEpoch)  # of an earlier data loader
                self.add_callback(SamplerEpoch(sampler))
            if isinstance(dataset, Dataset):
                dataset = self._remove_unused_columns(dataset, "Training")
            return super()._get_dataloader(
                FilledDataset(dataset), *args, sampler_fn=lambda _: sampler, is_training=True, **kwargs
            )
        finally:
            self.data_collator = collator

    def _get_eval_or_test_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        if not isinstance(self.data_collator, VWLMMDataCollator):
            return super()._get_dataloader(dataset, *args, **kwargs)
        packs = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        collator, self.data_collator = self.data_collator, replace(self.data_collator, packing=packs)
        try:
            if isinstance(dataset, Dataset):
                # In their order: Transformers would group them by lengths that a sample with images does not tell.
                sampler = SequentialSampler(dataset)
                if packs:
                    dataset = self._pack(self._remove_unused_columns(dataset))
                    sampler = dataset.sampler
                if kwargs["description"] == "Evaluation" and self.compute_metrics is None:
                    # Else predictions are gathered from all processes, and sorted out by Accelerate.
                    dataset = FilledDataset(self._remove_unused_columns(dataset) if not packs else dataset)
                    sampler = FullMicroStepSampler(sampler, self.args.eval_batch_size * self.args.world_size)
                    self.data_collator = FilledBatchCollator(self.data_collator)
                kwargs["sampler_fn"] = lambda _: sampler
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collator


class SamplerEpoch(TrainerCallback):
    """Tells a sampler the epoch: Transformers and Accelerate do not where a resumed run skips batches."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_epoch_begin`."""
        self.sampler.set_epoch(int(state.epoch or 0))

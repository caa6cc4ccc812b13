# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The order of samples: which optimiser step sees which, on any number of processes and with any micro-batch."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import Sampler, get_worker_info


@dataclass
class Filler:
    """Stands where an epoch has no sample left for a process. `sample` makes a batch of nothing else, unsupervised."""

    sample: Any = None


class RandomOrderSampler(Sampler):
    """
    Draws samples in a random order, the same for the same seed and epoch, whatever else draws random numbers.

    Args:
        num_samples (`int`): Number of samples.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
    """

    def __init__(self, num_samples: int, seed: int = 0) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer tells; a resumed run goes on in the order it had."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.num_samples, generator=generator).tolist())


class FullMicroStepSampler(Sampler):
    """
    A sampler's samples, and behind the last of them as many fillers as all processes need for a whole micro-batch.

    Accelerate would take samples of the epoch's beginning for these, as many as the layout has room for: then some
    count twice, and which depends on the number of processes.

    Args:
        sampler (`Sampler`): Draws samples.
        micro_step_size (`int`): Samples that all processes take together in one forward pass.
        global_batch_size (`int`, *optional*, defaults to 1): Samples of one optimiser step.
        drop_last (`bool`, *optional*, defaults to `False`): Whether to leave out the last, incomplete optimiser step.
    """

    def __init__(
        self, sampler: Sampler, micro_step_size: int, global_batch_size: int = 1, drop_last: bool = False
    ) -> None:
        self.sampler = sampler
        self.micro_step_size = micro_step_size
        self.num_samples = len(sampler)
        if drop_last:
            self.num_samples -= self.num_samples % global_batch_size
            if not self.num_samples:
                raise ValueError(
                    f"`dataloader_drop_last` leaves nothing to train on: {len(sampler)} samples are fewer than the "
                    f"{global_batch_size} of one optimiser step. Lower `global_batch_size`, or leave it out."
                )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer tells; a resumed run goes on in the order it had."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return self.num_samples + -self.num_samples % self.micro_step_size

    def __iter__(self) -> Iterator[Any]:
        yield from islice(self.sampler, self.num_samples)
        for _ in range(len(self) - self.num_samples):
            yield Filler()


class FilledDataset(TorchDataset):
    """
    A dataset that gives a [`Filler`] for a filler.

    Args:
        dataset: Any dataset that is read by index.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """The samples of a batch."""
        wanted = [index for index in indices if not isinstance(index, Filler)]
        if not wanted:
            # A packed row is a tuple of indices.
            first = next(iter(getattr(self.dataset, "sampler", range(1))))
            return [Filler(self.dataset[first])] * len(indices)
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(wanted)
        return [self.dataset[index] for index in wanted]


class FilledBatchCollator:
    """
    A collator for batches that may have fillers, or nothing else: these are marked with `is_filler`.

    Args:
        collator (`Callable`): Makes a batch of samples.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator
        self._lets_the_trainer_end = False

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        if get_worker_info() is not None and not self._lets_the_trainer_end:
            # The whole job gets SIGTERM, and the trainer needs its workers until it has saved a checkpoint.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._lets_the_trainer_end = True
        real = [sample for sample in samples if not isinstance(sample, Filler)]
        if real:
            return self.collator(real)
        if samples[0].sample is None:  # of a step that a resumed run has behind it
            return {}
        return {**self.collator([samples[0].sample]), "is_filler": True}


class GlobalStream(TorchIterableDataset):
    """
    The part of a stream that one process reads: its micro-batches of every optimiser step.

    Every process, and every worker of its data loader, passes over the whole stream in one order and decodes its own
    samples alone, so that an optimiser step has the same samples on any layout. Pass follows pass: the last step of
    each is filled up, or left out with `drop_last`.

    Args:
        stream (`datasets.IterableDataset`): The samples. Where it is shuffled, each pass has an order of its own.
        num_steps (`int`): Optimiser steps.
        global_batch_size (`int`): Samples of one optimiser step.
        micro_batch_size (`int`): Samples of one forward pass of one process.
        num_processes, process_index (`int`, *optional*): Number of processes, and which this is.
        drop_last (`bool`, *optional*, defaults to `False`): Whether to leave out the last, incomplete step of a pass.
    """

    def __init__(
        self,
        stream: IterableDataset,
        num_steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        num_processes: int = 1,
        process_index: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.stream = stream
        self.num_steps = num_steps
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.drop_last = drop_last
        # Steps that a resumed run has behind it.
        self.num_steps_taken = 0

    def __len__(self) -> int:
        return self.num_steps * self.global_batch_size // self.num_processes

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        num_workers, worker_index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        micro_batches = self._micro_batches()
        for index, (micro_batch, decode) in enumerate(islice(micro_batches, self.num_steps * self._num_micro_batches)):
            turn, process = divmod(index, self.num_processes)
            if process == self.process_index and turn % num_workers == worker_index:
                yield from map(decode, micro_batch)

    @property
    def _num_micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size

    def _micro_batches(self) -> Iterator[tuple[list[Any], Callable[[Any], Any]]]:
        # Those of one step after those of another, and in a step those of all processes in turn.
        features = self.stream.features
        is_raw = features is not None and not self.stream._formatting
        # A stream of its own, also because workers share the epoch of the one that they are given. Images of samples
        # that others train on stay bytes.
        stream = self.stream.decode(False) if is_raw else self.stream

        def decode(sample: Any) -> Any:
            return features.decode_example(sample) if is_raw and not isinstance(sample, Filler) else sample

        epoch, num_steps = 0, 0
        while True:
            stream.set_epoch(epoch)
            samples = read_stream(stream)
            num_steps_before = num_steps
            while step := list(islice(samples, self.global_batch_size)):
                if len(step) < self.global_batch_size:
                    if self.drop_last:
                        break
                    step += [Filler(decode(step[0]))] * (self.global_batch_size - len(step))
                num_steps += 1
                if num_steps <= self.num_steps_taken:
                    step = [Filler()] * self.global_batch_size
                for start in range(0, self.global_batch_size, self.micro_batch_size):
                    yield step[start : start + self.micro_batch_size], decode
            if num_steps == num_steps_before:
                raise ValueError(
                    f"Pass {epoch + 1} over the streamed training data has {len(step)} samples, and nothing to train "
                    "on. Give it samples, or leave `dataloader_drop_last` out."
                )
            epoch += 1


def read_stream(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """One pass over a whole stream, also in a worker: `iter(stream)` there reads the worker's share of the files."""
    for batch in stream.iter(batch_size=16):
        num_samples = len(next(iter(batch.values())))
        for row in range(num_samples):
            yield {name: column[row] for name, column in batch.items()}

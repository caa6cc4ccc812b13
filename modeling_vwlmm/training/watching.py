# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself beside its losses, when it stops, and how a benchmark is scored while it goes on."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .stages import MODULES


if TYPE_CHECKING:
    from .trainer import VWLMMTrainer


class TrainingDiverged(FloatingPointError):
    """Loss or gradient norm is no finite number, or far outside of its own history. No weight has changed by it."""


class History:
    """
    The last values of loss and gradient norm.

    A value is far outside where it lies more than `threshold` deviations above the median, in logarithms. The
    deviation is the median distance from the median, as of a normal distribution, and at least a tenth: of values that
    hardly change none is far outside for a small change.

    Args:
        threshold (`float`): How many deviations. 0 for any number.
        size (`int`, *optional*, defaults to 100): How many values are remembered. Half of them are waited for.
    """

    def __init__(self, threshold: float, size: int = 100) -> None:
        self.threshold = threshold
        self._values: dict[tuple[str, tuple[str, ...]], deque[float]] = {}
        self._size = size

    def find_outlier(self, values: Mapping[str, float], learned: tuple[str, ...] = ()) -> tuple[str, str] | None:
        """
        The name of a value of a step that is far outside, and what it is; or None, and they are remembered. Steps have
        a history with those that have `learned` the same: of images alone a loss has no part in language.
        """
        for name, value in values.items():
            if not math.isfinite(value):
                return name, str(value)
            past = self._values.get((name, learned), ())
            if self.threshold and value > 0 and len(past) >= self._size // 2:
                median = statistics.median(past)
                deviation = max(1.4826 * statistics.median(abs(other - median) for other in past), 0.1)
                if math.log(value) > median + self.threshold * deviation:
                    return name, f"{value:.4g}, where the last {len(past)} steps had {math.exp(median):.4g}"
        for name, value in values.items():
            if value > 0:
                self._values.setdefault((name, learned), deque(maxlen=self._size)).append(math.log(value))
        return None


class StopsWhenDiverged:
    """The part of a trainer that stops a run whose loss or gradient norm is no finite number, or far outside."""

    def _forget_steps(self) -> None:
        self._loss_of_step: torch.Tensor | float = 0.0
        self._last_losses: dict[str, torch.Tensor] = {}
        self._num_positions: dict[str, int | torch.Tensor] = {}  # of the step and all processes, by objective
        self._history = History(self.args.spike_threshold)

    def _watch_loss(self, loss: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
        """Adds the loss of a micro-batch, which has been divided by what is in the whole step."""
        self._loss_of_step = self._loss_of_step + loss.detach()
        self._last_losses = {name: part.detach() for name, part in parts.items()}
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._check_step()

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float | None:
        # Private: the one place that knows the norm before the weights change.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:  # whose engine steps with the backward pass
            self._check_step(getattr(grad_norm, "full_tensor", lambda: grad_norm)())
        return grad_norm

    def _check_step(self, grad_norm: torch.Tensor | None = None) -> None:
        # Once a step, and the only time that the host waits for the device.
        values = {"loss": self._loss_of_step}
        if grad_norm is not None and self.accelerator.scaler is None:  # which looks at gradients itself
            values["gradient norm"] = grad_norm
        if self._stop_votes is not None:  # a signal, of which one process may know alone
            values["stops"] = self._stop_votes
            # Of all processes, so that they agree. Each has its share times their number.
            values["loss"] = self.accelerator.reduce(values["loss"], "mean")
        # What one process has counted, the host knows without a read.
        counts = {name: count for name, count in self._num_positions.items() if isinstance(count, torch.Tensor)}
        values |= counts
        read = dict(zip(values, torch.stack([value.float() for value in values.values()]).tolist(), strict=True))
        self._loss_of_step, self._stops = 0.0, bool(read.pop("stops", 0))
        counts = {**self._num_positions, **{name: read.pop(name) for name in counts}}
        learned = tuple(name for name, count in counts.items() if count)
        if outlier := self._history.find_outlier(read, learned):
            losses = ", ".join(f"{name} {loss.item():.4g}" for name, loss in self._last_losses.items())
            raise TrainingDiverged(
                f"The {outlier[0]} of step {self.state.global_step + 1} is {outlier[1]} (of its last micro-batch: "
                f"{losses}). Training stops before this step changes the weights; checkpoints in "
                f"{self.args.output_dir} are untouched. Go on from the last of them with a lower learning rate, or "
                "look at the data of this step. `spike_threshold` says what is far outside."
            )


class Stopwatch:
    """Time since the last log, and how much of it went by in waiting for data."""

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begins anew at a step."""
        self._begun, self._step, self.waited = time.perf_counter(), step, 0.0

    def pop(self, state: TrainerState, num_tokens: float, num_images: float) -> dict[str, float]:
        """Speed, the share of time that this process waited for data, and the seconds left. Begins anew."""
        elapsed, steps = time.perf_counter() - self._begun, state.global_step - self._step
        logs = {
            "tokens_per_second": num_tokens / elapsed,
            "images_per_second": num_images / elapsed,
            "data_wait_share": self.waited / elapsed,
        }
        if steps:
            logs["seconds_left"] = (state.max_steps - state.global_step) * elapsed / steps
        self.restart(state.global_step)
        return logs


def measure_memory(device: torch.device) -> float:
    """GiB: the most that a GPU's tensors took so far, or what the process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def measure_gradient_norms(model: nn.Module, grad_norm: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Norms of the gradients of a model's parts, as they were before clipping, without a read of the device.

    Args:
        model (`nn.Module`): The model, wrapped or not. Sharded parameters have to be tensors of their own (FSDP2).
        grad_norm (`torch.Tensor`): Norm of all gradients before clipping.
    """
    parts = {**MODULES, "training_modules": "training_modules"}
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            path = name.removeprefix("module.").removeprefix("base_model.model.")
            part = next((part for part, path_of_part in parts.items() if path.startswith(f"{path_of_part}.")), "other")
            gradients.setdefault(part, []).append(parameter.grad)
    norms = {part: nn.utils.get_total_norm(tensors) for part, tensors in gradients.items()}
    norms = {part: norm.full_tensor() if hasattr(norm, "full_tensor") else norm for part, norm in norms.items()}
    if not norms:
        return {}
    clipped = torch.stack(list(norms.values())).norm()
    return {f"{part}_grad_norm": norm * (grad_norm / clipped).nan_to_num(1.0) for part, norm in norms.items()}


class BenchmarkCallback(TrainerCallback):
    """
    Scores the model on benchmarks every so many steps, and logs the scores as `benchmark_...`.

    Args:
        trainer ([`VWLMMTrainer`]): The trainer, which logs.
        benchmark (`Callable[[VWLMMForConditionalGeneration, VWLMMProcessor], dict[str, float]]` or `list[str]`):
            What scores the model, which is in evaluation mode and on its device; or names of lmms-eval's tasks. All
            processes call it together, and what the first one returns is logged.
        steps (`int`): Steps between scores. The last step is scored, too.
        kwargs: What else `lmms_eval.simple_evaluate` takes, such as `limit`.

    Example:

    ```python
    >>> trainer.add_callback(BenchmarkCallback(trainer, ["gqa", "pope"], steps=500, limit=500))
    ```
    """

    def __init__(
        self,
        trainer: "VWLMMTrainer",
        benchmark: Callable[..., dict[str, float]] | list[str],
        steps: int,
        **kwargs: Any,
    ) -> None:
        self.trainer = trainer
        self.benchmark = benchmark if callable(benchmark) else LmmsEval(benchmark, **kwargs)
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_step_end`."""
        if state.global_step % self.steps and state.global_step < state.max_steps:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                scores = self.benchmark(model, self.trainer.processing_class)
            self.trainer.log({f"benchmark_{name}": score for name, score in scores.items()})
        finally:
            model.train(was_training)


class LmmsEval:
    """
    Scores of lmms-eval's tasks.

    Args:
        tasks (`list[str]`): Names of tasks.
        batch_size (`int`, *optional*, defaults to 1): Questions a batch.
        kwargs: What else `lmms_eval.evaluator.simple_evaluate` takes.

    Raises:
        ImportError: If lmms-eval, or its model `vwlmm`, is not installed.
    """

    def __init__(self, tasks: list[str], batch_size: int = 1, **kwargs: Any) -> None:
        # An optional dependency, missed before a step is taken.
        from lmms_eval.evaluator import simple_evaluate

        from lmms_eval_vwlmm.model import VWLMM

        self.tasks, self.batch_size, self.kwargs = tasks, batch_size, kwargs
        self._evaluate, self._make_model = simple_evaluate, VWLMM

    def __call__(self, model: nn.Module, processor: Any) -> dict[str, float]:
        """The scores of a model, `task_metric` each."""
        asked = self._make_model(model, processor=processor, batch_size=self.batch_size)
        results = self._evaluate(asked, tasks=self.tasks, **self.kwargs)
        return {
            f"{task}_{metric.removesuffix(',none')}": value
            for task, values in ((results or {}).get("results") or {}).items()
            for metric, value in values.items()
            if isinstance(value, int | float) and "_stderr" not in metric
        }

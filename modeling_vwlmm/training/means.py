# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""What is logged: means over all positions since the last log, of all micro-batches and processes."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from accelerate.utils import gather_object

from ..objectives_vwlmm import Term


class PositionMeans:
    """
    Sums over positions, kept on their device until they are asked for: reading them makes the host wait.

    Args:
        weights (`Mapping[str, float]`): Weights of the objectives, by name.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self._sums: dict[tuple[str, str], list[torch.Tensor | int]] = defaultdict(list)

    def add_terms(self, terms: Mapping[str, Term]) -> None:
        """Adds what the objectives made of a batch."""
        for name, term in terms.items():
            for key, value in {"loss": term.total, "positions": term.count, **term.metrics}.items():
                # Detached: a sum that is kept would keep the graph of its batch.
                self._sums[name, key].append(value.detach() if isinstance(value, torch.Tensor) else value)

    def add_batch(self, num_positions: int, num_padding: int | torch.Tensor, num_images: int | torch.Tensor) -> None:
        """Adds the size of a batch."""
        self._sums["", "positions"].append(num_positions)
        self._sums["", "padding"].append(num_padding)
        self._sums["", "images"].append(num_images)

    def state_dict(self) -> list[tuple[str, str, list[float]]]:
        """The sums of this process. Reads the device."""
        return [
            (name, key, [value.item() if isinstance(value, torch.Tensor) else value for value in values])
            for (name, key), values in self._sums.items()
        ]

    def load_state_dict(self, state_dicts: list[list[tuple[str, str, list[float]]]]) -> None:
        """Goes on with sums, of one process or several."""
        self._sums = defaultdict(list)
        for name, key, values in (entry for state_dict in state_dicts for entry in state_dict):
            self._sums[name, key] += values

    def pop(self) -> dict[str, float]:
        """
        The means of all processes, which call this together, under their names in the logs; and beside `padding_share`
        the `num_tokens` and `num_images` behind them. What had no position has no mean: a loss of 0 would be a perfect
        one. Begins anew.
        """
        sums, self._sums = self._sums, defaultdict(list)
        read = {key: _read_sum(values) for key, values in sums.items()}
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for process in gather_object([read]):
            for (name, key), total in process.items():
                totals[name][key] += total

        logs = {}
        if sizes := totals.pop("", None):
            logs["padding_share"] = sizes["padding"] / sizes["positions"]
            logs |= {"num_tokens": sizes["positions"] - sizes["padding"], "num_images": sizes["images"]}
        visual = [name for name in totals if name != "language"]
        for name, sums_of_name in totals.items():
            num_positions = sums_of_name.pop("positions")
            kind = "text" if name == "language" else "image" if name == visual[0] else name
            logs[f"num_{kind}_positions"] = num_positions
            if num_positions == 0:
                continue
            means = {key: total / num_positions for key, total in sums_of_name.items()}
            logs[f"{name}_loss"] = means.pop("loss")
            # A metric that another objective has logged under this name is told by the objective's.
            logs |= {f"{name}_{key}" if key in logs else key: mean for key, mean in means.items()}
        if learned := [name for name in visual if f"{name}_loss" in logs]:
            total_weight = sum(self.weights[name] for name in learned)
            logs["visual_loss"] = sum(self.weights[name] * logs[f"{name}_loss"] for name in learned) / total_weight
        return logs


def _read_sum(values: list[torch.Tensor | int]) -> float:
    # In double precision, and with one read of the device for all.
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = [value for value in values if not isinstance(value, torch.Tensor)]
    return sum(numbers) + (sum(torch.stack(tensors).tolist()) if tensors else 0)

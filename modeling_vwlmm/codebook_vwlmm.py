# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
A codebook of unit length that follows what it stands for by a moving average (BEiT v2, arXiv 2208.06366, section 2.2).

Shapes: `K` codes of `d` numbers, `T` features.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


KMEANS_ITERATIONS = 10


class Codebook(nn.Module):
    """
    Nearest codes by cosine. Nothing here has a gradient: [`note`] remembers which features came to which code, and
    [`update`] moves the codes once an optimiser step, over all processes.

    Args:
        num_codes (`int`): Codes `K`.
        code_dim (`int`): Size `d` of a code.
        decay (`float`): Of the moving average of a code.
        revive_after (`int`): Updates without use after which a code is put where a feature of this step is.
    """

    def __init__(self, num_codes: int, code_dim: int, decay: float, revive_after: int) -> None:
        super().__init__()
        self.decay, self.revive_after = decay, revive_after
        self.register_buffer("embedding", torch.empty(num_codes, code_dim, dtype=torch.float32))
        self.register_buffer("idle_steps", torch.zeros(num_codes, dtype=torch.long))
        self.reset()

    def reset(self) -> None:
        """Random codes, and nothing noted."""
        self.features: list[torch.Tensor] = []
        self.ids: list[torch.Tensor] = []
        nn.init.normal_(self.embedding)
        if not getattr(self.embedding, "_is_hf_initialized", False):
            with torch.no_grad():
                self.embedding.copy_(F.normalize(self.embedding, dim=-1))
        nn.init.zeros_(self.idle_steps)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # Half precision would put neighbouring codes into one place.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Of features `[..., d]` the ids of the nearest codes, `[...]`, and these codes, `[..., d]`, in fp32. Codes are
        used as they are stored, and the distance is Euclidean.
        """
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            directions = F.normalize(features.detach().float(), dim=-1)  # [..., d]
            codes = self.embedding.float()  # [K, d]
            scores = directions @ codes.T - codes.square().sum(dim=-1) / 2  # [..., K]
            ids = scores.argmax(dim=-1)
            return ids, codes[ids]

    @torch.no_grad()
    def note(self, features: torch.Tensor, ids: torch.Tensor) -> None:
        """
        Remembers features until the next update.

        Args:
            features (`torch.Tensor` of shape `[T, d]`): Of unit length.
            ids (`torch.LongTensor` of shape `[T]`): Their codes.
        """
        self.features.append(features.detach().float())
        self.ids.append(ids)

    @torch.no_grad()
    def update(self, generator: torch.Generator) -> None:
        """
        Moves codes towards the mean direction of what came to them since the last update, on all processes, then
        revives those that nothing has come to for long: the other way round the average would undo it.

        Args:
            generator (`torch.Generator`): On the CPU, the same on every process: it picks where codes are revived.
        """
        features, ids = gather(torch.cat(self.features)), gather(torch.cat(self.ids))  # [T, d], [T]
        self.features, self.ids = [], []
        sums = torch.zeros_like(self.embedding).index_add_(0, ids, features)  # [K, d]
        is_used = torch.zeros_like(self.idle_steps).index_add_(0, ids, torch.ones_like(ids)) > 0  # [K]
        moved = self.decay * self.embedding + (1 - self.decay) * F.normalize(sums, dim=-1)
        self.embedding[is_used] = F.normalize(moved, dim=-1)[is_used]
        self.idle_steps.add_(1).masked_fill_(is_used, 0)
        idle = (self.idle_steps > self.revive_after).nonzero().squeeze(1)  # [dead]
        if len(idle) and len(features):
            self._revive(idle, features, generator)

    def _revive(self, idle: torch.Tensor, features: torch.Tensor, generator: torch.Generator) -> None:
        chosen = torch.randperm(len(features), generator=generator)[: len(idle)].to(idle.device)
        self.embedding[idle[: len(chosen)]] = _order(features)[chosen]
        self.idle_steps[idle[: len(chosen)]] = 0

    @torch.no_grad()
    def start(self, features: torch.Tensor, generator: torch.Generator) -> None:
        """
        Puts the codes where features are, by k-means of cosines.

        Args:
            features (`torch.Tensor` of shape `[T, d]`): Those of this process.
            generator (`torch.Generator`): On the CPU, the same on every process.

        Raises:
            ValueError: If there are fewer features than codes.
        """
        features = _order(gather(F.normalize(features.float(), dim=-1)))
        num_codes = len(self.embedding)
        if len(features) < num_codes:
            raise ValueError(
                f"The codebook of {num_codes} codes starts from {len(features)} features; expected one for each code "
                "at least. Use a larger batch or fewer codes."
            )
        codes = features[torch.randperm(len(features), generator=generator)[:num_codes].to(features.device)]
        for _ in range(KMEANS_ITERATIONS):
            ids = torch.cat([(chunk @ codes.T).argmax(dim=-1) for chunk in features.split(4096)])  # [T]
            sums = torch.zeros_like(codes).index_add_(0, ids, features)  # [K, d]
            # What nothing has come to stays where it is.
            codes = torch.where(sums.any(dim=-1, keepdim=True), F.normalize(sums, dim=-1), codes)
        self.embedding.copy_(codes)
        self.idle_steps.zero_()


def _order(features: torch.Tensor) -> torch.Tensor:
    """Features in an order of their own, so that what is picked does not depend on which process has which."""
    return features[features[:, 0].argsort()]


def gather(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in their order: `[T, ...]` of each to `[all T, ...]`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts: list[torch.Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)

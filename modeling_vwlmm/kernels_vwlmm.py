# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ANN001, ANN202 (Triton takes annotations for types of its own)

"""
The two steps of the fused loss between its matrix products, as Triton kernels.

Each does to one chunk of logits what its counterpart in `loss_vwlmm.py` does, reading every logit twice and writing
every gradient once: one pass finds the log-normaliser with an online softmax over tiles of the vocabulary, a second
one makes losses and gradients. Logits stay in the precision of the matrix product, arithmetic is fp32.

Shapes: `R` positions of a chunk, `C` vocabulary size.
"""

from __future__ import annotations

import torch


try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the loss then runs without kernels
    triton, jit = None, lambda function: function

# Logits that a program handles at a time.
TILE = 4096


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropies, `[R]`; `logits` `[R, C]` become their gradient."""
    num_rows, num_tokens = logits.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits.device)  # [R]
    _cross_entropy_kernel[(num_rows,)](logits, labels, losses, num_tokens, **_tiling(num_tokens))
    return losses


def kl_div_(logits: torch.Tensor, teacher_logits: torch.Tensor, teacher_temperature: float) -> torch.Tensor:
    """
    Returns the sums `[3]` of divergences and of the entropies of teacher and student; `logits` `[R, C]` become their
    gradient. The teacher's logits are divided by their temperature in fp32, for fp16 would not hold them.
    """
    num_rows, num_tokens = logits.shape
    statistics = torch.empty(num_rows, 3, dtype=torch.float32, device=logits.device)  # [R, 3]
    _kl_div_kernel[(num_rows,)](
        logits, teacher_logits, statistics, 1 / teacher_temperature, num_tokens, **_tiling(num_tokens)
    )
    return statistics.sum(dim=0)


def _tiling(num_tokens: int) -> dict[str, int]:
    return {"tile": min(triton.next_power_of_2(num_tokens), TILE), "num_warps": 8}


@jit
def _log_normalizer(row, scale, num_tokens, tile: tl.constexpr):
    largest, total = -float("inf"), 0.0
    for start in range(0, num_tokens, tile):
        tokens = start + tl.arange(0, tile)
        logits = scale * tl.load(row + tokens, mask=tokens < num_tokens, other=-float("inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(logits, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(logits - new_largest), axis=0)
        largest = new_largest
    return largest + tl.log(total)


@jit
def _cross_entropy_kernel(logits, labels, losses, num_tokens, tile: tl.constexpr):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * num_tokens
    label = tl.load(labels + index)
    log_normalizer = _log_normalizer(row, 1.0, num_tokens, tile)
    # Read before the gradient takes its place.
    tl.store(losses + index, log_normalizer - tl.load(row + label).to(tl.float32))
    tl.debug_barrier()
    for start in range(0, num_tokens, tile):
        tokens = start + tl.arange(0, tile)
        in_vocabulary = tokens < num_tokens
        q = tl.exp(tl.load(row + tokens, mask=in_vocabulary, other=0.0).to(tl.float32) - log_normalizer)
        gradient = q - tl.where(tokens == label, 1.0, 0.0)
        tl.store(row + tokens, gradient.to(logits.dtype.element_ty), mask=in_vocabulary)


@jit
def _kl_div_kernel(logits, teacher_logits, statistics, teacher_scale, num_tokens, tile: tl.constexpr):
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * num_tokens
    teacher_row = teacher_logits + index.to(tl.int64) * num_tokens
    log_normalizer = _log_normalizer(row, 1.0, num_tokens, tile)
    teacher_log_normalizer = _log_normalizer(teacher_row, teacher_scale, num_tokens, tile)
    kl_div, teacher_entropy, student_entropy = 0.0, 0.0, 0.0
    for start in range(0, num_tokens, tile):
        tokens = start + tl.arange(0, tile)
        in_vocabulary = tokens < num_tokens
        log_q = tl.load(row + tokens, mask=in_vocabulary, other=0.0).to(tl.float32) - log_normalizer
        teacher = tl.load(teacher_row + tokens, mask=in_vocabulary, other=0.0).to(tl.float32)
        log_p = teacher_scale * teacher - teacher_log_normalizer
        q, p = tl.where(in_vocabulary, tl.exp(log_q), 0.0), tl.where(in_vocabulary, tl.exp(log_p), 0.0)
        kl_div += tl.sum(p * (log_p - log_q), axis=0)
        teacher_entropy -= tl.sum(p * log_p, axis=0)
        student_entropy -= tl.sum(q * log_q, axis=0)
        tl.store(row + tokens, (q - p).to(logits.dtype.element_ty), mask=in_vocabulary)
    tl.store(statistics + 3 * index, kl_div)
    tl.store(statistics + 3 * index + 1, teacher_entropy)
    tl.store(statistics + 3 * index + 2, student_entropy)

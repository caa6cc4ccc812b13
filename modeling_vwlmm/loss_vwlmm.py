# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
One loss for text and visual words that never holds the logits of all positions.

Text and image positions meet the same head. A text position has a one-hot target; an image position has the
distribution of a second, linear teacher. Positions pass in chunks. The logits of a chunk become its loss and, in
place, the gradient of these logits, and that becomes the gradients of hidden states and head, so that each chunk's
logits are computed once and nothing of size `[positions, C]` outlives its chunk. What autograd keeps are the finished
gradients.

Shapes: `T` text positions, `V` image positions, `D` hidden size, `C` vocabulary size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .kernels_vwlmm import cross_entropy_ as triton_cross_entropy_
from .kernels_vwlmm import kl_div_ as triton_kl_div_
from .kernels_vwlmm import triton


# What the logits of one chunk may take, the teacher's beside the student's. Much smaller chunks make slow matrix
# products, and the head's gradient passes through memory once a chunk; larger ones gain nothing. At C = 32000 this is
# 384 image positions a chunk in fp32 on a CPU, and 2096 in bf16 on a GPU.
CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 256 * 2**20}
# Softmax and divergence of a chunk run block by block on a CPU, so that their temporaries stay in its cache.
CPU_BLOCK_BYTES = 2**18
# The head's gradient in 16 bits is summed in fp32: by the matrix product itself where it can (CUDA, torch 2.8), else
# over tiles of so many tokens.
HAS_OUT_DTYPE = hasattr(torch.ops.aten.addmm, "dtype_out")
TILE_ROWS = 512


class LinearLossOutput(NamedTuple):
    """
    loss: `text_scale * cross_entropy + image_scale * kl_div`. It alone has a gradient.
    cross_entropy: Sum over the text positions of `-log softmax(W h)[label]`, in nats.
    kl_div: Sum over the image positions of `KL(teacher || student)`, in nats.
    teacher_entropy, student_entropy: Sums over the image positions of the entropies of the two, in nats.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    kl_div: torch.Tensor
    teacher_entropy: torch.Tensor
    student_entropy: torch.Tensor


def linear_kl_div(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
) -> torch.Tensor:
    """
    Sum over positions of `KL(softmax(W_t x) || softmax(W_s h))`, the visual loss before its mean (equation 6 of the
    paper), without holding the logits of all positions. Gradients reach the student alone.

    Args:
        student_hidden (`torch.Tensor` of shape `[V, D]`): Inputs `h` of the student's head.
        student_weight (`torch.Tensor` of shape `[C, D]`): The student's head `W_s`.
        teacher_hidden (`torch.Tensor` of shape `[V, D']`): Inputs `x` of the teacher's head.
        teacher_weight (`torch.Tensor` of shape `[C, D']`): The teacher's head `W_t`.

    Returns:
        `torch.Tensor` of shape `()`, fp32 or wider, in nats.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    no_labels = torch.empty(0, dtype=torch.long, device=student_hidden.device)
    return linear_loss(student_hidden, student_weight, no_labels, teacher_hidden, teacher_weight).loss


def linear_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    text_scale: float | torch.Tensor = 1.0,
    image_scale: float | torch.Tensor = 1.0,
    teacher_temperature: float = 1.0,
) -> LinearLossOutput:
    """
    Cross-entropy at text positions and KL divergence at image positions, through one head and in one pass.

    Args:
        student_hidden (`torch.Tensor` of shape `[T + V, D]`): Inputs of the head, text positions first.
        student_weight (`torch.Tensor` of shape `[C, D]`): The head.
        labels (`torch.LongTensor` of shape `[T]`): Targets of the text positions.
        teacher_hidden (`torch.Tensor` of shape `[V, D']`): Inputs of the teacher's head at the image positions.
        teacher_weight (`torch.Tensor` of shape `[C, D']`): The teacher's head.
        text_scale, image_scale (`float` or `torch.Tensor`): Factors of the two sums in `loss`.
        teacher_temperature (`float`): What the teacher's logits are divided by.

    Returns:
        [`LinearLossOutput`]

    Raises:
        ValueError: If the shapes do not fit together.
    """
    loss, cross_entropies, kl_div, teacher_entropy, student_entropy = linear_row_losses(
        student_hidden,
        student_weight,
        labels,
        teacher_hidden,
        teacher_weight,
        text_scale,
        image_scale,
        teacher_temperature,
    )
    return LinearLossOutput(loss, cross_entropies.sum(), kl_div, teacher_entropy, student_entropy)


@torch.compiler.disable  # one break around it, in place of several within
def linear_row_losses(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    text_scale: float | torch.Tensor,
    image_scale: float | torch.Tensor,
    teacher_temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`linear_loss`] with the cross-entropies of the text positions one by one, `[T]`, and a factor for each of them
    where `text_scale` is `[T]`. So several objectives with one-hot targets share a pass, and each can be told from the
    others.
    """
    num_positions = labels.shape[0] + teacher_hidden.shape[0]
    if student_hidden.shape[0] != num_positions or student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"Found {student_hidden.shape[0]} student positions for {labels.shape[0]} labels and "
            f"{teacher_hidden.shape[0]} teacher positions, and heads of {student_weight.shape[0]} and "
            f"{teacher_weight.shape[0]} tokens; expected one student position for each label and teacher position, "
            "and heads over one vocabulary."
        )
    student_weight, teacher_weight = _make_whole(student_weight), _make_whole(teacher_weight.detach())
    if not torch.is_autocast_enabled(student_hidden.device.type):
        # The dtypes of decoder, heads and adapter may differ: each head reads its inputs in its own.
        student_hidden = student_hidden.to(student_weight.dtype)
        teacher_hidden = teacher_hidden.to(teacher_weight.dtype)
    return _LinearLoss.apply(
        student_hidden,
        student_weight,
        labels,
        teacher_hidden,
        teacher_weight,
        text_scale,
        image_scale,
        teacher_temperature,
        torch.is_grad_enabled(),
    )


def _make_whole(weight: torch.Tensor) -> torch.Tensor:
    # Of a head that tensor parallelism has split every process needs the whole, and has its own part's gradient.
    if not hasattr(weight, "device_mesh"):
        return weight
    from torch.distributed.tensor import Replicate  # not in every build

    whole = weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim)
    return whole.to_local(grad_placements=whole.placements)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        text_scale: float | torch.Tensor,
        image_scale: float | torch.Tensor,
        teacher_temperature: float,
        needs_grad: bool,
    ) -> tuple[torch.Tensor, ...]:
        # Inside `forward` gradients are always off: whether anyone wants them is only known outside.
        needs_hidden, needs_weight = (needs_grad and needed for needed in ctx.needs_input_grad[:2])
        hidden_dtype, weight_dtype, device = hidden.dtype, weight.dtype, hidden.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            hidden, weight, teacher_hidden = (tensor.to(dtype) for tensor in (hidden, weight, teacher_hidden))
            teacher_weight = teacher_weight.to(dtype) if len(teacher_hidden) else weight  # no copy that nobody reads
        # In fp16 one over the number of positions would underflow before a loss scale comes to its rescue: there the
        # larger scale stays 1 until backward, which has fp32 sums to multiply.
        statistics_dtype = torch.promote_types(hidden.dtype, torch.float32)
        num_text, num_tokens = labels.shape[0], weight.shape[0]
        scales = hidden.new_empty(len(hidden), 1, dtype=statistics_dtype)  # [T + V, 1]
        for rows, scale in ((slice(num_text), text_scale), (slice(num_text, None), image_scale)):
            if isinstance(scale, torch.Tensor):
                scales[rows] = scale.to(scales).reshape(-1, 1)
            else:
                scales[rows].fill_(scale)
        ctx.deferred_scale = None
        if hidden.dtype == torch.float16 and len(scales):
            ctx.deferred_scale = scales.max().where(scales.max() > 0, 1)
        factors = scales if ctx.deferred_scale is None else scales / ctx.deferred_scale  # [T + V, 1]
        cross_entropies = scales.new_zeros(num_text)  # [T]
        sums = scales.new_zeros(3)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # [T + V, D]
        grad_weight = None  # [C, D]

        def add_gradients(rows: slice, grad_logits: torch.Tensor) -> None:
            nonlocal grad_weight
            grad_logits = grad_logits.to(hidden.dtype)  # [R, C]
            if needs_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[rows]).mul_(factors[rows])
            if needs_weight:
                scaled_hidden = (hidden[rows] * factors[rows]).to(hidden.dtype)  # [R, D]
                grad_weight = _add_product(grad_weight, grad_logits.T, scaled_hidden)

        with torch.autocast(device.type, enabled=False):
            use_kernels = _use_kernels(hidden)
            logits_dtype = hidden.dtype if use_kernels else statistics_dtype
            most = max_chunk_rows(device, num_tokens * logits_dtype.itemsize)
            text_chunks, image_chunks = _chunks(0, num_text, most), _chunks(num_text, len(hidden), most // 2)
            # One buffer for all chunks: fresh memory costs a CPU as much time as softmax does.
            buffer = hidden.new_empty(_longest(text_chunks + image_chunks), num_tokens, dtype=logits_dtype)
            teacher_buffer = torch.empty_like(buffer[: _longest(image_chunks)])
            for rows in text_chunks:
                logits = _project(hidden[rows], weight, buffer)  # [R, C]
                if use_kernels:
                    cross_entropies[rows] = triton_cross_entropy_(logits, labels[rows])
                else:
                    for block in _blocks(logits):
                        cross_entropies[rows][block] = _cross_entropy_(logits[block], labels[rows][block])
                if needs_hidden or needs_weight:
                    add_gradients(rows, logits)
            for rows in image_chunks:
                teacher_rows = slice(rows.start - num_text, rows.stop - num_text)
                logits = _project(hidden[rows], weight, buffer)  # [R, C]
                teacher_logits = _project(teacher_hidden[teacher_rows], teacher_weight, teacher_buffer)  # [R, C]
                if use_kernels:
                    sums += triton_kl_div_(logits, teacher_logits, teacher_temperature)
                else:
                    for block in _blocks(logits):
                        sums += _kl_div_(logits[block], teacher_logits[block], teacher_temperature)
                if needs_hidden or needs_weight:
                    add_gradients(rows, logits)

        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.dtypes = hidden_dtype, weight_dtype
        if hidden.dtype != torch.float16:
            grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden_dtype)
            grad_weight = None if grad_weight is None else grad_weight.to(weight_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        image_scale = scales[num_text, 0] if len(teacher_hidden) else 0.0
        loss = torch.dot(scales[:num_text, 0], cross_entropies) + image_scale * sums[0]
        outputs = (loss, cross_entropies, *sums.unbind())
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        factor = grad_loss if ctx.deferred_scale is None else ctx.deferred_scale * grad_loss
        # In place unless another backward pass follows: a copy of the head's gradient is worth avoiding, and the
        # factor is 1 most often, but reading it would make the host wait. There is no public way to ask for
        # `retain_graph`.
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = [
            grad
            if grad is None
            else grad.mul_(factor)
            if in_place and grad.dtype == dtype
            else (grad * factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None, None, None, None)


def max_chunk_rows(device: torch.device, row_bytes: int) -> int:
    """How many rows of so many bytes one chunk may have, two at least."""
    return max(CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // row_bytes, 2)


def _use_kernels(hidden: torch.Tensor) -> bool:
    return triton is not None and hidden.is_cuda and hidden.dtype != torch.float64


def _chunks(start: int, stop: int, most: int) -> list[slice]:
    # Matrix products are fastest over multiples of 16 rows, and a short last chunk would waste one.
    multiple = 16 if most >= 16 else 1
    num_positions, most = max(stop - start, 1), most - most % multiple
    count = -(-num_positions // most)
    size = -(-num_positions // (count * multiple)) * multiple
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _longest(chunks: list[slice]) -> int:
    return max((rows.stop - rows.start for rows in chunks), default=0)


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    num_rows, row_bytes = logits.shape[0], logits.shape[1] * logits.element_size()
    step = max(CPU_BLOCK_BYTES // row_bytes, 1) if logits.device.type == "cpu" else max(num_rows, 1)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _project(hidden: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    logits = buffer[: len(hidden)]  # [R, C]
    if logits.dtype == hidden.dtype:
        return torch.matmul(hidden, weight.T, out=logits)
    return logits.copy_(hidden @ weight.T)


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds `a @ b`, `[C, D]`, to a sum in fp32 or wider."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if dtype == a.dtype:
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        total = a.new_zeros(len(a), b.shape[1], dtype=dtype)
    if total.is_cuda and HAS_OUT_DTYPE:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    # Tile by tile, so that no product of the head's size is written beside the sum.
    for rows in range(0, len(total), TILE_ROWS):
        tile = slice(rows, rows + TILE_ROWS)
        total[tile].add_(a[tile] @ b)
    return total


def _cross_entropy_(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropies, `[R]`; `logits` `[R, C]` become their gradient."""
    log_q = logits.log_softmax(dim=-1)  # [R, C]
    loss = -log_q.gather(1, labels[:, None]).squeeze(1)  # [R]
    q = torch.exp(log_q, out=logits)
    q.scatter_add_(1, labels[:, None], -torch.ones_like(labels, dtype=q.dtype)[:, None])
    return loss


def _kl_div_(logits: torch.Tensor, teacher_logits: torch.Tensor, teacher_temperature: float) -> torch.Tensor:
    """
    Returns the sums `[3]` of divergences and of the entropies of teacher and student; `logits` `[R, C]` become their
    gradient, and `teacher_logits` `[R, C]` are used up.
    """
    if teacher_temperature != 1:
        teacher_logits /= teacher_temperature
    log_q, log_p = logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)  # [R, C]
    q, p = torch.exp(log_q, out=logits), torch.exp(log_p, out=teacher_logits)  # [R, C]
    teacher_entropy = -torch.dot(p.flatten(), log_p.flatten())
    student_entropy = -torch.dot(q.flatten(), log_q.flatten())
    # Summed as differences: the difference of two sums would lose what is left of it when the two agree.
    kl_div = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
    q.sub_(p)
    return torch.stack([kl_div, teacher_entropy, student_entropy])

"""The sums over a queue that its contrast is made of: what a part of the queue adds to the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mooring_kernels.queue_info_nce.chunks import sums_in_chunks
from mooring_kernels.runtime.once import require_first_derivative


def queue_sums(
    query: Tensor, labels: Tensor, queue: Tensor, queue_labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``LSE_j l_ij``, ``sum_{j in pos(i)} l_ij`` and ``|pos(i)|`` over the filled slots, ``l_ij = q_i . k_j / T``.

    ``queue_info_nce`` is their ``LSE - mean - log |pos|``; sums over the parts of a queue add up to those of the whole.
    By the library's GEMMs, in chunks: no [B, N] logits exist.

    Args:
        query: q, [B, D] float32, finite.
        labels: [B] int64; a negative label matches no slot.
        queue: [N, D] float32 or bfloat16, detached here. Empty slots must be finite.
        queue_labels: [N] int64; a negative label marks an empty slot.
        temperature: T > 0.

    Returns:
        log_sum [B], -inf where no slot is filled; positive_sum [B]; positives [B], without gradient. float32. Gradients
        of the first two reach ``query``.

    Cost: reads the queue once; 2 B N D FLOP, and 4 B N D more for the gradient, formed in the forward.
    """
    return _QueueSums.apply(query, labels, queue.detach(), queue_labels, temperature)


class _QueueSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, labels: Tensor, queue: Tensor, queue_labels: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        scaled = query.float() / temperature
        sums = sums_in_chunks(scaled, labels, queue, queue_labels, with_keys=ctx.needs_input_grad[0])
        log_sum = torch.where(sums.total > 0, sums.total.log() + sums.peak, -torch.inf)
        if ctx.needs_input_grad[0]:
            mean = sums.weighted / torch.where(sums.total > 0, sums.total, 1)[:, None]
            ctx.save_for_backward(mean, sums.positive_keys)
            ctx.temperature = temperature
        ctx.mark_non_differentiable(sums.positives)
        return log_sum, sums.positive_sum, sums.positives

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        require_first_derivative("queue_sums")
        mean, positive_keys = ctx.saved_tensors
        grad_log_sum, grad_positive_sum, _ = grad_outputs
        grad = grad_log_sum[:, None] * mean + grad_positive_sum[:, None] * positive_keys
        return grad / ctx.temperature, None, None, None, None

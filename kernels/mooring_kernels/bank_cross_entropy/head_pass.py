"""Loss and gradients of a linear head over many rows, in one pass over chunks of rows.

Only the sum of the losses is differentiated, so its gradients are known up to one factor before the backward
asks for them: each chunk of logits becomes its own gradient in place and is multiplied at once. The logits of
all rows never exist together, and the backward multiplies by a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Logits rows start on a cache line: MKL's product with an odd row length runs at 0.6 of its rate.
_PAD = 16


# Enough rows for the matrix products to run at their rate; logits of 512 rows and 1000 classes are 2 MB.
_CPU_ROWS = 512
_CUDA_ELEMENTS = 2**26  # of a chunk's logits: 256 MB


def chunk_rows(rows: int, classes: int, device: torch.device) -> int:
    """How many rows a chunk has at most."""
    most = _CPU_ROWS if device.type == "cpu" else max(_CUDA_ELEMENTS // classes, 1024)
    return max(min(rows, most), 1)


class RowsGradient(Protocol):
    """Losses of rows; the logits become their gradient in place if ``gradient``, zero on masked rows."""

    def __call__(self, logits: Tensor, labels: Tensor, label_smoothing: float, gradient: bool) -> Tensor: ...


class HeadPass(NamedTuple):
    """Sums over all rows, fp32; a gradient that was not asked for is empty.

    Attributes:
        total: 0-d, sum of the losses.
        logits: [B, C] of the first B rows, or empty.
        grad_features: [B, D], of the first B rows.
        grad_weight: [C, D].
        grad_bias: [C].
    """

    total: Tensor
    logits: Tensor
    grad_features: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def head_pass(
    chunks: Iterable[tuple[Tensor, Tensor]],
    longest: int,
    batch: int,
    head: Tensor,
    offset: Tensor | None,
    label_smoothing: float,
    keep_logits: bool,
    needs: list[bool],
    rows_gradient_: RowsGradient,
) -> HeadPass:
    """Sum of the losses of all rows, and its gradients.

    Args:
        chunks: rows [n, D] fp32 and labels [n]; the first chunk begins with the batch. A chunk is used before the
            next one is asked for.
        longest: the largest n.
        batch: B, rows of the first chunk that carry a gradient.
        head: [C, D] fp32. offset: [C] fp32 or None.
        keep_logits: return the logits of the batch.
        needs: gradients of the features, the weight, the bias.
        rows_gradient_: see there.
    """
    classes = head.shape[0]
    buffer = head.new_empty(longest, -(-classes // _PAD) * _PAD)
    totals: list[Tensor] = []
    # separate tensors: outputs of an operator must not share memory
    logits, grad_features, grad_weight, grad_bias = (head.new_empty(0) for _ in range(4))
    for number, (rows, labels) in enumerate(chunks):
        grad = buffer[: rows.shape[0], :classes]
        if offset is None:
            torch.mm(rows, head.T, out=grad)
        else:
            torch.addmm(offset, rows, head.T, out=grad)
        if number == 0 and keep_logits:
            logits = grad[:batch].clone(memory_format=torch.contiguous_format)
        loss_rows = rows_gradient_(grad, labels, label_smoothing, any(needs))
        if number == 0:
            if needs[0]:
                grad_features = grad[:batch] @ head
            if needs[1]:
                grad_weight = grad.T @ rows
            if needs[2]:
                grad_bias = grad.sum(0)
        else:
            if needs[1]:
                grad_weight.addmm_(grad.T, rows)
            if needs[2]:
                grad_bias += grad.sum(0)
        totals.append(loss_rows.sum())
    total = sum(totals[1:], totals[0]) if totals else head.new_zeros(())
    return HeadPass(total, logits, grad_features, grad_weight, grad_bias)

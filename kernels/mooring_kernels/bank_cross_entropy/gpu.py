"""Softmax cross-entropy over rows in Triton: an online softmax, then the gradient over the logits, in fp32.

The logits come from the library's GEMM into memory of the op's own. Without a gradient they are read once; with
one each program reads its rows again, which it has just had in cache, and overwrites them.
"""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.runtime.triton_launch import blocked_row_tile, on_device_of


@triton.jit(do_not_specialize=["N"])
def softmax_cross_entropy_rows_grad_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    N: int,
    label_smoothing: float,
    C: tl.constexpr,
    stride_logits_n: tl.constexpr,
    stride_labels_n: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    label = tl.load(labels_ptr + rows * stride_labels_n, mask=rows < N, other=-1)  # [BLOCK_N]
    valid = (label >= 0) & (label < C)
    target = tl.load(logits_ptr + rows * stride_logits_n + label, mask=valid, other=0.0)  # [BLOCK_N]

    peak = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)  # largest logit so far
    total = tl.zeros([BLOCK_N], dtype=tl.float32)  # sum of exp(logit - peak)
    shifted = tl.zeros([BLOCK_N], dtype=tl.float32)  # sum of logit - peak, for the smoothed target
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = valid[:, None] & (columns < C)[None, :]  # [BLOCK_N, BLOCK_C]
        logits = tl.load(
            logits_ptr + rows[:, None] * stride_logits_n + columns[None, :], mask=inside, other=float("-inf")
        )  # [BLOCK_N, BLOCK_C]
        raised = tl.maximum(peak, tl.max(logits, axis=1))  # [BLOCK_N]
        origin = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - -inf would be NaN
        total = total * tl.exp(peak - origin) + tl.sum(tl.exp(logits - origin[:, None]), axis=1)
        if SMOOTHED:
            moved = tl.where(peak == float("-inf"), 0.0, peak - origin)  # [BLOCK_N]
            shifted += first * moved + tl.sum(tl.where(inside, logits - origin[:, None], 0.0), axis=1)
        peak = raised

    log_total = tl.log(tl.where(valid, total, 1.0))  # [BLOCK_N]
    # Everything relative to the peak: a common shift of the logits costs no digits.
    loss = log_total - (1.0 - label_smoothing) * (target - peak)  # [BLOCK_N]
    if SMOOTHED:
        loss -= label_smoothing * (shifted / C)
    tl.store(loss_ptr + rows, tl.where(valid, loss, 0.0), mask=rows < N)
    if GRADIENT:
        # No other program reads these rows; the barrier keeps the stores of this one behind its loads.
        tl.debug_barrier()
        lse = tl.where(valid, peak + log_total, 0.0)  # [BLOCK_N]
        for first in range(0, C, BLOCK_C):
            columns = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
            in_tile = (rows < N)[:, None] & (columns < C)[None, :]  # [BLOCK_N, BLOCK_C]
            inside = in_tile & valid[:, None]  # [BLOCK_N, BLOCK_C]
            at = logits_ptr + rows[:, None] * stride_logits_n + columns[None, :]  # [BLOCK_N, BLOCK_C]
            softmax = tl.exp(tl.load(at, mask=inside, other=0.0) - lse[:, None])  # [BLOCK_N, BLOCK_C]
            hit = tl.where(columns[None, :] == label[:, None], 1.0 - label_smoothing, 0.0)
            grad = softmax - hit - label_smoothing / C  # [BLOCK_N, BLOCK_C]
            tl.store(at, tl.where(inside, grad, 0.0), mask=in_tile)


def softmax_cross_entropy_rows_(
    logits: Tensor, labels: Tensor, label_smoothing: float, gradient: bool
) -> Tensor:
    """Cross-entropy of every row; with ``gradient`` the logits become ``softmax - smoothed one-hot`` in place.

    Args:
        logits: [N, C] fp32, unit stride along a row; overwritten if ``gradient``, zero on masked rows.
        labels: [N] int64; a row whose label lies outside [0, C) is not read.
        label_smoothing: mass spread evenly over the classes, in [0, 1].
        gradient: overwrite the logits.

    Returns:
        loss_rows [N] fp32, 0 on masked rows.
    """
    rows, classes = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    loss_rows = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return loss_rows
    tile = blocked_row_tile(classes)
    with on_device_of(logits):
        softmax_cross_entropy_rows_grad_kernel[(triton.cdiv(rows, tile.rows),)](
            logits,
            labels,
            loss_rows,
            rows,
            float(label_smoothing),
            C=classes,
            stride_logits_n=logits.stride(0),
            stride_labels_n=labels.stride(0),
            SMOOTHED=label_smoothing != 0.0,
            GRADIENT=gradient,
            BLOCK_N=tile.rows,
            BLOCK_C=tile.columns,
            num_warps=tile.warps,
        )
    return loss_rows

"""Softmax cross-entropy of one tile of rows in Triton, for the rows of either head."""

# Triton's types know not the element type of a pointer.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cross_entropy_fwd_tile(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    N: int,
    label_smoothing: float,
    C: tl.constexpr,
    stride_logits_n: tl.constexpr,
    stride_logits_c: tl.constexpr,
    stride_labels_n: tl.constexpr,
    SMOOTHED: tl.constexpr,
    tile: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Loss and log-sum-exp of rows tile * BLOCK_N to (tile + 1) * BLOCK_N, with an online softmax; reads them once."""
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    label = tl.load(labels_ptr + rows * stride_labels_n, mask=rows < N, other=-1)  # [BLOCK_N]
    valid = (label >= 0) & (label < C)  # masked rows are not read: an empty slot may hold anything

    peak = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)  # largest logit so far
    total = tl.zeros([BLOCK_N], dtype=tl.float32)  # sum of exp(logit - peak)
    shifted = tl.zeros([BLOCK_N], dtype=tl.float32)  # sum of logit - peak, for the smoothed target
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = valid[:, None] & (columns < C)[None, :]  # [BLOCK_N, BLOCK_C]
        logits = tl.load(
            logits_ptr + rows[:, None] * stride_logits_n + columns[None, :] * stride_logits_c,
            mask=inside,
            other=float("-inf"),
        ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        raised = tl.maximum(peak, tl.max(logits, axis=1))  # [BLOCK_N]
        origin = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - -inf would be NaN
        total = total * tl.exp(peak - origin) + tl.sum(tl.exp(logits - origin[:, None]), axis=1)
        if SMOOTHED:
            moved = tl.where(peak == float("-inf"), 0.0, peak - origin)  # [BLOCK_N]
            shifted += first * moved + tl.sum(tl.where(inside, logits - origin[:, None], 0.0), axis=1)
        peak = raised

    log_total = tl.log(tl.where(valid, total, 1.0))  # [BLOCK_N]
    target = tl.load(logits_ptr + rows * stride_logits_n + label * stride_logits_c, mask=valid, other=0.0).to(
        tl.float32
    )  # [BLOCK_N]
    # Everything relative to the peak: a common shift of the logits costs no digits.
    loss = log_total - (1.0 - label_smoothing) * (target - peak)  # [BLOCK_N]
    if SMOOTHED:
        loss -= label_smoothing * (shifted / C)
    tl.store(loss_ptr + rows, tl.where(valid, loss, 0.0), mask=rows < N)
    tl.store(lse_ptr + rows, tl.where(valid, peak + log_total, 0.0), mask=rows < N)


@triton.jit
def cross_entropy_bwd_tile(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    scale: tl.tensor,
    N: int,
    label_smoothing: float,
    C: tl.constexpr,
    stride_logits_n: tl.constexpr,
    stride_logits_c: tl.constexpr,
    stride_labels_n: tl.constexpr,
    stride_grad_logits_n: tl.constexpr,
    tile: tl.tensor,
    block: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """``scale * (softmax - smoothed one-hot)`` of the rows of a tile in one block of columns."""
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    label = tl.load(labels_ptr + rows * stride_labels_n, mask=rows < N, other=-1)  # [BLOCK_N]
    valid = (label >= 0) & (label < C)
    in_tile = (rows < N)[:, None] & (columns < C)[None, :]  # [BLOCK_N, BLOCK_C]
    inside = in_tile & valid[:, None]  # [BLOCK_N, BLOCK_C]
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)  # [BLOCK_N]
    logits = tl.load(
        logits_ptr + rows[:, None] * stride_logits_n + columns[None, :] * stride_logits_c,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
    softmax = tl.exp(logits - lse[:, None])  # [BLOCK_N, BLOCK_C]
    target = tl.where(columns[None, :] == label[:, None], 1.0 - label_smoothing, 0.0) + label_smoothing / C
    grad = scale * (softmax - target)  # [BLOCK_N, BLOCK_C]
    tl.store(
        grad_logits_ptr + rows[:, None] * stride_grad_logits_n + columns[None, :],
        tl.where(inside, grad, 0.0).to(grad_logits_ptr.dtype.element_ty),
        mask=in_tile,
    )

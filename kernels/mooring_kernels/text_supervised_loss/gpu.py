"""Text-supervised loss in Triton: both softmaxes of a row online in one read, in fp32; the backward recomputes them."""

# Triton's types know neither the launch options (num_warps), nor the element type of a pointer, nor that a
# kernel's own function returns.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.runtime.row_mean import mean_of_valid_rows
from mooring_kernels.runtime.triton_launch import blocked_row_tile, on_device_of

_MEAN_BLOCK = 512


@triton.jit(do_not_specialize=["N"])
def text_supervised_loss_fwd_kernel(
    logits_ptr: tl.tensor,
    cosines_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    loss_rows_ptr: tl.tensor,
    lse_logits_ptr: tl.tensor,
    lse_texts_ptr: tl.tensor,
    N: int,
    inverse_tau: float,
    lambda_v: float,
    lambda_t: float,
    C: tl.constexpr,
    stride_logits_n: tl.constexpr,
    stride_logits_c: tl.constexpr,
    stride_cosines_n: tl.constexpr,
    stride_cosines_c: tl.constexpr,
    stride_labels_n: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    label = tl.load(labels_ptr + rows * stride_labels_n, mask=rows < N, other=-1)  # [BLOCK_N]
    valid = (label >= 0) & (label < C)  # masked rows are not read

    lowest = float("-inf")
    peak_z = tl.full([BLOCK_N], lowest, dtype=tl.float32)  # largest logit so far
    peak_v = tl.full([BLOCK_N], lowest, dtype=tl.float32)  # largest cosine so far
    total_z = tl.zeros([BLOCK_N], dtype=tl.float32)  # sum of exp(z - peak_z)
    total_v = tl.zeros([BLOCK_N], dtype=tl.float32)  # sum of exp((v - peak_v) / tau)
    mixed = tl.zeros([BLOCK_N], dtype=tl.float32)  # sum of exp((v - peak_v) / tau) * (z - peak_z)
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        inside = valid[:, None] & (columns < C)[None, :]  # [BLOCK_N, BLOCK_C]
        z = tl.load(
            logits_ptr + rows[:, None] * stride_logits_n + columns[None, :] * stride_logits_c,
            mask=inside,
            other=lowest,
        ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        v = tl.load(
            cosines_ptr + rows[:, None] * stride_cosines_n + columns[None, :] * stride_cosines_c,
            mask=inside,
            other=lowest,
        ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        raised_z = tl.maximum(peak_z, tl.max(z, axis=1))  # [BLOCK_N]
        raised_v = tl.maximum(peak_v, tl.max(v, axis=1))  # [BLOCK_N]
        origin_z = tl.where(raised_z == lowest, 0.0, raised_z)  # -inf - -inf would be NaN
        origin_v = tl.where(raised_v == lowest, 0.0, raised_v)
        below = z - origin_z[:, None]  # [BLOCK_N, BLOCK_C]
        weight = tl.exp((v - origin_v[:, None]) * inverse_tau)  # [BLOCK_N, BLOCK_C]
        decay_v = tl.exp((peak_v - origin_v) * inverse_tau)  # [BLOCK_N]
        moved_z = tl.where(peak_z == lowest, 0.0, peak_z - origin_z)  # [BLOCK_N]
        mixed = (mixed + total_v * moved_z) * decay_v + tl.sum(weight * tl.where(inside, below, 0.0), axis=1)
        total_v = total_v * decay_v + tl.sum(weight, axis=1)
        total_z = total_z * tl.exp(peak_z - origin_z) + tl.sum(tl.exp(below), axis=1)
        peak_z, peak_v = raised_z, raised_v

    log_z = tl.log(tl.where(valid, total_z, 1.0))  # [BLOCK_N]
    log_v = tl.log(tl.where(valid, total_v, 1.0))  # [BLOCK_N]
    own_z = tl.load(logits_ptr + rows * stride_logits_n + label * stride_logits_c, mask=valid, other=0.0).to(
        tl.float32
    )  # [BLOCK_N]
    own_v = tl.load(
        cosines_ptr + rows * stride_cosines_n + label * stride_cosines_c, mask=valid, other=0.0
    ).to(tl.float32)  # [BLOCK_N]
    # Everything relative to the peaks: a common shift costs no digits. A weight of 0 asks for nothing of its
    # term, also where that is infinite.
    loss = log_z - (1.0 - lambda_v) * (own_z - peak_z)  # [BLOCK_N]
    loss -= tl.where(lambda_v != 0.0, lambda_v * (mixed / tl.where(valid, total_v, 1.0)), 0.0)
    loss += tl.where(lambda_t != 0.0, lambda_t * (log_v - (own_v - peak_v) * inverse_tau), 0.0)
    tl.store(loss_rows_ptr + rows, tl.where(valid, loss, 0.0), mask=rows < N)
    tl.store(lse_logits_ptr + rows, tl.where(valid, peak_z + log_z, 0.0), mask=rows < N)
    tl.store(lse_texts_ptr + rows, tl.where(valid, peak_v * inverse_tau + log_v, 0.0), mask=rows < N)


@triton.jit(do_not_specialize=["N", "C"])
def text_supervised_loss_mean_kernel(
    loss_rows_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    inverse_count_ptr: tl.tensor,
    N: int,
    C: int,
    stride_labels_n: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    mean, inverse = mean_of_valid_rows(loss_rows_ptr, labels_ptr, stride_labels_n, N, C, BLOCK_N)
    tl.store(loss_ptr, mean)
    tl.store(inverse_count_ptr, inverse)


@triton.jit(do_not_specialize=["N"])
def text_supervised_loss_bwd_kernel(
    logits_ptr: tl.tensor,
    cosines_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    lse_logits_ptr: tl.tensor,
    lse_texts_ptr: tl.tensor,
    grad_loss_ptr: tl.tensor,
    inverse_count_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    grad_cosines_ptr: tl.tensor,
    N: int,
    inverse_tau: float,
    lambda_v: float,
    lambda_t: float,
    C: tl.constexpr,
    stride_logits_n: tl.constexpr,
    stride_logits_c: tl.constexpr,
    stride_cosines_n: tl.constexpr,
    stride_cosines_c: tl.constexpr,
    stride_labels_n: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    label = tl.load(labels_ptr + rows * stride_labels_n, mask=rows < N, other=-1)  # [BLOCK_N]
    valid = (label >= 0) & (label < C)
    in_tile = (rows < N)[:, None] & (columns < C)[None, :]  # [BLOCK_N, BLOCK_C]
    inside = in_tile & valid[:, None]  # [BLOCK_N, BLOCK_C]
    scale = tl.load(grad_loss_ptr).to(tl.float32) * tl.load(inverse_count_ptr)
    lse_texts = tl.load(lse_texts_ptr + rows, mask=rows < N, other=0.0)  # [BLOCK_N]
    v = tl.load(
        cosines_ptr + rows[:, None] * stride_cosines_n + columns[None, :] * stride_cosines_c,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
    reference = tl.exp(v * inverse_tau - lse_texts[:, None])  # [BLOCK_N, BLOCK_C]
    own = columns[None, :] == label[:, None]  # [BLOCK_N, BLOCK_C]
    out = rows[:, None] * C + columns[None, :]  # both gradients are contiguous
    if grad_logits_ptr is not None:
        lse_logits = tl.load(lse_logits_ptr + rows, mask=rows < N, other=0.0)  # [BLOCK_N]
        z = tl.load(
            logits_ptr + rows[:, None] * stride_logits_n + columns[None, :] * stride_logits_c,
            mask=inside,
            other=0.0,
        ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        target = tl.where(own, 1.0 - lambda_v, 0.0) + lambda_v * reference  # [BLOCK_N, BLOCK_C]
        grad_z = scale * (tl.exp(z - lse_logits[:, None]) - target)  # [BLOCK_N, BLOCK_C]
        tl.store(
            grad_logits_ptr + out,
            tl.where(inside, grad_z, 0.0).to(grad_logits_ptr.dtype.element_ty),
            mask=in_tile,
        )
    if grad_cosines_ptr is not None:
        grad_v = scale * lambda_t * inverse_tau * (reference - tl.where(own, 1.0, 0.0))  # [BLOCK_N, BLOCK_C]
        tl.store(
            grad_cosines_ptr + out,
            tl.where(inside, grad_v, 0.0).to(grad_cosines_ptr.dtype.element_ty),
            mask=in_tile,
        )


def text_supervised_loss_mean(loss_rows: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean over the valid rows and 1 / max(their number, 1), both 0-d fp32."""
    loss = torch.empty((), dtype=torch.float32, device=loss_rows.device)
    inverse_count = torch.empty_like(loss)
    with on_device_of(loss_rows):
        text_supervised_loss_mean_kernel[(1,)](
            loss_rows,
            labels,
            loss,
            inverse_count,
            loss_rows.shape[0],
            classes,
            stride_labels_n=labels.stride(0),
            BLOCK_N=_MEAN_BLOCK,
            num_warps=4,
        )
    return loss, inverse_count


def text_supervised_loss_fwd(
    logits: Tensor, cosines: Tensor, labels: Tensor, tau: float, lambda_v: float, lambda_t: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss over the valid rows, and what its backward needs.

    Args:
        logits, cosines: [B, C] fp32 or bf16 each, any strides.
        labels: [B] int64; a row whose label lies outside [0, C) is not read.
        tau, lambda_v, lambda_t: as in the op.

    Returns:
        loss and 1 / (number of valid rows), 0-d fp32; lse of logits and of cosines / tau, [B] fp32, 0 where masked.
    """
    batch, classes = logits.shape
    loss_rows = torch.empty(batch, dtype=torch.float32, device=logits.device)
    lse_logits, lse_texts = torch.empty_like(loss_rows), torch.empty_like(loss_rows)
    tile = blocked_row_tile(classes)
    if batch:
        with on_device_of(logits):
            text_supervised_loss_fwd_kernel[(triton.cdiv(batch, tile.rows),)](
                logits,
                cosines,
                labels,
                loss_rows,
                lse_logits,
                lse_texts,
                batch,
                1.0 / tau,
                float(lambda_v),
                float(lambda_t),
                C=classes,
                stride_logits_n=logits.stride(0),
                stride_logits_c=logits.stride(1),
                stride_cosines_n=cosines.stride(0),
                stride_cosines_c=cosines.stride(1),
                stride_labels_n=labels.stride(0),
                BLOCK_N=tile.rows,
                BLOCK_C=tile.columns,
                num_warps=tile.warps,
            )
    loss, inverse_count = text_supervised_loss_mean(loss_rows, labels, classes)
    return loss, inverse_count, lse_logits, lse_texts


def text_supervised_loss_bwd(
    logits: Tensor,
    cosines: Tensor,
    labels: Tensor,
    lse_logits: Tensor,
    lse_texts: Tensor,
    grad_loss: Tensor,
    inverse_count: Tensor,
    tau: float,
    lambda_v: float,
    lambda_t: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and cosines in their dtypes, contiguous, zero on masked rows.

    Args:
        logits, cosines, labels, tau, lambda_v, lambda_t: as in the forward.
        lse_logits, lse_texts, inverse_count: from the forward.
        grad_loss: 0-d upstream gradient on the same device.
        needs: which of the two gradients to compute; the other is an empty tensor.
    """
    batch, classes = logits.shape
    shapes = [(batch, classes) if needed else (0,) for needed in needs]
    grad_logits = torch.empty(shapes[0], dtype=logits.dtype, device=logits.device)
    grad_cosines = torch.empty(shapes[1], dtype=cosines.dtype, device=cosines.device)
    if batch == 0:
        return grad_logits, grad_cosines
    tile = blocked_row_tile(classes)
    with on_device_of(logits):
        text_supervised_loss_bwd_kernel[(triton.cdiv(batch, tile.rows), triton.cdiv(classes, tile.columns))](
            logits,
            cosines,
            labels,
            lse_logits,
            lse_texts,
            grad_loss,
            inverse_count,
            grad_logits if needs[0] else None,
            grad_cosines if needs[1] else None,
            batch,
            1.0 / tau,
            float(lambda_v),
            float(lambda_t),
            C=classes,
            stride_logits_n=logits.stride(0),
            stride_logits_c=logits.stride(1),
            stride_cosines_n=cosines.stride(0),
            stride_cosines_c=cosines.stride(1),
            stride_labels_n=labels.stride(0),
            BLOCK_N=tile.rows,
            BLOCK_C=tile.columns,
            num_warps=tile.warps,
        )
    return grad_logits, grad_cosines

"""Class means of the bank in Triton, without atomics.

Rows are ordered by label, then one program owns one class and a tile of columns. Every sum has a fixed order,
so the result is the same on every run, and nothing is read back to the host.
"""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.runtime.triton_launch import next_power_of_two, on_device_of, warps_for, whole_row_tile

NORM_FLOOR = 1e-12  # of u(v) = v / max(norm2(v), 1e-12)
_ENOUGH_PROGRAMS = 256  # about two per multiprocessor of the largest devices
_NARROWEST_BLOCK = 32  # 32 fp32 columns are one 128-byte line


@triton.jit(do_not_specialize=["K"])
def class_logits_fwd_kernel(
    tuned_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    head_weight_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    K: int,
    cga_scale: float,
    norm_floor: float,
    C: tl.constexpr,
    D: tl.constexpr,
    stride_tuned_k: tl.constexpr,
    stride_tuned_d: tl.constexpr,
    stride_labels_k: tl.constexpr,
    stride_head_weight_c: tl.constexpr,
    stride_head_weight_d: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    label = tl.load(labels_ptr + rows * stride_labels_k, mask=rows < K, other=-1)  # [BLOCK_K]
    valid = (label >= 0) & (label < C)
    inside = valid[:, None] & (columns < D)[None, :]  # [BLOCK_K, BLOCK_D]
    tuned = tl.load(
        tuned_ptr + rows[:, None] * stride_tuned_k + columns[None, :] * stride_tuned_d, mask=inside, other=0.0
    ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
    prototype = tl.load(
        head_weight_ptr + label[:, None] * stride_head_weight_c + columns[None, :] * stride_head_weight_d,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
    norm = tl.sqrt(tl.sum(prototype * prototype, axis=1))  # [BLOCK_K]
    dot = tl.sum(tuned * prototype, axis=1)  # [BLOCK_K]
    tl.store(logits_ptr + rows, cga_scale * dot / tl.maximum(norm, norm_floor), mask=rows < K)


@triton.jit
def class_statistics_fwd_kernel(
    frozen_ptr: tl.tensor,
    tuned_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    order_ptr: tl.tensor,
    start_ptr: tl.tensor,
    frozen_mean_ptr: tl.tensor,
    tuned_mean_ptr: tl.tensor,
    count_ptr: tl.tensor,
    D: tl.constexpr,
    stride_frozen_k: tl.constexpr,
    stride_frozen_d: tl.constexpr,
    stride_tuned_k: tl.constexpr,
    stride_tuned_d: tl.constexpr,
    stride_frozen_mean_c: tl.constexpr,
    stride_tuned_mean_c: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    c = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_columns = columns < D
    members = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    first = tl.load(start_ptr + c)
    end = tl.load(start_ptr + c + 1)  # rows order[first:end] carry label c

    largest = tl.full([BLOCK_K], float("-inf"), dtype=tl.float32)
    for begin in range(first, end, BLOCK_K):
        in_class = begin + members < end
        row = tl.load(order_ptr + begin + members, mask=in_class, other=0)  # [BLOCK_K]
        largest = tl.maximum(largest, tl.load(logits_ptr + row, mask=in_class, other=float("-inf")))
    peak = tl.max(largest, axis=0)  # largest confidence logit of the class: the softmax cannot overflow

    frozen_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    tuned_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    weight_sum = tl.zeros([BLOCK_K], dtype=tl.float32)
    for begin in range(first, end, BLOCK_K):
        in_class = begin + members < end
        row = tl.load(order_ptr + begin + members, mask=in_class, other=0)  # [BLOCK_K]
        logit = tl.load(logits_ptr + row, mask=in_class, other=float("-inf"))  # [BLOCK_K]
        weight = tl.exp(logit - peak)  # [BLOCK_K]; 0 outside the class
        inside = in_class[:, None] & in_columns[None, :]  # [BLOCK_K, BLOCK_D]
        frozen = tl.load(
            frozen_ptr + row[:, None] * stride_frozen_k + columns[None, :] * stride_frozen_d,
            mask=inside,
            other=0.0,
        ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
        tuned = tl.load(
            tuned_ptr + row[:, None] * stride_tuned_k + columns[None, :] * stride_tuned_d,
            mask=inside,
            other=0.0,
        ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
        frozen_sum += tl.sum(frozen, axis=0)
        tuned_sum += tl.sum(weight[:, None] * tuned, axis=0)
        weight_sum += weight

    count = (end - first).to(tl.float32)
    total = tl.sum(weight_sum, axis=0)  # at least 1 where the class has a row: its peak weighs exp(0)
    frozen_mean = frozen_sum / tl.maximum(count, 1.0)  # [BLOCK_D]; 0 for an absent class
    tuned_mean = tuned_sum / tl.where(count > 0.0, total, 1.0)  # [BLOCK_D]; 0 for an absent class
    tl.store(frozen_mean_ptr + c * stride_frozen_mean_c + columns, frozen_mean, mask=in_columns)
    tl.store(tuned_mean_ptr + c * stride_tuned_mean_c + columns, tuned_mean, mask=in_columns)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + c, count)


def _rows_by_label(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Stable order of the rows by label, and where each class starts in it: a CSR index.

    Returns:
        order [K] int64; start [C + 1] int64. Rows with a label outside [0, C) come last, in no class.
    """
    valid = (labels >= 0) & (labels < classes)
    key, order = torch.sort(torch.where(valid, labels, classes), stable=True)
    start = torch.searchsorted(key, torch.arange(classes + 1, dtype=key.dtype, device=key.device))
    return order, start


def _class_tile(rows: int, classes: int, width: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_D): rows about as many as a class has, columns narrow enough to fill the device."""
    block_d = 128
    while block_d > _NARROWEST_BLOCK and classes * triton.cdiv(width, block_d) < _ENOUGH_PROGRAMS:
        block_d //= 2
    block_k = min(max(next_power_of_two(-(-rows // max(classes, 1))), 4), 32)
    return block_k, block_d


def class_statistics_fwd(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, cga_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain class means of the frozen rows and confidence-weighted class means of the tuned rows.

    The weights are a softmax of ``cga_scale * tuned_k . u(head_weight_{l_k})`` over the rows of a class.

    Args:
        frozen: [K, D] fp32, bf16 or fp16, any strides.
        tuned: [K, D], the same.
        labels: [K] int64; a row whose label lies outside [0, C) is not read.
        head_weight: [C, D] fp32, bf16 or fp16, any strides.
        cga_scale: sharpness of the confidence weights.

    Returns:
        frozen_mean [C, D], tuned_mean [C, D], count [C], all fp32; zeros for an absent class.
    """
    (rows, width), classes = frozen.shape, head_weight.shape[0]
    frozen_mean = torch.empty((classes, width), dtype=torch.float32, device=frozen.device)
    tuned_mean = torch.empty_like(frozen_mean)
    count = torch.empty(classes, dtype=torch.float32, device=frozen.device)
    if rows == 0 or classes == 0:
        return frozen_mean.zero_(), tuned_mean.zero_(), count.zero_()
    logits = torch.empty(rows, dtype=torch.float32, device=frozen.device)
    tile = whole_row_tile(width)
    block_k, block_d = _class_tile(rows, classes, width)
    with on_device_of(frozen):
        class_logits_fwd_kernel[(triton.cdiv(rows, tile.rows),)](
            tuned,
            labels,
            head_weight,
            logits,
            rows,
            float(cga_scale),
            NORM_FLOOR,
            C=classes,
            D=width,
            stride_tuned_k=tuned.stride(0),
            stride_tuned_d=tuned.stride(1),
            stride_labels_k=labels.stride(0),
            stride_head_weight_c=head_weight.stride(0),
            stride_head_weight_d=head_weight.stride(1),
            BLOCK_K=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )
        order, start = _rows_by_label(labels, classes)
        class_statistics_fwd_kernel[(classes, triton.cdiv(width, block_d))](
            frozen,
            tuned,
            logits,
            order,
            start,
            frozen_mean,
            tuned_mean,
            count,
            D=width,
            stride_frozen_k=frozen.stride(0),
            stride_frozen_d=frozen.stride(1),
            stride_tuned_k=tuned.stride(0),
            stride_tuned_d=tuned.stride(1),
            stride_frozen_mean_c=frozen_mean.stride(0),
            stride_tuned_mean_c=tuned_mean.stride(0),
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            num_warps=warps_for(block_k * block_d),
        )
    return frozen_mean, tuned_mean, count

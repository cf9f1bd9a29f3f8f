"""Calibration of the frozen bank in Triton: the closed form of the block, around one GEMM for the rotation.

Without a rotation one kernel reads the bank once and writes the result once. With one, the residuals are
written in fp32, multiplied by the library's GEMM, and finished in place.
"""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.runtime.triton_launch import on_device_of, whole_row_tile

NORM_FLOOR = 1e-12  # of u(v) = v / max(norm2(v), 1e-12)


@triton.jit(do_not_specialize=["K"])
def calibrate_residual_fwd_kernel(
    frozen_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    frozen_mean_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    K: int,
    C: tl.constexpr,
    D: tl.constexpr,
    stride_frozen_k: tl.constexpr,
    stride_frozen_d: tl.constexpr,
    stride_labels_k: tl.constexpr,
    stride_frozen_mean_c: tl.constexpr,
    stride_residual_k: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_tile = (rows < K)[:, None] & (columns < D)[None, :]  # [BLOCK_K, BLOCK_D]
    label = tl.load(labels_ptr + rows * stride_labels_k, mask=rows < K, other=-1)  # [BLOCK_K]
    valid = (label >= 0) & (label < C)
    inside = in_tile & valid[:, None]  # [BLOCK_K, BLOCK_D]
    frozen = tl.load(
        frozen_ptr + rows[:, None] * stride_frozen_k + columns[None, :] * stride_frozen_d,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
    mean = tl.load(
        frozen_mean_ptr + label[:, None] * stride_frozen_mean_c + columns[None, :], mask=inside, other=0.0
    ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
    tl.store(residual_ptr + rows[:, None] * stride_residual_k + columns[None, :], frozen - mean, mask=in_tile)


@triton.jit(do_not_specialize=["K"])
def calibrate_fwd_kernel(
    source_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    frozen_mean_ptr: tl.tensor,
    tuned_mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    calibrated_ptr: tl.tensor,
    K: int,
    norm_floor: float,
    C: tl.constexpr,
    D: tl.constexpr,
    stride_source_k: tl.constexpr,
    stride_source_d: tl.constexpr,
    stride_labels_k: tl.constexpr,
    stride_frozen_mean_c: tl.constexpr,
    stride_tuned_mean_c: tl.constexpr,
    stride_calibrated_k: tl.constexpr,
    SUBTRACT_MEAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    # source may be calibrated itself: each program reads its rows whole before it writes them.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_tile = (rows < K)[:, None] & (columns < D)[None, :]  # [BLOCK_K, BLOCK_D]
    label = tl.load(labels_ptr + rows * stride_labels_k, mask=rows < K, other=-1)  # [BLOCK_K]
    valid = (label >= 0) & (label < C)
    inside = in_tile & valid[:, None]  # [BLOCK_K, BLOCK_D]
    residual = tl.load(
        source_ptr + rows[:, None] * stride_source_k + columns[None, :] * stride_source_d,
        mask=inside,
        other=0.0,
    ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
    if SUBTRACT_MEAN:
        residual -= tl.load(
            frozen_mean_ptr + label[:, None] * stride_frozen_mean_c + columns[None, :], mask=inside, other=0.0
        ).to(tl.float32)
    shift = tl.load(
        tuned_mean_ptr + label[:, None] * stride_tuned_mean_c + columns[None, :], mask=inside, other=0.0
    ).to(tl.float32)  # [BLOCK_K, BLOCK_D]
    moved = residual + shift  # [BLOCK_K, BLOCK_D]; 0 on masked rows, and 0 / norm_floor stays 0
    norm = tl.sqrt(tl.sum(moved * moved, axis=1))  # [BLOCK_K]
    factor = tl.load(scale_ptr).to(tl.float32) / tl.maximum(norm, norm_floor)  # [BLOCK_K]
    calibrated = tl.where(inside, moved * factor[:, None], 0.0)  # [BLOCK_K, BLOCK_D]
    tl.store(
        calibrated_ptr + rows[:, None] * stride_calibrated_k + columns[None, :], calibrated, mask=in_tile
    )


def calibrate_fwd(
    frozen: Tensor,
    tuned: Tensor,
    labels: Tensor,
    frozen_mean: Tensor,
    tuned_mean: Tensor,
    rotation: Tensor | None,
    scale: Tensor,
) -> Tensor:
    """``scale * u(R (frozen_k - frozen_mean_{l_k}) + tuned_mean_{l_k})`` for every bank row.

    Args:
        frozen: [K, D] fp32, bf16 or fp16, any strides.
        tuned: [K, D]; it acts through ``tuned_mean`` alone.
        labels: [K] int64; a row whose label lies outside [0, C) becomes zero.
        frozen_mean: [C, D] fp32.
        tuned_mean: [C, D] fp32.
        rotation: [D, D] acting on column vectors, or None for the identity.
        scale: 0-d tensor on the same device.

    Returns:
        [K, D] fp32, contiguous.
    """
    (rows, width), classes = frozen.shape, frozen_mean.shape[0]
    assert tuned.shape == frozen.shape and scale.device == frozen.device
    if rows == 0 or classes == 0:
        return torch.zeros((rows, width), dtype=torch.float32, device=frozen.device)
    frozen_mean, tuned_mean = frozen_mean.contiguous(), tuned_mean.contiguous()
    tile = whole_row_tile(width)
    grid = (triton.cdiv(rows, tile.rows),)
    calibrated = torch.empty((rows, width), dtype=torch.float32, device=frozen.device)
    with on_device_of(frozen):
        if rotation is None:
            return calibrate_translate_(
                frozen, labels, frozen_mean, tuned_mean, scale, calibrated, subtract_mean=True
            )
        calibrate_residual_fwd_kernel[grid](
            frozen,
            labels,
            frozen_mean,
            calibrated,
            rows,
            C=classes,
            D=width,
            stride_frozen_k=frozen.stride(0),
            stride_frozen_d=frozen.stride(1),
            stride_labels_k=labels.stride(0),
            stride_frozen_mean_c=frozen_mean.stride(0),
            stride_residual_k=calibrated.stride(0),
            BLOCK_K=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )
        # Autocast would round the residuals to bf16, and they are small differences.
        with torch.autocast(frozen.device.type, enabled=False):
            calibrated = torch.matmul(calibrated, rotation.to(torch.float32).T)
        return calibrate_translate_(
            calibrated, labels, frozen_mean, tuned_mean, scale, calibrated, subtract_mean=False
        )


def calibrate_translate_(
    source: Tensor,
    labels: Tensor,
    frozen_mean: Tensor,
    tuned_mean: Tensor,
    scale: Tensor,
    out: Tensor,
    subtract_mean: bool = True,
) -> Tensor:
    """Without a rotation, into the first rows of ``out`` [>= K, D] fp32, which may be ``source``.

    Args:
        source: [K, D] rows; with ``subtract_mean=False`` they are residuals already.
        labels: [K] int64. frozen_mean, tuned_mean: [C, D] fp32 with contiguous rows. scale: 0-d.
        out: contiguous.

    Returns:
        The rows written, [K, D].
    """
    rows, width = source.shape
    calibrated, tile = out[:rows], whole_row_tile(width)
    if rows == 0:
        return calibrated
    with on_device_of(source):
        calibrate_fwd_kernel[(triton.cdiv(rows, tile.rows),)](
            source,
            labels,
            frozen_mean,
            tuned_mean,
            scale,
            calibrated,
            rows,
            NORM_FLOOR,
            C=frozen_mean.shape[0],
            D=width,
            stride_source_k=source.stride(0),
            stride_source_d=source.stride(1),
            stride_labels_k=labels.stride(0),
            stride_frozen_mean_c=frozen_mean.stride(0),
            stride_tuned_mean_c=tuned_mean.stride(0),
            stride_calibrated_k=calibrated.stride(0),
            SUBTRACT_MEAN=subtract_mean,
            BLOCK_K=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )
    return calibrated

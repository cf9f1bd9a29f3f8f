"""Row normalisation in Triton: one read and one write of each row, the norm in fp32."""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.runtime.triton_launch import on_device_of, whole_row_tile


@triton.jit(do_not_specialize=["N"])
def row_normalise_fwd_kernel(
    x_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    N: int,
    eps: float,
    D: tl.constexpr,
    stride_x_n: tl.constexpr,
    stride_x_d: tl.constexpr,
    stride_unit_n: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_rows = rows < N
    inside = in_rows[:, None] & (columns < D)[None, :]  # [BLOCK_N, BLOCK_D]
    x = tl.load(x_ptr + rows[:, None] * stride_x_n + columns[None, :] * stride_x_d, mask=inside, other=0.0)
    x = x.to(tl.float32)  # [BLOCK_N, BLOCK_D]
    norm = tl.sqrt(tl.sum(x * x, axis=1))  # [BLOCK_N]
    unit = x / tl.maximum(norm, eps)[:, None]  # [BLOCK_N, BLOCK_D]
    tl.store(
        unit_ptr + rows[:, None] * stride_unit_n + columns[None, :],
        unit.to(unit_ptr.dtype.element_ty),
        mask=inside,
    )
    tl.store(norm_ptr + rows, norm, mask=in_rows)


@triton.jit(do_not_specialize=["N"])
def row_normalise_bwd_kernel(
    grad_unit_ptr: tl.tensor,
    grad_norm_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    N: int,
    eps: float,
    D: tl.constexpr,
    stride_grad_unit_n: tl.constexpr,
    stride_grad_unit_d: tl.constexpr,
    stride_grad_norm_n: tl.constexpr,
    stride_unit_n: tl.constexpr,
    stride_unit_d: tl.constexpr,
    stride_grad_x_n: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_rows = rows < N
    inside = in_rows[:, None] & (columns < D)[None, :]  # [BLOCK_N, BLOCK_D]
    unit = tl.load(
        unit_ptr + rows[:, None] * stride_unit_n + columns[None, :] * stride_unit_d, mask=inside, other=0.0
    ).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    norm = tl.load(norm_ptr + rows, mask=in_rows, other=1.0).to(tl.float32)  # [BLOCK_N]
    clamped = norm < eps  # there unit = x / eps, and the clamp lets no gradient through the norm
    divisor = tl.maximum(norm, eps)  # [BLOCK_N]
    grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    if grad_unit_ptr is not None:
        grad_unit = tl.load(
            grad_unit_ptr + rows[:, None] * stride_grad_unit_n + columns[None, :] * stride_grad_unit_d,
            mask=inside,
            other=0.0,
        ).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        along = tl.where(clamped, 0.0, tl.sum(grad_unit * unit, axis=1))  # [BLOCK_N]
        grad += (grad_unit - unit * along[:, None]) / divisor[:, None]
    if grad_norm_ptr is not None:
        grad_norm = tl.load(grad_norm_ptr + rows * stride_grad_norm_n, mask=in_rows, other=0.0).to(tl.float32)
        # d norm / d x = x / norm = unit * divisor / norm, and the subgradient 0 where x = 0.
        slope = tl.where(norm > 0.0, divisor / tl.where(norm > 0.0, norm, 1.0), 0.0)  # [BLOCK_N]
        grad += unit * (grad_norm * slope)[:, None]
    tl.store(
        grad_x_ptr + rows[:, None] * stride_grad_x_n + columns[None, :],
        grad.to(grad_x_ptr.dtype.element_ty),
        mask=inside,
    )


def row_normalise_fwd(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``unit = x / max(norm2(x), eps)`` row by row.

    Args:
        x: [N, D] fp32, bf16 or fp16, any strides.
        eps: lower bound of the divisor.

    Returns:
        ``unit`` [N, D] in the dtype of ``x``, contiguous; ``norm`` [N] fp32.
    """
    rows, width = x.shape
    unit = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    norm = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return unit, norm
    tile = whole_row_tile(width)
    with on_device_of(x):
        row_normalise_fwd_kernel[(triton.cdiv(rows, tile.rows),)](
            x,
            unit,
            norm,
            rows,
            float(eps),
            D=width,
            stride_x_n=x.stride(0),
            stride_x_d=x.stride(1),
            stride_unit_n=unit.stride(0),
            BLOCK_N=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )
    return unit, norm


def row_normalise_bwd(
    grad_unit: Tensor | None, grad_norm: Tensor | None, unit: Tensor, norm: Tensor, eps: float
) -> Tensor:
    """Gradient of both outputs of :func:`row_normalise_fwd` towards ``x``.

    Args:
        grad_unit: [N, D] any strides (0 for an expanded gradient), or None where ``unit`` has no gradient.
        grad_norm: [N] any stride, or None where ``norm`` has no gradient.
        unit: [N, D] as returned by the forward.
        norm: [N] fp32 as returned by the forward.
        eps: as in the forward.

    Returns:
        grad_x [N, D] in the dtype of ``unit``, contiguous.
    """
    rows, width = unit.shape
    grad_x = torch.empty((rows, width), dtype=unit.dtype, device=unit.device)
    if rows == 0:
        return grad_x
    tile = whole_row_tile(width)
    with on_device_of(unit):
        row_normalise_bwd_kernel[(triton.cdiv(rows, tile.rows),)](
            grad_unit,
            grad_norm,
            unit,
            norm.contiguous(),
            grad_x,
            rows,
            float(eps),
            D=width,
            stride_grad_unit_n=0 if grad_unit is None else grad_unit.stride(0),
            stride_grad_unit_d=0 if grad_unit is None else grad_unit.stride(1),
            stride_grad_norm_n=0 if grad_norm is None else grad_norm.stride(0),
            stride_unit_n=unit.stride(0),
            stride_unit_d=unit.stride(1),
            stride_grad_x_n=grad_x.stride(0),
            BLOCK_N=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )
    return grad_x

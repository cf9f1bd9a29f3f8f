"""BatchNorm with the statistics of its batch in Triton: one pass over x, then a small combination.

Each program writes its own partial sums and a second kernel adds them in a fixed order: no atomics, the same
result on every run, nothing read back to the host.
"""

# Triton's types know neither the launch options (num_warps) nor the element type of a pointer.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mooring_kernels.batchnorm_statistics.layout import channels_innermost, laid_out
from mooring_kernels.runtime.triton_launch import next_power_of_two, on_device_of, warps_for

_TILE = 2048  # elements in flight per program: 16 per thread at 4 warps
_WIDEST_PLANE_BLOCK = 1024
_MOST_PLANES = 32
_WIDEST_ROW_BLOCK = 128
_PROGRAMS = 2048  # enough for 132 multiprocessors several times over, few enough to combine quickly


@triton.jit
def _channel_affine(
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    channel: tl.tensor,
    inside: tl.tensor,
    eps: float,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Shift, scale and offset of the channels, [BLOCK] each."""
    shift = tl.load(running_mean_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    variance = tl.load(running_var_ptr + channel, mask=inside, other=1.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(variance + eps)
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    offset = tl.zeros_like(scale)
    if bias_ptr is not None:
        offset = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    return shift, scale, offset


@triton.jit(do_not_specialize=["planes"])
def batchnorm_statistics_planes_kernel(
    x_ptr: tl.tensor,
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    s1_ptr: tl.tensor,
    s2_ptr: tl.tensor,
    planes: int,
    eps: float,
    C: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    plane = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    in_planes = plane < planes
    shift, scale, offset = _channel_affine(
        running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, plane % C, in_planes, eps
    )  # [BLOCK_R]
    s1 = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_P], dtype=tl.float32)
    for begin in range(0, P, BLOCK_P):
        position = begin + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        inside = in_planes[:, None] & (position < P)[None, :]  # [BLOCK_R, BLOCK_P]
        at = plane[:, None] * P + position[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, x - shift[:, None], 0.0)
        s1 += d
        s2 += d * d
        tl.store(y_ptr + at, d * scale[:, None] + offset[:, None], mask=inside)
    tl.store(s1_ptr + plane, tl.sum(s1, axis=1), mask=in_planes)
    tl.store(s2_ptr + plane, tl.sum(s2, axis=1), mask=in_planes)


@triton.jit(do_not_specialize=["R", "rows_per_part"])
def batchnorm_statistics_rows_kernel(
    x_ptr: tl.tensor,
    running_mean_ptr: tl.tensor,
    running_var_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    s1_ptr: tl.tensor,
    s2_ptr: tl.tensor,
    R: int,
    rows_per_part: int,
    eps: float,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    part = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    in_channels = channel < C
    shift, scale, offset = _channel_affine(
        running_mean_ptr, running_var_ptr, weight_ptr, bias_ptr, channel, in_channels, eps
    )  # [BLOCK_C]
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, R)
    s1 = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    s2 = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for begin in range(first, last, BLOCK_R):
        row = begin + tl.arange(0, BLOCK_R).to(tl.int64)  # [BLOCK_R]
        inside = (row < last)[:, None] & in_channels[None, :]  # [BLOCK_R, BLOCK_C]
        at = row[:, None] * C + channel[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, x - shift[None, :], 0.0)
        s1 += d
        s2 += d * d
        tl.store(y_ptr + at, d * scale[None, :] + offset[None, :], mask=inside)
    tl.store(s1_ptr + part * C + channel, tl.sum(s1, axis=0), mask=in_channels)
    tl.store(s2_ptr + part * C + channel, tl.sum(s2, axis=0), mask=in_channels)


@triton.jit(do_not_specialize=["parts", "count"])
def batchnorm_statistics_combine_kernel(
    s1_ptr: tl.tensor,
    s2_ptr: tl.tensor,
    running_mean_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    var_ptr: tl.tensor,
    parts: int,
    count: int,
    C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    in_channels = channel < C
    sums = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float64)
    squares = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float64)
    for begin in range(0, parts, BLOCK_T):
        part = begin + tl.arange(0, BLOCK_T).to(tl.int64)  # [BLOCK_T]
        inside = (part < parts)[:, None] & in_channels[None, :]  # [BLOCK_T, BLOCK_C]
        at = part[:, None] * C + channel[None, :]
        sums += tl.load(s1_ptr + at, mask=inside, other=0.0).to(tl.float64)
        squares += tl.load(s2_ptr + at, mask=inside, other=0.0).to(tl.float64)
    s1, s2 = tl.sum(sums, axis=0), tl.sum(squares, axis=0)  # [BLOCK_C]
    n = tl.cast(count, tl.float64)
    between = s1 * s1 / n
    within = tl.where(s2 < between, 0.0, s2 - between)  # rounding may leave less than nothing; a NaN stays
    shift = tl.load(running_mean_ptr + channel, mask=in_channels, other=0.0).to(tl.float64)
    tl.store(mean_ptr + channel, (shift + s1 / n).to(tl.float32), mask=in_channels)
    tl.store(var_ptr + channel, (within / tl.maximum(n - 1.0, 1.0)).to(tl.float32), mask=in_channels)


def _plane_tile(positions: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_P): several whole planes where they are small."""
    block_p = max(min(next_power_of_two(positions), _WIDEST_PLANE_BLOCK), 16)
    return min(max(_TILE // block_p, 1), _MOST_PLANES), block_p


def _row_tile(rows: int, channels: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_C, rows per part): about ``_PROGRAMS`` parts times column blocks, none shorter than a tile."""
    block_c = max(min(next_power_of_two(channels), _WIDEST_ROW_BLOCK), 16)
    block_r = max(_TILE // block_c, 1)
    parts = max(_PROGRAMS // -(-channels // block_c), 1)
    return block_r, block_c, -(-rows // (parts * block_r)) * block_r


def batchnorm_statistics_fwd(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output of BatchNorm by its running statistics, and mean and unbiased variance of the batch.

    Args:
        x: [B, C, *spatial] fp32 or bf16; a copy is made unless it is contiguous or channels last.
        running_mean, running_var: [C]. weight, bias: [C] or None (1 and 0).
        eps: added to the variance.

    Returns:
        y like ``x``; mean [C], var [C] fp32.
    """
    x = laid_out(x)
    y = torch.empty_like(x)
    batch, channels = x.shape[:2]
    positions = x.numel() // (batch * channels)
    running_mean, running_var = running_mean.contiguous(), running_var.contiguous()
    layer = (
        running_mean,
        running_var,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    by_rows = channels_innermost(x)
    rows = batch * positions
    rows_in_tile, block_c, rows_per_part = _row_tile(rows, channels)
    parts = -(-rows // rows_per_part) if by_rows else batch
    s1 = torch.empty((parts, channels), dtype=torch.float32, device=x.device)
    s2 = torch.empty_like(s1)
    mean = torch.empty(channels, dtype=torch.float32, device=x.device)
    var = torch.empty_like(mean)
    with on_device_of(x):
        if by_rows:
            batchnorm_statistics_rows_kernel[(parts, triton.cdiv(channels, block_c))](
                x,
                *layer,
                y,
                s1,
                s2,
                rows,
                rows_per_part,
                float(eps),
                C=channels,
                BLOCK_R=rows_in_tile,
                BLOCK_C=block_c,
                num_warps=warps_for(rows_in_tile * block_c),
            )
        else:
            planes = batch * channels
            block_r, block_p = _plane_tile(positions)
            batchnorm_statistics_planes_kernel[(triton.cdiv(planes, block_r),)](
                x,
                *layer,
                y,
                s1,
                s2,
                planes,
                float(eps),
                C=channels,
                P=positions,
                BLOCK_R=block_r,
                BLOCK_P=block_p,
                num_warps=warps_for(block_r * block_p),
            )
        # eight channels are one 32-byte sector; tall tiles, so that few loads wait for one another
        block_t = min(max(next_power_of_two(parts), 2), 256)
        batchnorm_statistics_combine_kernel[(triton.cdiv(channels, 8),)](
            s1,
            s2,
            running_mean,
            mean,
            var,
            parts,
            batch * positions,
            C=channels,
            BLOCK_T=block_t,
            BLOCK_C=8,
            num_warps=warps_for(block_t * 8),
        )
    return y, mean, var

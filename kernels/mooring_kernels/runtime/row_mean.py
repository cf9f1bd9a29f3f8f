"""Mean of a value per row over the rows whose label is a class, on the device and in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mean_of_valid_rows(
    rows_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    stride_labels_n: tl.constexpr,
    N: int,
    C: int,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """For one program: the mean, 0 where no row is valid, and 1 / max(number of valid rows, 1)."""
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    count = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
        label = tl.load(labels_ptr + rows * stride_labels_n, mask=rows < N, other=-1)  # [BLOCK_N]
        valid = (label >= 0) & (label < C)
        total += tl.load(rows_ptr + rows, mask=valid, other=0.0)
        count += tl.where(valid, 1.0, 0.0)
    inverse = 1.0 / tl.maximum(tl.sum(count, axis=0), 1.0)
    return tl.sum(total, axis=0) * inverse, inverse

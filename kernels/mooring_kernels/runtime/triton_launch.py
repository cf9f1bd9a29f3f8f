"""Launch rules shared by the Triton kernels: tile shapes from the problem's shape, and the right device.

There is no autotuning. Every kernel here is bound by memory traffic, so a tile only has to keep enough
16-byte loads in flight and stay in registers; both follow from the width of a row. Widths and strides are
compile-time constants: they are fixed for a run, and let the compiler prove that 16-byte loads are aligned.
The number of rows is a run-time argument that is not specialised: a short last batch does not compile again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# 16 fp32 values per thread: four 16-byte loads in flight, and room for three such tiles within 64 registers.
_ELEMENTS_PER_WARP = 32 * 16
_ELEMENTS_PER_TILE = 4 * _ELEMENTS_PER_WARP
_MAX_ROWS_PER_TILE = 16
_MAX_WARPS = 32
WIDEST_ROW = 32 * 1024  # 32 values per thread at 32 warps; the widest row that is held in registers at once


class RowTile(NamedTuple):
    """Shape of the tile one program holds: ``rows`` x ``columns`` values over ``warps`` warps."""

    rows: int
    columns: int
    warps: int


def next_power_of_two(value: int) -> int:
    """Smallest power of two that is at least ``value`` (1 for 0)."""
    return 1 << max(value - 1, 0).bit_length()


def warps_for(elements: int) -> int:
    """Warps that give each thread about 16 of a tile's ``elements``; a power of two from 1 to 32."""
    return min(max(next_power_of_two(elements) // _ELEMENTS_PER_WARP, 1), _MAX_WARPS)


def whole_row_tile(width: int) -> RowTile:
    """Tile that holds whole rows of ``width`` values, several of them where rows are short.

    Raises:
        ValueError: the row is wider than registers allow.
    """
    if width > WIDEST_ROW:
        raise ValueError(
            f"rows must be at most {WIDEST_ROW} wide for the Triton kernels; got {width}: "
            "use impl='reference'"
        )
    columns = max(next_power_of_two(width), 16)
    rows = min(max(_ELEMENTS_PER_TILE // columns, 1), _MAX_ROWS_PER_TILE)
    return RowTile(rows, columns, warps_for(rows * columns))


def blocked_row_tile(width: int, *, widest_block: int = 4096) -> RowTile:
    """Tile for a kernel that walks a row of any ``width`` in blocks of at most ``widest_block`` columns."""
    return whole_row_tile(min(width, widest_block))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which a Triton launch goes to ``tensor``'s GPU: Triton launches on the current one.

    On a CPU tensor (Triton's interpreter) there is nothing to select.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

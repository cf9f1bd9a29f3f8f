"""The two orders in memory that a BatchNorm input has: planes of one channel, or rows of all channels."""

from __future__ import annotations

from torch import Tensor


def channels_innermost(x: Tensor) -> bool:
    """Whether [B, C, *spatial] lies as [B, *spatial, C]: channels last, or no positions at all."""
    return x.movedim(1, -1).is_contiguous()


def laid_out(x: Tensor) -> Tensor:
    """``x`` where it is contiguous in either order, else a contiguous copy."""
    return x if x.is_contiguous() or channels_innermost(x) else x.contiguous()

"""Exponential moving average of tensors, the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype


def ema(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: Tensor | float) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target.is_floating_point():
            dtype = working_dtype(target)
            target.copy_(momentum * target.to(dtype) + (1 - momentum) * source.to(dtype))
        else:
            target.copy_(source)


def ema_step(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: Tensor | float) -> None:
    """The same by torch's multi-tensor lerp, which reads each value once: ``t <- t + weight (s - t)``.

    Args:
        targets: floating-point, of any dtypes.
        sources: cast to the target's dtype where it differs.
        weight: 1 - momentum; a tensor lies on the targets' device.
    """
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        same, ends = by_dtype.setdefault(target.dtype, ([], []))
        same.append(target)
        ends.append(source.to(target.dtype))
    for dtype, (same, ends) in by_dtype.items():
        if isinstance(weight, Tensor):
            torch._foreach_lerp_(same, ends, [weight.to(dtype)] * len(same))
        else:
            torch._foreach_lerp_(same, ends, weight)

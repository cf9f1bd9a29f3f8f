"""Moving average on the CPU: torch's lerp for equal dtypes, the native module where the source is bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.ema.reference import ema_step
from mooring_kernels.runtime.native import same_dense_layout, threads


def ema_fwd(targets: list[Tensor], sources: list[Tensor], weight: float) -> None:
    """All floating-point; torch's lerp alone would first write an fp32 copy of each bfloat16 source."""
    fused: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for pair in zip(targets, sources, strict=True):
        target, source = pair
        fits = target.dtype == torch.float32 and source.dtype == torch.bfloat16
        (fused if fits and same_dense_layout(target, source) else others).append(pair)
    if fused:
        _C.lerp_from_bf16([(t.data_ptr(), s.data_ptr(), t.numel()) for t, s in fused], weight, threads())
    if others:
        ema_step([t for t, _ in others], [s for _, s in others], weight)

"""Row normalisation, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype


def row_normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(working_dtype(x))
    norm = torch.linalg.vector_norm(wide, dim=1)
    unit = wide / norm.clamp_min(eps)[:, None]
    return unit.to(x.dtype), norm

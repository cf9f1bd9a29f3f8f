"""Moving frozen rows onto the tuned classes, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype

NORM_FLOOR = 1e-12


def calibrate(
    frozen: Tensor,
    labels: Tensor,
    frozen_mean: Tensor,
    tuned_mean: Tensor,
    rotation: Tensor | None,
    scale: Tensor,
) -> Tensor:
    """``scale * u(R (frozen_k - frozen_mean[l_k]) + tuned_mean[l_k])``; zero on masked rows."""
    dtype = working_dtype(frozen, frozen_mean, *([] if rotation is None else [rotation]))
    valid = (labels >= 0) & (labels < frozen_mean.shape[0])
    index = torch.where(valid, labels, 0)
    residual = torch.where(valid[:, None], frozen.to(dtype) - frozen_mean.to(dtype)[index], 0)
    if rotation is not None:
        # autocast would round the residuals, which are small differences, to 8 bits
        with torch.autocast(frozen.device.type, enabled=False):
            residual = residual @ rotation.to(dtype).T
    moved = residual + tuned_mean.to(dtype)[index]
    norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True).clamp_min(NORM_FLOOR)
    return torch.where(valid[:, None], scale.to(dtype) * (moved / norm), 0)

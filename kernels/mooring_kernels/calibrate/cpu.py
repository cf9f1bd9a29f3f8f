"""Moving frozen rows onto the tuned classes by the native module: the GEMM is torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def calibrate_fwd(
    frozen: Tensor,
    labels: Tensor,
    frozen_mean: Tensor,
    tuned_mean: Tensor,
    rotation: Tensor | None,
    scale: Tensor,
) -> Tensor:
    factor = float(scale)
    frozen, labels = frozen.contiguous(), labels.contiguous()
    frozen_mean, tuned_mean = frozen_mean.contiguous(), tuned_mean.contiguous()
    (rows, width), classes = frozen.shape, frozen_mean.shape[0]
    shape = rows, width, classes, threads()
    moved = torch.empty(rows, width, dtype=torch.float32)
    source = frozen.data_ptr(), dtype_code(frozen), labels.data_ptr(), frozen_mean.data_ptr()
    if rotation is None:
        _C.calibrate_translate(*source, tuned_mean.data_ptr(), factor, moved.data_ptr(), *shape)
        return moved
    _C.calibrate_residual(*source, moved.data_ptr(), *shape)
    # autocast would round the residuals, which are small differences, to 8 bits
    with torch.autocast("cpu", enabled=False):
        moved = torch.matmul(moved, rotation.float().T)
    _C.calibrate_place(moved.data_ptr(), labels.data_ptr(), tuned_mean.data_ptr(), factor, *shape)
    return moved

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
    moved = torch.empty(rows, width, dtype=torch.float32)
    if rotation is None:
        return calibrate_translate_(frozen, labels, frozen_mean, tuned_mean, factor, moved)
    shape = rows, width, classes, threads()
    source = frozen.data_ptr(), dtype_code(frozen), labels.data_ptr(), frozen_mean.data_ptr()
    _C.calibrate_residual(*source, moved.data_ptr(), *shape)
    # autocast would round the residuals, which are small differences, to 8 bits
    with torch.autocast("cpu", enabled=False):
        moved = torch.matmul(moved, rotation.float().T)
    _C.calibrate_place(moved.data_ptr(), labels.data_ptr(), tuned_mean.data_ptr(), factor, *shape)
    return moved


def calibrate_translate_(
    frozen: Tensor, labels: Tensor, frozen_mean: Tensor, tuned_mean: Tensor, factor: float, out: Tensor
) -> Tensor:
    """Without a rotation, into the first rows of ``out`` [>= K, D] fp32; all contiguous. Returns these rows."""
    rows, width = frozen.shape
    moved = out[:rows]
    _C.calibrate_translate(
        frozen.data_ptr(),
        dtype_code(frozen),
        labels.data_ptr(),
        frozen_mean.data_ptr(),
        tuned_mean.data_ptr(),
        factor,
        moved.data_ptr(),
        rows,
        width,
        frozen_mean.shape[0],
        threads(),
    )
    return moved

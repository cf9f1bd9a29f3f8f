"""BatchNorm with the statistics of its batch by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.batchnorm_statistics.layout import channels_innermost, laid_out
from mooring_kernels.runtime.native import dtype_code, threads


def batchnorm_statistics_fwd(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x = laid_out(x)
    y = torch.empty_like(x)
    batch, channels = x.shape[:2]
    positions = x.numel() // (batch * channels)
    # held in names: their memory must outlive the call
    means, variances = running_mean.float().contiguous(), running_var.float().contiguous()
    weights = None if weight is None else weight.float().contiguous()
    biases = None if bias is None else bias.float().contiguous()
    mean, var = torch.empty_like(means), torch.empty_like(means)
    layer = (
        means.data_ptr(),
        variances.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        0 if biases is None else biases.data_ptr(),
        eps,
    )
    pointers = (x.data_ptr(), dtype_code(x), layer, y.data_ptr(), mean.data_ptr(), var.data_ptr())
    if channels_innermost(x):
        _C.batchnorm_statistics_rows(*pointers, batch * positions, channels, threads())
    else:
        _C.batchnorm_statistics_planes(*pointers, batch, channels, positions, threads())
    return y, mean, var

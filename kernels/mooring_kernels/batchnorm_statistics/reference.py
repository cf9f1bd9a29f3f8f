"""BatchNorm in eval mode together with the statistics of its batch, the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype


def batchnorm_statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = working_dtype(x)
    values = x.to(dtype)
    of_channel = [0, *range(2, x.dim())]
    count = x.numel() // x.shape[1]
    var, mean = torch.var_mean(values, of_channel, correction=1 if count > 1 else 0)
    running_mean, running_var = running_mean.to(dtype), running_var.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y = F.batch_norm(values, running_mean, running_var, weight, bias, training=False, eps=eps)
    return y.to(x.dtype), mean, var

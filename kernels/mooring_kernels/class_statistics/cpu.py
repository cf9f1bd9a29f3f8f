"""Class means of a bank by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def class_statistics_fwd(
    frozen: Tensor, tuned: Tensor, labels: Tensor, head_weight: Tensor, cga_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    frozen, tuned, labels = frozen.contiguous(), tuned.contiguous(), labels.contiguous()
    head_weight = head_weight.float().contiguous()
    frozen_mean, tuned_mean = torch.empty_like(head_weight), torch.empty_like(head_weight)
    count = torch.empty(head_weight.shape[0], dtype=torch.float32)
    _C.class_statistics(
        frozen.data_ptr(),
        dtype_code(frozen),
        tuned.data_ptr(),
        dtype_code(tuned),
        labels.data_ptr(),
        head_weight.data_ptr(),
        cga_scale,
        frozen_mean.data_ptr(),
        tuned_mean.data_ptr(),
        count.data_ptr(),
        frozen.shape[0],
        frozen.shape[1],
        head_weight.shape[0],
        threads(),
    )
    return frozen_mean, tuned_mean, count

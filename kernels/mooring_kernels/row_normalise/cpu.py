"""Row normalisation by the native module."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, threads


def row_normalise_fwd(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows, width = x.shape
    unit = torch.empty_like(x)
    norm = torch.empty(rows, dtype=torch.float32)
    _C.row_normalise_forward(
        x.data_ptr(), dtype_code(x), eps, unit.data_ptr(), norm.data_ptr(), rows, width, threads()
    )
    return unit, norm


def row_normalise_bwd(grad_unit: Tensor, grad_norm: Tensor, unit: Tensor, norm: Tensor, eps: float) -> Tensor:
    grad_unit, grad_norm = grad_unit.to(unit.dtype).contiguous(), grad_norm.float().contiguous()
    unit, norm = unit.contiguous(), norm.contiguous()
    rows, width = unit.shape
    grad_x = torch.empty_like(unit)
    _C.row_normalise_backward(
        grad_unit.data_ptr(),
        grad_norm.data_ptr(),
        unit.data_ptr(),
        norm.data_ptr(),
        dtype_code(unit),
        eps,
        grad_x.data_ptr(),
        rows,
        width,
        threads(),
    )
    return grad_x

"""The penalty by the native module: each parameter and its anchor are read once, nothing else is written."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels import _C
from mooring_kernels.runtime.native import dtype_code, same_dense_layout, threads

Pairs = list[tuple[Tensor, Tensor | None]]


def _in_step(parameters: list[Tensor], anchors: list[Tensor | None]) -> Pairs:
    """Parameter and anchor in one order of memory, the parameter's; copied only where they are not."""
    pairs: Pairs = []
    for parameter, anchor in zip(parameters, anchors, strict=True):
        if same_dense_layout(parameter, parameter if anchor is None else anchor):
            pairs.append((parameter, anchor))
        else:
            dense = torch.empty_like(parameter).copy_(parameter)
            other = None if anchor is None else torch.empty_like(dense, dtype=anchor.dtype).copy_(anchor)
            pairs.append((dense, other))
    return pairs


def _described(pairs: Pairs) -> list[tuple[int, int, int, int, int]]:
    return [
        (p.data_ptr(), dtype_code(p), 0, 0, p.numel())
        if a is None
        else (p.data_ptr(), dtype_code(p), a.data_ptr(), dtype_code(a), p.numel())
        for p, a in pairs
    ]


def squared_distance(parameters: list[Tensor], anchors: list[Tensor | None]) -> float:
    pairs = _in_step(parameters, anchors)  # kept by name: addresses do not keep a copy alive
    return _C.l2_sp_forward(_described(pairs), threads())


def scaled_drift(parameters: list[Tensor], anchors: list[Tensor | None], scale: float) -> list[Tensor]:
    pairs = _in_step(parameters, anchors)
    # the layout of the parameters, as the operator's fake says: a dense tensor keeps its strides in empty_like
    grads = [torch.empty_like(p) for p, _ in pairs]
    _C.l2_sp_backward(_described(pairs), [grad.data_ptr() for grad in grads], scale, threads())
    return grads

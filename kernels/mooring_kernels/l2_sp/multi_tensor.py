"""The penalty by torch's multi-tensor operations: a few launches for all parameters, on any device.

The differences are written out, in fp32: one more copy of the parameters for as long as the call lasts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _drift(parameters: list[Tensor], anchors: list[Tensor | None]) -> list[Tensor]:
    """``p - p0`` in fp32, in tensors of their own."""
    pairs = [(p, a) for p, a in zip(parameters, anchors, strict=True) if a is not None]
    differences = iter(
        torch._foreach_sub([p.float() for p, _ in pairs], [a.float() for _, a in pairs]) if pairs else ()
    )
    return [
        p.to(torch.float32, copy=True) if a is None else next(differences)
        for p, a in zip(parameters, anchors, strict=True)
    ]


def squared_distance(parameters: list[Tensor], anchors: list[Tensor | None]) -> Tensor:
    return torch.stack(torch._foreach_norm(_drift(parameters, anchors))).square().sum()


def scaled_drift(parameters: list[Tensor], anchors: list[Tensor | None], scale: Tensor) -> list[Tensor]:
    drift = _drift(parameters, anchors)
    torch._foreach_mul_(drift, scale)
    return [d.to(p.dtype) for d, p in zip(drift, parameters, strict=True)]

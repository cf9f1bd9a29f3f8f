"""Penalty on the distance to the starting point, the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype


def l2_sp(parameters: Sequence[Tensor], anchors: Sequence[Tensor | None], weight: float) -> Tensor:
    dtype = working_dtype(*parameters, *(a for a in anchors if a is not None))
    terms = []
    for parameter, anchor in zip(parameters, anchors, strict=True):
        drift = parameter.to(dtype) if anchor is None else parameter.to(dtype) - anchor.to(dtype)
        terms.append(drift.square().sum())
    return 0.5 * weight * torch.stack(terms).sum()

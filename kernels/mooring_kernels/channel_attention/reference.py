"""Attention over channels, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from mooring_kernels.runtime.dispatch import working_dtype


def channel_attention(x: Tensor) -> Tensor:
    values = x.to(working_dtype(x))
    energy = values @ values.transpose(1, 2)
    return (torch.softmax(energy.amax(2, keepdim=True) - energy, 2) @ values).to(x.dtype)

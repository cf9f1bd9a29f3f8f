"""One process, one device: backward, clip and step by PyTorch itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mooring.train.precision import autocast_dtype


class LocalBackend:
    """Runs the method where it is, without a process group.

    Args:
        device: where parameters and batches lie.
        precision: ``fp32`` or ``bf16`` (autocast; parameters stay fp32).
    """

    name = "local"
    rank = 0
    world = 1

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self.dtype = autocast_dtype(precision)

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which matrix products and convolutions run in the run's precision."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Scales the gradients to at most ``limit`` in L2 norm; returns the norm before (device scalar)."""
        return nn.utils.clip_grad_norm_(parameters, limit, foreach=True)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

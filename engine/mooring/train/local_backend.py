"""One process, one device: backward, clip and step by PyTorch itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mooring.data.batch import Batch
from mooring.distributed import Ranks
from mooring.methods.base import At, Method, StepOutput
from mooring.train.optimizer_state import (
    load_optimizer_state,
    load_whole_state,
    optimizer_state,
    trained_names,
)
from mooring.train.precision import autocast_dtype


class LocalBackend:
    """Runs the method where it is, without a process group.

    Args:
        device: where parameters and batches lie.
        precision: ``fp32`` or ``bf16`` (autocast; parameters stay fp32).
    """

    name = "local"

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self.ranks = Ranks()
        self.dtype = autocast_dtype(precision)
        self.rank, self.world = 0, 1
        self.divided = False
        self.method: Method
        self.optimizer: Optimizer

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which matrix products and convolutions run in the run's precision."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def prepare(self, method: Method, optimizer: Optimizer) -> None:
        self.method, self.optimizer = method, optimizer

    def forward(self, batch: Batch, at: At) -> StepOutput:
        with self.autocast():
            return self.method(batch, at)

    def predict(self, images: Tensor) -> Tensor:
        return self.method.predict(images)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def clip(self, limit: float) -> Tensor:
        """Scales the gradients to at most ``limit`` in L2 norm; returns the norm before (device scalar)."""
        return nn.utils.clip_grad_norm_(self._trained(), limit, foreach=True)

    def _trained(self) -> list[nn.Parameter]:
        """Parameters that this step has a gradient for."""
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norms(self) -> tuple[list[nn.Parameter], Tensor]:
        parameters = self._trained()
        if not parameters:
            return [], torch.zeros(0, device=self.device)
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        return parameters, torch.stack([norm.float() for norm in norms])

    def weights(self) -> dict[str, Tensor]:
        return dict(self.method.state_dict())

    def whole(self, module: nn.Module, *, write: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        with self.whole(self.method, write=True):
            self.method.load_state_dict(dict(weights))

    def state_dict(self) -> dict[str, Any]:
        return optimizer_state(self.optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_optimizer_state(self.optimizer, state)

    def takes(self, state: Mapping[str, Any]) -> bool:
        return "state" in state

    def load_redistributed(self, states: Iterable[Mapping[str, Any]]) -> None:
        load_whole_state(self.optimizer, states, trained_names(self.optimizer, self.method))

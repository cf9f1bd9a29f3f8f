"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mooring.errors import RunFolderError
from mooring.models.partition import chunks, whole


class WeightEMA:
    """``ema <- d ema + (1 - d) weight`` for parameters; buffers are copied.

    With warm-up the decay of update n (from 0) is ``min(decay, (1 + n) / (10 + n))``: a short run is not
    left at its first weights. The average is whole on every rank; parameters that ranks divide are gathered for it.

    Args:
        module: its parameters and buffers are followed, on the devices where they lie.
        decay: d, in (0, 1).
        warm_up: ramp the decay up.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, *, warm_up: bool = True) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay must lie in (0, 1); got {decay}")
        self.decay = decay
        self.warm_up = warm_up
        self.updates = 0
        self.parameters = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards ``module``'s weights; call once per optimizer step. No host sync."""
        decay = self.decay
        if self.warm_up:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        names = {id(p): name for name, p in module.named_parameters()}
        for chunk in chunks(module.parameters()):
            with whole(chunk):
                averages = [self.parameters[names[id(p)]] for p in chunk]
                torch._foreach_lerp_(averages, [p.detach() for p in chunk], 1.0 - decay)
        self._copy_buffers(module)
        self.updates += 1

    @torch.no_grad()
    def copy_from(self, module: nn.Module) -> None:
        """Makes the average equal to ``module``'s weights."""
        names = {id(p): name for name, p in module.named_parameters()}
        for chunk in chunks(module.parameters()):
            with whole(chunk):
                for p in chunk:
                    self.parameters[names[id(p)]].copy_(p)
        self._copy_buffers(module)

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Inside, ``module`` has the averaged weights; afterwards its own again, bit for bit."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    def state_dict(self) -> dict[str, Any]:
        """Everything, by reference; the next update writes into the same tensors."""
        return {"updates": self.updates, "parameters": dict(self.parameters), "buffers": dict(self.buffers)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the average exactly.

        Raises:
            RunFolderError: the state is of another module.
        """
        for own, given in ((self.parameters, state["parameters"]), (self.buffers, state["buffers"])):
            different = sorted(set(own) ^ set(given))
            different += [n for n in own if n in given and own[n].shape != given[n].shape]
            if different:
                raise RunFolderError(
                    f"the saved weight EMA is of another model; these differ: {', '.join(different)}"
                )
        for own, given in ((self.parameters, state["parameters"]), (self.buffers, state["buffers"])):
            for name, tensor in own.items():
                tensor.copy_(given[name])
        self.updates = int(state["updates"])

    def _copy_buffers(self, module: nn.Module) -> None:
        for name, buffer in module.named_buffers():
            self.buffers[name].copy_(buffer)

    @torch.no_grad()
    def _swap(self, module: nn.Module) -> None:
        # Values change places, not tensors: the optimizer and a wrapper keep their references.
        names = {id(p): name for name, p in module.named_parameters()}
        for chunk in chunks(module.parameters()):
            with whole(chunk, write=True):
                for p in chunk:
                    _exchange(p, self.parameters[names[id(p)]])
        for name, buffer in module.named_buffers():
            _exchange(buffer, self.buffers[name])


def _exchange(live: Tensor, average: Tensor) -> None:
    held = live.detach().clone()
    live.copy_(average)
    average.copy_(held)

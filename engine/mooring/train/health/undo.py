"""What a step changes before it reaches the weights, kept so that a bad step leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from mooring.methods.base import Method


class Undo:
    """Buffers, random streams and places in the data as they were before the step under way.

    The copies of the buffers (running statistics, a key network) are made on the device and overwritten by the next
    step's.

    Args:
        method: ``forward_state`` says what its forwards change.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._generators: list[tuple[Generator, Tensor]] = []
        self._streams: dict[str, Any] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Takes the copies; the host does not wait for the device."""
        tensors, generators = self._method.forward_state()
        if [id(t) for t in tensors] != [id(t) for t in self._tensors]:
            self._tensors = list(tensors)
            self._copies = [torch.empty_like(t) for t in tensors]
        if tensors:
            torch._foreach_copy_(self._copies, self._tensors)
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._streams = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._streams["cuda"] = torch.cuda.get_rng_state()

    @torch.no_grad()
    def put_back_buffers(self) -> None:
        """What forwards have written into buffers is taken back."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._copies)

    def put_back_streams(self) -> None:
        """The next step draws the random numbers of this one."""
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._streams["python"])
        np.random.set_state(self._streams["numpy"])  # noqa: NPY002
        torch.set_rng_state(self._streams["torch"])
        if "cuda" in self._streams:
            torch.cuda.set_rng_state(self._streams["cuda"])

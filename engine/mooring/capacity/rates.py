"""How fast a machine computes, moves and sends: given, assumed, or measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import log2

import torch


@dataclass(frozen=True, slots=True)
class Rates:
    """What one rank achieves, not what is printed on the box. Bytes and operations per second.

    The defaults are round numbers for one H100 or H200 with a 400 Gbit/s link of its own: assumptions, to be
    replaced by what ``mooring plan --measure`` and ``mooring preflight`` show on the machines themselves.

    Attributes:
        matmul: floating-point operations per second of matrix products in the run's precision.
        memory: bytes read and written by operations that are bound by memory.
        link: bytes that a rank sends in a collective over several nodes (what nccl-tests call bus bandwidth).
        node_link: the same inside one node.
        latency: seconds of one collective, for every doubling of the ranks.
        launch: seconds to start one operation; what is less work than that waits for the host.
    """

    matmul: float = 400e12
    memory: float = 2.4e12
    link: float = 40e9
    node_link: float = 200e9
    latency: float = 10e-6
    launch: float = 4e-6

    def seconds_to_send(self, sent: float, world: int, gpus_per_node: int, collectives: int) -> float:
        """Time of collectives in which every rank sends ``sent`` bytes in all."""
        if world == 1:
            return 0.0
        rate = self.node_link if world <= gpus_per_node else self.link
        return sent / rate + collectives * self.latency * max(1.0, log2(world))


def measured(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Matrix products in FLOP/s and copies in bytes/s on this device, now: the best of a few tries.

    A copy counts twice, read and written.
    """
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn((256 if device.type == "cuda" else 32) << 20, device=device)
    target = torch.empty_like(source)
    matmul = 2 * size**3 / _best(lambda: torch.mm(a, b), device)
    return matmul, 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], object], device: torch.device, tries: int = 5) -> float:
    seconds = []
    for _ in range(tries + 1):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""What the machine itself does in the same rounds: a copy of the op's own number of bytes, a matrix product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import Call

COPY, CLONE, MATMUL = "copy rate", "clone rate", "matmul rate"
_SMALLEST, _LARGEST = (
    2**16,
    2**29,
)  # bytes moved by one copy: under it only the call is timed, over it the rate is flat
_BEYOND_CACHE = 2**27  # one pair of buffers of this weight evicts itself


@dataclass(frozen=True)
class Yardsticks:
    """Calls to time beside the candidates, and what they move and compute."""

    calls: dict[str, Call]
    copy_bytes: int  # read and written by one copy
    matmul_width: int

    @property
    def matmul_flop(self) -> int:
        return 2 * self.matmul_width**3


def yardsticks(device: torch.device, counted_bytes: int, sets: int, *, quick: bool) -> Yardsticks:
    """A copy that moves ``counted_bytes`` (half read, half written) and a square fp32 matrix product.

    The copy walks through as many pairs of buffers as the candidates have sets of inputs, so that a small op
    and its yardstick find their data in the same level of cache. The clone moves as much into fresh memory, as an op
    does that returns a new tensor: above 32 MiB the CPU's allocator returns every block, and its pages fault again.
    """
    moved = min(max(counted_bytes, _SMALLEST), _LARGEST) // 8 * 8
    pairs = [
        (torch.rand(moved // 8, device=device), torch.zeros(moved // 8, device=device))
        for _ in range(1 if moved >= _BEYOND_CACHE else sets)
    ]
    width = 64 if quick else 4096 if device.type == "cuda" else 512
    left, right = (torch.rand(width, width, device=device) for _ in range(2))
    turn = 0

    def copy() -> None:
        nonlocal turn
        turn = (turn + 1) % len(pairs)
        source, target = pairs[turn]
        target.copy_(source)

    def clone() -> Tensor:
        return pairs[turn][0].clone()

    return Yardsticks({COPY: copy, CLONE: clone, MATMUL: lambda: left @ right}, moved, width)

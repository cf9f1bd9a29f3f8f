"""Bytes that exchanges between ranks carry, by what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Literal

from torch import Tensor

Exchange = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce"]
# What one of W ranks sends for each byte that it hands over, where ranks form a ring; of a broadcast the mean.
_RING: dict[Exchange, Callable[[int], float]] = {
    "all_reduce": lambda world: 2 * (world - 1) / world,
    "all_gather": lambda world: world - 1,
    "reduce_scatter": lambda world: (world - 1) / world,
    "broadcast": lambda world: (world - 1) / world,
    "reduce": lambda world: (world - 1) / world,
}


class Traffic:
    """What this rank exchanged since its process began.

    Attributes:
        bytes: handed to exchanges: the tensor of an all-reduce, a rank's own part in an all-gather.
        sent: what of it leaves the rank if ranks form a ring, which is the least that is possible.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def count(self, tensor: Tensor, purpose: str, world: int, exchange: Exchange = "all_reduce") -> None:
        """Counts one exchange of a tensor among ``world`` ranks."""
        handed = tensor.numel() * tensor.element_size()
        self.bytes[purpose] += handed
        self.sent[purpose] += round(_RING[exchange](world) * handed)

    def since(self, before: Counter[str]) -> dict[str, int]:
        """Bytes handed over, by purpose, on top of an earlier copy of ``bytes``."""
        return grown(self.bytes, before)


def grown(counts: Counter[str], before: Counter[str]) -> dict[str, int]:
    """By purpose, what ``counts`` has on top of an earlier copy of itself."""
    return {name: count for name, count in (counts - before).items() if count}


TRAFFIC = Traffic()

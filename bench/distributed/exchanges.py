"""What torch's dispatcher sees of the exchanges between ranks, whoever called for them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's own exchanges -> which of their arguments hold what a rank hands over
_HANDED = {
    "allreduce_": 0, "broadcast_": 0, "reduce_": 0, "allgather_": 1, "_allgather_base_": 1, "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
}  # fmt: skip


class Dispatched(TorchDispatchMode):
    """Counts exchanges while it is active.

    Attributes:
        bytes: that this rank handed over, by torch's name of the exchange.
        background: those of them whose caller went on at once, by the same name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.background: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname != "barrier":
            name = func._opname
            tensors = tree_leaves(args[_HANDED[name]])
            count = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
            self.bytes[name] += count
            place = [argument.name for argument in func._schema.arguments].index("async_op")
            if args[place] if place < len(args) else (kwargs or {}).get("async_op", True):
                self.background[name] += count
        return func(*args, **(kwargs or {}))

"""What each rank runs for test_distributed_traffic."""

from __future__ import annotations

from collections import Counter
from typing import Any

from equality_cases import train
from method_cases import make_method, trained_parameters
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mooring.traffic import TRAFFIC, grown

# torch's own exchanges -> which of their arguments hold what a rank hands over
_HANDED = {
    "allreduce_": 0, "broadcast_": 0, "reduce_": 0, "allgather_": 1, "_allgather_base_": 1, "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
}  # fmt: skip


class Dispatched(TorchDispatchMode):
    """Bytes of every exchange that reaches torch's dispatcher, whoever called for it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname != "barrier":
            name = func._opname
            tensors = tree_leaves(args[_HANDED[name]])
            self.bytes[name] += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return func(*args, **(kwargs or {}))


def counted_and_dispatched(**case: Any) -> dict[str, Any]:
    """A few steps, the bytes that we count and those that torch sees, from the first weights to the last ones."""
    before = TRAFFIC.bytes.copy()
    with Dispatched() as dispatched:
        result = train(**case)
    return {
        "counted": grown(TRAFFIC.bytes, before),
        "dispatched": dict(dispatched.bytes),
        "a step": result["bytes"],
    }


def trained_sizes(method: str, kind: str, classes: int) -> list[int]:
    """Elements of each trained parameter."""
    return [p.numel() for p in trained_parameters(make_method(method, kind, classes))]

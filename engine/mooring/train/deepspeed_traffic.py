"""Counts what DeepSpeed exchanges, at the place where all of its exchanges pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mooring.traffic import TRAFFIC, Exchange

# deepspeed.comm's backend: method -> what it is, the name of the tensors that a rank hands over, and their place
_METHODS: dict[str, tuple[Exchange, str, int]] = {
    "all_reduce": ("all_reduce", "tensor", 0),
    "all_reduce_coalesced": ("all_reduce", "tensors", 0),
    "all_gather": ("all_gather", "tensor", 1),
    "all_gather_into_tensor": ("all_gather", "input_tensor", 1),
    "all_gather_coalesced": ("all_gather", "input_tensors", 1),
    "reduce_scatter": ("reduce_scatter", "input_list", 1),
    "reduce_scatter_tensor": ("reduce_scatter", "input_tensor", 1),
    "reduce": ("reduce", "tensor", 0),
    "broadcast": ("broadcast", "tensor", 0),
}
# What is no reduction carries weights.
_REDUCTIONS = ("all_reduce", "reduce_scatter", "reduce")
_AT_REST = "agreement"
_reduced = _AT_REST  # what reductions are of just now


def count_exchanges() -> None:
    """Has all exchanges of this process's DeepSpeed counted from now on; the second time does nothing.

    Gathers and broadcasts are of parameters, reductions of what ``reducing`` says; else they are norms and flags.
    """
    from deepspeed.comm import comm

    if comm.cdb is None or hasattr(comm.cdb, "counted_by_mooring"):
        return
    for name, described in _METHODS.items():
        setattr(comm.cdb, name, _counting(getattr(comm.cdb, name), *described))
    vars(comm.cdb)["counted_by_mooring"] = True


@contextmanager
def reducing(purpose: str) -> Iterator[None]:
    """Within it DeepSpeed's reductions are counted under ``purpose``."""
    global _reduced
    _reduced = purpose
    try:
        yield
    finally:
        _reduced = _AT_REST


def _counting(call: Callable[..., Any], exchange: Exchange, name: str, place: int) -> Callable[..., Any]:
    @functools.wraps(call)
    def counted(*args: Any, **kwargs: Any) -> Any:
        handed = kwargs[name] if name in kwargs else args[place]
        groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
        world = dist.get_world_size(*groups)
        if world > 1:
            for tensor in [handed] if isinstance(handed, Tensor) else handed:
                purpose = _reduced if exchange in _REDUCTIONS else "parameters"
                TRAFFIC.count(tensor, purpose, world, exchange)
        return call(*args, **kwargs)

    return counted

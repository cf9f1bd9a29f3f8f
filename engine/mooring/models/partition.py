"""Parameters that DeepSpeed's ZeRO-3 has divided among ranks, read as if they were whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_T = TypeVar("_T")
# Parameters that are gathered at a time where all are needed, one after the other.
_CHUNK_ELEMENTS = 1 << 26


def is_divided(parameter: Tensor) -> bool:
    """Whether each rank holds a part of it only."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Tensor) -> torch.Size:
    """Its shape when it is whole."""
    return torch.Size(parameter.ds_shape) if is_divided(parameter) else parameter.shape  # type: ignore[attr-defined]


def whole(parameters: Iterable[Tensor], *, write: bool = False) -> AbstractContextManager[Any]:
    """Within it these parameters are whole on every rank; all ranks enter it together.

    Args:
        parameters: any; those that are not divided are left alone.
        write: what rank 0 changes in place is kept, on all ranks.
    """
    divided = [p for p in parameters if is_divided(p)]
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if write else None)


def chunks(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters that may be gathered together without holding the whole model."""
    chunk: list[nn.Parameter] = []
    room = _CHUNK_ELEMENTS
    for parameter in parameters:
        size = full_shape(parameter).numel()
        if chunk and size > room:
            yield chunk
            chunk, room = [], _CHUNK_ELEMENTS
        chunk.append(parameter)
        room -= size
    if chunk:
        yield chunk


def within_forward(module: nn.Module, function: Callable[..., _T], *inputs: Any) -> _T:
    """``function(*inputs)`` as if it were the forward of ``module``, whose parameters it reads.

    Hooks on a module's forward are where ZeRO-3 gathers its parameters, before it and before its backward. Tensors that
    the gradient goes back to must be among the inputs, and tensors that it comes from be returned, alone or in a tuple.

    Args:
        module: owns the parameters.
        function: must read them anew, ``module.weight``, when it is called.
        inputs: what it is called with.
    """
    if not module._forward_hooks and not module._forward_pre_hooks:
        return function(*inputs)
    before = module.__dict__.get("forward")
    module.forward = function  # type: ignore[method-assign]
    try:
        return module(*inputs)
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]

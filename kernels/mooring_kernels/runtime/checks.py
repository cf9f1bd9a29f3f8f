"""Argument checks of the public ops: each message says what was expected and what was got."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def require_floats(op: str, name: str, tensor: Tensor, *shape: int | str) -> None:
    """A floating-point tensor of this shape; a size given as a letter is free.

    Raises:
        ValueError: another number of dimensions or another size.
        TypeError: not a tensor, or not a floating-point dtype.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {_expected(shape)}; got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{op}: {name} must be {_expected(shape)} float32 or bfloat16; got {_describe(tensor)}"
        )
    fits = tensor.dim() == len(shape) and all(
        isinstance(expected, str) or size == expected
        for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must be {_expected(shape)}; got {_describe(tensor)}")


def require_labels(op: str, name: str, tensor: Tensor, rows: int) -> None:
    """An int64 tensor with one label per row.

    Raises:
        ValueError: another shape.
        TypeError: not a tensor, or another dtype.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        got = _describe(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{op}: {name} must be [{rows}] int64; got {got}")
    if tensor.dim() != 1 or tensor.shape[0] != rows:
        raise ValueError(f"{op}: {name} must be [{rows}] int64, one label per row; got {_describe(tensor)}")


def require_one_device(op: str, **tensors: Tensor | None) -> None:
    """All given tensors on one device.

    Raises:
        ValueError: they are on several; the message lists them.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {listed}")


def require_width(op: str, name: str, size: int) -> None:
    """A size of at least 1.

    Raises:
        ValueError: it is 0.
    """
    if size < 1:
        raise ValueError(f"{op}: {name} must be at least 1; got {size}")


def _expected(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"

"""Which implementation of an op runs."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from mooring_kernels.runtime.native import NATIVE_BUILT, require_native

Impl = Literal["auto", "reference", "native", "triton"]
Chosen = Literal["reference", "native", "triton"]

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def choose(op: str, impl: Impl, *tensors: Tensor) -> Chosen:
    """The implementation to run for these floating-point tensors, all on one device.

    ``"auto"``: Triton on CUDA, native on the CPU, for float32 and bfloat16; the reference for any other
    dtype or device, and where the kernels are not installed.

    Raises:
        ValueError: ``impl`` is unknown, or was asked for by name and cannot take these tensors.
        ImportError: it was asked for by name and is not installed.
    """
    device = tensors[0].device.type
    taken = all(tensor.dtype in _KERNEL_DTYPES for tensor in tensors)
    if impl == "auto":
        if taken and device == "cuda" and TRITON_INSTALLED:
            return "triton"
        if taken and device == "cpu" and NATIVE_BUILT:
            return "native"
        return "reference"
    if impl == "reference":
        return "reference"
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    if not taken:
        raise ValueError(
            f"{op}: impl={impl!r} takes float32 and bfloat16; got {[str(t.dtype) for t in tensors]}: "
            "use impl='auto' or 'reference'"
        )
    if impl == "native":
        if device != "cpu":
            raise ValueError(f"{op}: impl='native' takes CPU tensors; got {device}: use impl='auto'")
        require_native(f"{op} with impl='native'")
        return "native"
    if not TRITON_INSTALLED:
        raise ImportError(
            f"{op}: impl='triton' needs triton, which is not installed: run  python -m pip install 'triton==3.7.1'"
        )
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{op}: impl='triton' takes CUDA tensors; got {device}: use impl='auto', or set TRITON_INTERPRET=1 "
            "before triton is imported to run the kernels in its interpreter"
        )
    return "triton"


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32: what a reference computes in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32

"""Access to the native module: whether it is built, which instruction set it uses, tensors as its arguments."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

# A source checkout works without the native module, by the reference implementations.
NATIVE_BUILT = importlib.util.find_spec("mooring_kernels._C") is not None

_CODES = {torch.float32: 0, torch.bfloat16: 1}


def cpu_capability() -> str:
    """The instruction set of the CPU kernels: ``"scalar"``, ``"avx2"`` or ``"avx512"``.

    It is the strongest one that the CPU has, or the one the environment variable MOORING_CPU names.

    Raises:
        ImportError: the native module is not built.
        ValueError: MOORING_CPU names a set that is unknown or that this CPU does not have.
    """
    require_native("cpu_capability")
    from mooring_kernels import _C

    return _C.cpu_capability()


def require_native(needed_for: str) -> None:
    """Says how to build the native module where it is missing.

    Raises:
        ImportError: it is not built.
    """
    if not NATIVE_BUILT:
        raise ImportError(
            f"{needed_for}: the native module mooring_kernels._C is not built: run  "
            "python -m pip install --no-build-isolation --no-deps -e ."
        )


def dtype_code(tensor: Tensor) -> int:
    """How the native module calls the dtype of ``tensor``: 0 is float32, 1 is bfloat16."""
    return _CODES[tensor.dtype]


def threads() -> int:
    """How many threads a native kernel may use: as many as torch does."""
    return torch.get_num_threads()


def same_dense_layout(a: Tensor, b: Tensor) -> bool:
    """Whether both hold their values without gaps and in one order: element i in memory is the same element."""
    if a.stride() != b.stride():
        return a.is_contiguous() and b.is_contiguous()
    return a.is_contiguous() or (a.dim() == 4 and a.is_contiguous(memory_format=torch.channels_last))

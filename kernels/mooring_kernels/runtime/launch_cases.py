"""Shapes at which Triton kernels are compiled ahead of time, shared by the ops that read a bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch

Case = tuple[
    str, Callable[[], object]
]  # a name that holds the shape, and a call of a launcher on CPU tensors

DTYPES = (torch.float32, torch.bfloat16)
# (K, D, C): ResNet-50; ViT-B with ImageNet's classes; an odd width, where no row but the first is aligned.
_BANKS = ((2048, 2048, 200), (2048, 768, 1000), (509, 513, 37))


def dtype_name(dtype: torch.dtype) -> str:
    """ "fp32" or "bf16"."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def bank_shapes() -> Iterator[tuple[str, int, int, int, torch.dtype]]:
    """Name, K, D, C and dtype of the banks in use."""
    for (rows, width, classes), dtype in product(_BANKS, DTYPES):
        yield f"K{rows}-D{width}-C{classes}-{dtype_name(dtype)}", rows, width, classes, dtype

"""Which implementations a test of an op runs, and inputs that several of them share."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from mooring_kernels.runtime.native import NATIVE_BUILT

KERNELS = [
    pytest.param(
        "native", marks=pytest.mark.skipif(not NATIVE_BUILT, reason="mooring_kernels._C is not built")
    ),
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("triton") is None, reason="triton is not installed"
        ),
    ),
]
IMPLEMENTATIONS = ["reference", *KERNELS]


def draw_unit_rows(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator))


def draw_bank(
    rows: int, width: int, classes: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit frozen and tuned rows, labels with masked ones (-1 and C) among them, and a head."""
    frozen, tuned = (draw_unit_rows(rows, width, generator).to(dtype) for _ in range(2))
    labels = torch.randint(-1, classes + 1, (rows,), generator=generator)
    return frozen, tuned, labels, 0.01 * torch.randn(classes, width, generator=generator)

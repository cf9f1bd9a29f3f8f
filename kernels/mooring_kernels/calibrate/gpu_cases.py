"""Launches of calibrate that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from mooring_kernels.calibrate import gpu
from mooring_kernels.runtime.launch_cases import Case, bank_shapes


def cases() -> Iterator[Case]:
    """Every launcher at every shape and dtype in use."""
    for name, rows, width, classes, dtype in bank_shapes():
        bank, mean = torch.zeros(rows, width, dtype=dtype), torch.zeros(classes, width)
        labels = torch.zeros(rows, dtype=torch.int64)
        # Its GEMM is the library's: no need to pay for it here.
        rotation = torch.zeros(1, 1).expand(width, width)
        for turn in (None, rotation):
            yield name, partial(gpu.calibrate_fwd, bank, bank, labels, mean, mean, turn, torch.ones(()))

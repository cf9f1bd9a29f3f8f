"""Launches of class_statistics that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from mooring_kernels.class_statistics import gpu
from mooring_kernels.runtime.launch_cases import Case, bank_shapes


def cases() -> Iterator[Case]:
    """Every launcher at every shape and dtype in use."""
    for name, rows, width, classes, dtype in bank_shapes():
        bank, head = torch.zeros(rows, width, dtype=dtype), torch.zeros(classes, width)
        labels = torch.zeros(rows, dtype=torch.int64)
        yield name, partial(gpu.class_statistics_fwd, bank, bank, labels, head, 1.0)

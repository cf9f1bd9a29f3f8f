"""Launches of row_normalise that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from mooring_kernels.row_normalise import gpu
from mooring_kernels.runtime.launch_cases import Case, bank_shapes


def cases() -> Iterator[Case]:
    """Every launcher at every shape and dtype in use."""
    for name, rows, width, _, dtype in bank_shapes():
        bank, norm = torch.zeros(rows, width, dtype=dtype), torch.zeros(rows)
        yield name, partial(gpu.row_normalise_fwd, bank, 1e-12)
        for grad_unit, grad_norm in ((bank, None), (None, norm), (bank, norm)):
            yield name, partial(gpu.row_normalise_bwd, grad_unit, grad_norm, bank, norm, 1e-12)

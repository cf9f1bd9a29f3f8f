"""Launches of bank_cross_entropy that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from mooring_kernels.bank_cross_entropy import gpu
from mooring_kernels.runtime.launch_cases import DTYPES, Case, dtype_name


def cases() -> Iterator[Case]:
    """Every launcher at every shape and dtype in use."""
    labels, lse, scale = torch.zeros(64, dtype=torch.int64), torch.zeros(64), torch.ones(())
    for classes, dtype, smoothing in product((14, 200, 1000, 21841), DTYPES, (0.0, 0.1)):
        name = f"C{classes}-{dtype_name(dtype)}-smooth{smoothing}"
        logits = torch.zeros(64, classes, dtype=dtype)
        yield name, partial(gpu.softmax_cross_entropy_rows_fwd, logits, labels, smoothing)
        if dtype == torch.float32:
            padded = torch.zeros(64, -(-classes // 16) * 16)[:, :classes]
            for gradient in (False, True):
                yield (
                    f"{name}-gradient{gradient}",
                    partial(gpu.softmax_cross_entropy_rows_, padded, labels, smoothing, gradient),
                )
        yield name, partial(gpu.softmax_cross_entropy_rows_bwd, logits, labels, lse, scale, smoothing)

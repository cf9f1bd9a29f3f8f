"""Launches of bank_cross_entropy that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from mooring_kernels.bank_cross_entropy import gpu
from mooring_kernels.runtime.launch_cases import Case


def cases() -> Iterator[Case]:
    """The launcher at every shape in use: fp32 logits in a buffer of padded rows, as ``head_pass`` has them."""
    labels = torch.zeros(64, dtype=torch.int64)
    for classes, smoothing, gradient in product((14, 200, 1000, 21841), (0.0, 0.1), (False, True)):
        logits = torch.zeros(64, -(-classes // 16) * 16)[:, :classes]
        yield (
            f"C{classes}-fp32-smooth{smoothing}-gradient{gradient}",
            partial(gpu.softmax_cross_entropy_rows_, logits, labels, smoothing, gradient),
        )

"""Launches of two_head_cross_entropy that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from mooring_kernels.runtime.launch_cases import DTYPES, Case, dtype_name
from mooring_kernels.two_head_cross_entropy import gpu

_HEADS = ((200, 1000), (200, 21841), (37, 1000))  # (C, C_S)


def cases() -> Iterator[Case]:
    """Every launcher at every shape and dtype in use, with the weight as a number and as a tensor."""
    labels, lse, one = torch.zeros(64, dtype=torch.int64), torch.zeros(128), torch.ones(())
    for weight in (None, one):  # reads one value per row only
        yield "rows", partial(gpu.two_head_cross_entropy_mean, lse, labels, labels, (200, 1000), weight, 0.5)
    for (classes, source_classes), dtype, smoothing in product(_HEADS, DTYPES, (0.0, 0.1)):
        name = f"C{classes}-S{source_classes}-{dtype_name(dtype)}-smooth{smoothing}"
        target, source = torch.zeros(64, classes, dtype=dtype), torch.zeros(64, source_classes, dtype=dtype)
        rows = (target, labels, source, labels)
        yield name, partial(gpu.two_head_cross_entropy_fwd, *rows, None, 0.5, smoothing)
        backward = partial(gpu.two_head_cross_entropy_bwd, *rows, lse)
        for upstream, weight in (((one, None, None), None), ((one, one, one), one)):
            yield name, partial(backward, upstream, torch.ones(2), weight, 0.5, smoothing, [True, True])
        alone = partial(backward, (one, None, None), torch.ones(2), None, 0.5, smoothing)
        yield name, partial(alone, [True, False])
        yield name.partition("-")[2], partial(alone, [False, True])

"""Launches of patch_match_info_nce that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from mooring_kernels.patch_match_info_nce import gpu
from mooring_kernels.runtime.launch_cases import DTYPES, Case, dtype_name


def cases() -> Iterator[Case]:
    """Every launcher at every shape and dtype in use; the sizes of batch and queue are not specialised."""
    batch, classes, slots = 2, 6, 4
    labels = torch.zeros(batch, dtype=torch.int64)
    valid = torch.ones(classes, slots, dtype=torch.bool)
    negatives, picks = (
        torch.ones(batch, 5, dtype=torch.int64),
        torch.zeros(batch, 1 + slots, dtype=torch.int64),
    )
    for dtype in DTYPES:
        for patches, width in ((9, 128), (9, 200), (5, 1000)):
            query = torch.zeros(batch, patches, width, dtype=dtype)
            queue = torch.zeros(classes, slots, patches, width, dtype=dtype)
            yield (
                f"P{patches}-D{width}-{dtype_name(dtype)}",
                partial(
                    gpu.patch_match_info_nce_fwd,
                    *(query, query, labels, queue, valid, negatives, picks, 0.07, 10, 0.01, 30, True),
                ),
            )

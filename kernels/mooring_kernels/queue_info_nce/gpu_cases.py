"""Launches of queue_info_nce that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from mooring_kernels.queue_info_nce import gpu
from mooring_kernels.runtime.launch_cases import DTYPES, Case, dtype_name

_FP32, _BF16 = DTYPES
_ALL = ([True, True], [True, False], [False, True], [False, False])
# width, queue's dtype, query's dtype, which gradients
_USES = (
    (200, _FP32, _FP32, _ALL),
    (200, _BF16, _FP32, _ALL[:1]),
    (128, _FP32, _FP32, _ALL[::3]),
    (37, _FP32, _BF16, _ALL[:1]),
)


def cases() -> Iterator[Case]:
    """CUB's logit space, Bi-Tuning's projector and an odd width; with and without own key."""
    for width, queue_dtype, query_dtype, wanted in _USES:
        name = f"D{width}-{dtype_name(queue_dtype)}-from-{dtype_name(query_dtype)}"
        query, labels = torch.zeros(48, width, dtype=query_dtype), torch.zeros(48, dtype=torch.int64)
        queue, queue_labels = (
            torch.zeros(8000, width, dtype=queue_dtype),
            torch.zeros(8000, dtype=torch.int64),
        )
        for needs in wanted:
            for own in (query, None):
                if own is None and needs[1]:
                    continue
                call = partial(gpu.queue_info_nce_fwd, query, own, labels, queue, queue_labels, 0.07, needs)
                yield f"{name}-own{own is not None:d}-grad{needs[0]:d}{needs[1]:d}", call

"""Launches of ring_push that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from mooring_kernels.ring_push import gpu
from mooring_kernels.runtime.launch_cases import DTYPES, Case, bank_shapes, dtype_name


def cases() -> Iterator[Case]:
    """Every launcher at every shape and dtype in use."""
    for name, rows, width, _, dtype in bank_shapes():
        bank = torch.zeros(rows, width, dtype=dtype)
        labels, fresh_labels = torch.zeros(rows, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
        for field_dtype, normalise in product(DTYPES, (True, False)):
            field = torch.zeros(64, width, dtype=field_dtype)
            push = partial(gpu.ring_push_fwd, [bank, bank], labels, [field, field], fresh_labels)
            yield f"{name}-from-{dtype_name(field_dtype)}", partial(push, 0, normalise)

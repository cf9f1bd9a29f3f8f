"""Launches of class_ring_push that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from mooring_kernels.class_ring_push import gpu
from mooring_kernels.runtime.launch_cases import DTYPES, Case, dtype_name


def cases() -> Iterator[Case]:
    """CUB's image and patch queues (K = 40, nine patches), and an odd width."""
    classes, capacity, batch = 200, 4, 48  # K only scales addresses
    bank_labels, heads = torch.zeros(classes, capacity).long(), torch.zeros(classes).long()
    labels = torch.zeros(batch).long()
    for dtype in DTYPES:
        for inner, normalise in (((200,), True), ((9, 200), True), ((37,), False)):
            bank = torch.zeros(classes, capacity, *inner, dtype=dtype)
            field = torch.zeros(batch, *inner)
            call = partial(gpu.class_ring_push_fwd, [bank, bank], bank_labels, heads, [field, field], labels)
            yield f"D{inner[-1]}-{dtype_name(dtype)}", partial(call, normalise)

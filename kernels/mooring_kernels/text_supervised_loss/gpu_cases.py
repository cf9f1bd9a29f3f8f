"""Launches of text_supervised_loss that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from mooring_kernels.runtime.launch_cases import DTYPES, Case, dtype_name
from mooring_kernels.text_supervised_loss import gpu


def cases() -> Iterator[Case]:
    """Every launcher at every shape and dtype in use; the cosines stay fp32 beside bf16 logits."""
    labels, lse, scalar = torch.zeros(64, dtype=torch.int64), torch.zeros(64), torch.ones(())
    options = (0.03, 0.1, 0.3)
    yield "rows", partial(gpu.text_supervised_loss_mean, lse, labels, 200)  # reads one value per row only
    for classes, dtype in product((37, 100, 200, 1000, 21841), DTYPES):
        name = f"C{classes}-{dtype_name(dtype)}"
        logits, cosines = torch.zeros(64, classes, dtype=dtype), torch.zeros(64, classes)
        yield name, partial(gpu.text_supervised_loss_fwd, logits, cosines, labels, *options)
        for needs in ([True, True], [True, False], [False, True]):
            backward = partial(gpu.text_supervised_loss_bwd, logits, cosines, labels, lse, lse)
            yield name, partial(backward, scalar, scalar, *options, needs)

"""Launches of batchnorm_statistics that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from mooring_kernels.batchnorm_statistics import gpu
from mooring_kernels.runtime.launch_cases import DTYPES, Case, dtype_name

# (C, height): the first, a middle and the last stage of ResNet-50; sizes where no plane or row is aligned.
_LAYERS = ((64, 112), (256, 56), (2048, 7), (37, 13))
_BATCH = 3


def cases() -> Iterator[Case]:
    """Every launcher at every shape, layout and dtype in use."""
    for (channels, height), dtype, layout in product(
        _LAYERS, DTYPES, (torch.contiguous_format, torch.channels_last)
    ):
        x = torch.zeros(_BATCH, channels, height, height, dtype=dtype).to(memory_format=layout)
        each = torch.zeros(channels)
        order = "planes" if layout == torch.contiguous_format else "rows"
        name = f"BN-C{channels}-P{height * height}-{order}-{dtype_name(dtype)}"
        yield name, partial(gpu.batchnorm_statistics_fwd, x, each, each, each, each, 1e-5)
    x, each = torch.zeros(_BATCH, 64, 7, 7), torch.zeros(64)
    yield "BN-C64-P49-no-affine-fp32", partial(gpu.batchnorm_statistics_fwd, x, each, each, None, None, 1e-5)

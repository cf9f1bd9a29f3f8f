"""Triton batchnorm_statistics: canaries, many tiles, parts that end in the middle, the same result every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_op_batchnorm_statistics import EPS, check, draw_layer

pytest.importorskip("triton")
from mooring_kernels.batchnorm_statistics import gpu
from mooring_kernels.batchnorm_statistics.gpu import batchnorm_statistics_fwd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (300, 40), (3, 130, 5), (2, 33, 40, 40)], ids=str)
@pytest.mark.parametrize("parts", [1, 4, 2048])
def test_results_and_nothing_around_them(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parts: int,
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "_PROGRAMS", parts)
    x = torch.randn(shape, generator=generator).to(dtype)
    layer = draw_layer(shape[1], generator)
    on_device = [t.to(device) for t in layer]
    for given in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        # the canaries of empty_like keep shapes, not strides: contiguous only
        if len(shape) == 2 or given.is_contiguous():
            got = batchnorm_statistics_fwd(given.to(device), *on_device, EPS)
            check(tuple(t.cpu() for t in got), x, layer, assert_within)


@pytest.mark.parametrize("parts", [1, 3, 2048])
def test_channels_last(
    parts: int,
    device: torch.device,
    generator: torch.Generator,
    assert_within: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "_PROGRAMS", parts)
    x = torch.randn(3, 33, 9, 11, generator=generator).to(memory_format=torch.channels_last)
    layer = draw_layer(33, generator)
    on_device = [t.to(device) for t in layer]
    first = batchnorm_statistics_fwd(x.to(device), *on_device, EPS)
    check(tuple(t.cpu() for t in first), x, layer, assert_within)
    again = batchnorm_statistics_fwd(x.to(device), *on_device, EPS)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

"""batchnorm_statistics: every implementation against the formulas in float64, in both orders of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS
from torch import Tensor

from mooring_kernels import batchnorm_statistics

EPS = 1e-5
Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def draw_layer(channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, weight, bias = (torch.randn(channels, generator=generator) for _ in range(3))
    return mean, torch.rand(channels, generator=generator) + 0.3, weight, bias


def formulas(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, weight, bias = (None if t is None else t.double() for t in layer)
    assert mean is not None and var is not None
    rows = x.double().movedim(1, -1)  # [B, *spatial, C]
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    y = ((rows - mean) / (var + EPS).sqrt() * weight + bias).movedim(-1, 1)
    rows = rows.reshape(-1, x.shape[1])
    batch_mean = rows.mean(0)
    return y, batch_mean, ((rows - batch_mean) ** 2).sum(0) / max(len(rows) - 1, 1)


def check(got: tuple[Tensor, ...], x: Tensor, layer: Layer, assert_within: Any) -> None:
    y, batch_mean, batch_var = formulas(x, layer)
    mean, var, weight, bias = layer
    assert got[0].dtype == x.dtype and got[1].dtype == got[2].dtype == torch.float32
    column = (1, -1, *[1] * (x.dim() - 2))
    scale = (torch.ones_like(mean) if weight is None else weight).abs() / (var + EPS).sqrt()
    offset = torch.zeros_like(mean) if bias is None else bias.abs()
    # y: a difference, a product, a sum; the scale is itself off by three roundings
    assert_within(
        got[0],
        y,
        operations=8,
        magnitude=(x.float().abs() + mean.abs().view(column)) * scale.view(column) + offset.view(column),
    )
    rows = x.float().movedim(1, -1).reshape(-1, x.shape[1])
    # at most 4096 values go into one fp32 sum, over 16 lanes or more
    terms = min(len(rows), 256) + 16
    assert_within(
        got[1], batch_mean, operations=terms, magnitude=(rows - mean).abs().mean(0) + rows.abs().mean(0)
    )
    assert_within(
        got[2], batch_var, operations=2 * terms, magnitude=batch_var + (batch_mean - mean.double()) ** 2
    )


SHAPES = [(1, 1), (5, 3), (300, 17), (3, 5, 7), (2, 37, 3, 3), (1, 4, 70, 70), (2, 20, 5, 7, 2)]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_against_the_formulas(
    impl: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: bool,
    affine: bool,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    x = (torch.randn(shape, generator=generator) * 2 + 1).to(dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    layer: Layer = draw_layer(shape[1], generator)
    if not affine:
        layer = (*layer[:2], None, None)
    got = batchnorm_statistics(x, *layer, EPS, impl=impl)
    assert impl == "reference" or got[0].stride() == x.stride()
    check(got, x, layer, assert_within)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_inputs(impl: Any, generator: torch.Generator, assert_within: Any) -> None:
    x = torch.randn(4, 12, 6, 5, generator=generator)[1:, ::2, :, 1:]
    layer = tuple(t[::2] for t in draw_layer(12, generator))
    check(batchnorm_statistics(x, *layer, EPS, impl=impl), x, layer, assert_within)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_value_and_constant_channels_have_no_variance(impl: Any, generator: torch.Generator) -> None:
    layer = draw_layer(6, generator)
    for shape in [(1, 6), (1, 6, 1, 1), (4, 6, 3, 3)]:
        x = torch.full(shape, 3.25)
        _, mean, var = batchnorm_statistics(x, *layer, EPS, impl=impl)
        torch.testing.assert_close(mean, torch.full((6,), 3.25))
        assert var.min() >= 0 and var.max() <= 1e-5


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_million_values_with_a_distant_shift(
    last: bool, generator: torch.Generator, assert_within: Any
) -> None:
    """The rounding of the sums does not grow with n; that of the variance grows with the distance of the shift."""
    x = torch.randn(1 << 18, 4, generator=generator) + torch.tensor([0.0, 0.1, 3.0, 30.0])
    x = x.T.contiguous().unsqueeze(0) if not last else x
    layer = (torch.zeros(4), torch.ones(4), None, None)
    check(batchnorm_statistics(x, *layer, EPS, impl="native"), x, layer, assert_within)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_result_does_not_depend_on_the_number_of_threads(last: bool, generator: torch.Generator) -> None:
    x = torch.randn(5, 70, 41, 17, generator=generator)
    x = x.to(memory_format=torch.channels_last) if last else x
    layer = draw_layer(70, generator)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(batchnorm_statistics(x, *layer, EPS, impl="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16), batch=st.integers(2, 6), channels=st.integers(1, 20), side=st.integers(1, 4)
)
def test_order_layout_and_names_do_not_matter(seed: int, batch: int, channels: int, side: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, side, side, generator=generator)
    layer = draw_layer(channels, generator)
    y, mean, var = batchnorm_statistics(x, *layer, impl="native")
    rows, names = torch.randperm(batch, generator=generator), torch.randperm(channels, generator=generator)
    variants = [
        (x[rows].contiguous(), layer, lambda t: t[rows], lambda t: t),
        (x.to(memory_format=torch.channels_last), layer, lambda t: t, lambda t: t),
        (x[:, names].contiguous(), [t[names] for t in layer], lambda t: t[:, names], lambda t: t[names]),
    ]
    for other, its_layer, expected_y, expected in variants:
        got = batchnorm_statistics(other, *its_layer, impl="native")
        torch.testing.assert_close(got[0], expected_y(y), rtol=0, atol=1e-5)
        torch.testing.assert_close(got[1], expected(mean), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[2], expected(var), rtol=1e-5, atol=1e-5)


def test_a_nan_stays_in_its_channel_and_bf16_layers_are_taken(generator: torch.Generator) -> None:
    x, layer = torch.randn(3, 40, 9, 8, generator=generator), draw_layer(40, generator)
    x[1, 7, 2, 3] = torch.nan
    for images in (x, x.to(memory_format=torch.channels_last)):
        for result in batchnorm_statistics(images, *layer, impl="native")[1:]:
            assert result.isnan().nonzero().flatten().tolist() == [7]
    low = [t.bfloat16() for t in layer]
    same = batchnorm_statistics(x, *low, impl="native"), batchnorm_statistics(x, *(t.float() for t in low))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*same, strict=True))


def test_a_gradient_is_refused_not_dropped(generator: torch.Generator) -> None:
    x, layer = torch.randn(3, 4, generator=generator), draw_layer(4, generator)
    layer[2].requires_grad_()
    with pytest.raises(ValueError, match=r"no gradient is defined; call it under torch.no_grad\(\)"):
        batchnorm_statistics(x, *layer)
    with torch.no_grad():
        assert not batchnorm_statistics(x, *layer)[0].requires_grad

"""Triton row normalisation against its float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from mooring_kernels.row_normalise.gpu import row_normalise_bwd, row_normalise_fwd
from mooring_kernels.runtime.triton_launch import WIDEST_ROW

EPS = 1e-12
SHAPES = [(1, 1), (5, 17), (33, 64), (3, 769), (2, 2049)]
DTYPES = [torch.float32, torch.bfloat16]


def shape_id(shape: tuple[int, int]) -> str:
    return f"N{shape[0]}-D{shape[1]}"


def draw(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def definition_gradient(
    grad_unit: Tensor | None, grad_norm: Tensor | None, unit: Tensor, norm: Tensor, eps: float
) -> Tensor:
    """d/dx of <grad_unit, x / max(|x|, eps)> + <grad_norm, |x|> in float64, by x = unit * max(|x|, eps)."""
    unit, norm = unit.double(), norm.double()
    x = unit * norm.clamp_min(eps)[:, None]
    grad = torch.zeros_like(x)
    if grad_unit is not None:
        g = grad_unit.double()
        free = (norm >= eps).double()[:, None]
        grad += (g - free * unit * (g * unit).sum(1, keepdim=True)) / norm.clamp_min(eps)[:, None]
    if grad_norm is not None:
        direction = torch.where(norm[:, None] > 0, x / norm[:, None], 0.0)
        grad += grad_norm.double()[:, None] * direction
    return grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_forward(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    x = draw(shape, dtype, device, generator)
    x[0] = 0.0
    unit, norm = row_normalise_fwd(x, EPS)
    assert unit.dtype == dtype and norm.dtype == torch.float32
    exact = x.double()
    exact_norm = exact.norm(dim=1)
    terms = shape[1] ** 0.5 + 8  # rounding of a sum grows like the root of its terms
    assert_within(norm, exact_norm, operations=terms, magnitude=exact_norm)
    assert_within(unit, exact / exact_norm.clamp_min(EPS)[:, None], operations=terms)
    assert torch.equal(unit[0], torch.zeros_like(unit[0])) and norm[0] == 0.0


@pytest.mark.parametrize("given", ["unit", "norm", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_backward(
    shape: tuple[int, int],
    dtype: torch.dtype,
    given: str,
    device: torch.device,
    generator: torch.Generator,
    guarded_empty: None,
    assert_within: Any,
) -> None:
    eps = 1e-3
    x = draw(shape, dtype, device, generator)
    x[-1] *= 1e-5  # below eps: the clamp decides
    if shape[0] > 1:
        x[0] = 0.0
    unit, norm = row_normalise_fwd(x, eps)
    grad_unit = draw(shape, dtype, device, generator) if given != "norm" else None
    grad_norm = torch.randn(shape[0], generator=generator).to(device) if given != "unit" else None
    actual = row_normalise_bwd(grad_unit, grad_norm, unit, norm, eps)
    assert actual.dtype == dtype
    expected = definition_gradient(grad_unit, grad_norm, unit, norm, eps)
    size = 0.0 if grad_unit is None else grad_unit.double().norm(dim=1, keepdim=True)
    magnitude = size / norm.double().clamp_min(eps)[:, None]
    magnitude = magnitude + (0.0 if grad_norm is None else grad_norm.double().abs()[:, None])
    assert_within(actual, expected, operations=shape[1] ** 0.5 + 16, magnitude=magnitude)


def test_backward_agrees_with_autograd_of_the_formula(
    device: torch.device, generator: torch.Generator
) -> None:
    """The formula above is itself checked: torch differentiates the forward in float64."""
    x = torch.randn(7, 13, generator=generator).to(device).double()
    x[2] *= 1e-5
    x.requires_grad_()
    norm = torch.linalg.vector_norm(x, dim=1)
    unit = x / norm.clamp_min(1e-3)[:, None]
    grad_unit, grad_norm = torch.randn(7, 13, generator=generator), torch.randn(7, generator=generator)
    grad_unit, grad_norm = grad_unit.to(x), grad_norm.to(x)
    (expected,) = torch.autograd.grad([unit, norm], [x], [grad_unit, grad_norm])
    stated = definition_gradient(grad_unit, grad_norm, unit.detach(), norm.detach(), 1e-3)
    torch.testing.assert_close(stated, expected, rtol=1e-12, atol=1e-12)


def test_strided_inputs_and_expanded_gradient(device: torch.device, generator: torch.Generator) -> None:
    wide = draw((6, 80), torch.float32, device, generator)
    for x in (wide[:, 3:40], wide[:, ::2], wide.T):
        unit, norm = row_normalise_fwd(x, EPS)
        dense_unit, dense_norm = row_normalise_fwd(x.contiguous(), EPS)
        assert torch.equal(unit, dense_unit) and torch.equal(norm, dense_norm)
        expanded = torch.ones((), device=device).expand(x.shape)
        assert torch.equal(
            row_normalise_bwd(expanded, None, unit, norm, EPS),
            row_normalise_bwd(expanded.contiguous(), None, unit, norm, EPS),
        )


def test_no_rows(device: torch.device) -> None:
    unit, norm = row_normalise_fwd(torch.empty(0, 5, device=device), EPS)
    assert unit.shape == (0, 5) and norm.shape == (0,)
    assert row_normalise_bwd(unit, norm, unit, norm, EPS).shape == (0, 5)


def test_row_too_wide_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"at most {WIDEST_ROW} wide .* got {WIDEST_ROW + 1}"):
        row_normalise_fwd(torch.zeros(1, WIDEST_ROW + 1, device=device), EPS)

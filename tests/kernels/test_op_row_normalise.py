"""row_normalise: every implementation against the definition in float64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implementations import IMPLEMENTATIONS, KERNELS
from torch import Tensor

from mooring_kernels import row_normalise


def definition(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    norm = x.square().sum(1).sqrt()
    return x / torch.where(norm < eps, eps, norm)[:, None], norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 17), (7, 130)], ids="N{0[0]}-D{0[1]}".format)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forward_and_backward(
    impl: Any, shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, assert_within: Any
) -> None:
    x = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    unit, norm = row_normalise(x, impl=impl)
    exact_unit, exact_norm = definition(exact, 1e-12)
    width = shape[1]
    assert unit.dtype == dtype and norm.dtype == torch.float32
    assert_within(unit, exact_unit, operations=width + 6)
    assert_within(norm, exact_norm, operations=width + 6, magnitude=exact_norm)

    grad_unit, grad_norm = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in (unit, norm))
    (grad,) = torch.autograd.grad([unit, norm], [x], [grad_unit, grad_norm])
    (exact_grad,) = torch.autograd.grad(
        [exact_unit, exact_norm], [exact], [grad_unit.double(), grad_norm.double()]
    )
    # terms of size |g| / |x| and |h|; the backward uses the unit row as it was stored, which is off by eps / 2
    size = grad_unit.double().norm(dim=1, keepdim=True) * 2 / exact_norm[:, None] + grad_norm.abs()[:, None]
    stored = torch.finfo(dtype).eps * 2**24
    assert_within(grad, exact_grad, operations=2 * width + 20 + 2 * stored, magnitude=size)


@pytest.mark.parametrize("used", ["unit", "norm"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_either_output_alone_has_a_gradient(impl: Any, used: str, generator: torch.Generator) -> None:
    x = torch.randn(4, 9, generator=generator, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    index = 0 if used == "unit" else 1
    outputs = row_normalise(x, impl=impl)[index], definition(exact, 1e-12)[index]
    upstream = torch.randn(outputs[0].shape, generator=generator)
    (grad,) = torch.autograd.grad(outputs[0], x, upstream)
    (exact_grad,) = torch.autograd.grad(outputs[1], exact, upstream.double())
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_zero_and_short_rows(impl: Any) -> None:
    """A zero row stays zero with finite gradient; a row below eps is divided by eps."""
    x = torch.tensor([[0.0, 0.0], [0.3, 0.4], [3.0, 4.0]], requires_grad=True)
    unit, norm = row_normalise(x, eps=1.0, impl=impl)
    torch.testing.assert_close(unit.detach(), torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.6, 0.8]]))
    torch.testing.assert_close(norm.detach(), torch.tensor([0.0, 0.5, 5.0]))
    (grad,) = torch.autograd.grad([unit, norm], [x], [torch.ones(3, 2), torch.ones(3)])
    # clamped: g / eps + h x / |x|;  free: (g - u (u . g)) / |x| + h u
    free = (1 - torch.tensor([0.6, 0.8]) * 1.4) / 5 + torch.tensor([0.6, 0.8])
    torch.testing.assert_close(grad, torch.stack([torch.ones(2), torch.tensor([1.6, 1.8]), free]))


@pytest.mark.parametrize("impl", KERNELS)
def test_no_rows_strided_rows_and_expanded_gradient(impl: Any, generator: torch.Generator) -> None:
    unit, norm = row_normalise(torch.empty(0, 5), impl=impl)
    assert unit.shape == (0, 5) and norm.shape == (0,)
    x = torch.randn(9, 4, generator=generator).T.requires_grad_()  # [4, 9], column-major
    unit, _ = row_normalise(x, impl=impl)
    (grad,) = torch.autograd.grad(unit.sum(), x)  # an upstream gradient of stride 0
    (expected,) = torch.autograd.grad(row_normalise(x, impl="reference")[0].sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_huge_rows_do_not_overflow_in_the_native_kernel() -> None:
    unit, norm = row_normalise(torch.tensor([[3e30, 4e30]]), impl="native")
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(norm, torch.tensor([5e30]))


def test_float64_passes_gradcheck(generator: torch.Generator) -> None:
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: row_normalise(t), x)

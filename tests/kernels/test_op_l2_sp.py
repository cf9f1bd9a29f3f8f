"""l2_sp: every implementation against the formula in float64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implementations import IMPLEMENTATIONS
from torch import Tensor

from mooring_kernels import l2_sp

SHAPES = [(), (0,), (3,), (5, 7), (2, 3, 4, 5), (40_001,)]


def draw(
    generator: torch.Generator, dtype: torch.dtype, anchor_dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Every third parameter has no anchor."""
    parameters = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    anchors = [
        None
        if number % 3 == 2
        else (p.float() + 0.1 * torch.randn(p.shape, generator=generator)).to(anchor_dtype)
        for number, p in enumerate(parameters)
    ]
    return parameters, anchors


def exact(parameters: list[Tensor], anchors: list[Tensor | None]) -> list[Tensor]:
    return [
        p.detach().double() - (0 if a is None else a.double())
        for p, a in zip(parameters, anchors, strict=True)
    ]


@pytest.mark.parametrize("anchor_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_against_the_formula(
    impl: Any,
    dtype: torch.dtype,
    anchor_dtype: torch.dtype,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    parameters, anchors = draw(generator, dtype, anchor_dtype)
    for number, p in enumerate(parameters):
        p.requires_grad_(number != 3)
    loss = l2_sp(parameters, anchors, 0.02, impl=impl)
    assert loss.dtype == torch.float32 and loss.shape == ()
    drift = exact(parameters, anchors)
    squares = sum(d.square().sum() for d in drift)
    # sums of up to 40001 squares of one sign, in blocks or pairwise: far fewer dependent additions
    assert_within(
        loss.detach(), torch.as_tensor(0.01 * squares), operations=600, magnitude=0.01 * float(squares)
    )
    (3.5 * loss).backward()
    for number, (p, d) in enumerate(zip(parameters, drift, strict=True)):
        if number == 3:
            assert p.grad is None
            continue
        assert p.grad is not None and p.grad.dtype == dtype
        # the difference is rounded in fp32, then twice more with the factor
        assert_within(p.grad, 0.07 * d, operations=4, magnitude=0.07 * d.abs())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layouts(impl: Any, generator: torch.Generator) -> None:
    """channels_last, transposed and strided parameters against contiguous anchors, and the other way round."""
    image, matrix = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(6, 4, generator=generator)
    last = image.to(memory_format=torch.channels_last)
    parameters = [last, image.clone(), last + 0, matrix.T, matrix[:, ::2], matrix.T[1:3]]
    shifts = [torch.randn(p.shape, generator=generator) for p in parameters]
    anchors = [p.contiguous() + s for p, s in zip(parameters, shifts, strict=True)]
    anchors[2] = anchors[2].to(memory_format=torch.channels_last)
    leaves = [p.detach().requires_grad_() for p in parameters]
    loss = l2_sp(leaves, list(anchors), 1.0, impl=impl)
    torch.testing.assert_close(loss.item(), 0.5 * sum(s.square().sum().item() for s in shifts))
    grads = torch.autograd.grad(loss, leaves)
    for grad, shift in zip(grads, shifts, strict=True):
        torch.testing.assert_close(grad, -shift, rtol=0, atol=2e-6)


def test_float64_keeps_float64(generator: torch.Generator) -> None:
    p, a = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    assert l2_sp([p], [a], 0.3).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: l2_sp([x, x], [a, None], 0.3), p.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Also past the size from which gradients are written around the cache."""
    p = torch.randn(9_000_001, generator=generator).to(dtype).requires_grad_()
    anchor = torch.randn(9_000_001, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            loss = l2_sp([p, p], [anchor, None], 0.1, impl="native")
            results.append((loss.detach(), *torch.autograd.grad(loss, p)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected = (0.1 * (p.detach().float() - anchor)).to(dtype) + (0.1 * p.detach().float()).to(dtype)
    torch.testing.assert_close(results[0][1], expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_at_the_start_it_is_zero(impl: Any) -> None:
    p = torch.randn(7).requires_grad_()
    loss = l2_sp([p], [p.detach().clone()], 5.0, impl=impl)
    loss.backward()
    assert loss.item() == 0 and p.grad is not None and not p.grad.any()
    assert l2_sp([], [], 1.0).item() == 0

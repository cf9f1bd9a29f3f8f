"""channel_attention: every implementation against two matrix products in float64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implementations import IMPLEMENTATIONS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mooring_kernels import channel_attention
from mooring_kernels.channel_attention import op


def loop(x: Tensor) -> Tensor:
    """Row by row; differentiable."""
    images = []
    for image in x:
        rows = []
        for channel in image:
            energy = (image * channel).sum(1)
            weight = torch.exp(energy.min() - energy)
            rows.append((weight[:, None] * image).sum(0) / weight.sum())
        images.append(torch.stack(rows))
    return torch.stack(images)


def with_gradient(call: Any, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = call(leaf)
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
    return out.detach(), grad


# the last takes the matrix products on the CPU; 7 and 49 positions are padded on a GPU
SHAPES = [(2, 5, 1), (3, 7, 7), (1, 1, 4), (2, 33, 49), (1, 6, 130)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-D{0[1]}-N{0[2]}".format)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_against_a_loop(
    impl: Any,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    x = (0.3 * torch.randn(shape, generator=generator)).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    out, grad = with_gradient(lambda leaf: channel_attention(leaf, impl=impl), x, upstream)
    expected, expected_grad = with_gradient(loop, x.double(), upstream.double())
    assert out.dtype == grad.dtype == dtype
    _, channels, positions = shape
    # a score is a dot of N products of size at most |x|^2; its error passes through exp into every weight
    score = 8 + (positions + 4) * x.double().square().amax().item()
    assert_within(out, expected, operations=score + channels, magnitude=x.double().abs().max().item())
    assert_within(
        grad,
        expected_grad,
        operations=8 * (score + channels + positions),
        magnitude=1 + expected_grad.abs().max().item(),
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scores_in_the_hundreds(impl: Any, grad: bool, generator: torch.Generator) -> None:
    """ReLU features, bf16 in: scores near 1e3 whose differences decide. In bf16 they would be off by 4."""
    x = (6 * torch.randn(1, 24, 130, generator=generator)).relu().bfloat16()
    energy = x.double() @ x.double().transpose(1, 2)
    assert energy.diagonal(dim1=1, dim2=2).max() > 1e3
    out = channel_attention(x.float().requires_grad_(grad), impl=impl).detach()
    expected = loop(x.double())
    # one rounding of a score, 1e3 * 2^-24, is a relative error of a weight; sums of 130 terms add some
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-3 * x.max().item() * 130**0.5 / 130)
    narrow = channel_attention(x, impl=impl)
    torch.testing.assert_close(narrow.double(), expected, rtol=2.0**-8, atol=1e-2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_channels_and_positions_may_be_permuted(impl: Any, generator: torch.Generator) -> None:
    x = torch.randn(2, 9, 10, generator=generator)
    channels, positions = torch.randperm(9, generator=generator), torch.randperm(10, generator=generator)
    plain = channel_attention(x, impl=impl)[:, channels][:, :, positions]
    strided = x[:, channels].transpose(1, 2)[:, positions].transpose(1, 2)
    torch.testing.assert_close(channel_attention(strided, impl=impl), plain)


def test_no_rows() -> None:
    x = torch.zeros(0, 3, 4, requires_grad=True)
    out = channel_attention(x)
    out.sum().backward()
    assert out.shape == (0, 3, 4) and x.grad is not None


def test_the_fused_kernel_runs_and_autocast_does_not_lower_it() -> None:
    """Without torch's fused kernel the [B, D, D] scores would be back."""
    x = torch.randn(2, 40, 9)
    with profile(activities=[ProfilerActivity.CPU]) as trace, torch.autocast("cpu", torch.bfloat16):
        lowered = channel_attention(x, impl="native")
    names = {event.key for event in trace.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names and "aten::softmax" not in names
    assert torch.equal(lowered, channel_attention(x, impl="native"))


def test_both_programs_of_the_cpu_agree(generator: torch.Generator) -> None:
    x = torch.randn(2, 12, op._KEPT_SCORES_POSITIONS, generator=generator)
    torch.testing.assert_close(op._by_products(x), op._fused(x))

"""convert_batchnorm_: the eval function stays, exactly as far as the stores round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import daft
from mooring_kernels import convert_batchnorm_

SIZES, EPS = (5, 1, 64), (1e-5, 1e-3, 1e-5)


def draw(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """weights, biases, running means, running variances; target means, target variances."""

    def normals(scale: float) -> list[Tensor]:
        return [scale * torch.randn(size, generator=generator, dtype=dtype) for size in SIZES]

    def positives() -> list[Tensor]:
        return [torch.rand(size, generator=generator, dtype=dtype) * 4 for size in SIZES]

    return [normals(1), normals(1), normals(1), positives(), normals(3), positives()]


def outputs(x: Tensor, layers: list[list[Tensor]]) -> list[Tensor]:
    weights, biases, means, variances = layers[:4]
    return [
        F.batch_norm(x[:, :size], mean, var, weight, bias, training=False, eps=eps)
        for size, weight, bias, mean, var, eps in zip(
            SIZES, weights, biases, means, variances, EPS, strict=True
        )
    ]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
def test_the_function_stays_and_the_statistics_arrive(
    dtype: torch.dtype, tolerance: float, generator: torch.Generator
) -> None:
    layers = draw(generator, dtype)
    layers[5][0][1:3] = torch.tensor([0.0, 1e-12])  # constant, and all but constant, on the target data
    x = torch.randn(200, 64, generator=generator, dtype=dtype)
    before, old = outputs(x, layers), [[t.clone() for t in tensors] for tensors in layers]
    ratios = convert_batchnorm_(*layers, EPS)
    for a, b in zip(before, outputs(x, layers), strict=True):
        # the largest term of the sum: where v_T is 0, weight 0 and 1 / sqrt(eps) meet
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 10)
    for layer, size in enumerate(SIZES):
        weight, bias, mean, var, new_mean, new_var = (tensors[layer].double() for tensors in old)
        scale = (var + EPS[layer]).sqrt()
        ratio = (new_var + EPS[layer]).sqrt() / scale
        rounding = torch.finfo(dtype).eps
        assert ratios[layer].shape == (size,) and ratios[layer].dtype == torch.float64
        torch.testing.assert_close(ratios[layer], ratio, rtol=1e-14, atol=0)
        torch.testing.assert_close(layers[0][layer].double(), weight * ratio, rtol=rounding, atol=0)
        expected = bias + (new_mean - mean) * weight / scale
        torch.testing.assert_close(layers[1][layer].double(), expected, rtol=rounding, atol=1e-14)
        assert torch.equal(layers[2][layer], layers[4][layer])
        assert torch.equal(layers[3][layer], layers[5][layer])


def test_a_second_conversion_changes_no_bit_and_the_way_back_restores(generator: torch.Generator) -> None:
    layers = draw(generator)
    layers[4] = [t.double() + 1e-9 for t in layers[4]]  # more digits than the buffers hold
    original = [[t.clone() for t in tensors] for tensors in layers[:4]]
    convert_batchnorm_(*layers, EPS)
    once = [[t.clone() for t in tensors] for tensors in layers[:4]]
    ratios = convert_batchnorm_(*layers, EPS)
    assert all(
        torch.equal(a, b) for x, y in zip(once, layers[:4], strict=True) for a, b in zip(x, y, strict=True)
    )
    assert all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in ratios)
    convert_batchnorm_(*layers[:4], original[2], original[3], EPS)
    for a, b in zip(original, layers[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_bound_on_the_ratio_moves_the_variance(generator: torch.Generator) -> None:
    layers = draw(generator)
    layers[3][2][:2] = torch.tensor([0.0, 1e4])  # dead on the source data, and the opposite
    x = torch.randn(50, 64, generator=generator)
    before = outputs(x, layers)
    ratios = convert_batchnorm_(*layers, EPS, max_ratio=2.0)
    assert all(ratio.min() >= 0.5 - 1e-6 and ratio.max() <= 2 + 1e-6 for ratio in ratios)
    torch.testing.assert_close(before, outputs(x, layers), rtol=1e-5, atol=1e-4)
    assert not torch.equal(layers[3][2][:2], layers[5][2][:2])
    assert all(var.min() >= 0 for var in layers[3])


def test_nothing_is_written_where_something_is_wrong(generator: torch.Generator) -> None:
    layers = draw(generator)
    kept = [[t.clone() for t in tensors] for tensors in layers]
    low = [*layers[0][:2], layers[0][2].bfloat16()]
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((low, *layers[1:], EPS), TypeError, r"weights\[2\] must be float32 or float64; got bfloat16"),
        ((*layers, EPS[:2]), ValueError, r"equally long, one entry per layer; got .*'eps': 2"),
        ((*layers, (1e-5, 0.0, 1e-5)), ValueError, r"eps\[1\] must be > 0; got 0.0"),
        (([layers[1][0], *layers[0][1:]], *layers[1:], EPS), ValueError, "one tensor in two places"),
        (
            (*layers[:5], [*layers[5][:2], layers[5][2][1:]], EPS),
            ValueError,
            r"target_vars\[2\] must be \[64\]",
        ),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message):
            convert_batchnorm_(*arguments)
    with pytest.raises(ValueError, match=r"max_ratio must be >= 1; got 0\.5"):
        convert_batchnorm_(*layers, EPS, max_ratio=0.5)
    assert all(
        torch.equal(a, b) for x, y in zip(kept, layers, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert convert_batchnorm_([], [], [], [], [], [], []) == []


def test_the_public_code_converts_alike(generator: torch.Generator) -> None:
    layers = draw(generator)
    theirs = [[t.clone() for t in tensors] for tensors in layers]
    daft.convert(*theirs, list(EPS))
    convert_batchnorm_(*layers, EPS)
    torch.testing.assert_close(layers, theirs, rtol=1e-5, atol=1e-5)

"""Benchmarks of batchnorm_statistics, in both orders of memory."""

from __future__ import annotations

from math import isqrt

import torch

import mooring_kernels as ops
from bench.baselines import daft
from bench.operation import Candidate, Inputs, Operation, Size, implementations, normal

_LAYER = ("running_mean", "running_var", "weight", "bias")
# ResNet-50 at 224 pixels: after the first convolution, in the first and in the last stage.
_SIZES = (Size(B=32, C=64, P=112 * 112), Size(B=32, C=256, P=56 * 56), Size(B=64, C=2048, P=7 * 7))


def _operation(name: str, layout: torch.memory_format) -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        x = normal(generator, size.B, size.C, isqrt(size.P), isqrt(size.P))
        return {
            "x": x.to(dtype).to(memory_format=layout),
            "running_mean": 0.1 * normal(generator, size.C),
            "running_var": torch.rand(size.C, generator=generator) + 0.5,
            "weight": normal(generator, size.C),
            "bias": normal(generator, size.C),
        }

    return Operation(
        name=name,
        inputs=inputs,
        candidates=(
            *implementations(
                lambda i, impl: ops.batchnorm_statistics(i["x"], *(i[key] for key in _LAYER), 1e-5, impl=impl)
            ),
            # its mean and variance are rounded to the dtype of x
            Candidate(
                "public",
                lambda i: daft.batchnorm_forward(i["x"], *(i[key] for key in _LAYER), 1e-5),
                same_function=False,
            ),
        ),
        counted_bytes=lambda size, value, _: 2 * size.B * size.C * size.P * value + 24 * size.C,
        counted_flop=lambda size, _: 6 * size.B * size.C * size.P,
        sizes=_SIZES,
        quick_sizes=(Size(B=4, C=16, P=64), Size(B=3, C=7, P=25)),
        # a mean near 0 is the sum of terms that are not
        amplification=30.0,
        longest_sum=lambda size: size.B * size.P,
        step="",
        note="the output is fresh memory: on a CPU over 32 MiB its page faults cost more than the pass itself",
    )


OPERATIONS = (
    _operation("batchnorm_statistics", torch.contiguous_format),
    _operation("batchnorm_statistics_channels_last", torch.channels_last),
)

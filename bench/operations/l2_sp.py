"""Benchmark of l2_sp over all parameters of a network."""

from __future__ import annotations

import torch

import mooring_kernels as ops
from bench.operation import Candidate, Inputs, Operation, Outputs, Pass, Size, implementations, normal
from bench.parameter_shapes import NETWORKS, SMALL_NETWORKS, shapes_of, values_of
from mooring_kernels.runtime.dispatch import Impl

_WEIGHT = 0.01


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        start = [normal(generator, *shape) for shape in shapes_of(size)]
        return {
            "parameters": [(p + 0.1 * normal(generator, *p.shape)).to(dtype) for p in start],
            "anchors": [p.to(dtype) for p in start],
        }

    def penalty(i: Inputs, impl: Impl) -> Outputs:
        return (ops.l2_sp(i["parameters"], i["anchors"], _WEIGHT, impl=impl),)

    def public(i: Inputs) -> Outputs:
        pairs = zip(i["parameters"], i["anchors"], strict=True)
        return (0.5 * _WEIGHT * torch.stack([(p - a).norm() ** 2 for p, a in pairs]).sum(),)

    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        return {"forward": 2, "backward": 3, "both": 5}[which] * value * values_of(size)

    return Operation(
        name="l2_sp",
        inputs=inputs,
        candidates=(
            *implementations(penalty),
            Candidate("public", public, dtypes=(torch.float32,)),
        ),
        counted_bytes=counted_bytes,
        counted_flop=lambda size, which: {"forward": 3, "backward": 2, "both": 5}[which] * values_of(size),
        differentiable=("parameters",),
        sizes=NETWORKS,
        quick_sizes=SMALL_NETWORKS,
        longest_sum=lambda size: 16 * 1024,
        note="D, K: ViT of K blocks; D alone: ResNet-50.",
        step="fine_tune",
    )


OPERATIONS = (_operation(),)

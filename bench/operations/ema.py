"""Benchmark of ema_: fp32 averages of all parameters of a network in fp32 and in bf16."""

from __future__ import annotations

import torch

import mooring_kernels as ops
from bench.baselines import concept_tuning
from bench.operation import Candidate, Inputs, Operation, Outputs, Size, implementations, normal
from bench.parameter_shapes import NETWORKS, SMALL_NETWORKS, shapes_of, values_of
from mooring_kernels.runtime.dispatch import Impl

_MOMENTUM = 0.999


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        shapes = shapes_of(size)
        return {
            "targets": [normal(generator, *shape) for shape in shapes],
            "sources": [normal(generator, *shape).to(dtype) for shape in shapes],
        }

    def step(i: Inputs, impl: Impl) -> Outputs:
        ops.ema_(i["targets"], i["sources"], _MOMENTUM, impl=impl)
        return tuple(i["targets"])

    def public(i: Inputs) -> Outputs:
        concept_tuning.ema(i["targets"], i["sources"], _MOMENTUM)
        return tuple(i["targets"])

    return Operation(
        name="ema_",
        inputs=inputs,
        candidates=(*implementations(step), Candidate("public", public, dtypes=(torch.float32,))),
        counted_bytes=lambda size, value, _: (8 + value) * values_of(size),
        counted_flop=lambda size, _: 3 * values_of(size),
        in_place=True,
        sizes=NETWORKS,
        quick_sizes=SMALL_NETWORKS,
        longest_sum=lambda size: 2,
        note="D, K: ViT of K blocks; D alone: ResNet-50. The dtype is that of the sources; the averages are fp32.",
        step="bi_tuning",
    )


OPERATIONS = (_operation(),)

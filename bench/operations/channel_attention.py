"""Benchmark of channel_attention: D channels of N positions."""

from __future__ import annotations

import torch

import mooring_kernels as ops
from bench.operation import Inputs, Operation, Pass, Size, implementations, normal


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        return {"x": (0.5 * normal(generator, size.B, size.D, size.N)).relu().to(dtype)}

    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        return {"forward": 2, "backward": 4, "both": 6}[which] * value * size.B * size.D * size.N

    def counted_flop(size: Size, which: Pass) -> int:
        return {"forward": 4, "backward": 10, "both": 14}[which] * size.B * size.D**2 * size.N

    return Operation(
        name="channel_attention",
        inputs=inputs,
        candidates=implementations(lambda i, impl: (ops.channel_attention(i["x"], impl=impl),)),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("x",),
        # an error of a score is one of every weight: scores reach about 100
        amplification=8.0,
        sizes=(Size(B=8, D=2048, N=49), Size(B=8, D=768, N=196)),
        quick_sizes=(Size(B=2, D=40, N=9), Size(B=1, D=24, N=130)),
        longest_sum=lambda size: max(size.D, size.N),
        note="native is torch's fused attention, or two matrix products. The public form is the reference.",
        step="concept_tuning",
    )


OPERATIONS = (_operation(),)

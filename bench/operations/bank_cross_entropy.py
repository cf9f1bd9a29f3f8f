"""Benchmark of bank_cross_entropy."""

from __future__ import annotations

from typing import Any

import torch

import mooring_kernels as ops
from bench.baselines import dr_tune
from bench.operation import (
    SIZES,
    Candidate,
    Inputs,
    Operation,
    Pass,
    Size,
    draw_head,
    implementations,
    normal,
    unit_rows,
)

IMAGENET21K = Size(B=64, K=2048, D=768, C=21841)


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        return {
            "features": 17.0 * unit_rows(generator, size.B, size.D).to(dtype),
            "labels": torch.randint(0, size.C, (size.B,), generator=generator),
            "bank": 17.0 * unit_rows(generator, size.K, size.D).to(dtype),
            "bank_labels": torch.randint(0, size.C, (size.K,), generator=generator),
            "weight": draw_head(size, generator).to(dtype),
            "bias": 0.1 * normal(generator, size.C).to(dtype),
        }

    def arguments(i: Inputs) -> tuple[Any, ...]:
        return i["features"], i["labels"], i["bank"], i["bank_labels"], i["weight"], i["bias"]

    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        rows, head = (size.B + size.K) * size.D, (size.D + 1) * size.C
        forward = value * (rows + head)
        backward = value * (rows + 2 * head + size.B * size.D)
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    def counted_flop(size: Size, which: Pass) -> int:
        forward = 2 * (size.B + size.K) * size.D * size.C
        backward = forward + 2 * size.B * size.D * size.C
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    return Operation(
        name="bank_cross_entropy",
        inputs=inputs,
        candidates=(
            *implementations(lambda i, impl: (ops.bank_cross_entropy(*arguments(i), impl=impl),)),
            Candidate("public", lambda i: (dr_tune.loss(*arguments(i)),)),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("features", "weight", "bias"),
        dtypes=(torch.float32,),
        sizes=(*SIZES, IMAGENET21K),
        amplification=4.0,
        note="native and triton form the gradients with the loss: hold `both` against the others, not `backward`",
    )


OPERATIONS = (_operation(),)

"""Benchmark of ring_push."""

from __future__ import annotations

import torch

import mooring_kernels as ops
from bench.baselines import dr_tune
from bench.operation import (
    SIZES,
    Candidate,
    Inputs,
    Operation,
    Outputs,
    Size,
    draw_bank,
    implementations,
    normal,
)
from mooring_kernels.runtime.dispatch import Impl


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        bank = draw_bank(size, generator, dtype)
        return {
            "bank_fields": [bank["frozen"], bank["tuned"]],
            "bank_labels": bank["labels"],
            "fields": [normal(generator, size.B, size.D) for _ in range(2)],
            "labels": torch.randint(0, size.C, (size.B,), generator=generator),
        }

    def push(i: Inputs, impl: Impl) -> Outputs:
        ops.ring_push_(i["bank_fields"], i["bank_labels"], i["fields"], i["labels"], 0, impl=impl)
        return (*i["bank_fields"], i["bank_labels"])

    def push_public(i: Inputs) -> Outputs:
        dr_tune.enqueue(i["bank_fields"], i["bank_labels"], i["fields"], i["labels"], 0)
        return (*i["bank_fields"], i["bank_labels"])

    return Operation(
        name="ring_push_",
        sizes=(*SIZES, Size(B=16384, K=16384, D=2048, C=1000)),  # 268 MB of new rows: no cache holds them
        inputs=inputs,
        candidates=(
            *implementations(push),
            Candidate("public", push_public, takes=lambda size: size.K % size.B == 0),
        ),
        counted_bytes=lambda size, value, _: 2 * size.B * size.D * (4 + value) + 16 * size.B,
        counted_flop=lambda size, _: 6 * size.B * size.D,
        in_place=True,
        note="head = 0 and B divides K: the public code cannot wrap",
    )


OPERATIONS = (_operation(),)

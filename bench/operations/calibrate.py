"""Benchmark of calibrate."""

from __future__ import annotations

import torch

import mooring_kernels as ops
from bench.baselines import dr_tune
from bench.operation import (
    Candidate,
    Inputs,
    Operation,
    Outputs,
    Pass,
    Size,
    draw_bank,
    draw_head,
    implementations,
    normal,
)
from mooring_kernels.runtime.dispatch import Impl


def _operation(rotated: bool) -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        turn = torch.linalg.qr(normal(generator, size.D, size.D))[0] if rotated else None
        return {
            **draw_bank(size, generator, dtype),
            "head_weight": draw_head(size, generator),
            "rotation": turn,
            "scale": torch.tensor(17.0),
        }

    def call(i: Inputs, impl: Impl) -> Outputs:
        return (
            ops.calibrate(
                i["frozen"], i["tuned"], i["labels"], i["head_weight"], i["rotation"], i["scale"], impl=impl
            ),
        )

    def call_public(i: Inputs) -> Outputs:
        return (
            dr_tune.calibrate(
                i["frozen"], i["tuned"], i["labels"], i["head_weight"], i["rotation"], i["scale"]
            ),
        )

    def counted_bytes(size: Size, value: int, _: Pass) -> int:
        turn = 4 * size.D * size.D if rotated else 0
        return 2 * size.K * size.D * value + 4 * size.K * size.D + 4 * size.C * size.D + 8 * size.K + turn

    def counted_flop(size: Size, _: Pass) -> int:
        turn = 2 * size.K * size.D * size.D if rotated else 0
        return 11 * size.K * size.D + 4 * size.C * size.D + turn

    return Operation(
        name="calibrate_rotated" if rotated else "calibrate",
        inputs=inputs,
        candidates=(
            *implementations(call),
            # It normalises its rows again: for rows rounded to bf16 that is another function.
            Candidate("public", call_public, dtypes=(torch.float32,)),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        amplification=4.0,  # residuals are differences of unit rows and are scaled back up
        note="the public code runs this once per step, with a rotation on every 10th step only",
    )


OPERATIONS = (_operation(rotated=False), _operation(rotated=True))

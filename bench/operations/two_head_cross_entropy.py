"""Benchmark of two_head_cross_entropy: C classes of the target head, K of the source head, B and M rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import mooring_kernels as ops
from bench.operation import Candidate, Inputs, Operation, Outputs, Pass, Size, implementations, normal

_WEIGHT = 0.5  # half-way down the linear schedule


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        return {
            "target_logits": 2.0 * normal(generator, size.B, size.C).to(dtype),
            "target_labels": torch.randint(0, size.C, (size.B,), generator=generator),
            "source_logits": 2.0 * normal(generator, size.M, size.K).to(dtype),
            "source_labels": torch.randint(0, size.K, (size.M,), generator=generator),
        }

    def arguments(i: Inputs) -> tuple[Any, ...]:
        return i["target_logits"], i["target_labels"], i["source_logits"], i["source_labels"]

    def two_losses(i: Inputs) -> Outputs:
        target = F.cross_entropy(i["target_logits"].float(), i["target_labels"])
        return (target + _WEIGHT * F.cross_entropy(i["source_logits"].float(), i["source_labels"]),)

    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        forward = value * (size.B * size.C + size.M * size.K) + 8 * (size.B + size.M)
        backward = 2 * forward
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    def counted_flop(size: Size, which: Pass) -> int:
        forward = backward = 4 * (size.B * size.C + size.M * size.K)
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    return Operation(
        name="two_head_cross_entropy",
        inputs=inputs,
        candidates=(
            *implementations(
                lambda i, impl: (ops.two_head_cross_entropy(*arguments(i), _WEIGHT, impl=impl)[0],)
            ),
            # the third party's two calls: no masks, a mean by the number of rows
            Candidate("public", two_losses),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("target_logits", "source_logits"),
        sizes=tuple(Size(B=rows, C=200, K=k, M=rows) for k in (1000, 21841) for rows in (64, 256)),
        quick_sizes=(Size(B=16, C=10, K=37, M=16), Size(B=13, C=7, K=20, M=5)),
        longest_sum=lambda size: max(size.B, size.C, size.K, size.M),
        step="soft",
        note="C classes of the target head, K of the source head, M source rows; source weight 0.5.",
    )


OPERATIONS = (_operation(),)

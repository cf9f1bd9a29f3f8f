"""Benchmark of queue_info_nce: a class queue of C classes, N rows in all, against B queries of width D."""

from __future__ import annotations

from typing import Any

import torch

import mooring_kernels as ops
from bench.baselines import concept_tuning
from bench.operation import Candidate, Inputs, Operation, Pass, Size, implementations, unit_rows

_TEMPERATURE = 0.07


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        labels = torch.randint(0, size.C, (size.B,), generator=generator)
        # rows lean towards their class, as features do: the positives are not lost in the sum
        centres = unit_rows(generator, size.C, size.D)
        queue_labels = torch.arange(size.C).repeat_interleave(size.N // size.C)

        def near(of: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(centres[of] + unit_rows(generator, len(of), size.D))

        return {
            "query": near(labels),
            "own_key": near(labels),
            "labels": labels,
            "queue": near(queue_labels).to(dtype),
            "queue_labels": queue_labels,
        }

    def arguments(i: Inputs) -> tuple[Any, ...]:
        return i["query"], i["own_key"], i["labels"], i["queue"], i["queue_labels"], _TEMPERATURE

    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        forward = value * size.N * size.D + 4 * 2 * size.B * size.D + 8 * (size.N + size.B)
        backward = value * size.N * size.D + 4 * size.B * size.D
        return {"forward": forward, "backward": backward, "both": forward + 4 * size.B * size.D}[which]

    def counted_flop(size: Size, which: Pass) -> int:
        product = 2 * size.B * size.N * size.D
        return {"forward": product, "backward": product, "both": 2 * product}[which]

    return Operation(
        name="queue_info_nce",
        inputs=inputs,
        candidates=(
            *implementations(lambda i, impl: (ops.queue_info_nce(*arguments(i), impl=impl),)),
            Candidate("public", lambda i: (concept_tuning.image_loss(*arguments(i)),)),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("query",),
        amplification=8.0,  # logits are cosines over T = 0.07
        sizes=tuple(
            Size(B=48, N=40 * classes, D=width, C=classes) for width in (200, 128) for classes in (200, 1000)
        ),
        quick_sizes=(Size(B=16, N=80, D=20, C=10), Size(B=5, N=77, D=37, C=7)),
        longest_sum=lambda size: max(size.B, size.N, size.D),
        note="native and triton form the gradient with the loss: hold `both` against the others, not `backward`; "
        "the dtype is the queue's",
        step="bi_tuning",
    )


OPERATIONS = (_operation(),)

"""Benchmark of text_supervised_loss."""

from __future__ import annotations

from typing import Any

import torch

import mooring_kernels as ops
from bench.baselines import tes
from bench.operation import Candidate, Inputs, Operation, Pass, Size, implementations, normal, unit_rows

_WIDTH = 512  # of CLIP's class-name embeddings
_OPTIONS = (0.03, 0.1, 0.3)  # tau, lambda_v, lambda_t of the released script


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        labels = torch.randint(0, size.C, (size.B,), generator=generator)
        # a row leans towards the name of its class, not so far that r - onehot vanishes
        names = unit_rows(generator, size.C, _WIDTH)
        query = torch.nn.functional.normalize(names[labels] + 8.0 * unit_rows(generator, size.B, _WIDTH))
        return {
            "logits": 2.0 * normal(generator, size.B, size.C).to(dtype),
            "cosines": query @ names.T,
            "labels": labels,
        }

    def arguments(i: Inputs) -> tuple[Any, ...]:
        return i["logits"], i["cosines"], i["labels"], *_OPTIONS

    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        forward = size.B * size.C * (value + 4) + 8 * size.B
        backward = 2 * forward
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    def counted_flop(size: Size, which: Pass) -> int:
        forward, backward = 10 * size.B * size.C, 9 * size.B * size.C
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    return Operation(
        name="text_supervised_loss",
        inputs=inputs,
        candidates=(
            *implementations(lambda i, impl: (ops.text_supervised_loss(*arguments(i), impl=impl),)),
            Candidate("public", lambda i: (tes.loss(*arguments(i)),), dtypes=(torch.float32,)),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("logits", "cosines"),
        amplification=4.0,  # cosines are divided by tau
        sizes=(Size(B=256, C=1000), Size(B=256, C=21841)),
        small_sizes=(Size(B=256, C=100), Size(B=16, C=10)),
        quick_sizes=(Size(B=16, C=10), Size(B=13, C=37)),
        longest_sum=lambda size: max(size.B, size.C),
        step="fine_tune",
        note="Cosines are fp32 also beside bf16 logits. FLOP: an exponential counts as one.",
    )


OPERATIONS = (_operation(),)

"""Benchmark of class_ring_push_: C rings of K rows, an image row and P patches of width D for each of B images."""

from __future__ import annotations

import torch

import mooring_kernels as ops
from bench.baselines import concept_tuning
from bench.operation import Candidate, Inputs, Operation, Outputs, Size, implementations, normal, unit_rows
from mooring_kernels.runtime.dispatch import Impl


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        image = unit_rows(generator, size.C * size.K, size.D).to(dtype)
        patches = unit_rows(generator, size.C * size.K * size.P, size.D).to(dtype)
        return {
            "bank_fields": [
                image.view(size.C, size.K, size.D),
                patches.view(size.C, size.K, size.P, size.D),
            ],
            "bank_labels": torch.arange(size.C)[:, None].repeat(1, size.K),
            "heads": torch.randint(0, size.K, (size.C,), generator=generator),
            "fields": [
                normal(generator, size.B, size.D),
                normal(generator, size.B, size.P, size.D),
            ],
            "labels": torch.randint(0, size.C, (size.B,), generator=generator),
        }

    def results(i: Inputs) -> Outputs:
        return (*i["bank_fields"], i["bank_labels"], i["heads"])

    def push(i: Inputs, impl: Impl) -> Outputs:
        ops.class_ring_push_(
            i["bank_fields"], i["bank_labels"], i["heads"], i["fields"], i["labels"], impl=impl
        )
        return results(i)

    def push_public(i: Inputs) -> Outputs:
        concept_tuning.enqueue(i["bank_fields"], i["bank_labels"], i["heads"], i["fields"], i["labels"])
        return results(i)

    return Operation(
        name="class_ring_push_",
        inputs=inputs,
        candidates=(*implementations(push), Candidate("public", push_public)),
        counted_bytes=lambda size, value, _: size.B * (1 + size.P) * size.D * (4 + value) + 40 * size.B,
        counted_flop=lambda size, _: 3 * size.B * (1 + size.P) * size.D,
        in_place=True,
        sizes=(Size(B=48, K=40, D=200, C=200, P=9), Size(B=48, K=40, D=128, C=1000, P=9)),
        quick_sizes=(Size(B=16, K=4, D=20, C=10, P=3), Size(B=9, K=2, D=37, C=5, P=2)),
        note="the image queue and the patch queue of Concept-Tuning in one call",
        step="",
    )


OPERATIONS = (_operation(),)

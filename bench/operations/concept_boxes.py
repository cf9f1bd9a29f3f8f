"""Benchmark of concept_boxes: maps of N = H W positions of D channels, 224 pixels, nine boxes."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

import mooring_kernels as ops
from bench.baselines import concept_tuning
from bench.operation import Candidate, Inputs, Operation, Outputs, Size, implementations
from mooring_kernels.concept_boxes.rule import default_group_width

_PATCHES = 9


def _operation() -> Operation:
    def integers(generator: torch.Generator, *shape: int) -> Tensor:
        """Small whole numbers, so that every sum is exact and no candidate may break a tie of its own."""
        return torch.randint(-64, 65, shape, generator=generator).float()

    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        side = isqrt(size.N)
        return {
            "feature_map": integers(generator, size.B, size.D, side, side).relu().to(dtype),
            "logits": integers(generator, size.B, size.C).to(dtype),
            "labels": torch.randint(0, size.C, (size.B,), generator=generator),
            "head_weight": integers(generator, size.C, size.D),
        }

    def image(i: Inputs) -> int:
        return 32 * int(i["feature_map"].shape[2])

    def public(i: Inputs) -> Outputs:
        return concept_tuning.boxes(
            i["feature_map"], i["logits"], i["labels"], i["head_weight"], image(i), i["logits"].shape[1] - 1
        )

    def counted_bytes(size: Size, value: int, _: object) -> int:
        read = _PATCHES * default_group_width(size.D) * size.N * value + 16 * size.D + size.C * value
        return size.B * (read + 16 * _PATCHES + 8 * (size.C - 1))

    return Operation(
        name="concept_boxes",
        inputs=inputs,
        candidates=(
            *implementations(
                lambda i, impl: ops.concept_boxes(
                    i["feature_map"],
                    i["logits"],
                    i["labels"],
                    i["head_weight"],
                    image_size=(image(i), image(i)),
                    negatives=i["logits"].shape[1] - 1,
                    impl=impl,
                )
            ),
            Candidate("public", public, dtypes=(torch.float32,)),
        ),
        counted_bytes=counted_bytes,
        counted_flop=lambda size, _: size.B * (4 * size.D + _PATCHES * default_group_width(size.D) * size.N),
        sizes=(Size(B=48, D=2048, N=49, C=200), Size(B=48, D=768, N=196, C=200)),
        quick_sizes=(Size(B=5, D=80, N=9, C=6), Size(B=3, D=66, N=4, C=9)),
        note="Cells of 32 pixels; all other classes are asked for as negatives.",
        reads_a_part=True,
        step="concept_tuning",
    )


OPERATIONS = (_operation(),)

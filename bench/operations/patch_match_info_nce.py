"""Benchmark of patch_match_info_nce."""

from __future__ import annotations

from typing import Any

import torch

import mooring_kernels as ops
from bench.baselines import concept_tuning
from bench.operation import Candidate, Inputs, Operation, Pass, Size, implementations, normal

_ROUNDS, _NEGATIVES = 30, 10
# An eighth of CUB's step (B = 48): the largest batch whose eager candidates fit a run of some minutes on a CPU.
_CUB = Size(B=6, K=40, D=200, C=200, P=9, M=199)
_QUICK = (Size(B=3, K=4, D=20, C=5, P=9, M=4), Size(B=2, K=3, D=17, C=4, P=5, M=3))


def _operation() -> Operation:
    def inputs(size: Size, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        # Patches of a class are alike, as a network's are: the plans have something to match.
        models = normal(generator, size.C, size.P, size.D)

        def patches(model: torch.Tensor) -> torch.Tensor:
            drawn = model + 1.5 * normal(generator, *model.shape)
            return torch.nn.functional.normalize(drawn, dim=-1).to(dtype)

        labels = torch.randint(0, size.C, (size.B,), generator=generator)
        others = torch.arange(size.C - 1).repeat(size.B, 1)
        return {
            "query": patches(models[labels]),
            "own_key": patches(models[labels]),
            "labels": labels,
            "queue": patches(models[:, None].expand(-1, size.K, -1, -1)),
            "queue_valid": torch.ones(size.C, size.K, dtype=torch.bool),
            "negative_classes": (others + (others >= labels[:, None]))[:, : size.M].contiguous(),
            "positive_pick": torch.randint(0, 3, (size.B, 1 + size.K), generator=generator),
        }

    def arguments(i: Inputs) -> tuple[Any, ...]:
        names = ("query", "own_key", "labels", "queue", "queue_valid", "negative_classes", "positive_pick")
        return tuple(i[name] for name in names)

    def public(i: Inputs) -> tuple[torch.Tensor, ...]:
        query, own_key, labels, queue, _, negative_classes, positive_pick = arguments(i)
        return (
            concept_tuning.patch_match_loss(
                query, own_key, labels, queue, negative_classes, positive_pick, 0.07
            ),
        )

    def problems(size: Size) -> int:
        return size.B * (1 + size.K + size.K * size.M)

    def counted_bytes(size: Size, value: int, which: Pass) -> int:
        forward = value * size.P * size.D * (size.C * size.K + 2 * size.B)
        backward = value * size.P * size.D * (size.C * size.K + size.B)
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    def counted_flop(size: Size, which: Pass) -> int:
        entries = problems(size) * size.P**2
        forward = entries * (2 * size.D + 4 * _ROUNDS)
        backward = 2 * problems(size) * _NEGATIVES * size.D
        return {"forward": forward, "backward": backward, "both": forward + backward}[which]

    return Operation(
        name="patch_match_info_nce",
        inputs=inputs,
        candidates=(
            *implementations(lambda i, impl: (ops.patch_match_info_nce(*arguments(i), 0.07, impl=impl),)),
            Candidate("public", public, same_function=False),
        ),
        counted_bytes=counted_bytes,
        counted_flop=counted_flop,
        differentiable=("query",),
        dtypes=(torch.float32,),
        # logits are up to 1 / 0.07; an entry of a plan at the edge of its grid may change a pair
        amplification=16.0,
        sizes=(_CUB,),
        quick_sizes=_QUICK,
        longest_sum=lambda size: max(size.D, 1 + size.K + _NEGATIVES * size.K * size.M),
        step="concept_tuning",
        note="The gradient is formed with the loss: `backward` alone is a scaling, compare `both`.",
    )


OPERATIONS = (_operation(),)

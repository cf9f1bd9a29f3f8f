"""Contrasts against a class queue whose rings lie on several ranks, beside those against the whole queue."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mooring.distributed import Ranks
from mooring.methods.bank import BankSpec, FeatureBank
from mooring.methods.sharded_contrast import SharedQueries, sharded_info_nce, sharded_patch_info_nce
from mooring_kernels import patch_match_info_nce, queue_info_nce

WIDTH, PATCHES, SLOTS = 24, 4, 5
OPTIONS: dict[str, Any] = {"negatives_per_set": 6, "epsilon": 0.05, "rounds": 8}


def _units(*shape: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def contrasts(classes: int, rows: int, likeness: float, temperature: float, negatives: int) -> dict[str, Any]:
    """Loss and gradients of the rows of all ranks, against the sharded queue and against the whole one.

    Some rings are empty, some half full, and the batch has rows without a label, which hold NaN.

    Args:
        classes: C. rows: of each rank. likeness: of the rows of a class: large makes the own key dominate.
        temperature: T. negatives: M.
    """
    ranks = Ranks.here()
    generator = torch.Generator().manual_seed(classes)
    every = ranks.world * rows
    centre = _units(classes, PATCHES, WIDTH, generator=generator)

    def drawn(labels: Tensor) -> Tensor:
        noise = _units(len(labels), PATCHES, WIDTH, generator=generator)
        return F.normalize(likeness * centre[labels.clamp_min(0)] + noise, dim=-1)

    spec = BankSpec(SLOTS, {"image": WIDTH, "patches": (PATCHES, WIDTH)}, layout="per_class", classes=classes)
    whole = FeatureBank(spec)
    parts = FeatureBank(
        BankSpec(spec.rows, spec.fields, layout="per_class", classes=classes, scope="sharded"), ranks=ranks
    )
    stored = torch.randint(1, classes, (3 * ranks.world * classes,), generator=generator)  # none of class 0
    patches = drawn(stored)
    fields = {"image": patches[:, 0], "patches": patches}
    whole.push(fields, stored, torch.arange(len(stored)))
    own = slice(ranks.rank * rows, (ranks.rank + 1) * rows)
    share = slice(ranks.rank * len(stored) // ranks.world, (ranks.rank + 1) * len(stored) // ranks.world)
    parts.push({n: f[share] for n, f in fields.items()}, stored[share], torch.arange(len(stored))[share])

    labels = torch.arange(every) % classes  # every class, so the one without keys too
    labels[rows - 1] = -1
    queries, keys = (drawn(labels).masked_fill((labels < 0)[:, None, None], torch.nan) for _ in range(2))
    pick = torch.randint(0, 3, (every, 1 + SLOTS), generator=generator)
    offsets = 1 + torch.stack([torch.randperm(classes - 1, generator=generator) for _ in range(every)])
    others = (labels.clamp_min(0)[:, None] + offsets)[:, :negatives] % classes
    upstream = torch.randn(3, ranks.world, generator=generator)  # a factor for each rank's loss

    expected = _whole(ranks, rows, queries, keys, labels, whole, pick, others, temperature, upstream)
    query = queries[own].clone().requires_grad_()
    own_key = keys[own].clone().requires_grad_()
    shared = SharedQueries(
        ranks, labels[own], image=query[:, 0], query=query, own_key=keys[own], negatives=others[own]
    )
    first = sharded_info_nce(
        query[:, 0], keys[own][:, 0], shared["image"], shared, parts, "image", temperature
    )
    fixed = queries[:, 1].clone()
    second = sharded_info_nce(fixed[own], own_key[:, 0], fixed, shared, parts, "image", temperature)
    third = sharded_patch_info_nce(query, keys[own], shared, parts, pick, temperature, **OPTIONS)
    losses = torch.stack([first, second, third])
    grads = torch.autograd.grad((upstream[:, ranks.rank] * losses).sum(), [query, own_key])
    with torch.no_grad():
        again = sharded_patch_info_nce(query, keys[own], shared, parts, pick, temperature, **OPTIONS)
    assert torch.equal(again, third)
    return {
        "found": [losses.detach(), *(g.nan_to_num(99.0) for g in grads)],
        "expected": [expected[0][:, ranks.rank], *(g[own] for g in expected[1:])],
    }


def _whole(
    ranks: Ranks,
    rows: int,
    queries: Tensor,
    keys: Tensor,
    labels: Tensor,
    bank: FeatureBank,
    pick: Tensor,
    others: Tensor,
    temperature: float,
    upstream: Tensor,
) -> list[Tensor]:
    query, own_key = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    view = bank.view()
    rings = (-1, SLOTS)
    losses = []
    for rank in range(ranks.world):
        own = slice(rank * rows, (rank + 1) * rows)
        queue = (labels[own], view["image"], view.labels, temperature)
        patches = patch_match_info_nce(
            query[own], keys[own], labels[own], view["patches"].unflatten(0, rings), view.labels.view(rings) >= 0,
            others[own], pick[own], temperature, **OPTIONS,
        )  # fmt: skip
        losses += [
            queue_info_nce(query[own][:, 0], keys[own][:, 0], *queue),
            queue_info_nce(queries[own][:, 1], own_key[own][:, 0], *queue),
            patches,
        ]
    found = torch.stack(losses).view(ranks.world, 3).T
    return [found.detach(), *torch.autograd.grad((upstream * found).sum(), [query, own_key])]

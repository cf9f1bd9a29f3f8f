"""What each rank runs for test_distributed_ranks."""

from __future__ import annotations

from typing import Any

import torch

from mooring.distributed import Ranks, init_from_environment


def everything() -> dict[str, Any]:
    ranks = Ranks.here()
    ranks.barrier()
    return {
        "ranks": (ranks.rank, ranks.world, ranks.local_rank),
        "again": init_from_environment() == ranks,
        "first": ranks.is_first,
        "gathered": ranks.gather({"rank": ranks.rank, "text": "x" * (1 + 1000 * ranks.rank)}),
        "broadcast": ranks.broadcast({"from": ranks.rank}),
        "any of none": ranks.any(False),
        "any of one": ranks.any(ranks.rank == 1),
        "sum": ranks.all_reduce_(torch.tensor([1.5, 1.0 * ranks.rank])),
        "max": ranks.all_reduce_(torch.tensor([ranks.rank, -ranks.rank]), "max"),
        "min": ranks.all_reduce_(torch.tensor([ranks.rank, -ranks.rank]), "min"),
    }


def one_fails() -> None:
    if Ranks.here().rank == 1:
        raise ValueError("planted")
    Ranks.here().barrier()

"""What each rank runs for test_distributed_ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mooring.distributed import Ranks, init_from_environment, is_lost_rank
from mooring.errors import ConfigError
from mooring.exit_codes import CRASHED


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


def a_problem_of_one(kind: str) -> tuple[str, int]:
    """What rank 1's problem is on this rank, and the exit code that it stands for."""
    planted = {"mistake": ConfigError("planted"), "crash": RuntimeError("planted")}[kind]
    ranks = Ranks.here()
    try:
        ranks.agree(planted if ranks.rank == 1 else None)
    except Exception as err:
        return f"{type(err).__name__}: {err}", getattr(err, "exit_code", CRASHED)
    return "", 0


def one_goes(meeting: str) -> NoReturn:
    """Writes down whether the error that rank 0 gets, where rank 1 has gone in the middle, says that it has."""
    rank = Ranks.here().rank
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
    dist.all_reduce(torch.ones(4), group=group)
    if rank == 1:
        os._exit(9)
    try:
        while True:
            dist.all_reduce(torch.ones(4), group=group)
    except Exception as err:
        Path(meeting).write_text(f"{is_lost_rank(err)} {type(err).__name__} {err}")
        raise

"""Thread counts: settled through the environment before torch loads its OpenMP, hence in a process of their own.

Threads wait passively. By default a worker that has nothing to do spins for a while: CPU time would count that
as work, and a worker of one candidate's pool would still hold a core while the next candidate is timed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from bench.outcome import Outcome

WAIT_POLICY = "passive"
Result = TypeVar("Result")


def settle(threads: int) -> None:
    """Sets what OpenMP and MKL read when they are loaded.

    Raises:
        RuntimeError: torch is loaded already, and with it OpenMP.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the number of threads must be settled before torch is imported")
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": WAIT_POLICY,
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
    }


def in_new_process(threads: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a new process at this many threads (0: as torch likes); picklable both ways."""
    if threads:
        settle(threads)  # the new process inherits it; this one never imports torch
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def in_processes(
    counts: list[int],
    names: list[str],
    total_seconds: float | None,
    quick: bool,
    candidates: list[str],
    write: bool,
) -> Outcome:
    """``bench.session.run`` on the CPU, one thread count after the other, each in a new process.

    Args:
        counts: numbers of threads; ``total_seconds`` is shared evenly among them.
        names: ops; none for all.
    """
    total = Outcome()
    for threads in counts:
        seconds = None if total_seconds is None else total_seconds / len(counts)
        plan = (names, threads, seconds, quick, candidates, write)
        total += in_new_process(threads, _in_this_process, *plan)
    return total


def _in_this_process(
    names: list[str],
    threads: int,
    total_seconds: float | None,
    quick: bool,
    candidates: list[str],
    write: bool,
) -> Outcome:
    import torch

    from bench import records
    from bench.run import Options
    from bench.session import chosen_operations, run

    torch.set_num_threads(threads)
    options = Options(torch.device("cpu"), quick, tuple(candidates), records.FOLDER if write else None)
    return run(chosen_operations(names), options, total_seconds=total_seconds)

"""Thread counts: settled through the environment before torch loads its OpenMP, hence in a process of their own.

Threads wait passively. By default a worker that has nothing to do spins for a while: CPU time would count that
as work, and a worker of one candidate's pool would still hold a core while the next candidate is timed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

WAIT_POLICY = "passive"


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


def in_new_process(threads: int, function: str, *arguments: Any) -> Any:
    """``function(*arguments)`` in a new process at this many threads (0: as torch likes).

    Args:
        function: "module:name": it is imported there, and torch with it, but not here.
    """
    if threads:
        settle(threads)  # the new process inherits it; this one never imports torch
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(_call, function, *arguments).result()


def _call(function: str, *arguments: Any) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(*arguments)

"""Peak memory of one call above what was allocated before it, in a call that is not timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints two lines per use; read when it is first used
_MEMORY_EVENT = "[memory]"


def _peak_on_cpu(call: Callable[[], object]) -> int:
    """Running sum of torch's own allocation events: exact for tensors, those inside ops included.

    What a library allocates past torch is not in it: packed panels of MKL and oneDNN, and the few vectors of
    the C++ ops (of length D, C or K, never a matrix).
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    events = sorted(
        (event for event in results.events() if event.name() == _MEMORY_EVENT),
        key=lambda event: event.start_ns(),
    )
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _peak_on_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(call: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """Bytes that one call holds at its worst moment beyond its inputs, and the seconds this call took."""
    measure = _peak_on_cuda if device.type == "cuda" else _peak_on_cpu
    begin = time.perf_counter()
    peak = measure(call)
    return peak, time.perf_counter() - begin

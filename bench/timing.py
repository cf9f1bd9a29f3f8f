"""Fair times: every candidate is called once per round, in one process, and ratios are taken per round.

On the CPU the clock is the CPU time of this process at one thread: other load on a shared machine slows the
wall clock, not the work. On a GPU each call lies between two events, after a write that empties the L2
cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
_SHORTEST_SAMPLE = 2e-3  # seconds of CPU time: far above the clock's resolution and the cost of reading it
_FLUSH_BYTES = 256 * 1024**2  # more than any L2 cache today
_WARM_UP = 3


@dataclass(frozen=True)
class Quantiles:
    """20 %, 50 % and 80 % of a sample."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Linear interpolation between order statistics."""
        ordered = torch.tensor(sorted(values), dtype=torch.float64)
        p20, p50, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return cls(p20, p50, p80)


def _cpu_seconds(call: Call, repeats: int) -> float:
    begin = time.process_time_ns()
    for _ in range(repeats):
        call()
    return (time.process_time_ns() - begin) * 1e-9 / repeats


def _rounds_on_cpu(calls: Mapping[str, Call], rounds: int, budget_seconds: float) -> dict[str, list[float]]:
    repeats = {}
    for name, call in calls.items():
        for _ in range(_WARM_UP):
            call()
        repeats[name] = max(1, math.ceil(_SHORTEST_SAMPLE / max(_cpu_seconds(call, 1), 1e-9)))
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.monotonic() + budget_seconds
    for number in range(rounds):
        if number >= 3 and time.monotonic() > deadline:
            break
        start = number % len(names)  # nobody always runs behind the same neighbour
        for name in names[start:] + names[:start]:
            samples[name].append(_cpu_seconds(calls[name], repeats[name]))
    return samples


def _rounds_on_cuda(calls: Mapping[str, Call], rounds: int, budget_seconds: float) -> dict[str, list[float]]:
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    torch.cuda.synchronize()
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.monotonic() + budget_seconds
    for number in range(rounds):
        if number >= 3 and time.monotonic() > deadline:
            break
        start = number % len(names)
        events = {}
        for name in names[start:] + names[:start]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            calls[name]()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            samples[name].append(begin.elapsed_time(end) * 1e-3)
    return samples


def alternate(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int, budget_seconds: float
) -> dict[str, list[float]]:
    """Seconds of every candidate, one entry per round; entry i of all candidates belongs to the same round.

    Args:
        calls: name -> a call with everything bound.
        device: where the calls run.
        rounds: samples per candidate.
        budget_seconds: wall time after which no round begins (three are always made).
    """
    measure = _rounds_on_cuda if device.type == "cuda" else _rounds_on_cpu
    return measure(calls, rounds, budget_seconds)


def paired_ratio(samples: Sequence[float], baseline: Sequence[float]) -> Quantiles:
    """``baseline / samples`` round by round: how many times faster than the baseline."""
    return Quantiles.of([b / s for s, b in zip(samples, baseline, strict=True)])

"""Fair times: every candidate is called once per round, in one process, and ratios are taken per round.

On the CPU two clocks are read around the same calls: the CPU time of this process, which other load on a shared
machine does not lengthen, and the wall. At one thread CPU time is the time of the work. At more threads it is
the work of all threads together, and the wall says what they gain. On a GPU each call lies between two events,
after a write that empties the L2 cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
_SHORTEST_SAMPLE = 2e-3  # seconds of CPU time: far above the clock's resolution and the cost of reading it
_FLUSH_BYTES = 256 * 1024**2  # more than any L2 cache today
SLOW_SECONDS = 1.0  # seconds: a call this long is warm after its first time
_FEWEST_ROUNDS, _VERY_SLOW, _FEWEST_OF_VERY_SLOW = 3, 4.0, 2


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


@dataclass(frozen=True)
class Samples:
    """One entry per round: CPU time or, on a GPU, time between events; and, on the CPU, the wall."""

    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)


def _on_cpu(call: Call, repeats: int) -> tuple[float, float]:
    wall, work = time.perf_counter_ns(), time.process_time_ns()
    for _ in range(repeats):
        call()
    work, wall = time.process_time_ns() - work, time.perf_counter_ns() - wall
    return work * 1e-9 / repeats, wall * 1e-9 / repeats


def plan_rounds(costs: Mapping[str, float], rounds: int, budget_seconds: float) -> dict[str, int]:
    """How many rounds each candidate takes part in: an equal share of the budget each, cheap ones first.

    What a cheap candidate does not use is left to the others. A slow one gets the first rounds only (three;
    two where one call takes several seconds), so that an SVD does not decide how often the rest is timed.
    """
    left, plan = budget_seconds, {}
    for number, (name, cost) in enumerate(sorted(costs.items(), key=lambda item: item[1])):
        fewest = _FEWEST_OF_VERY_SLOW if cost > _VERY_SLOW else _FEWEST_ROUNDS
        share = left / (len(costs) - number)
        plan[name] = min(rounds, max(fewest, int(share / max(cost, 1e-9))))
        left = max(left - plan[name] * cost, 0.0)
    return {name: plan[name] for name in costs}


def _warm(call: Call, known: float | None, wait: Callable[[], None], warm_up: int) -> float:
    """Seconds of one warm call: what is known of a slow one, else measured after a warm-up."""
    if known is not None and known >= SLOW_SECONDS:
        return known
    seconds = 0.0
    for _ in range(warm_up):
        begin = time.perf_counter()
        call()
        wait()
        seconds = time.perf_counter() - begin
    return seconds


def _in_turn(names: Sequence[str], plan: Mapping[str, int], number: int) -> list[str]:
    """Who is called in this round, from another start each time: nobody always runs behind the same neighbour."""
    start = number % len(names)
    return [name for name in [*names[start:], *names[:start]] if number < plan[name]]


def _rounds_on_cpu(
    calls: Mapping[str, Call], rounds: int, budget_seconds: float, known: Mapping[str, float], warm_up: int
) -> dict[str, Samples]:
    repeats, costs = {}, {}
    for name, call in calls.items():
        once = _warm(call, known.get(name), lambda: None, warm_up)
        repeats[name] = max(1, math.ceil(_SHORTEST_SAMPLE / max(once, 1e-9)))
        costs[name] = once * repeats[name]
    plan = plan_rounds(costs, rounds, budget_seconds)
    samples = {name: Samples() for name in calls}
    for number in range(max(plan.values())):
        for name in _in_turn(list(calls), plan, number):
            work, wall = _on_cpu(calls[name], repeats[name])
            samples[name].seconds.append(work)
            samples[name].wall_seconds.append(wall)
    return samples


def _rounds_on_cuda(
    calls: Mapping[str, Call], rounds: int, budget_seconds: float, known: Mapping[str, float], warm_up: int
) -> dict[str, Samples]:
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    costs = {
        name: _warm(call, known.get(name), torch.cuda.synchronize, warm_up) for name, call in calls.items()
    }
    plan = plan_rounds(costs, rounds, budget_seconds)
    samples = {name: Samples() for name in calls}
    for number in range(max(plan.values())):
        events = {}
        for name in _in_turn(list(calls), plan, number):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            calls[name]()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            samples[name].seconds.append(begin.elapsed_time(end) * 1e-3)
    return samples


def alternate(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    budget_seconds: float,
    known: Mapping[str, float] | None = None,
    warm_up: int = 3,
) -> dict[str, Samples]:
    """Times of every candidate, one entry per round; entry i of all candidates belongs to the same round.

    Args:
        calls: name -> a call with everything bound.
        device: where the calls run.
        rounds: most samples per candidate.
        budget_seconds: wall time of all rounds; slow candidates take part in the first few only.
        known: seconds that earlier calls took; those over a second are not warmed up again.
        warm_up: calls before the first round.
    """
    measure = _rounds_on_cuda if device.type == "cuda" else _rounds_on_cpu
    return measure(calls, rounds, budget_seconds, known or {}, warm_up)


def paired_ratio(samples: Sequence[float], baseline: Sequence[float]) -> Quantiles:
    """``baseline / samples`` round by round, over the rounds that both took part in: how many times faster."""
    return Quantiles.of([b / s for s, b in zip(samples, baseline, strict=False)])

"""Verifies, times and records the candidates of an op."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import environment, records
from bench.operation import Candidate, Inputs, Operation, Outputs, Pass, Size, map_tensors
from bench.timing import Call, Quantiles, alternate, paired_ratio
from bench.verify import (
    Expected,
    VerificationError,
    expected_of,
    gradients,
    relative_error,
    seeded_inputs,
    upstream_for,
    verify,
)

SEED = 20240229
_COPY, _MATMUL = "copy rate", "matmul rate"  # measured in the same rounds as the candidates


def _prepared(candidate: Candidate) -> Callable[[Inputs], Outputs]:
    return torch.compile(candidate.call, dynamic=False) if candidate.compiled else candidate.call


class _Runner:
    """One candidate bound to its sets of inputs: each call takes the next set, that none stays in cache."""

    def __init__(self, operation: Operation, candidate: Candidate, sets: list[Inputs]) -> None:
        self._operation = operation
        self._call = _prepared(candidate)
        # in-place ops write their inputs: candidates must not see each other's
        self._sets = [map_tensors(s, lambda t: t.clone()) for s in sets] if operation.in_place else sets
        self._turn = 0
        self.graphed = candidate.graphed
        self._saved: list[tuple[Outputs, Outputs]] = []

    def _next(self) -> int:
        self._turn = (self._turn + 1) % len(self._sets)
        return self._turn

    def first(self, upstream: Outputs) -> tuple[Outputs, Outputs]:
        """Outputs and gradients on the first set of inputs, for the verify gate."""
        inputs = self._sets[0]
        outputs = self._call(inputs)
        if not self._operation.differentiable:
            return outputs, ()
        return outputs, gradients(self._operation, inputs, outputs, upstream)

    def _forward(self, number: int) -> Outputs:
        with torch.no_grad():
            return self._call(self._sets[number])

    def _both(self, number: int) -> Outputs:
        outputs = self._call(self._sets[number])
        return gradients(self._operation, self._sets[number], outputs, self._saved[number][1])

    def _backward(self, number: int) -> Outputs:
        outputs, upstream = self._saved[number]
        return gradients(self._operation, self._sets[number], outputs, upstream)

    def bind(self, which: Pass) -> Call:
        """The call that is timed for one pass."""
        if self._operation.differentiable and not self._saved:
            for inputs in self._sets:
                outputs = self._call(inputs)
                self._saved.append((outputs, upstream_for(outputs, SEED)))
        step = {"forward": self._forward, "backward": self._backward, "both": self._both}[which]
        if not self.graphed:
            return lambda: step(self._next())
        graphs = [self._capture(step, number) for number in range(len(self._sets))]
        return lambda: graphs[self._next()].replay()

    @staticmethod
    def _capture(step: Callable[[int], Outputs], number: int) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(number)
            eager = map_tensors(list(step(number)), lambda tensor: tensor.detach().clone())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(number)
        graph.replay()
        # Eager was held against the definition; only a stale or unwritten result is off by this much.
        if not all(relative_error(a, b) <= 1e-3 for a, b in zip(captured, eager, strict=True)):
            raise VerificationError("a replayed CUDA graph gives another result than the calls it captured")
        return graph


def _checked(
    operation: Operation,
    candidate: Candidate,
    sets: list[Inputs],
    expected: Expected,
    size: Size,
    dtype: torch.dtype,
) -> tuple[_Runner, float]:
    """The candidate, ready to be timed, and its relative error. Raises VerificationError."""
    runner = _Runner(operation, candidate, sets)
    outputs, slopes = runner.first(expected.upstream)
    if candidate.same_function:
        return runner, verify(operation, outputs, slopes, expected, size, dtype, candidate.name)
    results, exact = (*outputs, *slopes), (*expected.outputs, *expected.gradients)
    return runner, max(relative_error(a, b) for a, b in zip(results, exact, strict=True))


def _yardsticks(device: torch.device, copy_bytes: int, matmul_width: int) -> dict[str, Call]:
    source = torch.rand(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    left, right = (torch.rand(matmul_width, matmul_width, device=device) for _ in range(2))
    return {_COPY: lambda: target.copy_(source), _MATMUL: lambda: left @ right}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_operation(
    operation: Operation,
    device: torch.device,
    *,
    quick: bool,
    folder: Path = records.FOLDER,
    write: bool = True,
    budget_seconds: float = 20.0,
    deadline: float = math.inf,
    report: Callable[[str], None] = print,
) -> list[records.Record]:
    """Verifies and times all candidates of an op on a device.

    Args:
        operation: from ``bench.registry``.
        device: cpu or cuda.
        quick: small sizes, few rounds, no torch.compile: a check of the machinery, not a measurement.
        folder: where records are appended.
        write: append to ``folder``. A quick run is never appended: its numbers mean nothing.
        budget_seconds: wall time for the rounds of one (size, dtype, pass).
        deadline: time.monotonic() after which no further size or dtype is begun.
        report: takes one line per candidate.

    Returns:
        One record per size, dtype, pass and candidate.

    Raises:
        VerificationError: a candidate is wrong. Nothing of that op is timed then.
    """
    described = environment.describe(device)
    identity, commit = environment.identity(described), environment.commit()
    made: list[records.Record] = []
    for size in operation.quick_sizes if quick else operation.sizes:
        for dtype in operation.dtypes:
            if made and time.monotonic() > deadline:
                report(f"{operation.name} {size} {_dtype_name(dtype)}: not run, no time is left")
                continue
            made += _run_size(operation, device, size, dtype, quick, budget_seconds, report)
    for record in made:
        record |= {
            "environment": identity,
            "commit": commit,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        if write and not quick:
            records.append(record, folder)
    if write and not quick:
        records.remember_environment(identity, described, folder)
    return made


def _run_size(
    operation: Operation,
    device: torch.device,
    size: Size,
    dtype: torch.dtype,
    quick: bool,
    budget_seconds: float,
    report: Callable[[str], None],
) -> list[records.Record]:
    number_of_sets = 2 if quick else 4
    sets = [seeded_inputs(operation, size, dtype, device, SEED + n) for n in range(number_of_sets)]
    expected = expected_of(operation, sets[0], SEED)
    runners: dict[str, _Runner] = {}
    errors: dict[str, float] = {}
    base = {"op": operation.name, "size": str(size), "dtype": _dtype_name(dtype), "device": device.type}
    made: list[records.Record] = []
    for candidate in operation.candidates:
        if device.type not in candidate.devices or (quick and candidate.compiled):
            continue
        if dtype in candidate.dtypes and candidate.takes(size):
            runners[candidate.name], errors[candidate.name] = _checked(
                operation, candidate, sets, expected, size, dtype
            )
    input_bytes = _bytes_of(sets[0])
    copy_bytes, matmul_width = (2**20, 64) if quick else (2**26, 1024)
    for which in operation.passes:
        calls, unavailable = _bind(runners, which)
        for name, reason in unavailable.items():
            report(f"{operation.name} {size} {base['dtype']} {which}: {name} not timed: {reason}")
            made.append({**base, "pass": which, "candidate": name, "unavailable": reason})
        samples = alternate(
            calls | _yardsticks(device, copy_bytes, matmul_width),
            device,
            rounds=5 if quick else 50,
            budget_seconds=budget_seconds,
        )
        copy_rate = 2 * copy_bytes / Quantiles.of(samples[_COPY]).p50
        matmul_rate = 2 * matmul_width**3 / Quantiles.of(samples[_MATMUL]).p50
        counted_bytes = operation.counted_bytes(size, torch.finfo(dtype).bits // 8, which)
        counted_flop = operation.counted_flop(size, which)
        baseline = next(iter(calls))
        for name in calls:
            seconds, ratio = Quantiles.of(samples[name]), paired_ratio(samples[name], samples[baseline])
            record: dict[str, Any] = {
                **base,
                "pass": which,
                "candidate": name,
                "baseline": baseline,
                "seconds": asdict(seconds),
                "times_faster_than": {
                    other: asdict(paired_ratio(samples[name], samples[other]))
                    for other in calls
                    if other != name
                },
                "clock": "events" if device.type == "cuda" else "cpu time, one process",
                "rounds": len(samples[name]),
                "relative_error": errors[name],
                "counted_bytes": counted_bytes,
                "counted_flop": counted_flop,
                "copy_bytes_per_second": copy_rate,
                "matmul_flop_per_second": matmul_rate,
                "share_of_copy_rate": counted_bytes / seconds.p50 / copy_rate,
                "share_of_matmul_rate": counted_flop / seconds.p50 / matmul_rate,
                "input_sets": number_of_sets,
                "input_bytes": input_bytes,
                "note": operation.note,
            }
            made.append(record)
            report(
                f"{operation.name:<20}{size!s:<24}{base['dtype']:<9}{which:<9}{name:<10}"
                f"{seconds.p50 * 1e6:>11.1f} us  x{ratio.p50:<7.2f} [{ratio.p20:.2f}, {ratio.p80:.2f}]  "
                f"copy {record['share_of_copy_rate']:>6.1%}  matmul {record['share_of_matmul_rate']:>6.1%}  "
                f"error {errors[name]:.1e}"
            )
    return made


def _bytes_of(inputs: Inputs) -> int:
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_tensors(inputs, add)
    return total


def _bind(runners: dict[str, _Runner], which: Pass) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls by candidate; and why a CUDA graph could not be captured (a host sync, a data-given shape)."""
    calls: dict[str, Call] = {}
    unavailable: dict[str, str] = {}
    for name, runner in runners.items():
        try:
            calls[name] = runner.bind(which)
        except RuntimeError as error:
            if not runner.graphed or isinstance(error, VerificationError):
                raise
            torch.cuda.synchronize()
            unavailable[name] = str(error).splitlines()[0]
    return calls, unavailable


def main_loop(
    operations: list[Operation],
    device: torch.device,
    *,
    quick: bool,
    write: bool,
    total_seconds: float | None,
) -> int:
    """Runs the ops one after the other; returns how many failed their verification.

    Args:
        total_seconds: wall time for all of them; what is left is shared evenly among the ops to come.
    """
    failed = 0
    end = math.inf if total_seconds is None else time.monotonic() + total_seconds
    for number, operation in enumerate(operations):
        share = (end - time.monotonic()) / (len(operations) - number)
        passes = len(operation.sizes) * len(operation.dtypes) * len(operation.passes)
        try:
            run_operation(
                operation,
                device,
                quick=quick,
                write=write,
                # half: inputs, the float64 definition, compilation and warm-up take the rest
                budget_seconds=min(20.0, max(0.5 * share / passes, 0.0)),
                deadline=time.monotonic() + share,
            )
        except VerificationError as error:
            failed += 1
            print(f"NOT TIMED: {error}", file=sys.stderr)
    return failed

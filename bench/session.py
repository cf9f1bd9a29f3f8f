"""A whole run over the ops in one process: verify all first, then time case by case until the time is up."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from bench import records
from bench.operation import Case, Operation
from bench.outcome import Outcome, Request, UnknownOperationError
from bench.records import Record, deciding
from bench.registry import OPERATIONS
from bench.run import Options, dtype_name, run_case, verify_quickly
from bench.verify import VerificationError

SLOWEST_AUTO = 0.95  # of the best candidate
COMPILE_SECONDS = 15.0  # a case with torch.compile: less than this for each op, and the ops go before it
_MOST_SECONDS_A_PASS, _FEWEST_SECONDS_A_PASS = 20.0, 1.0


def chosen_operations(names: Iterable[str]) -> list[Operation]:
    """The ops of these names, all of them for none.

    Raises:
        UnknownOperationError: naming those that exist.
    """
    wanted = list(names)
    unknown = [name for name in wanted if name not in OPERATIONS]
    if unknown:
        raise UnknownOperationError(f"expected ops among {', '.join(OPERATIONS)}; got {', '.join(unknown)}")
    return [OPERATIONS[name] for name in wanted or OPERATIONS]


def slow_auto(record: Record) -> str | None:
    """A line for a measurement of ``auto`` that another candidate beats by more than 5 %, else None."""
    share = record.get("auto_share_of_best", 1.0)
    if share >= SLOWEST_AUTO:
        return None
    ratio = deciding(record).times_faster_than[record["best_candidate"]]
    threads = f"threads={record['threads']}  " if "threads" in record else ""
    return (
        f"{record['op']:<24}{record['size']:<24}{record['dtype']:<9}{record['pass']:<9}{threads}"
        f"auto is at {share:.2f} [{ratio['p20']:.2f}, {ratio['p80']:.2f}] of {record['best_candidate']}"
    )


def serve(wanted: Request, threads: int = 0) -> Outcome:
    """``run`` as a request says.

    Args:
        wanted: the request.
        threads: of the CPU, settled before this process imported torch; 0: leave them.
    """
    if threads:
        torch.set_num_threads(threads)
    folder = records.FOLDER if wanted.write else None
    options = Options(torch.device(wanted.device), wanted.quick, wanted.candidates, folder)
    operations = chosen_operations(wanted.names)
    return run(operations, options, total_seconds=wanted.seconds, verify_only=wanted.verify_only)


def in_turns(operations: list[Operation], *, quick: bool) -> list[list[tuple[Operation, Case]]]:
    """First cases of all ops, then second ones, and so on: a short run still covers every op."""
    cases = [(op, op.quick_cases if quick else op.cases) for op in operations]
    longest = max((len(of_op) for _, of_op in cases), default=0)
    return [[(op, of_op[turn]) for op, of_op in cases if turn < len(of_op)] for turn in range(longest)]


def _say(line: str) -> None:
    print(line, flush=True)  # a run of half an hour is watched through a pipe too


def run(
    operations: list[Operation],
    options: Options,
    *,
    total_seconds: float | None = None,
    verify_only: bool = False,
    report: Callable[[str], None] = _say,
) -> Outcome:
    """Verifies every op on its quick sizes, then verifies, times and records case by case.

    An op with a wrong or a failing candidate is not timed; one that turns out so at a later size not further.

    Args:
        operations: from the registry.
        options: how.
        total_seconds: wall time for all of it; the cases that are left when it is up are named.
        verify_only: stop once the quick sizes are verified.
        report: takes one line at a time.
    """
    end = math.inf if total_seconds is None else time.monotonic() + total_seconds
    outcome = Outcome()
    wrong: set[str] = set()

    def refuse(operation: Operation, error: Exception) -> None:
        if not isinstance(error, VerificationError):
            traceback.print_exc()
        wrong.add(operation.name)
        outcome.failed.append(f"NOT TIMED: {operation.name}: {type(error).__name__}: {error}")
        print(outcome.failed[-1], file=sys.stderr, flush=True)

    for operation in operations:
        try:
            verify_quickly(operation, options)
        except Exception as error:
            refuse(operation, error)
    turns = [] if verify_only else in_turns(operations, quick=options.quick)
    at = f" threads={torch.get_num_threads()}" if options.device.type == "cpu" else ""
    cases_left = sum(len(turn) for turn in turns)
    for turn in turns:
        for number, (operation, case) in enumerate(turn):
            left, share = end - time.monotonic(), 0.5 * (end - time.monotonic()) / cases_left
            cases_left -= 1
            if operation.name in wrong:
                continue
            where = f"{operation.name} {case.size} {dtype_name(case.dtype)}{at}"
            if left <= 0:
                outcome.left_out.append(where)
                continue
            compiled = left / (len(turn) - number) >= COMPILE_SECONDS
            if not compiled and not case.small and any(c.compiled for c in operation.candidates):
                outcome.left_out.append(f"{where}: torch.compile")
            # half: inputs, the float64 definition, compilation and warm-up take the rest
            budget = min(max(share / len(operation.passes), _FEWEST_SECONDS_A_PASS), _MOST_SECONDS_A_PASS)
            try:
                made = run_case(operation, case, replace(options, compiled=compiled), budget, report)
            except Exception as error:  # the other ops are still worth their time
                refuse(operation, error)
                continue
            outcome.slow_auto += [line for record in made if (line := slow_auto(record)) is not None]
    return outcome

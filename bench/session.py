"""A whole run over the ops in one process: verify all first, then time case by case until the time is up."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable

from bench.operation import Case, Operation
from bench.outcome import Outcome, UnknownOperationError
from bench.records import Record, deciding
from bench.registry import OPERATIONS
from bench.run import Options, dtype_name, run_case, verify_quickly
from bench.verify import VerificationError

SLOWEST_AUTO = 0.95  # of the best candidate
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
    threads = f"threads={record['threads']}  " if "threads" in record else ""
    return (
        f"{record['op']:<24}{record['size']:<24}{record['dtype']:<9}{record['pass']:<9}{threads}"
        f"auto is at {share:.2f} of {record['best_candidate']} "
        f"({deciding(record).seconds['p50'] * 1e6:.1f} us)"
    )


def in_turns(operations: list[Operation], *, quick: bool) -> list[tuple[Operation, Case]]:
    """First cases of all ops, then second ones, and so on: a short run still covers every op."""
    cases = [(op, op.quick_cases if quick else op.cases) for op in operations]
    longest = max((len(of_op) for _, of_op in cases), default=0)
    return [(op, of_op[turn]) for turn in range(longest) for op, of_op in cases if turn < len(of_op)]


def run(
    operations: list[Operation],
    options: Options,
    *,
    total_seconds: float | None = None,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Verifies every op on its quick sizes, then verifies, times and records case by case.

    An op with a wrong or a failing candidate is not timed; one that turns out so at a later size not further.

    Args:
        operations: from the registry.
        options: how.
        total_seconds: wall time for all of it; the cases that are left when it is up are named.
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
    turns = in_turns(operations, quick=options.quick)
    for number, (operation, case) in enumerate(turns):
        if operation.name in wrong:
            continue
        left = end - time.monotonic()
        if left <= 0:
            outcome.left_out.append(f"{operation.name} {case.size} {dtype_name(case.dtype)}")
            continue
        # half: inputs, the float64 definition, compilation and warm-up take the rest
        share = 0.5 * left / (len(turns) - number) / len(operation.passes)
        budget = min(max(share, _FEWEST_SECONDS_A_PASS), _MOST_SECONDS_A_PASS)
        try:
            made = run_case(operation, case, options, budget, report)
        except Exception as error:  # the other ops are still worth their time
            refuse(operation, error)
            continue
        outcome.slow_auto += [line for record in made if (line := slow_auto(record)) is not None]
    return outcome

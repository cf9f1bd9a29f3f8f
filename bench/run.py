"""Verifies, times and records the candidates of an op."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import environment, records
from bench.operation import Candidate, Case, Inputs, Operation, Pass, map_tensors
from bench.runner import Runner
from bench.threads import WAIT_POLICY
from bench.timing import Call, Quantiles, Samples, alternate, paired_ratio
from bench.verify import Expected, VerificationError, expected_of, relative_error, seeded_inputs, verify
from bench.yardsticks import CLONE, COPY, MATMUL, Yardsticks, yardsticks

SEED = 20240229
AUTO = "auto"
ROUNDS, QUICK_ROUNDS = 50, 5
_BEYOND_CACHE = 2**26  # bytes of one set of inputs: two sets evict each other

# A recompilation past dynamo's limit would silently time eager code under the name of the compiled one.
torch._dynamo.config.fail_on_recompile_limit_hit = True


@dataclass(frozen=True)
class Options:
    """How a run is made.

    Args:
        device: cpu or cuda.
        quick: small sizes, few rounds, no torch.compile: a check of the machinery, never recorded.
        candidates: only these, the first of them the baseline; empty: all.
        folder: where records are appended; None: nowhere.
        compiled: torch.compile is among the candidates.
    """

    device: torch.device
    quick: bool = False
    candidates: tuple[str, ...] = ()
    folder: Path | None = None
    compiled: bool = True

    def wants(self, candidate: Candidate, case: Case) -> bool:
        """torch.compile takes seconds a case, and no dispatch could choose it: it is left out where calls are small."""
        return (
            self.device.type in candidate.devices
            and case.dtype in candidate.dtypes
            and candidate.takes(case.size)
            and not (candidate.compiled and (self.quick or case.small or not self.compiled))
            and (not self.candidates or candidate.name in self.candidates)
        )


def _checked(
    operation: Operation,
    candidate: Candidate,
    sets: list[Inputs],
    expected: Expected,
    case: Case,
    device: torch.device,
) -> tuple[Runner, float]:
    """The candidate, ready to be timed, and its relative error. Raises VerificationError."""
    runner = Runner(operation, candidate, sets, device=device, seed=SEED)
    outputs, slopes = runner.first(expected.upstream)
    if candidate.same_function:
        return runner, verify(operation, outputs, slopes, expected, case.size, case.dtype, candidate.name)
    results, exact = (*outputs, *slopes), (*expected.outputs, *expected.gradients)
    return runner, max(relative_error(a, b) for a, b in zip(results, exact, strict=True))


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def verify_quickly(operation: Operation, options: Options) -> None:
    """Holds every candidate against the definition on the quick sizes, before anything is timed.

    Raises:
        VerificationError: a candidate is wrong.
    """
    for case in operation.quick_cases:
        inputs = seeded_inputs(operation, case.size, case.dtype, options.device, SEED)
        expected = expected_of(operation, inputs, SEED)
        for candidate in operation.candidates:
            if options.wants(candidate, case):
                _checked(operation, candidate, [inputs], expected, case, options.device)


def run_operation(
    operation: Operation,
    device: torch.device,
    *,
    quick: bool,
    folder: Path | None = None,
    budget_seconds: float = 20.0,
    report: Callable[[str], None] = print,
) -> list[records.Record]:
    """Verifies and times all candidates of an op on a device.

    Args:
        operation: from ``bench.registry``.
        device: cpu or cuda.
        quick: small sizes and few rounds.
        folder: where records are appended; a quick run is never appended: its numbers mean nothing.
        budget_seconds: wall time for the rounds of one (size, dtype, pass).
        report: takes one line per candidate.

    Returns:
        One record per size, dtype, pass and candidate.

    Raises:
        VerificationError: a candidate is wrong.
    """
    options = Options(device, quick, folder=folder)
    cases = operation.quick_cases if quick else operation.cases
    return [record for case in cases for record in run_case(operation, case, options, budget_seconds, report)]


def run_case(
    operation: Operation,
    case: Case,
    options: Options,
    budget_seconds: float,
    report: Callable[[str], None] = print,
) -> list[records.Record]:
    """Verifies, times and records all candidates of an op at one size and dtype; see ``run_operation``."""
    torch._dynamo.reset()  # graphs of other cases would count towards dynamo's limit
    base: dict[str, Any] = {
        "op": operation.name,
        "size": str(case.size),
        "dtype": dtype_name(case.dtype),
        "device": options.device.type,
        "small": case.small,
    }
    if options.device.type == "cpu":
        base |= {"threads": torch.get_num_threads(), "omp_wait_policy": WAIT_POLICY}
    sets = _input_sets(operation, case, options)
    runners, errors, made = _runners(operation, case, options, sets)
    for which in operation.passes if runners else ():
        made += _run_pass(operation, case, options, sets, runners, errors, which, budget_seconds)
    made = [base | record for record in made]
    _judge_auto(made)
    described = environment.describe(options.device)
    identity, commit = environment.identity(described), environment.commit()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = [record | {"environment": identity, "commit": commit, "time": now} for record in made]
    for record in made:
        report(line_of(record))
    if options.folder is not None and not options.quick:
        records.remember_environment(identity, described, options.folder)
        for record in made:
            records.append(record, options.folder)
    return made


def _input_sets(operation: Operation, case: Case, options: Options) -> list[Inputs]:
    def draw(number: int) -> Inputs:
        return seeded_inputs(operation, case.size, case.dtype, options.device, SEED + number)

    first = draw(0)
    number_of_sets = 2 if options.quick or _bytes_of(first) > _BEYOND_CACHE else 4
    return [first, *(draw(number) for number in range(1, number_of_sets))]


def _runners(
    operation: Operation, case: Case, options: Options, sets: list[Inputs]
) -> tuple[list[Runner], dict[str, float], list[records.Record]]:
    """Verified candidates, their errors, and records of compiled baselines that do not work here."""
    expected = expected_of(operation, sets[0], SEED)
    runners: list[Runner] = []
    errors: dict[str, float] = {}
    unavailable: list[records.Record] = []
    for candidate in operation.candidates:
        if not options.wants(candidate, case):
            continue
        try:
            runner, errors[candidate.name] = _checked(
                operation, candidate, sets, expected, case, options.device
            )
        except Exception as error:
            if not candidate.compiled:
                raise
            unavailable += [_unavailable(candidate.name, which, error) for which in operation.passes]
            continue
        runners.append(runner)
    return runners, errors, unavailable


def _unavailable(name: str, which: Pass, error: Exception) -> records.Record:
    lines = str(error).strip().splitlines()
    return {"pass": which, "candidate": name, "unavailable": lines[0] if lines else type(error).__name__}


def _run_pass(
    operation: Operation,
    case: Case,
    options: Options,
    sets: list[Inputs],
    runners: list[Runner],
    errors: Mapping[str, float],
    which: Pass,
    budget_seconds: float,
) -> list[records.Record]:
    counted_bytes = operation.counted_bytes(case.size, torch.finfo(case.dtype).bits // 8, which)
    bound: dict[str, Runner] = {}
    calls: dict[str, Call] = {}
    known: dict[str, float] = {}
    made: list[records.Record] = []
    for runner in runners:
        name = runner.candidate.name
        try:
            calls[name] = runner.bind(which)
            seconds = runner.measure_peak(which, calls[name])
        except RuntimeError as error:
            # a CUDA graph cannot hold a host sync or a data-given shape
            if not runner.candidate.graphed or isinstance(error, VerificationError):
                raise
            torch.cuda.synchronize()
            made.append(_unavailable(name, which, error))
            continue
        bound[name] = runner
        if seconds is not None:
            known[name] = seconds
    yard = yardsticks(options.device, counted_bytes, len(sets), quick=options.quick)
    samples = alternate(
        calls | yard.calls,
        options.device,
        rounds=QUICK_ROUNDS if options.quick else ROUNDS,
        budget_seconds=budget_seconds,
        known=known,
    )
    shared = {
        "pass": which,
        "baseline": next(iter(calls)),
        "counted_bytes": counted_bytes,
        "counted_flop": operation.counted_flop(case.size, which),
        "input_sets": len(sets),
        "input_bytes": _bytes_of(sets[0]),
        "step": operation.step,
        "calls_per_step": operation.calls_per_step,
        "note": operation.note,
    }
    for name, runner in bound.items():
        others = {other: samples[other] for other in calls if other != name}
        made.append(
            shared
            | {
                "candidate": name,
                "ours": runner.candidate.ours,
                "same_function": runner.candidate.same_function,
                "graphed": runner.candidate.graphed,
                "relative_error": errors[name],
                "peak_bytes": runner.peaks[which],
            }
            | runner.compiled
            | times_of(samples[name], others, options.device)
            | _shares(shared, samples[name], samples, yard)
        )
    return made


def times_of(mine: Samples, others: Mapping[str, Samples], device: torch.device) -> records.Record:
    """Quantiles of a candidate's times and of its ratios to the others, by CPU time (or events) and by the wall."""
    record: records.Record = {
        "clock": "events" if device.type == "cuda" else "cpu time of the process",
        "rounds": len(mine.seconds),
        "seconds": asdict(Quantiles.of(mine.seconds)),
        "times_faster_than": {
            name: asdict(paired_ratio(mine.seconds, other.seconds)) for name, other in others.items()
        },
    }
    if mine.wall_seconds:
        record |= {
            "wall_seconds": asdict(Quantiles.of(mine.wall_seconds)),
            "wall_times_faster_than": {
                name: asdict(paired_ratio(mine.wall_seconds, other.wall_seconds))
                for name, other in others.items()
            },
        }
    return record


def _shares(
    counted: Mapping[str, Any], mine: Samples, samples: Mapping[str, Samples], yard: Yardsticks
) -> records.Record:
    """Counted bytes and FLOP per second over what the copy and the matrix product reached, on the deciding clock."""

    def median(of: Samples) -> float:
        by_wall = of.wall_seconds and torch.get_num_threads() > 1
        return Quantiles.of(of.wall_seconds if by_wall else of.seconds).p50

    seconds = median(mine)
    copy_rate = yard.copy_bytes / median(samples[COPY])
    clone_rate = yard.copy_bytes / median(samples[CLONE])
    matmul_rate = yard.matmul_flop / median(samples[MATMUL])
    return {
        "copy_bytes": yard.copy_bytes,
        "copy_bytes_per_second": copy_rate,
        "clone_bytes_per_second": clone_rate,
        "matmul_width": yard.matmul_width,
        "matmul_flop_per_second": matmul_rate,
        "share_of_copy_rate": counted["counted_bytes"] / seconds / copy_rate,
        "share_of_clone_rate": counted["counted_bytes"] / seconds / clone_rate,
        "share_of_matmul_rate": counted["counted_flop"] / seconds / matmul_rate,
    }


def _judge_auto(made: list[records.Record]) -> None:
    """Writes into the records of ``auto`` which candidate is best, and auto's speed as a share of it.

    Graphs are no rivals: whether calls are captured is the caller's choice, not dispatch's.
    """
    for record in made:
        if record["candidate"] != AUTO or "seconds" not in record:
            continue
        rivals = {
            other["candidate"]
            for other in made
            if other["pass"] == record["pass"] and other.get("same_function") and not other["graphed"]
        }
        ratios = records.deciding(record).times_faster_than
        shares = {name: ratio["p50"] for name, ratio in ratios.items() if name in rivals}
        if shares:
            best = min(shares, key=lambda name: shares[name])
            record |= {"best_candidate": best, "auto_share_of_best": shares[best]}


def _bytes_of(inputs: Inputs) -> int:
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    map_tensors(inputs, add)
    return total


def line_of(record: records.Record) -> str:
    """One line for the terminal."""
    where = f"{record['op']:<24}{record['size']:<24}{record['dtype']:<9}{record['pass']:<9}"
    if "unavailable" in record:
        return f"{where}{record['candidate']:<13}not timed: {record['unavailable']}"
    times = records.deciding(record)
    ratio = times.times_faster_than.get(record["baseline"], {"p20": 1.0, "p50": 1.0, "p80": 1.0})
    return (
        f"{where}{record['candidate']:<13}{times.seconds['p50'] * 1e6:>11.1f} us  x{ratio['p50']:<7.2f} "
        f"[{ratio['p20']:.2f}, {ratio['p80']:.2f}]  copy {record['share_of_copy_rate']:>6.1%}  "
        f"matmul {record['share_of_matmul_rate']:>6.1%}  {record['peak_bytes'] / 2**20:>8.2f} MiB  "
        f"error {record['relative_error']:.1e}"
    )

"""Every benchmarked op computes what it claims, on the small sizes; the machinery around it is honest."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.memory import peak_bytes
from bench.operation import Candidate, Operation, Size
from bench.registry import OPERATIONS
from bench.run import Options, run_operation
from bench.session import in_turns, run, slow_auto
from bench.timing import Quantiles, alternate, paired_ratio, plan_rounds
from bench.verify import VerificationError, bound_for, relative_error
from bench.yardsticks import yardsticks

DEVICE = torch.device("cuda" if os.environ.get("MOORING_GPU") == "1" else "cpu")


def quiet(line: str) -> None:
    """Drops a report line."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_candidate_verifies_and_is_timed_in_pairs(name: str, tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    made = run_operation(operation, DEVICE, quick=True, folder=tmp_path, report=quiet)
    timed = [record for record in made if "seconds" in record]
    available = {c.name for c in operation.candidates if DEVICE.type in c.devices and not c.compiled}
    unavailable = {record["candidate"] for record in made if "unavailable" in record}
    assert {record["candidate"] for record in timed} | unavailable == available
    for record in timed:
        assert record["relative_error"] == record["relative_error"], "NaN"
        assert record["rounds"] == 5
        assert record["counted_bytes"] > 0 and record["counted_flop"] > 0
        assert record["seconds"]["p20"] <= record["seconds"]["p50"] <= record["seconds"]["p80"]
        assert record["peak_bytes"] >= 0 and record["copy_bytes"] > 0
        assert DEVICE.type == "cuda" or (record["threads"] >= 1 and record["wall_seconds"]["p50"] > 0)
    assert not list(tmp_path.iterdir()), "a quick run is no measurement and leaves no record"


def test_counted_bytes_cover_inputs_and_outputs() -> None:
    """The floor of a forward pass is what its tensors weigh; ring_push_ touches B rows of its banks only."""
    for operation in OPERATIONS.values():
        size = operation.quick_sizes[0]
        inputs = operation.inputs(size, torch.Generator().manual_seed(1), torch.float32)
        flat = [v for value in inputs.values() for v in (value if isinstance(value, list) else [value])]
        tensors = [t for t in flat if isinstance(t, torch.Tensor) and t.dim() > 0]
        weight = sum(t.numel() * t.element_size() for t in tensors)
        counted = operation.counted_bytes(size, 4, "forward")
        if operation.in_place:
            assert counted <= 2 * weight  # what is written in place is read and written
            continue
        if operation.reads_a_part:
            assert counted < weight
            continue
        outputs = operation.candidates[0].call(inputs)
        weight += sum(t.numel() * t.element_size() for t in outputs)
        # labels of a row are the only tensors an op may leave out of its count
        assert 0.95 * weight <= counted <= 1.1 * weight, operation.name


def wrong(operation: Operation, spoil: Any) -> Operation:
    """The op with one more candidate, whose result is spoilt."""
    right = operation.candidates[0].call
    candidate = Candidate("wrong", lambda inputs: tuple(spoil(output) for output in right(inputs)))
    return dataclasses.replace(operation, candidates=(operation.candidates[0], candidate))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t * (1 + 1e-3),
        lambda t: t * float("nan"),
        lambda t: t.detach() + 0.0 * t,  # right values, gradient zero
        lambda t: t.detach(),  # right values, no gradient
    ],
    ids=["scaled", "nan", "zero-gradient", "no-gradient"],
)
def test_a_wrong_candidate_is_not_timed(spoil: Any, tmp_path: Path) -> None:
    spoilt = wrong(OPERATIONS["bank_cross_entropy"], spoil)
    with pytest.raises(VerificationError, match=r"wrong|with a gradient"):
        run_operation(spoilt, DEVICE, quick=True, folder=tmp_path, report=quiet)


def test_auto_is_a_candidate_of_every_op_and_judged(tmp_path: Path) -> None:
    for operation in OPERATIONS.values():
        assert "auto" in {candidate.name for candidate in operation.candidates if candidate.ours}, (
            operation.name
        )
    operation = OPERATIONS["class_statistics"]
    made = run_operation(operation, DEVICE, quick=True, folder=tmp_path, report=quiet)
    judged = [record for record in made if record["candidate"] == "auto"]
    assert judged and all(record["auto_share_of_best"] > 0 for record in judged)
    slow = judged[0] | {"auto_share_of_best": 0.9499}
    assert judged[0]["best_candidate"] in str(slow_auto(slow))
    assert slow_auto(slow | {"auto_share_of_best": 0.95}) is None


def test_small_sizes_are_timed_and_first_cases_come_first() -> None:
    for operation in OPERATIONS.values():
        assert any(case.small for case in operation.cases) and not operation.cases[0].small, operation.name
    turns = in_turns(list(OPERATIONS.values()), quick=False)
    assert [operation.name for operation, _ in turns[0]] == list(OPERATIONS)
    assert sum(len(turn) for turn in turns) == sum(len(operation.cases) for operation in OPERATIONS.values())


def test_a_run_out_of_time_names_what_it_left_out_and_a_failing_op_stops_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operation = OPERATIONS["row_normalise"]
    broken = dataclasses.replace(operation, name="broken", counted_bytes=lambda *_: 1 // 0)
    options = Options(DEVICE, quick=True, candidates=("reference",), folder=tmp_path)
    lines: list[str] = []
    outcome = run([broken, operation], options, report=lines.append)
    assert len(outcome.failed) == 1 and "ZeroDivisionError" in outcome.failed[0]
    assert len(lines) == len(operation.quick_cases) * 3 and not outcome.left_out
    outcome = run([operation], options, total_seconds=0.0, report=lines.append)
    assert len(outcome.left_out) == len(operation.quick_cases)
    capsys.readouterr()


def test_slow_candidates_take_part_in_few_rounds() -> None:
    plan = plan_rounds({"svd": 10.0, "slow": 2.0, "fast": 0.01, "medium": 0.1}, 50, 8.0)
    assert plan == {"svd": 2, "slow": 3, "fast": 50, "medium": 25}
    counts = {"a": 0, "b": 0}

    def call(name: str) -> None:
        counts[name] += 1

    # b is known to take a second: no warm-up, and three rounds are more than its share
    calls = {name: functools.partial(call, name) for name in counts}
    samples = alternate(calls, torch.device("cpu"), rounds=6, budget_seconds=0.5, known={"b": 1.0})
    assert counts["b"] == len(samples["b"].seconds) == 3 and len(samples["a"].seconds) == 6
    assert paired_ratio([1.0, 1.0, 9.0], [2.0, 2.0]) == Quantiles(2.0, 2.0, 2.0)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the CPU allocator's events")
def test_peak_memory_counts_what_is_allocated_inside_a_call() -> None:
    x = torch.ones(1024)

    def call() -> torch.Tensor:
        wide = x.expand(8, 1024).contiguous()  # 32 KiB that are gone at the end
        kept = wide.sum(0)  # 4 KiB
        del wide
        return kept.contiguous()

    peak, seconds = peak_bytes(call, DEVICE)
    assert 36 * 1024 <= peak < 37 * 1024 and seconds > 0


def test_the_copy_yardstick_moves_the_bytes_of_the_op() -> None:
    assert yardsticks(DEVICE, 10_000_000, 2, quick=True).copy_bytes == 10_000_000
    assert yardsticks(DEVICE, 8, 2, quick=True).copy_bytes == 2**16


@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads of the CPU")
def test_each_number_of_threads_has_a_process_of_its_own(repository: Path) -> None:
    command = [sys.executable, "-m", "bench", "class_statistics", "--quick", "--threads", "1", "2"]
    command += ["--candidates", "reference", "auto"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    timed = [line for line in done.stdout.splitlines() if not line.startswith("WARNING")]
    assert len(timed) == 2 * 2 * len(OPERATIONS["class_statistics"].quick_cases)


def test_relative_error_and_bound() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan"), 4.0]), expected) != 0.0
    size = Size(B=4, K=60, D=36, C=5)
    operation = OPERATIONS["class_statistics"]
    summed = 16 * 64**0.5 * 2.0**-24
    assert bound_for(operation, size, expected, torch.bfloat16) == pytest.approx(summed + 2.0**-23)
    assert bound_for(operation, size, expected.bfloat16(), torch.bfloat16) == pytest.approx(summed + 2.0**-7)


def test_rounds_alternate_and_ratios_are_paired() -> None:
    order: list[str] = []

    def work(name: str) -> None:
        order.append(name)
        begin = time.process_time()
        while time.process_time() - begin < 4e-3:  # longer than the shortest sample: called once per round
            pass

    calls = {name: functools.partial(work, name) for name in ("a", "b")}
    samples = alternate(calls, torch.device("cpu"), rounds=4, budget_seconds=60.0)
    assert {name: len(taken.seconds) for name, taken in samples.items()} == {"a": 4, "b": 4}
    assert all(wall >= 4e-3 for taken in samples.values() for wall in taken.wall_seconds)
    assert "".join(order[-8:]) == "abbaabba"
    drifting = [1.0, 2.0, 4.0, 8.0]
    assert paired_ratio(drifting, [3 * v for v in drifting]) == Quantiles(3.0, 3.0, 3.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a machine without CUDA can say so")
@pytest.mark.parametrize(
    "command", [["bench/gpu.py"], ["-m", "bench", "--device", "cuda"]], ids=["make-gpu", "bench"]
)
def test_without_a_gpu_one_sentence_and_a_failure(command: list[str], repository: Path) -> None:
    run = subprocess.run(
        [sys.executable, *command], cwd=repository, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2
    assert "CUDA device" in run.stderr and len(run.stderr.splitlines()) == 1


def test_an_unknown_op_is_named(repository: Path) -> None:
    command = [sys.executable, "-m", "bench", "calibrat"]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "got calibrat" in run.stderr and "row_normalise" in run.stderr

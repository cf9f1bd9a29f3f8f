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

from bench import records
from bench.compare import compare
from bench.operation import Candidate, Operation, Size
from bench.plot import main as plot
from bench.registry import OPERATIONS
from bench.run import run_operation
from bench.timing import Quantiles, alternate, paired_ratio
from bench.verify import VerificationError, bound_for, relative_error

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


def fake_record(commit: str, seconds: float, copy_rate: float, candidate: str = "native") -> dict[str, Any]:
    return {
        "op": "calibrate",
        "size": "B1-K2-D3-C4",
        "dtype": "float32",
        "device": "cpu",
        "pass": "forward",
        "candidate": candidate,
        "baseline": "reference",
        "environment": "e0",
        "commit": commit,
        "seconds": {"p20": 0.9 * seconds, "p50": seconds, "p80": 1.1 * seconds},
        "times_faster_than": {"reference": {"p20": 1.0, "p50": 2.0, "p80": 3.0}},
        "share_of_copy_rate": 0.5,
        "share_of_matmul_rate": 0.5,
        "relative_error": 1e-7,
        "copy_bytes_per_second": copy_rate,
    }


def test_compare_corrects_for_the_machine_and_takes_the_newest() -> None:
    history = [
        fake_record("aaa", 9.0, 1.0),
        fake_record("aaa", 4.0, 1.0),
        fake_record("bbb", 4.0, 0.5),  # the machine ran at half its speed: the code got twice as fast
        fake_record("bbb", 1.0, 1.0, candidate="only new"),
    ]
    (change,) = compare(history, "aa", "bbb")
    assert change.speed_up == pytest.approx(2.0) and change.beyond_noise
    assert (change.old_seconds, change.new_seconds) == (4.0, 4.0)
    assert compare(history, "aaa", "ccc") == []


def test_pictures_and_table_are_drawn_from_records(tmp_path: Path) -> None:
    store, out = tmp_path / "records", tmp_path / "plots"
    assert plot(["--records", str(store), "--out", str(out)]) == 1
    environment: dict[str, object] = {"cpu": "a CPU", "threads": 1, "torch": "2"}
    records.remember_environment("e0", environment, store)
    records.remember_environment("e0", environment, store)
    assert len(records.environments(store)) == 1
    for record in (fake_record("a", 2e-6, 1.0, "reference"), fake_record("a", 1e-6, 1.0)):
        records.append(record, store)
    step = fake_record("a", 8e-6, 1.0, "resnet50") | {"op": "training_step"}
    del step["times_faster_than"], step["baseline"]
    records.append(step, store)
    assert plot(["--records", str(store), "--out", str(out)]) == 0
    assert (out / "calibrate-e0.png").read_bytes().startswith(b"\x89PNG")
    lines = (out / "table.md").read_text().splitlines()
    assert len(lines) == 4
    assert lines[3].endswith("| native | 1.0 | 2.00 (1.00 to 3.00) |  | 50.0% | 50.0% | 1.0e-07 |  |")


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


def test_the_pictures_are_drawn_from_the_committed_records(tmp_path: Path) -> None:
    """The folder also holds results of whole runs (the demo, the data sources): they are no measurement of an op."""
    from bench import plot, records

    assert (records.FOLDER / "demo.jsonl").is_file()
    assert plot.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").stat().st_size > 0

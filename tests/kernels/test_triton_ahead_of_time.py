"""Every Triton kernel, in every configuration the launchers ask for, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

CAPABILITIES = (80, 90, 100)

SPILLING_KERNEL = """
import triton, triton.language as tl
from mooring_kernels.runtime.ahead_of_time import compile_launch, recorded_launches
import torch

@triton.jit
def fat_kernel(x_ptr: tl.tensor, BLOCK: tl.constexpr) -> None:
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns)
    tl.store(x_ptr + columns, x / tl.sum(x, axis=0))

with recorded_launches("one-warp") as launches:
    fat_kernel[(1,)](torch.zeros(8192), BLOCK=8192, num_warps=1)
print("; ".join(compile_launch(launches[0], 90).faults()))
"""


def without_interpreter() -> dict[str, str]:
    """This process interprets Triton and so cannot compile; the environment of one that can."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "mooring_kernels.runtime.ahead_of_time",
        *map(str, CAPABILITIES),
        "--json",
    ]
    run = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_of_every_op_is_compiled_for_every_target(
    compiled: list[dict[str, Any]], repository: Path
) -> None:
    defined = {
        line.split("def ")[1].split("(")[0]
        for source in sorted((repository / "kernels/mooring_kernels").glob("*/gpu.py"))
        for line in source.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert len(defined) >= 9
    for capability in CAPABILITIES:
        assert {row["name"].split("[")[0] for row in compiled if row["capability"] == capability} == defined


def test_nothing_spills_and_everything_fits(compiled: list[dict[str, Any]]) -> None:
    limits = {
        80: 163 * 1024,
        90: 227 * 1024,
        100: 227 * 1024,
    }  # CUDA programming guide: shared memory per block
    for row in compiled:
        assert row["stack_bytes"] == 0 and row["local_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= limits[row["capability"]], row


def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """Widths 768 and 2048, 200 or 1000 logits and 3136 or 12544 positions are multiples of 16 bytes."""
    kernels = set()
    for row in compiled:
        kernel, _, case = row["name"].rstrip("]").partition("[")
        if not any(size in case for size in ("D2048", "D768", "C200-", "C1000-", "P3136-", "P12544-")):
            continue
        if kernel.endswith("combine_kernel"):
            continue  # reads partial sums, a few channels at a time
        kernels.add(kernel)
        assert row["widest_load_bits"] == 128, row
        # These write one value per row or per column only; every other kernel writes whole rows.
        one_value_per_row = (
            "class_logits",
            "class_statistics",
            "text_supervised_loss_fwd",
            "two_head_cross_entropy_fwd",
        )
        if not kernel.startswith(one_value_per_row) and not case.endswith("gradientFalse"):
            assert row["widest_store_bits"] == 128, row
    assert len(kernels) >= 9


def test_a_spilling_kernel_is_found(tmp_path: Path) -> None:
    script = tmp_path / "spilling.py"  # Triton reads a kernel's source from its file
    script.write_text(SPILLING_KERNEL)
    run = subprocess.run(
        [sys.executable, str(script)], env=without_interpreter(), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("fat_kernel[one-warp] on sm_90: registers spill")


@pytest.mark.parametrize(
    ("arguments", "interpreted", "message"),
    [(["75"], False, "compute capabilities must be among"), (["90"], True, "TRITON_INTERPRET=1 is set")],
)
def test_a_wrong_call_is_explained(arguments: list[str], interpreted: bool, message: str) -> None:
    environment = without_interpreter() | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    command = [sys.executable, "-m", "mooring_kernels.runtime.ahead_of_time", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and message in run.stderr

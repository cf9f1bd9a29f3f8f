"""``make gpu``: every CUDA test, kernel check and benchmark in one go, in less than eight minutes.

It needs torch with CUDA, Triton, NumPy and pytest; not DALI, DeepSpeed, timm, the native module or a network.
`--only` takes some of the parts, with all of the time: two calls of eight minutes see more sizes than one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 450.0  # of 480: the rest is for starting Python and writing records
# Most that a part may take; what it does not use is left to the benchmarks, which come last.
TEST_SECONDS, COMPILE_SECONDS, SANITIZER_SECONDS, STEP_SECONDS = 200.0, 50.0, 50.0, 30.0
_STOP_SECONDS = 15.0  # a benchmark looks at the clock between measurements, not within one
_FAULT, _STOPPED = 99, 124


def environment() -> dict[str, str]:
    """Both source roots importable without an installation, kernels compiled and not interpreted."""
    roots = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT)]
    inherited = os.environ.get("PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {
        "MOORING_GPU": "1",
        "PYTHONPATH": os.pathsep.join([*roots, *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
    }


def test_files() -> list[str]:
    """The kernel and benchmark tests, and every other test file that has a test marked ``gpu``.

    Only these are collected: other files may import what a GPU machine need not have.
    """
    folders = [ROOT / "tests" / "kernels", ROOT / "tests" / "bench"]
    marked = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if not any(folder in path.parents for folder in folders)
        and "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    return [str(path.relative_to(ROOT)) for path in [*folders, *marked]]


def _limited(command: list[str], seconds: float, **variables: str) -> int:
    """Exit status of a command, 124 if it had to be stopped."""
    print("+", " ".join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment() | variables, start_new_session=True)
    try:
        return process.wait(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", file=sys.stderr)
        _end(process)
        return _STOPPED
    except KeyboardInterrupt:
        _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a command that still runs, and what it has started: a sanitizer's target, compilers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tests(seconds: float) -> int:
    return _limited(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--durations=10", *test_files()], seconds
    )


def _kernels(seconds: float) -> int:
    """Registers, shared memory and spills of every Triton kernel, compiled for the device at hand."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "mooring_kernels.runtime.ahead_of_time", str(10 * major + minor)]
    return _limited(command, seconds)


def _sanitizer(seconds: float) -> int:
    """Our kernels on the quick, odd sizes under memcheck; every tensor in an allocation of its own.

    It slows the GPU down by one to two orders of magnitude: not reaching the end in time is no fault.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH: left out")
        return 0
    check = [sanitizer, "--tool", "memcheck", "--error-exitcode", str(_FAULT), "--target-processes", "all"]
    bench = [sys.executable, "-m", "bench", "--device", "cuda", "--quick", "--verify-only"]
    status = _limited(
        [*check, *bench, "--candidates", "triton", "auto"], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    if status not in (0, _FAULT, _STOPPED):
        print(f"compute-sanitizer ended with {status}: it does not run on every machine; no fault was found")
        return 0
    return 0 if status == _STOPPED else status


def _step(seconds: float) -> int:
    """The rest of a training step, where timm is there."""
    status = _limited([sys.executable, "-m", "bench.training_step", "--device", "cuda"], seconds)
    return 0 if status == 2 else status


def _benchmarks(seconds: float) -> int:
    limit = f"{seconds - _STOP_SECONDS:.0f}"
    return _limited([sys.executable, "-m", "bench", "--device", "cuda", "--seconds", limit], seconds)


# In this order; the seconds are the most that a part may take of what is left.
PARTS: dict[str, tuple[Callable[[float], int], float]] = {
    "tests": (_tests, TEST_SECONDS),
    "kernels": (_kernels, COMPILE_SECONDS),
    "sanitizer": (_sanitizer, SANITIZER_SECONDS),
    "step": (_step, STEP_SECONDS),
    "benchmarks": (_benchmarks, TOTAL_SECONDS),
}


def missing() -> str | None:
    """One sentence saying what this machine lacks, or None."""
    try:
        import torch
    except ImportError:
        return "make gpu needs PyTorch with CUDA, and this Python cannot import torch."
    if not torch.cuda.is_available():
        return f"make gpu needs a CUDA device, and torch {torch.__version__} sees none on this machine."
    try:
        import triton  # noqa: F401
    except ImportError:
        return "make gpu needs Triton, and this Python cannot import it."
    return None


def main() -> int:
    """Runs the parts one after the other; 0 only if all did well, 2 where this machine cannot run them."""
    parser = argparse.ArgumentParser(prog="python bench/gpu.py", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts together")
    chosen = parser.parse_args()
    lacking = missing()
    if lacking is not None:
        print(lacking, file=sys.stderr)
        return 2
    begin = time.monotonic()
    statuses = {}
    parts = [name for name in PARTS if name in chosen.only]
    for name in parts:
        part, most = PARTS[name]
        left = chosen.seconds - (time.monotonic() - begin)
        statuses[name] = part(left if name == parts[-1] else min(most, left))
    said = "; ".join(f"{name}: {status or 'well'}" for name, status in statuses.items())
    print(f"{said}; {time.monotonic() - begin:.0f} s ({_STOPPED}: stopped; other numbers: exit status)")
    return 1 if any(statuses.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

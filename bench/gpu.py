"""``make gpu``: every CUDA test and every kernel benchmark in one go, in less than eight minutes.

It needs torch with CUDA, Triton and pytest; not DALI, DeepSpeed, timm, the native module or a network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 450  # of 480: the rest is for starting Python and writing records
TEST_SECONDS = 220
_STOP_SECONDS = 15  # a benchmark looks at the clock between measurements, not within one


def environment() -> dict[str, str]:
    """Both source roots importable without an installation, kernels compiled and not interpreted."""
    roots = [str(ROOT / "engine"), str(ROOT / "kernels"), str(ROOT)]
    inherited = os.environ.get("PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return variables | {
        "MOORING_GPU": "1",
        "PYTHONPATH": os.pathsep.join([*roots, *([inherited] if inherited else [])]),
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


def _limited(command: list[str], seconds: float) -> int:
    """Exit status of a command, 124 if it had to be stopped."""
    print("+", " ".join(command[1:]), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, env=environment(), timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s", file=sys.stderr)
        return 124


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
    """Runs tests, then benchmarks; returns 0 only if both did well, 2 where this machine cannot run them."""
    lacking = missing()
    if lacking is not None:
        print(lacking, file=sys.stderr)
        return 2
    begin = time.monotonic()
    tests = _limited([sys.executable, "-m", "pytest", "-q", "-m", "not slow", *test_files()], TEST_SECONDS)
    left = TOTAL_SECONDS - (time.monotonic() - begin)
    benchmarks = _limited(
        [sys.executable, "-m", "bench", "--device", "cuda", "--seconds", f"{left - _STOP_SECONDS:.0f}"], left
    )
    print(
        f"tests: {'passed' if tests == 0 else f'exit status {tests}'}; "
        f"benchmarks: {'verified and recorded' if benchmarks == 0 else f'exit status {benchmarks}'}; "
        f"{time.monotonic() - begin:.0f} s"
    )
    return 0 if tests == 0 and benchmarks == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

"""The C++ tests, plain and under the address and undefined-behaviour sanitizers, in every capability of this CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_C = pytest.importorskip("mooring_kernels._C")

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


def run(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout


@pytest.mark.parametrize("sanitize", ["", "address,undefined"], ids=["plain", "sanitized"])
def test_ctest(repository: Path, sanitize: str) -> None:
    # Kept between runs, so that only what changed is compiled again.
    build = repository / "build" / f"ctest-{'sanitized' if sanitize else 'plain'}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(
        "cmake", "-S", str(repository), "-B", str(build), *generator,
        "-DMOORING_PYTHON=OFF", "-DMOORING_TESTS=ON", f"-DMOORING_SANITIZE={sanitize}",
        f"-DCMAKE_BUILD_TYPE={'Debug' if sanitize else 'Release'}",
    )  # fmt: skip
    run("cmake", "--build", str(build), "--parallel", "2")
    report = run("ctest", "--test-dir", str(build), "--output-on-failure", "--no-tests=error")
    passed = re.findall(r"Test +#\d+: (\w+)\.(\w+) \.+ +Passed", report)
    programs = {path.stem for path in (repository / "csrc" / "tests").glob("test_*.cpp")}
    expected = {(program, capability) for program in programs for capability in _C.cpu_capabilities()}
    assert set(passed) == expected, report

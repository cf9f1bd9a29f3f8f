"""Every function of the native module under the sanitizers, called with strange values and impossible numbers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mooring_kernels._C")

pytestmark = [
    pytest.mark.slow,  # compiles the bindings with the sanitizers
    pytest.mark.skipif(
        shutil.which("cmake") is None or shutil.which("gcc") is None, reason="needs cmake and gcc"
    ),
]


def run(*command: str, **environment: str) -> str:
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout[-2000:]}\n{ran.stderr[-6000:]}"
    return ran.stdout


def library(name: str) -> str:
    return run("gcc", f"-print-file-name={name}").strip()


def test_no_call_reads_or_writes_outside_its_buffers(repository: Path) -> None:
    build = repository / "build" / "fuzz"  # kept between runs
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    pybind = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    run(
        "cmake", "-S", str(repository), "-B", str(build), *generator, "-DMOORING_PYTHON=ON", "-DMOORING_TESTS=OFF",
        "-DMOORING_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Debug", f"-DMOORING_MODULE_DIR={build / 'module'}",
        f"-Dpybind11_DIR={pybind}", f"-DPython_EXECUTABLE={sys.executable}",
    )  # fmt: skip
    run("cmake", "--build", str(build), "--parallel", "2")
    told = run(
        sys.executable, str(repository / "tests" / "fuzz" / "native.py"), str(build / "module"), "--seconds", "20",
        # the C++ library too: the sanitizer looks for its symbols when it starts
        LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
        OMP_NUM_THREADS="2",
    )  # fmt: skip
    functions, calls, numbers = map(
        int, re.findall(r"^(\d+) functions, (\d+) calls, (\d+) wrong numbers", told)[0]
    )
    assert functions >= 20 and calls >= 50 * functions
    # a wrong number is negative, or larger than any memory
    assert numbers >= calls

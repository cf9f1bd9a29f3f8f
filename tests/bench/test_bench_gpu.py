"""The division of ``make gpu``'s time, on a machine that need not have a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from bench import gpu

EIGHT_MINUTES = 480


def test_all_parts_fit_into_eight_minutes_and_leave_time_for_the_benchmarks() -> None:
    before = [most for name, (_, most) in gpu.PARTS.items() if name != "benchmarks"]
    assert gpu.TOTAL_SECONDS < EIGHT_MINUTES
    assert gpu.TOTAL_SECONDS - sum(before) >= 2 * 60
    assert list(gpu.PARTS)[-1] == "benchmarks", "it gets what the others leave"


def test_each_part_gets_its_limit_and_the_last_one_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, float] = {}

    def part(name: str, seconds: float) -> int:
        given[name] = seconds
        return 1 if name == "kernels" else 0

    parts = {
        name: (lambda seconds, name=name: part(name, seconds), most) for name, (_, most) in gpu.PARTS.items()
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 1, "one part failed"
    assert given["tests"] == gpu.TEST_SECONDS and given["benchmarks"] > gpu.TOTAL_SECONDS - 1
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "tests", "--seconds", "300"])
    given.clear()
    assert gpu.main() == 0 and list(given) == ["tests"] and given["tests"] > 299


def test_a_command_past_its_limit_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = f"import pathlib, time; time.sleep(4); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu._limited([sys.executable, "-c", parent], 1.0) == 124
    time.sleep(4)
    assert not (tmp_path / "alive").exists()
    assert gpu._limited([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == 3
    assert gpu.environment()["MOORING_GPU"] == "1" and "TRITON_INTERPRET" not in gpu.environment()


def test_only_files_with_gpu_tests_are_collected(repository: Path) -> None:
    files = gpu.test_files()
    assert files[:2] == ["tests/kernels", "tests/bench"]
    assert all("mark.gpu" in (repository / name).read_text(encoding="utf-8") for name in files[2:])

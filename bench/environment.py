"""What a number depends on besides the code: machine, versions, commit."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from mooring_kernels import cpu_capability
from mooring_kernels.runtime.native import NATIVE_BUILT

ROOT = Path(__file__).resolve().parent.parent


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, object]:
    """Everything about this machine and its software that can move a timing; no host name, no path.

    The number of threads is no part of it: each record says its own.
    """
    described: dict[str, object] = {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "native": cpu_capability() if NATIVE_BUILT else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return described


def identity(described: dict[str, object]) -> str:
    """Short name of an environment: equal exactly when its description is."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def commit() -> str:
    """Commit of the checkout, with ``+changes`` where the tree differs; "unknown" outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    # records and plots are what a benchmark writes: they are not a change of what was measured
    changed = git("status", "--porcelain", "--", ".", ":!bench/records", ":!bench/plots")
    return f"{head}+changes" if changed else head

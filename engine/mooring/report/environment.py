"""What a run ran on: versions, device, processor, which optional parts are there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mooring.report.run_folder import RunFolder

_PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pillow", "pyarrow", "pydantic", "safetensors",
    "torchmetrics", "triton", "deepspeed", "transformers",
)  # fmt: skip
_DALI_BUILDS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


def collect_environment() -> dict[str, Any]:
    """Everything a number from this machine should be read with, as JSON values.

    Paths under the home folder are written with ``~``.
    """
    import torch

    import mooring

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "mooring": mooring.__version__,
        "commit": _commit(),
        "command": [_without_home(part) for part in sys.argv],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": package_versions(),
        "cpu": {
            "model": cpu_model(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "devices": _devices(),
        "parts": {name: state for name, (_, state) in optional_parts().items()},
    }


def write_environment(folder: RunFolder) -> None:
    """Writes ``environment.json``; a continued run keeps the parts before it in ``earlier``."""
    environment = collect_environment()
    if (folder.path / "environment.json").is_file():
        before = folder.read_json("environment.json")
        environment["earlier"] = [*before.pop("earlier", []), before]
    folder.write_json("environment.json", environment)


def package_versions() -> dict[str, str]:
    """Installed distributions of the stack, without importing them."""
    found = {name: _version(name) for name in (*_PACKAGES, *_DALI_BUILDS)}
    return {name: installed for name, installed in found.items() if installed is not None}


def optional_parts() -> dict[str, tuple[bool, str]]:
    """Part -> (usable, what was found), for the parts a run can do without."""
    import torch

    parts: dict[str, tuple[bool, str]] = {}
    if torch.cuda.is_available():
        names = ", ".join(device["name"] for device in _devices())
        parts["CUDA"] = True, f"{torch.version.cuda}: {names}"
    else:
        parts["CUDA"] = (
            False,
            "this torch is a CPU build" if torch.version.cuda is None else "no usable device",
        )
    native = _found("mooring_kernels._C")
    parts["native CPU kernels"] = (
        native,
        "mooring_kernels._C" if native else "not built: reference ops are used",
    )
    dali = next((f"{name} {installed}" for name in _DALI_BUILDS if (installed := _version(name))), None)
    parts["DALI"] = dali is not None, dali or "not installed: images are decoded by Pillow"
    for part, package, without in (
        ("Triton", "triton", "not installed: no GPU kernels"),
        ("DeepSpeed", "deepspeed", "not installed: one process only"),
    ):
        installed = _version(package)
        parts[part] = installed is not None, f"{package} {installed}" if installed else without
    # a successful `import apex` proves nothing: only its compiled modules do
    kernels = [name for name in ("amp_C", "fused_layer_norm_cuda", "xentropy_cuda") if _found(name)]
    apex = bool(kernels) and torch.cuda.is_available()
    parts["Apex"] = apex, ", ".join(kernels) if apex else "no compiled modules: torch's optimizers are used"
    parts["torchvision ops"] = _torchvision_ops()
    return parts


def cpu_model() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _torchvision_ops() -> tuple[bool, str]:
    installed = _version("torchvision")
    if installed is None:
        return False, "torchvision is not installed"
    from mooring.models.torchvision_shim import import_torchvision

    extension = import_torchvision().extension
    if extension._has_ops():
        return True, f"torchvision {installed}, compiled"
    return (
        False,
        f"torchvision {installed} without compiled ops (shim): transforms work, nms and roi_align do not",
    )


def _devices() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"{device.major}.{device.minor}"
        found.append({"name": device.name, "memory_bytes": device.total_memory, "capability": capability})
    return found


def _commit() -> str | None:
    """Commit of the checkout that this package is imported from, with ``+changes`` where it was edited."""
    folder = Path(__file__).resolve().parent
    # a package in a virtual environment inside somebody's repository is not part of that repository
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False  # its parent package is not there


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text

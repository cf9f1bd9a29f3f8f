"""What one machine says about itself before a training starts: ``python -m mooring.launch.facts REQUEST``.

REQUEST and the answer, one line on stdout, are JSON. Standard library only, and every wait is bounded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "timm", "deepspeed", "safetensors", "numpy")


@dataclass(frozen=True, slots=True)
class Request:
    """What every machine is asked.

    Attributes:
        data: the images: a manifest folder, or what would be scanned.
        files: files that must be the same everywhere, such as weights.
        out: the run folder, or the nearest folder above that exists, is looked at for space.
        address, port: where the processes will meet.
        first: whether this machine is the one that listens there.
        visitors: how many other machines will come by.
        seconds: for the port, and for looking through the data.
    """

    data: str
    files: tuple[str, ...]
    out: str
    address: str
    port: int
    first: bool
    visitors: int
    seconds: float = 20.0


@dataclass(frozen=True, slots=True)
class Facts:
    """One machine's answer. A text that begins with "no " is what went wrong."""

    name: str
    python: str
    packages: dict[str, str]
    code: str
    data: str
    files: dict[str, str]
    free_bytes: int
    gpus: list[dict[str, str]] = field(default_factory=list)
    meeting: str = ""

    @classmethod
    def from_json(cls, text: str) -> Facts:
        return cls(**json.loads(text))


def gather(request: Request) -> Facts:
    """Looks at this machine."""
    return Facts(
        name=socket.gethostname(),
        python=platform.python_version(),
        packages={name: found for name in _PACKAGES if (found := _version(name))},
        code=code_digest(),
        data=data_digest(Path(request.data), request.seconds),
        files={name: _file(Path(name)) for name in request.files},
        free_bytes=free_bytes(Path(request.out)),
        gpus=gpus(),
        meeting=_listen(request) if request.first else _visit(request),
    )


def code_digest() -> str:
    """sha256 over the Python files and recipes of both packages, by their names under the package."""
    total = hashlib.sha256()
    for package in ("mooring", "mooring_kernels"):
        spec = find_spec(package)
        for root in sorted(spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(root).rglob("*")):
                if path.suffix in (".py", ".toml"):
                    total.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                    total.update(path.read_bytes())
    return total.hexdigest()[:16]


def data_digest(path: Path, seconds: float) -> str:
    """The manifest's own digest, or one over names and sizes of what would be scanned."""
    head = path / "manifest.json"
    try:
        if head.is_file():
            return f"manifest {json.loads(head.read_text(encoding='utf-8'))['digest'][:16]}"
        if path.is_file():
            return f"{path.stat().st_size} bytes {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
    except (OSError, ValueError, KeyError) as err:
        return f"no data that can be read: {err}"
    if not path.is_dir():
        return "no data there"
    deadline = time.monotonic() + seconds
    found: list[tuple[str, int]] = []
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            with contextlib.suppress(OSError):
                found.append((file.relative_to(path).as_posix(), file.stat().st_size))
        if time.monotonic() > deadline:
            return f"unknown: more than {len(found)} files, not looked through in {seconds:.0f} s"
    digest = hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()
    return f"{len(found)} files {digest[:16]}" if found else "no files there"


def free_bytes(path: Path) -> int:
    """Free space where ``path`` lies or will lie; -1 where that cannot be asked."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            with contextlib.suppress(OSError):
                return shutil.disk_usage(folder).free
            break
    return -1


def gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each NVIDIA GPU, as ``nvidia-smi`` tells; none where it is not there."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(("name", "driver", "memory"), row, strict=True)) for row in rows if len(row) == 3]


def _file(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError as err:
        return f"no file: {err.strerror}"


def _listen(request: Request) -> str:
    """Whether the port is free here, and how many machines came by."""
    came = 0
    try:
        with socket.create_server(("", request.port), backlog=1024) as server:
            deadline = time.monotonic() + request.seconds
            while came < request.visitors and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    server.accept()[0].close()
                    came += 1
    except OSError as err:
        return f"no free port {request.port}: {err.strerror}"
    return f"listened, {came} came"


def _visit(request: Request) -> str:
    deadline = time.monotonic() + request.seconds
    problem = "not tried"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((request.address, request.port), timeout=2):
                return "reached"
        except OSError as err:
            problem = err.strerror or str(err)
        time.sleep(0.1)
    return f"no way to {request.address}:{request.port}: {problem}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def main(arguments: list[str]) -> None:
    given: dict[str, Any] = json.loads(arguments[0])
    given["files"] = tuple(given["files"])
    print(json.dumps(asdict(gather(Request(**given)))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

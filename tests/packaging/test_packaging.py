"""The wheel: what is in it, that it works without torch, and that it steps on nobody's name."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_SOURCES = (
    "setup.py",
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "csrc",
    "engine",
    "kernels",
)


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build folder in the checkout could slip old files into it."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in _SOURCES:
        origin = repository / name
        if origin.is_dir():
            shutil.copytree(origin, source / name, ignore=ignored)
        else:
            shutil.copy(origin, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
    ]
    ran = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (built,) = folder.glob("mooring-*.whl")
    return built


def members(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_top_level_is_the_two_packages_and_their_dist_info(wheel: Path) -> None:
    top = {name.split("/")[0] for name in members(wheel)}
    (dist_info,) = {name for name in top if name.endswith(".dist-info")}
    assert top == {"mooring", "mooring_kernels", dist_info} and dist_info.startswith("mooring-")


def test_everything_needed_is_in_it_and_nothing_else(wheel: Path, repository: Path) -> None:
    inside = set(members(wheel))
    expected = {
        str(path.relative_to(repository / root))
        for root in ("engine", "kernels")
        for pattern in ("*.py", "*.pyi", "*.toml", "py.typed")
        for path in (repository / root).rglob(pattern)
        if "egg-info" not in str(path)
    }
    assert expected <= inside, f"missing from the wheel: {sorted(expected - inside)}"
    others = {name for name in inside - expected if ".dist-info/" not in name}
    module = {name for name in others if name.startswith("mooring_kernels/_C.") and name.endswith(".so")}
    assert len(module) == 1
    strange = {name for name in others - module if name.endswith((".cpp", ".h", ".o", ".pyc", ".so", ".a"))}
    assert not strange


def test_the_native_module_needs_no_torch(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (module,) = (tmp_path / "mooring_kernels").glob("_C.*.so")
    program = (
        "import sys, importlib.util\n"
        "spec = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.cpu_capability())"
    )
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(module)], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() in ("scalar", "avx2", "avx512")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_imports_from_the_checkout(repository: Path) -> None:
    """Its optional package `kernels` must not be taken for the folder of that name."""
    # the second module is the one that asks for the package `kernels`
    program = "import transformers, transformers.integrations.hub_kernels"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]

"""Builds mooring_kernels._C with CMake; everything else of the build is declared in pyproject.toml."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def build_tool(name: str, variable: str) -> str:
    """Path of cmake or ninja: the Python package of that name if installed, else the one on PATH."""
    try:
        folder = Path(getattr(importlib.import_module(name), variable))
    except ImportError:
        folder = None
    found = shutil.which(name, path=str(folder) if folder else None) or shutil.which(name)
    if found is None:
        raise SystemExit(
            f"building mooring needs {name}, which was not found: run  python -m pip install {name}"
        )
    return found


class CMakeBuild(build_ext):
    """Configures and builds the native module into the place setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        cmake = build_tool("cmake", "CMAKE_BIN_DIR")
        # The build folder may survive from another (isolated) environment whose tools are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(
            [
                cmake,
                "-S", str(ROOT),
                "-B", str(build),
                "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja', 'BIN_DIR')}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DMOORING_MODULE_DIR={module.parent}",
            ],
            check=True,
        )  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--target", "_C", "--parallel", jobs], check=True)
        if not module.is_file():
            raise SystemExit(f"the CMake build ended without {module}")


def packages_under(root: str) -> list[str]:
    return find_packages(str(ROOT / root), include=["mooring*"])


setup(
    packages=packages_under("engine") + packages_under("kernels"),
    package_dir={"mooring": "engine/mooring", "mooring_kernels": "kernels/mooring_kernels"},
    package_data={
        "mooring": ["py.typed", "**/*.toml", "**/*.json", "**/*.txt"],
        "mooring_kernels": ["py.typed", "*.pyi"],
    },
    ext_modules=[Extension("mooring_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)

"""``pip install .`` as a user without our requirements does it: from an sdist, in pip's own build environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_sdist_builds_in_pips_isolated_environment(repository: Path, tmp_path: Path) -> None:
    """Nothing but what build-system.requires names, and no torch: the native module includes no torch header."""
    make_sdist = (
        "import os, sys; os.chdir(sys.argv[1]); "
        "from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", make_sdist, str(repository), str(tmp_path)], check=True, timeout=300
    )
    (sdist,) = tmp_path.glob("mooring-*.tar.gz")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(tmp_path / "out"),
        str(sdist),
    ]
    subprocess.run(command, check=True, timeout=900)
    (wheel,) = (tmp_path / "out").glob("mooring-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "mooring",
        "mooring_kernels",
        f"{wheel.name.split('-py3')[0].split('-cp')[0]}.dist-info",
    }
    assert any(name.startswith("mooring_kernels/_C.") and name.endswith(".so") for name in names)
    assert "mooring/config/recipes/quick.toml" in names

"""The plain scripts under launch/: they parse, and run torchrun with the words they were given."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mooring.launch.request import launch_request
from mooring.launch.slurm import sbatch_script

SCRIPTS = ("torchrun.sh", "deepspeed.sh", "slurm.sbatch")


@pytest.fixture
def scripts(repository: Path) -> Path:
    return repository / "launch"


def generated(folder: Path) -> str:
    asked = launch_request(["train", "data=my photos"], name="x", slurm=True, nodes="2", gpus_per_node=1)
    assert asked.allocation is not None
    return sbatch_script(asked.program, asked.allocation, asked.rendezvous, folder=folder)


def test_no_script_is_forgotten(scripts: Path) -> None:
    assert {path.name for path in scripts.iterdir()} == {*SCRIPTS, "README.md"}
    readme = (scripts / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in SCRIPTS)


@pytest.mark.parametrize("name", [*SCRIPTS, "generated"])
def test_shells_accept_them(scripts: Path, name: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(
        generated(tmp_path) if name == "generated" else (scripts / name).read_text(encoding="utf-8")
    )
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_script_starts_every_process(scripts: Path, rendezvous: str, tmp_path: Path) -> None:
    """Real torchrun; the program is a stand-in that writes down what it was started with."""
    package = tmp_path / "mooring"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(
        "import os, sys, pathlib\n"
        "lines = [os.environ['WORLD_SIZE'], *sys.argv[1:]]\n"
        "pathlib.Path(os.environ['RANK'] + '.txt').write_text('\\n'.join(lines))\n"
    )  # fmt: skip
    environment = {
        "PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "PROCESSES": "2",
        "NODE_RANK": "0", "RENDEZVOUS": rendezvous, "PORT": "0" if rendezvous == "c10d" else str(free_port()),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    subprocess.run(
        ["bash", str(scripts / "torchrun.sh"), "data=my photos", "out=$HOME"],
        env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    for rank in ("0", "1"):
        words = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert words[:4] == ["2", "train", "data=my photos", "out=$HOME"]
        assert words[4:] == (["resume=auto"] if rendezvous == "c10d" else [])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_folder_is_insisted_on(scripts: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node0 slots=1\n")
    done = subprocess.run(
        ["bash", str(scripts / name), "data=photos"],
        env={"PATH": "/usr/bin:/bin", "HOSTFILE": str(tmp_path / "hosts")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "give out=FOLDER" in done.stderr


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])

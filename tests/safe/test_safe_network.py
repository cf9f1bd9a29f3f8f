"""A run uses no network: the real programs with sockets forbidden, and where it can be made, in a namespace without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mooring.data.sources import dali_is_installed
from mooring.models.weights import cache_folder

HERE = Path(__file__).resolve().parent
SHORT = [
    "train.epochs=1",
    "data.shots=4",
    "train.image_size=64",
    "train.eval_size=64",
    "report.progress=quiet",
]


@cache
def without_network() -> tuple[str, ...]:
    """A command prefix that takes every interface but loopback away, below Python too; empty where not permitted."""
    if shutil.which("unshare") is None:
        return ()
    for prefix in (("unshare", "--net"), ("unshare", "--user", "--map-root-user", "--net")):
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return ()


def offline(script: Path, *arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script with the network forbidden; what would keep a client from asking is not set."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    if cache is not None:
        environment["MOORING_CACHE"] = str(cache)
    command = [*without_network(), sys.executable, str(HERE / "offline.py"), str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for number in range(8):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
                root / label / f"{number}.png"
            )
    return root


# the demo below runs with DALI
@pytest.mark.parametrize("source", ["torch", pytest.param("dali", marks=pytest.mark.slow)])
def test_training_to_prediction_without_a_network(images: Path, tmp_path: Path, source: str) -> None:
    if source == "dali" and not dali_is_installed():
        pytest.skip("DALI is not installed")
    done = offline(
        HERE / "train_small.py", str(images), str(tmp_path / "run"), source, cache=tmp_path / "cache"
    )
    assert done.returncode == 0, done.stderr
    assert "all done" in done.stdout


def test_the_demo_without_a_network(repository: Path, tmp_path: Path) -> None:
    if not (cache_folder() / "demo" / "groceries.parquet").is_file():
        pytest.skip("the demo's files are not in the cache: run  python demo/fetch.py")
    demo = repository / "demo" / "run.py"
    done = offline(demo, "--out", str(tmp_path), "--methods", "linear_probe", "--set", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "linear probe" in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://example.invalid')",
        "import socket; socket.getaddrinfo('example.invalid', 80)",
        "import threading, socket\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "t = threading.Thread(target=s.sendto, args=(b'', ('127.0.0.1', 9))); t.start(); t.join()",
    ],
)
def test_a_connection_is_seen(tmp_path: Path, line: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"try:\n    {line.replace(chr(10), chr(10) + '    ')}\nexcept Exception:\n    pass\n")
    done = offline(script)
    assert done.returncode == 97, done
    assert "network used" in done.stderr

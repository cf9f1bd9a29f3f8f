"""The README's examples, executed as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mooring.models.weights import cached_weights


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``photos/`` as the README describes it: real weights are in the cache, photos are generated."""
    if not cached_weights("tf_efficientnet_lite0").is_file():
        pytest.skip("the demo's weights are not in the cache: run  python demo/fetch.py")
    root = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for name, colour in (("ripe", (190, 60, 50)), ("unripe", (70, 160, 60))):
        folder = root / "photos" / name  # the first layout it names
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(np.array(colour) + rng.normal(0, 30, (60, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


def run(workplace: Path, command: list[str]) -> str:
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_and_python_examples_run_in_order(workplace: Path, repository: Path) -> None:
    """Commands first: the later Python examples open what they leave."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert "@" not in readme.replace("Recall@1", "")  # no placeholder is left
    commands = [line.split("#")[0].strip() for block in blocks(readme, "bash") for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        arguments = command.split()
        assert arguments[0] == "mooring"
        out = run(workplace, [sys.executable, "-m", "mooring.cli", *arguments[1:]])
        if arguments[1] == "predict":
            assert "ripe" in out
    examples = blocks(readme, "python")
    assert len(examples) >= 4
    for example in examples:
        run(workplace, [sys.executable, "-c", example])

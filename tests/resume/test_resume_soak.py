"""A run that is killed at random moments and resumed each time ends with the weights of the run that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "kills", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_random_kills_change_nothing(kills: int) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "soak.py"), "--kills", str(kills)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["starts"] == kills + 1
    assert found["tensors_equal"] > 100

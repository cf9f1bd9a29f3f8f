"""Environment of the whole test run, set before anything heavy is imported."""

from __future__ import annotations

import os

ON_GPU = os.environ.get("MOORING_GPU") == "1"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first import of triton
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder with real weights and image sets; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("MOORING_ASSETS", ROOT.parent / "shared" / "assets"))
    if not (folder / "MANIFEST.tsv").is_file():
        pytest.skip(f"no assets at {folder}: set MOORING_ASSETS to a folder with weights/ and datasets/")
    return folder


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """A test that would wait for ever, as on a pipe that nobody writes to, fails."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise AssertionError("still waiting")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)

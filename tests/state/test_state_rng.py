from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mooring.errors import RunFolderError
from mooring.state.rng import capture_rng, restore_rng
from mooring.state.tree import load_tree, save_tree


def draw() -> list[Any]:
    """Draws of all kinds, among them those for which a generator keeps half a pair."""
    values: list[Any] = [random.random(), random.gauss(0, 1), random.getrandbits(40)]
    values += [float(np.random.rand()), float(np.random.randn()), int(np.random.randint(1 << 30))]  # noqa: NPY002
    values += torch.rand(5).tolist() + torch.randn(3).tolist() + torch.randperm(9).tolist()
    if torch.cuda.is_available():
        values += torch.rand(4, device="cuda").tolist()
    return values


@pytest.mark.parametrize("through_files", [False, True])
def test_the_same_draws_come_out_again(through_files: bool, tmp_path: Path) -> None:
    draw()
    state = capture_rng()
    if through_files:
        state = load_tree(save_tree(tmp_path / "rng", state))
    first = draw()
    draw()
    restore_rng(state)
    assert draw() == first
    assert draw() != first


def test_an_incomplete_state_is_refused_before_anything_changes() -> None:
    state = capture_rng()
    del state["numpy"]
    expected = torch.get_rng_state()
    with pytest.raises(RunFolderError, match="numpy"):
        restore_rng(state)
    assert torch.equal(torch.get_rng_state(), expected)


def test_another_number_of_cuda_devices_is_refused() -> None:
    state = capture_rng()
    state["cuda"] = [torch.get_rng_state()] * (torch.cuda.device_count() + 1)
    with pytest.raises(RunFolderError, match="CUDA devices"):
        restore_rng(state)

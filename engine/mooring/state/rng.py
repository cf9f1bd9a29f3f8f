"""The states of all random number generators a run draws from, as a tree that ``save_tree`` takes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mooring.errors import RunFolderError


def capture_rng() -> dict[str, Any]:
    """States of Python's, NumPy's (global), torch's CPU and every CUDA device's generator."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": [state.clone() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Puts back what ``capture_rng`` returned; afterwards the same draws come out.

    A state captured without CUDA leaves the CUDA generators alone.

    Raises:
        RunFolderError: the state is incomplete, or was captured with another number of CUDA devices.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = {"python", "numpy", "torch", "cuda"} - set(state)
    if missing:
        raise RunFolderError(
            f"the saved random states lack {', '.join(sorted(missing))}: use another checkpoint"
        )
    if state["cuda"] and len(state["cuda"]) != devices:
        raise RunFolderError(
            f"the random states were saved with {len(state['cuda'])} CUDA devices; here are {devices}: "
            "the run would not continue exactly"
        )
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(  # noqa: NPY002
        (
            numpy["name"],
            numpy["keys"].numpy().astype(np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached"],
        )
    )
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])

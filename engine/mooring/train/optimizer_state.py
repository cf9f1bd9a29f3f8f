"""The state of a torch optimizer as a tree of tensors and numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Per-parameter state in the order of the groups (JSON keys are strings, so a list, not a dict of ints)."""
    saved = optimizer.state_dict()
    count = sum(len(g["params"]) for g in saved["param_groups"])
    # Apex counts its steps in the groups
    groups = [
        {k: v for k, v in g.items() if k not in ("params", "lr") and isinstance(v, int | float)}
        for g in saved["param_groups"]
    ]
    return {"state": [saved["state"].get(i) for i in range(count)], "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores what ``optimizer_state`` returned."""
    fresh = optimizer.state_dict()
    for group, saved in zip(fresh["param_groups"], state["groups"], strict=True):
        group.update(saved)
    # a copy: torch keeps references, and two optimizers would write into one momentum buffer
    fresh["state"] = copy.deepcopy({i: s for i, s in enumerate(state["state"]) if s is not None})
    optimizer.load_state_dict(fresh)
    # torch's fused optimizers walk parameter and buffers in memory order and do not compare strides: a buffer
    # that came back contiguous beside a channels_last parameter would be applied to the wrong elements
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if torch.is_tensor(buffer) and buffer.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter, dtype=buffer.dtype).copy_(buffer)

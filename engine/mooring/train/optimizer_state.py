"""The state of a torch optimizer as a tree of tensors and numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mooring.train.optimizer_pieces import Flat, Piece, redistributed


def trained_names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[str]:
    """Names in ``module`` of the parameters that the optimizer was made for, in the order of its groups."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


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


def load_whole_state(
    optimizer: torch.optim.Optimizer, saved: Iterable[Mapping[str, Any]], names: list[str]
) -> None:
    """Restores the states that ranks have saved for their parts, to an optimizer of whole parameters.

    Args:
        optimizer: of the same parameter groups.
        saved: of each rank; read one after the other.
        names: of its parameters, as ``trained_names``.

    Raises:
        ValueError: as ``redistributed``.
    """
    places = [(i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
    targets = [
        Flat(group, p.numel(), [Piece(name, 0, p.numel(), 0)])
        for name, (group, p) in zip(names, places, strict=True)
    ]
    values, numbers = redistributed(saved, targets, names)
    whole = [
        {k: v.view(p.shape) if torch.is_tensor(v) and k != "step" else v for k, v in own.items()} or None
        for own, (_, p) in zip(values, places, strict=True)
    ]
    load_optimizer_state(optimizer, {"state": whole, "groups": known_numbers(optimizer, numbers)})


def known_numbers(optimizer: torch.optim.Optimizer, numbers: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the saved numbers of each group, those that its groups have here, too.

    Raises:
        ValueError: the groups are others.
    """
    if len(numbers) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimizer's state has {len(numbers)} parameter groups, this run {len(optimizer.param_groups)}"
        )
    return [
        {k: v for k, v in saved.items() if k in group}
        for saved, group in zip(numbers, optimizer.param_groups, strict=True)
    ]

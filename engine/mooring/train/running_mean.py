"""Metrics of many steps, summed on the device and read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mooring.collectives import all_reduce_
from mooring.distributed import Ranks

_COUNTS = ("rows", "correct")


class RunningMetrics:
    """Sums device scalars over steps without waiting for them; ``drain`` is the only host sync.

    ``rows`` and ``correct`` become ``top1``; every other metric becomes its mean over the steps that had it, and over
    the ranks: all of them add the same metrics in the same steps, and drain together.

    Args:
        ranks: whose metrics are brought together.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value in metrics.items():
            total = self._sums.get(name)
            self._sums[name] = value.clone() if total is None else total + value
            self._steps[name] = self._steps.get(name, 0) + 1

    def drain(self) -> dict[str, float]:
        """Means since the last drain; empty where nothing was added."""
        if not self._sums:
            return {}
        names = list(self._sums)
        stacked = torch.stack([self._sums[n].float() for n in names])
        values = all_reduce_(stacked, self._ranks, "metrics").tolist()
        sums = dict(zip(names, values, strict=True))
        steps, self._steps, self._sums = self._steps, {}, {}
        rows, correct = sums.pop("rows", 0.0), sums.pop("correct", 0.0)
        means = {name: value / (steps[name] * self._ranks.world) for name, value in sums.items()}
        if rows:
            means["top1"] = correct / rows
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, by reference."""
        return {"sums": dict(self._sums), "steps": dict(self._steps)}

    @staticmethod
    def resharded_state(states: Sequence[Mapping[str, Any]], world: int) -> dict[str, Any]:
        """A share for each of ``world`` ranks of what other ranks summed up, so that the drained means are the same.

        Args:
            states: of each rank that was.
            world: ranks that are.
        """
        sums = {
            # counts add up over ranks, other metrics are averaged over them
            name: sum(state["sums"][name] for state in states) / (world if name in _COUNTS else len(states))
            for name in states[0]["sums"]
        }
        return {"sums": sums, "steps": dict(states[0]["steps"])}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Goes on from what ``state_dict`` returned, with metrics that come from ``device``."""
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}
        self._steps = dict(state["steps"])

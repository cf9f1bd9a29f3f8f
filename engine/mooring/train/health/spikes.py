"""A loss that jumps: worth a note, not a stop."""

from __future__ import annotations

import math
from typing import Any

_MEMORY = 0.9  # of the running mean and deviation, per logged loss
_LEAST = 10  # logged losses before one can be called a spike


class SpikeDetector:
    """Compares each logged loss with an exponential mean of those before it.

    Args:
        deviations: how many deviations above the mean are a spike; None: nothing is.
    """

    def __init__(self, deviations: float | None) -> None:
        self.deviations = deviations
        self.mean = 0.0
        self.square = 0.0
        self.count = 0

    def look(self, loss: float) -> str | None:
        """A sentence where ``loss`` is a spike. A spike counts for the mean no more than the limit does."""
        if self.deviations is None or not math.isfinite(loss):
            return None
        note = None
        deviation = math.sqrt(max(0.0, self.square - self.mean**2))
        # a loss that hardly moves has a deviation of nearly nothing
        limit = self.mean + self.deviations * max(deviation, 0.02 * abs(self.mean))
        if self.count >= _LEAST and loss > limit:
            note = f"the loss jumped to {loss:.4g}; it was {self.mean:.4g} +- {deviation:.2g} before"
            loss = limit
        memory = min(_MEMORY, self.count / (self.count + 1))  # a plain mean at first
        self.mean = memory * self.mean + (1 - memory) * loss
        self.square = memory * self.square + (1 - memory) * loss * loss
        self.count += 1
        return note

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "square": self.square, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.square = float(state["mean"]), float(state["square"])
        self.count = int(state["count"])

"""Which epoch is the best one: decided on validation data, never on the test split."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mooring.train.evaluate import EvalResult


@dataclass(slots=True)
class BestEpoch:
    """The best epoch so far by top-1; equal top-1 (frequent on small validation sets) goes by the lower loss."""

    epoch: int | None = None
    top1: float = -1.0
    nll: float = float("inf")

    def offer(self, epoch: int, result: EvalResult) -> bool:
        """Takes ``epoch`` if it is better; returns whether it was."""
        # the first one in any case: a NaN compares as worse than nothing
        better = self.epoch is None or (result.top1, -result.nll) > (self.top1, -self.nll)
        if better:
            self.epoch, self.top1, self.nll = epoch, result.top1, result.nll
        return better

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.top1, self.nll = state["epoch"], state["top1"], state["nll"]

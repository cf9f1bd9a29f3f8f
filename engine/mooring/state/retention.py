"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Protocol


class Kept(Protocol):
    """What the choice is made by."""

    @property
    def step(self) -> int: ...
    @property
    def score(self) -> tuple[float, float] | None: ...


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept; a checkpoint that one rule keeps is not deleted for another.

    Attributes:
        last: so many of the newest, at least 1.
        best: so many of those with the best validation.
        every: those of steps that are multiples of it; None: no further ones.
    """

    last: int = 2
    best: int = 0
    every: int | None = None

    def kept(self, newest_first: Sequence[Kept]) -> set[int]:
        """Positions in ``newest_first`` of those that stay; the first always does."""
        kept = set(range(min(max(1, self.last), len(newest_first))))
        scored = [(i, ref.score) for i, ref in enumerate(newest_first) if ref.score is not None]
        # top-1, then the lower loss, then the earlier one, as the best epoch is chosen
        scored.sort(key=lambda item: (-item[1][0], _last_if_nan(item[1][1]), -item[0]))
        kept |= {i for i, _ in scored[: self.best]}
        if self.every is not None:
            seen: set[int] = set()
            for i, ref in enumerate(newest_first):
                if ref.step % self.every == 0 and ref.step not in seen:  # of equal steps the last state
                    seen.add(ref.step)
                    kept.add(i)
        return kept


def _last_if_nan(loss: float) -> float:
    return float("inf") if isnan(loss) else loss

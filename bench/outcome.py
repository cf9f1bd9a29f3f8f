"""What a run has to say at its end. No torch here: the process that starts the others never loads it."""

from __future__ import annotations

from dataclasses import dataclass, field


class UnknownOperationError(ValueError):
    """An op of this name is not registered."""


@dataclass
class Outcome:
    """Each entry is one line."""

    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    slow_auto: list[str] = field(default_factory=list)

    def __iadd__(self, other: Outcome) -> Outcome:
        self.failed += other.failed
        self.left_out += other.left_out
        self.slow_auto += other.slow_auto
        return self

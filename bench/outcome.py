"""What a run is asked for and what it has to say. No torch here: the process that starts the others never loads it."""

from __future__ import annotations

from dataclasses import dataclass, field


class UnknownOperationError(ValueError):
    """An op of this name is not registered."""


@dataclass(frozen=True)
class Request:
    """One run over the ops, as the command line asks for it.

    Args:
        names: ops; none for all.
        device: cpu or cuda.
        quick: small sizes, few rounds, nothing recorded.
        candidates: only these, the first of them the baseline; none for all.
        write: append records.
        verify_only: stop once the quick sizes are verified.
        seconds: wall time for all of it; None: as long as it takes.
    """

    names: tuple[str, ...] = ()
    device: str = "cpu"
    quick: bool = False
    candidates: tuple[str, ...] = ()
    write: bool = True
    verify_only: bool = False
    seconds: float | None = None


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

"""One display for all runs of a comparison."""

from __future__ import annotations

from collections.abc import Mapping

from mooring.report.progress import Plan, Progress


class RunOfMany(Progress):
    """Hands each run's progress to one display, which the comparison opens and closes.

    Args:
        shown: the display, already entered.
        total: runs in all.
    """

    def __init__(self, shown: Progress, total: int) -> None:
        self._shown = shown
        self._total = total
        self._number = 0
        self._told: set[str] = set()

    def announce(self, title: str) -> None:
        """The next run begins, or is found finished."""
        self._number += 1
        self._shown.note(f"run {self._number} of {self._total}: {title}")

    def start(self, plan: Plan, epochs: int) -> None:
        self._shown.start(plan, epochs)

    def advance(self, step: int, values: Mapping[str, float] | None) -> None:
        self._shown.advance(step, values)

    def evaluated(self, kind: str, epoch: int, values: Mapping[str, float]) -> None:
        self._shown.evaluated(kind, epoch, values)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def note_once(self, text: str) -> None:
        """A line that further runs would only repeat."""
        if text not in self._told:
            self._told.add(text)
            self._shown.note(text)

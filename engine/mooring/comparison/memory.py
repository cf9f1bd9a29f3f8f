"""The most memory that one run held, where several runs share a process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Peak memory in bytes, and what was measured."""

    bytes: int
    how: str


class MemoryMeter:
    """Starts anew for each run.

    On CUDA it is the allocator's peak. On a CPU it is the resident memory of this process, libraries
    included: the kernel's high-water mark is reset at the start where Linux allows it; elsewhere it is the
    peak since the program began, so that a run never shows less than those before it. Decoding processes
    (``data.source=torch`` with workers) are not counted.

    Args:
        device: where the run computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text("5")  # Linux: sets the high-water mark to what is resident now
            self._reset = _high_water() is not None
        except OSError:
            pass

    def read(self) -> PeakMemory:
        """The peak since the start."""
        if self._device.type == "cuda":
            return PeakMemory(torch.cuda.max_memory_allocated(self._device), "CUDA allocator")
        marked = _high_water() if self._reset else None
        if marked is not None:
            return PeakMemory(marked, "resident memory during the run")
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # kilobytes on Linux, bytes on macOS
        return PeakMemory(
            peak * (1 if sys.platform == "darwin" else 1024), "resident memory since the program began"
        )


def _high_water() -> int | None:
    try:
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass  # not Linux
    return None
